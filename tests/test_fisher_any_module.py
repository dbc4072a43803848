"""The Fisher is right on any module, for every order and batch size, or it is refused."""

import random
import warnings

import pytest
import reference
import torch
from reference import CE, CRITERIA, Net, refused
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import ewc_utils
from ewc_utils import compute_fisher_information

LABELS, SLOW = ("exact", "empirical"), "one example at a time"
NOISE = f".*({SLOW}|performance drop|padding='same'|weight_norm|nested tensors)"
pytestmark = pytest.mark.filterwarnings(f"ignore:{NOISE}")


def tokens(*shape, pad=None):
    """Token numbers 1..6. With a padding number it ends the last two sequences, and no other."""
    x = torch.randint(1, 7, (6, *shape))
    if pad is not None:
        x[4:, ..., 2:] = pad % 7
    return x


def read(forward, x, **parts):
    """A linear read-out of what forward(net, x) returns, and x, or a random x of this shape."""
    x, body = x if torch.is_tensor(x) else torch.randn(6, *x), Net(forward, **parts)
    with torch.no_grad():
        width = body.eval()(x).flatten(1).shape[1]
    whole = Net(lambda net, x: net.out(net.body(x).flatten(1)), body=body, out=nn.Linear(width, 3))
    return whole, x


def layer(module, *shape):
    """The module between a linear layer, so that a gradient passes through it, and a read-out."""
    mix = nn.Linear(shape[-1], shape[-1])
    return read(lambda net, x: net.layer(net.mix(x)).tanh(), shape, layer=module, mix=mix)


def linear(forward, *shape):
    """A forward of one's own with a linear layer, net.a."""
    return read(forward, (*shape, 4), a=nn.Linear(4, 4))


def images(forward, *shape):
    return read(forward, (*shape, 2, 4, 3), c=nn.Conv2d(2, 2, 2, padding=1))


def with_statistics(norm):
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm


def recurrent(cell, **how):
    cell = cell(3, 4, batch_first=True, **how)
    return read(lambda net, x: net.cell(x)[0][:, -1], (4, 3), cell=cell)


def words(x, **how):
    return read(lambda net, x: net.words(x).mean(1).tanh(), x, words=nn.Embedding(7, 3, **how))


def blank_first(module):
    """The gradients of the first three examples are zero."""
    x = torch.randn(6, 4)
    x[:3] = 0
    return nn.Sequential(module, nn.Linear(4, 3)), x


def experts(net, x):
    """Each example goes to one of two layers."""
    h = torch.zeros_like(x)
    for rows, expert in ((x[:, 0] > 0, net.a), (x[:, 0] <= 0, net.b)):
        if rows.any():
            h = h.index_add(0, rows.nonzero()[:, 0], expert(x[rows]))
    return h.tanh()


def tied(*names, n=4):
    """Linear layers that share some of their parameters."""
    a, b = nn.Linear(4, n), nn.Linear(n, n)
    for name in names:
        setattr(b, name, getattr(a, name))
    return nn.Sequential(a, nn.Tanh(), b, nn.Tanh(), nn.Linear(n, 3)), torch.randn(6, 4)


def tied_embedding(*order):
    parts = {"words": nn.Embedding(7, 3), "decode": nn.Linear(3, 7)}
    parts["decode"].weight = parts["words"].weight
    forward = lambda net, x: net.decode(net.words(x).mean(1).tanh())  # noqa: E731
    return read(forward, tokens(4), **{name: parts[name] for name in order})


def registered_again():
    model, x = linear(lambda net, x: net.a(x).tanh())
    model.again = model.body.a.weight
    return model, x


def sorted_rows(net, x):
    order = x[:, 0].argsort()
    return net.a(x[order]).tanh()[order.argsort()]


def transformer():
    """With a padding mask it takes another path, to other outputs, where gradients are off."""

    def forward(net, x):
        return net.encoder(net.words(x), src_key_padding_mask=x == 0).mean(1)

    one = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, dropout=0.3)
    parts = {"encoder": nn.TransformerEncoder(one, 2), "words": nn.Embedding(7, 4, padding_idx=0)}
    return read(forward, tokens(5, pad=0), **parts)


def bare(forward, **shapes):
    """Parameters without a module of their own."""
    parts = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    return read(forward, (4,), a=nn.Linear(4, 4), **parts)


def stored_activation(net, x):
    net.kept = net.a(x).tanh()
    return net.kept


def sparse_buffer():
    graph = Net(lambda net, x: x @ net.graph)
    graph.register_buffer("graph", torch.eye(4).roll(1, 0).to_sparse())
    return layer(graph, 4)


class TimesThree(nn.Linear):
    def forward(self, x):
        return F.linear(x, 3 * self.weight, self.bias)


CASES = {
    "Linear": lambda: layer(nn.Linear(4, 3), 4),
    "Linear on sequences": lambda: layer(nn.Linear(4, 3), 5, 4),
    "positions first": lambda: linear(lambda n, x: n.a(x.transpose(0, 1)).transpose(0, 1), 3),
    "positions in the batch": lambda: linear(lambda n, x: n.a(x.flatten(0, 1)).view(len(x), -1), 3),
    "Linear used twice": lambda: linear(lambda net, x: net.a(net.a(x).tanh())),
    "bias used twice": lambda: linear(lambda net, x: net.a(x).tanh() + net.a.bias),
    "experts": lambda: read(experts, (4,), a=nn.Linear(4, 4), b=nn.Linear(4, 4)),
    "tied weights": lambda: tied("weight"),
    "tied biases": lambda: tied("bias", n=5),
    "tied layers": lambda: tied("weight", "bias"),
    "tied to an embedding": lambda: tied_embedding("words", "decode"),
    "tied to a later embedding": lambda: tied_embedding("decode", "words"),
    "weight registered twice": registered_again,
    "a gradient shared by two": lambda: bare(lambda n, x: n.a(x) + n.b + n.c, b=(4,), c=(4,)),
    "a bare matrix": lambda: bare(lambda net, x: (net.a(x) @ net.m).tanh(), m=(4, 3)),
    "empty and scalar": lambda: bare(lambda n, x: x * n.s + n.e.sum(), s=(), e=(3, 0), unused=(0,)),
    "PReLU, blank images first": lambda: blank_first(nn.PReLU()),
    "PReLU per feature, blank images first": lambda: blank_first(nn.PReLU(4)),
    "sorted rows": lambda: linear(sorted_rows),
    "a forward of its own": lambda: layer(TimesThree(4, 4), 4),
    "other under no_grad": lambda: linear(lambda n, x: n.a(x) * (1 + torch.is_grad_enabled())),
    "Conv1d, same": lambda: layer(nn.Conv1d(2, 3, 4, padding="same", dilation=3), 2, 9),
    "Conv2d": lambda: layer(nn.Conv2d(2, 3, (3, 2), (2, 1), (1, 0), (1, 2), bias=False), 2, 7, 6),
    "Conv2d, one position": lambda: layer(nn.Conv2d(2, 3, (4, 3)), 2, 4, 3),
    "Conv2d, same": lambda: layer(nn.Conv2d(2, 2, 3, padding="same"), 2, 4, 3),
    "Conv2d, frames": lambda: images(lambda n, x: n.c(x.flatten(0, 1)).view(len(x), -1), 3),
    "Conv2d, image by image": lambda: images(lambda n, x: torch.stack([n.c(i).tanh() for i in x])),
    "Conv2d, weight used again": lambda: images(lambda n, x: n.c(x).tanh() * n.c.weight.mean()),
    "Conv2d, changed in place": lambda: images(lambda n, x: n.c(x).relu_()),
    "Linear, changed in place": lambda: linear(lambda n, x: n.a(x).relu_()),
    "Conv2d, groups": lambda: layer(nn.Conv2d(4, 6, 2, (2, 1), 1, groups=2), 4, 5, 4),
    "Conv2d, reflect": lambda: layer(nn.Conv2d(2, 2, 3, 1, 1, padding_mode="reflect"), 2, 4, 4),
    "ConvTranspose2d": lambda: layer(nn.ConvTranspose2d(2, 2, 2, stride=2), 2, 3, 3),
    "Bilinear": lambda: read(lambda net, x: net.b(x, x), (4,), b=nn.Bilinear(4, 4, 3)),
    "BatchNorm2d": lambda: layer(with_statistics(nn.BatchNorm2d(3)), 3, 2, 4),
    "LayerNorm": lambda: layer(nn.LayerNorm((3, 4)), 2, 3, 4),
    "GroupNorm": lambda: layer(nn.GroupNorm(2, 4), 4, 2, 3),
    "Embedding": lambda: words(tokens(4)),
    "Embedding, sparse": lambda: words(tokens(4), sparse=True),
    "Embedding, max_norm": lambda: words(tokens(4), max_norm=0.5),
    "Embedding, padding seen late": lambda: words(tokens(4, pad=0), padding_idx=0),
    "F.embedding, negative padding": lambda: read(
        lambda net, x: F.embedding(x, net.w.weight, -2).sin(), tokens(4, pad=-2), w=nn.Linear(3, 7)
    ),
    "EmbeddingBag": lambda: read(
        lambda net, x: net.b(x).tanh(), tokens(4, pad=0), b=nn.EmbeddingBag(7, 3, padding_idx=0)
    ),
    "TransformerEncoder, padding mask": transformer,
    "RNN": lambda: recurrent(nn.RNN),
    "GRU": lambda: recurrent(nn.GRU),
    "LSTM": lambda: recurrent(nn.LSTM, num_layers=2, bidirectional=True, dropout=0.4),
    "old weight_norm": lambda: layer(nn.utils.weight_norm(nn.Linear(4, 4)), 4),
    "spectral_norm": lambda: layer(parametrizations.spectral_norm(nn.Linear(4, 4)), 4),
    "pruned": lambda: layer(prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5), 4),
    "a stored activation": lambda: linear(stored_activation),
    "a sparse buffer": sparse_buffer,
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_float64_loop_for_every_order_and_batch_size(name, monkeypatch):
    torch.manual_seed(0)
    model, x = CASES[name]()
    y = torch.randint(3, (6,))
    with torch.no_grad():
        model.eval()(x)  # what the model stores has no history, so that it can be copied
    truths = {labels: reference.fisher(model, [(x, y)], labels) for labels in LABELS}
    model(x).sum().backward()  # now it has one
    rolled = list(zip(x.roll(3, 0).split(2), y.roll(3, 0).split(2)))
    for batches in ([(x, y)], [(x.flip(0), y.flip(0))], rolled):
        for labels, truth in truths.items():
            found = compute_fisher_information(model, batches, CE, labels=labels)
            assert reference.error(found, truth) < 1e-4, labels
        monkeypatch.setattr(ewc_utils, "COPIES", 0, raising=False)  # memory for one example


def test_an_embedding_with_max_norm_counts_as_it_runs_and_is_not_changed():
    torch.manual_seed(0)
    x = torch.arange(24).view(6, 4) // 4  # the last examples hold other words than the first
    model, x = words(x, max_norm=0.5)
    model.body.words.reset_parameters()
    before, batch = model.body.words.weight.detach().clone(), (x, torch.arange(6) % 3)
    found = compute_fisher_information(model, [batch], CE)
    assert torch.equal(model.body.words.weight, before) and before.norm(dim=1).max() > 1
    assert reference.error(found, reference.fisher(model, [batch])) < 1e-5


def test_sequences_may_have_several_lengths():
    torch.manual_seed(0)
    model, _ = words(tokens(4), padding_idx=0)
    shapes = ((1, 3), (2, 3), (3, 6), (1, 1), (2, 3))
    batches = [(torch.randint(7, shape), torch.randint(3, shape[:1])) for shape in shapes]
    found = compute_fisher_information(model, batches, CE)
    assert reference.error(found, reference.fisher(model, batches)) < 1e-5


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compiled", "parallel"])
def test_a_wrapped_model_has_the_plain_names(wrap):
    torch.manual_seed(0)
    model, x = CASES["Linear"]()
    batch = x, torch.randint(3, (6,))
    found = compute_fisher_information(wrap(model), [batch], CE)
    assert reference.error(found, reference.fisher(model, [batch])) < 1e-5


ALONE = ("RNN", "GRU", "LSTM", "experts")
ORDINARY = ("Linear", "tied biases", "Conv2d, reflect", "BatchNorm2d", "Embedding", "Bilinear")


@pytest.mark.parametrize("name", [*ALONE, *ORDINARY, "Conv2d"])
def test_the_slow_way_is_announced_and_ordinary_modules_do_not_take_it(name):
    torch.manual_seed(0)
    model, x = CASES[name]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compute_fisher_information(model, [(x, torch.randint(3, (6,)))], CE)
    assert any(SLOW in str(warning.message) for warning in caught) == (name in ALONE)


ROWS_THAT_ARE_NO_EXAMPLES = {
    "centred": lambda z: z - z.mean(0),
    "centred a little": lambda z: 1e-7 * (z - 0.5 * z.mean(0)),
    "softmax over the batch": lambda z: z.softmax(0),
    "sorted": lambda z: z.sort(0).values,
    "a running sum": lambda z: z.cumsum(0),
    "the row before": lambda z: z + z.roll(1, 0),
    "neighbours in a graph": lambda z: (torch.ones(len(z), len(z)) / len(z)) @ z,
    "positions first": lambda z: z.unsqueeze(0).expand(2, -1, -1),
    "half the rows": lambda z: z[::2],
}


@pytest.mark.parametrize("size", [1, 2, 6])
@pytest.mark.parametrize("name", ROWS_THAT_ARE_NO_EXAMPLES)
def test_a_model_whose_rows_are_no_examples_is_refused(name, size):
    torch.manual_seed(0)
    mix, x, y = ROWS_THAT_ARE_NO_EXAMPLES[name], torch.randn(6, 4), torch.arange(6) % 3
    model = Net(lambda net, x: mix(net.a(x)), a=nn.Linear(4, 3))
    with refused(ValueError, "outputs"):
        compute_fisher_information(model, list(zip(x.split(size), y.split(size))), CE)


def twice(part):
    return Net(lambda net, x: net.part(net.part(x).tanh()), part=part)


VECTOR = [  # features -> a block for inputs (..., features)
    lambda n: nn.Linear(n, 3),
    lambda n: nn.Linear(n, 4, bias=False),
    lambda n: Net(lambda net, x: x + net.b(net.a(x).tanh()), a=nn.Linear(n, 2), b=nn.Linear(2, n)),
    lambda n: twice(nn.Linear(n, n)),
    nn.LayerNorm,
]
SEQUENCE = VECTOR + [
    lambda n: nn.TransformerEncoderLayer(n, 1, 3, batch_first=True),
    lambda n: Net(lambda net, x: net.cell(x)[0], cell=nn.GRU(n, 3, batch_first=True)),
]
IMAGE = [  # channels -> a block for inputs (n, channels, 4, 4)
    lambda n: nn.Conv2d(n, 3, 3, padding=2, dilation=2, bias=False),
    lambda n: nn.Conv2d(n, 2 * n, 2, padding="same", groups=n),
    lambda n: nn.Conv2d(n, 2, 3, padding=1, stride=2, padding_mode="replicate"),
    lambda n: twice(nn.Conv2d(n, n, 3, padding=1, padding_mode="circular")),
    lambda n: with_statistics(nn.BatchNorm2d(n)),
    lambda n: nn.GroupNorm(1, n),
]
KINDS = [((3,), VECTOR), ((3, 3), SEQUENCE), ((4,), SEQUENCE), ((2, 4, 4), IMAGE)]


def random_case(seed):
    """(r, model, x, number of outputs): depth, layers, sharing, freezing and values by the seed."""
    r, layers = random.Random(seed), []
    torch.manual_seed(seed)
    (shape, blocks), outputs = r.choice(KINDS), r.randint(2, 3)
    x = torch.randn(r.randint(1, 5), *shape)
    if shape == (4,):
        x = torch.randint(5, x.shape)
        layers.append(nn.Embedding(5, 3, padding_idx=r.choice([None, 0])))
    for _ in range(r.randint(0, 3)):
        features = nn.Sequential(*layers).eval()(x).shape[1 if blocks is IMAGE else -1]
        layers.append(r.choice(blocks)(features))
        layers.append(r.choice([nn.Tanh, nn.Softplus, nn.GELU, nn.PReLU, nn.Dropout])())
    width = nn.Sequential(*layers, nn.Flatten()).eval()(x).shape[1]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, outputs))
    linear = [m for m in model.modules() if type(m) is nn.Linear]
    for a, b in zip(linear, linear[1:]):
        if a.weight.shape == b.weight.shape and r.random() < 0.5:
            b.weight = a.weight
    for p in model.parameters():
        p.requires_grad_(r.random() < 0.9)
    model[-1].weight.requires_grad_(True)
    return r, model.train(), x, outputs


@pytest.mark.parametrize("group", range(8))
def test_random_modules_equal_the_float64_loop(group):
    """In float64 to 1e-9, which nothing that is merely close would reach; a third in float32."""
    for seed in range(group, 320, 8):
        r, model, x, outputs = random_case(seed)
        family, labels = r.choice(list(CRITERIA)), r.choice(["exact", "exact", "empirical"])
        dtype, tolerance = (torch.float32, 2e-3) if seed % 3 == 0 else (torch.float64, 1e-9)
        y = torch.randint(2, (len(x), outputs)).to(dtype)
        y = y.argmax(1) if family == "categorical" else y
        model, x = model.to(dtype), x.to(dtype) if x.is_floating_point() else x
        size = r.randint(1, len(x))
        batches = list(zip(x.split(size), y.split(size)))
        found = compute_fisher_information(model, batches, CRITERIA[family], labels=labels)
        error = reference.error(found, reference.fisher(model, batches, labels, family))
        assert error < tolerance, f"seed {seed}, {family}, {labels}, {dtype}: {error:.1e}, {model}"
