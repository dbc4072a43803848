"""The Fisher is right on any module, for every order and batch size, or it is refused."""

import random
import re
import threading
import warnings

import pytest
import reference
import torch
from reference import CE, CRITERIA, Net, refused
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, rnn
from torch.utils.checkpoint import checkpoint

from ewc_utils import compute_fisher_information

LABELS, SLOW = ("exact", "empirical"), "one example at a time"
LAST, PADDED = {"memory_format": torch.channels_last}, nn.Embedding(7, 3, padding_idx=0)
NOISE = f".*({SLOW}|performance drop|padding='same'|nested tensors|jit.script)"
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


def linear(forward, *shape, **parts):
    """A forward of one's own with a linear layer, net.a."""
    return read(forward, (*shape, 4), a=nn.Linear(4, 4), **parts)


def images(forward, *shape):
    return read(forward, (*shape, 2, 4, 3), c=nn.Conv2d(2, 2, 2, padding=1))


def with_statistics(norm):
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm


def packed(net, x):
    """An LSTM that skips the padding."""
    inputs, lengths = net.words(x), (x != 0).sum(1).cpu()
    how = {"batch_first": True, "enforce_sorted": False}
    return net.cell(rnn.pack_padded_sequence(inputs, lengths, **how))[1][0][-1]


def recurrent(cell, **how):
    cell = cell(3, 4, batch_first=True, **how)
    return read(lambda net, x: net.cell(x)[0][:, -1], (4, 3), cell=cell)


def words(x, **how):
    return read(lambda net, x: net.words(x).mean(1).tanh(), x, words=nn.Embedding(7, 3, **how))


def picked(net, x):
    """The rows that a mask picks, here as many as there are examples."""
    mask = x[..., 0] > -9
    return torch.zeros_like(x).masked_scatter(mask[..., None], net.a(x[mask]).tanh()).sum(1)


def lengths(*counts):
    """So many rows of each sequence; the others are below every mask."""
    x = torch.randn(len(counts), max(counts), 4)
    for sequence, count in zip(x, counts):
        sequence[count:] = -10
    return x


def hooked(kind, hook):
    """A linear layer whose inputs or outputs a hook changes."""
    model, x = linear(lambda net, x: net.a(x).tanh())
    getattr(model.body.a, f"register_{kind}_hook")(hook)
    return model, x


def named_twice(a):
    return nn.Sequential(nn.Linear(4, 4), a, nn.Tanh(), a, nn.Linear(4, 3)), torch.randn(6, 4)


def tied(*names, n=4):
    """Linear layers that share some of their parameters."""
    a, b = nn.Linear(4, n), nn.Linear(n, n)
    for name in names:
        setattr(b, name, getattr(a, name))
    return nn.Sequential(a, nn.Tanh(), b, nn.Tanh(), nn.Linear(n, 3)), torch.randn(6, 4)


def tied_embedding():
    words, decode = nn.Embedding(7, 3), nn.Linear(3, 7)
    decode.weight = words.weight
    forward = lambda net, x: net.decode(net.words(x).mean(1).tanh())  # noqa: E731
    return read(forward, tokens(4), decode=decode, words=words)


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


class TimesThree(nn.Linear):
    def forward(self, x):
        return F.linear(x, 3 * self.weight, self.bias)


CASES = {
    "Linear": lambda: layer(nn.Linear(4, 3), 4),
    "Linear on sequences": lambda: layer(nn.Linear(4, 3), 5, 4),
    "Linear, by keyword": lambda: linear(lambda n, x: n.a(input=x).tanh()),
    "six positions first": lambda: linear(lambda n, x: n.a(x.transpose(0, 1)).transpose(0, 1), 6),
    "rows picked by a mask": lambda: read(picked, lengths(1, 2, 0, 1, 2, 0), a=nn.Linear(4, 4)),
    "positions in the batch": lambda: linear(lambda n, x: n.a(x.flatten(0, 1)).view(len(x), -1), 3),
    "Linear used twice": lambda: linear(lambda net, x: net.a(net.a(x).tanh())),
    "bias used twice": lambda: linear(lambda net, x: net.a(x).tanh() + net.a.bias),
    "one of two heads": lambda: linear(lambda n, x: n.a(x).tanh(), other=nn.Linear(4, 2)),
    "Linear under two names": lambda: named_twice(nn.Linear(4, 4)),
    "PReLU under two names": lambda: named_twice(nn.PReLU()),
    "LayerNorm under two names": lambda: named_twice(nn.LayerNorm(4)),
    "tied weights": lambda: tied("weight"),
    "tied biases": lambda: tied("bias", n=5),
    "tied layers": lambda: tied("weight", "bias"),
    "tied to an embedding": tied_embedding,
    "a gradient shared by two": lambda: bare(lambda n, x: n.a(x) + n.b + n.c, b=(4,), c=(4,)),
    "a bare matrix": lambda: bare(lambda net, x: (net.a(x) @ net.m).tanh(), m=(4, 3)),
    "empty and scalar": lambda: bare(lambda n, x: x * n.s + n.e.sum(), s=(), e=(3, 0), unused=(0,)),
    "PReLU": lambda: layer(nn.PReLU(), 4),
    "a question to the data": lambda: linear(lambda n, x: n.a(x) if x.any() else x),
    "a module that asks": lambda: bare(lambda n, x: n.a(x) * n.s if x.any() else x, s=(4,)),
    "checkpoint": lambda: linear(lambda n, x: checkpoint(n.a, x, use_reentrant=False).tanh()),
    "inputs changed by a hook": lambda: hooked("forward_pre", lambda m, i: (2 * i[0],)),
    "outputs changed by a hook": lambda: hooked("forward", lambda m, i, o: o**2),
    "a backward hook": lambda: hooked("full_backward", lambda m, g, h: None),
    "a forward of its own": lambda: layer(TimesThree(4, 4), 4),
    "other under no_grad": lambda: linear(lambda n, x: n.a(x) * (1 + torch.is_grad_enabled())),
    "Conv1d, same": lambda: layer(nn.Conv1d(2, 3, 4, padding="same", dilation=3), 2, 9),
    "Conv2d": lambda: layer(nn.Conv2d(2, 3, (3, 2), (2, 1), (1, 0), (1, 2), bias=False), 2, 7, 6),
    "Conv2d, one position, channels last": lambda: layer(nn.Conv2d(2, 3, 2).to(**LAST), 2, 2, 2),
    "Conv2d, same": lambda: layer(nn.Conv2d(2, 2, 3, padding="same"), 2, 4, 3),
    "Conv2d, frames": lambda: images(lambda n, x: n.c(x.flatten(0, 1)).view(len(x), -1), 3),
    "Conv2d, image by image": lambda: images(lambda n, x: torch.stack([n.c(i).tanh() for i in x])),
    "Conv2d, changed in place": lambda: images(lambda n, x: n.c(x).relu_()),
    "Conv2d, groups": lambda: layer(nn.Conv2d(4, 6, 2, (2, 1), 1, groups=2), 4, 5, 4),
    "Conv2d, reflect": lambda: layer(nn.Conv2d(2, 2, 3, 1, 1, padding_mode="reflect"), 2, 4, 4),
    "ConvTranspose2d": lambda: layer(nn.ConvTranspose2d(2, 2, 2, stride=2), 2, 3, 3),
    "Bilinear": lambda: read(lambda net, x: net.b(x, x), (4,), b=nn.Bilinear(4, 4, 3)),
    "BatchNorm2d": lambda: layer(with_statistics(nn.BatchNorm2d(3)), 3, 2, 4),
    "LayerNorm": lambda: layer(nn.LayerNorm((3, 4)), 2, 3, 4),
    "Embedding": lambda: words(tokens(4)),
    "Embedding, sparse": lambda: words(tokens(4), sparse=True),
    "Embedding, max_norm": lambda: words(tokens(4), max_norm=0.5),
    "Embedding, padding seen late": lambda: words(tokens(4, pad=0), padding_idx=0),
    "Embedding under two names": lambda: read(
        lambda n, x: (n.a(x) + n.b(x).sin()).mean(1), tokens(4), **dict.fromkeys("ab", PADDED)
    ),
    "torch.embedding, padding": lambda: read(
        lambda n, x: torch.embedding(n.table.weight, x, 5), tokens(4, pad=5), table=nn.Linear(3, 7)
    ),
    "a scripted embedding": lambda: read(
        lambda n, x: n.table(x).mean(1).tanh(), tokens(4, pad=0), table=torch.jit.script(PADDED)
    ),
    "TransformerEncoder, padding mask": transformer,
    "MultiheadAttention": lambda: read(
        lambda n, x: n.m(x, x, x)[0].tanh(), (5, 4), m=nn.MultiheadAttention(4, 2, batch_first=True)
    ),
    "GRU": lambda: recurrent(nn.GRU),
    "LSTM": lambda: recurrent(nn.LSTM, num_layers=2, bidirectional=True, dropout=0.4),
    "LSTM of packed sequences": lambda: read(
        packed, tokens(5, pad=0), words=nn.Embedding(7, 3), cell=nn.LSTM(3, 4, batch_first=True)
    ),
    "spectral_norm": lambda: layer(parametrizations.spectral_norm(nn.Linear(4, 4)), 4),
    "pruned": lambda: layer(prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5), 4),
}


ALONE = {  # the module that the warning names: the networks that run one example at a time
    "body": ["a module that asks"],
    "body.a": ["six positions first", "rows picked by a mask", "bias used twice"],
    "body.c": ["Conv2d, image by image"],
    "body.table": ["torch.embedding, padding", "a scripted embedding"],
    "body.words": ["Embedding, sparse"],
    "body.cell": ["GRU", "LSTM", "LSTM of packed sequences"],
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_float64_loop_for_every_order_and_batch_size(name):
    """And a warning tells whether and why the network runs one example at a time."""
    torch.manual_seed(0)
    model, x = CASES[name]()
    y = torch.randint(3, (6,))
    truths = {labels: reference.fisher(model, [(x, y)], labels) for labels in LABELS}
    rolled = list(zip(x.roll(3, 0).split(2), y.roll(3, 0).split(2)))
    named = set()
    for batches in ([(x, y)], [(x.flip(0), y.flip(0))], rolled):
        for labels, truth in truths.items():
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found = compute_fisher_information(model, batches, CE, labels=labels)
            assert reference.error(found, truth) < 1e-4, labels
            texts = [str(w.message) for w in caught if SLOW in str(w.message)]
            assert len(texts) <= 1
            named |= {re.search(r"'(.*?)(\.weight|\.bias)?'", text)[1] for text in texts}
    assert named == {part for part, names in ALONE.items() if name in names}


def patched(m):
    a, b = m.a, m.b
    a.forward = lambda x: F.linear(x, a.weight, a.bias) + b(x)


class Data:
    def __deepcopy__(self, memo):
        raise TypeError("data were copied")


HELD = {
    "a hook": lambda m: m.a.register_forward_hook(lambda _, i, o, b=m.b: o + b(i[0])),
    "a closure": lambda m: setattr(m, "rule", lambda n, x, b=m.b: n.out(n.a(x).tanh() + b(x))),
    "a patched forward": patched,
    "activations": lambda m: m.a.register_forward_hook(lambda _, i, o: m.kept.append(o)),
    "a lock": lambda m: setattr(m, "kept", threading.Lock()),
    "a data set": lambda m: setattr(m, "kept", Data()),
}


@pytest.mark.parametrize("name", HELD)
def test_the_model_itself_runs_with_all_that_it_holds_and_that_holds_it(name):
    """A copy would call the original's modules, where their Fisher is 0, or cannot be made."""
    torch.manual_seed(0)
    parts = {"a": nn.Linear(4, 5), "b": nn.Linear(4, 5), "out": nn.Linear(5, 3), "kept": []}
    model = Net(lambda net, x: net.out(net.a(x).tanh()), **parts).double()
    HELD[name](model)
    x, y = reference.draw(6, 4), torch.arange(6) % 3
    truths = {k: reference.fisher(model, [(x, y)], k, copied=False) for k in LABELS}
    model.train()(x).sum().backward()
    for labels, truth in truths.items():
        found = compute_fisher_information(model, [(x, y)], CE, labels=labels)
        assert reference.error(found, truth) < 1e-9
        assert found["b.weight"].any() == (name in ("a hook", "a closure", "a patched forward"))


OWN = type("Own", (nn.Embedding,), {})(7, 3, padding_idx=0)  # vmap does not know of its padding
ONE_PADDED = (1 + torch.arange(3000) % 6).index_fill(0, torch.tensor(2900), 0)[:, None]
MIDDLE = {
    "rows one too far": lambda: read(picked, lengths(1, 1, 2, *[1] * 59, 0, 1), a=nn.Linear(4, 4)),
    "padding": lambda: read(lambda n, x: n.w(x).mean(1), ONE_PADDED, w=OWN),
}


@pytest.mark.parametrize("name", MIDDLE)
def test_what_happens_to_few_examples_in_the_middle_of_a_batch_is_noticed(name):
    """The first and the last examples are as they should be."""
    torch.manual_seed(0)
    model, x = MIDDLE[name]()
    batch = x, torch.arange(len(x)) % 3
    found = compute_fisher_information(model, [batch], CE, labels="empirical")
    assert reference.error(found, reference.fisher(model, [batch], "empirical")) < 1e-4


def test_what_begins_late_and_happens_to_few_examples_is_noticed():
    """All examples of a batch are compared now and then, not only in the first batches."""
    torch.manual_seed(0)
    model, _ = linear(lambda n, x: n.a(x).tanh() + n.a.bias * (x[:, :1] > 9))
    x = torch.randn(35, 600, 4)
    x[30:, 300, 0] = 10
    batches = [(part, torch.arange(600) % 3) for part in x]
    with pytest.warns(UserWarning, match="'body.a.bias' has another gradient"):
        compute_fisher_information(model, batches, CE, labels="empirical")


def test_batches_may_have_several_lengths_and_types():
    torch.manual_seed(0)
    parts = {"words": nn.Embedding(7, 3, padding_idx=0), "a": nn.Linear(3, 3)}
    model = Net(lambda n, x: n.a(x) if x.is_floating_point() else n.words(x).mean(1).sin(), **parts)
    xs = [torch.randint(7, shape) for shape in ((1, 3), (2, 3), (3, 6), (1, 1), (2, 3))]
    batches = [(x, torch.randint(3, x.shape[:1])) for x in (*xs, torch.randn(4, 3), xs[1])]
    found = compute_fisher_information(model, batches, CE)
    assert reference.error(found, reference.fisher(model, batches)) < 1e-5


def behind(z, value):
    return (z + z.roll(1, 0)).index_fill(1, torch.tensor([2]), value)


ROWS_THAT_ARE_NO_EXAMPLES = {
    "centred": lambda z: z - z.mean(0),
    "centred a little": lambda z: 1e-7 * (z - 0.5 * z.mean(0)),
    "the row before": lambda z: z + z.roll(1, 0),
    "neighbours in a graph": lambda z: (torch.ones(len(z), len(z)) / len(z)) @ z,
    "positions first": lambda z: z.unsqueeze(0).expand(2, -1, -1),
    "half the rows": lambda z: z[::2],
    "the row before, a little": lambda z: z + 0.01 * z.roll(1, 0),
    "the row before, behind a large logit": lambda z: behind(z, -1e9),
    "the row before, behind a mask": lambda z: behind(z, -torch.inf),
}


@pytest.mark.parametrize("size", [1, 2, 6])
@pytest.mark.parametrize("name", ROWS_THAT_ARE_NO_EXAMPLES)
def test_a_model_whose_rows_are_no_examples_is_refused(name, size):
    torch.manual_seed(0)
    mix, x, y = ROWS_THAT_ARE_NO_EXAMPLES[name], torch.randn(6, 4), torch.arange(6) % 3
    model = Net(lambda net, x: mix(net.a(x)), a=nn.Linear(4, 3))
    with refused(ValueError, "outputs"):
        compute_fisher_information(model, list(zip(x.split(size), y.split(size))), CE)


BLOCKS = [  # for inputs (n, 4, 4)
    lambda: nn.Linear(4, 4),
    lambda: Net(lambda net, x: x + net.b(net.a(x).tanh()), a=nn.Linear(4, 2), b=nn.Linear(2, 4)),
    lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 16, bias=False), nn.Unflatten(1, (4, 4))),
    lambda: nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv2d(1, 1, 3, 1, 1), nn.Flatten(1, 2)),
    lambda: with_statistics(nn.BatchNorm1d(4)),
    lambda: nn.TransformerEncoderLayer(4, 1, 3, batch_first=True),
]


def random_case(seed):
    """(r, model, x, number of outputs): depth, blocks, sharing, freezing and values by the seed."""
    r, outputs, layers = random.Random(seed), 2 + seed % 2, []
    torch.manual_seed(seed)
    blocks = [r.choice(BLOCKS)() for _ in range(r.randint(0, 3))]
    blocks += r.sample(blocks, r.randint(0, len(blocks)) // 2)  # once more
    for block in blocks:
        layers += [block, r.choice([nn.Tanh, nn.GELU, nn.Dropout])()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, outputs))
    for p in model.parameters():
        p.requires_grad_(r.random() < 0.9)
    model[-1].weight.requires_grad_(True)
    return r, model, torch.randn(r.randint(1, 5), 4, 4), outputs


@pytest.mark.parametrize("group", range(8))
def test_random_modules_equal_the_float64_loop(group):
    """In float64 to 1e-9, which nothing that is merely close would reach; a third in float32."""
    for seed in range(group, 320, 8):
        r, model, x, outputs = random_case(seed)
        family, labels = r.choice(list(CRITERIA)), r.choice(["exact", "exact", "empirical"])
        dtype, tolerance = (torch.float32, 2e-3) if seed % 3 == 0 else (torch.float64, 1e-9)
        y = torch.randint(2, (len(x), outputs)).to(dtype)
        y = y.argmax(1) if family == "categorical" else y
        model, x, size = model.to(dtype), x.to(dtype), r.randint(1, len(x))
        batches = list(zip(x.split(size), y.split(size)))
        found = compute_fisher_information(model, batches, CRITERIA[family], labels=labels)
        error = reference.error(found, reference.fisher(model, batches, labels, family))
        assert all((f >= 0).all() and not f.requires_grad for f in found.values())
        assert error < tolerance, f"seed {seed}, {family}, {labels}, {dtype}: {error:.1e}, {model}"
