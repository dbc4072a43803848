"""The Fisher is right on any module, and takes the route one expects. Reference: the float64 loop."""

import types

import pytest
import reference
import torch
from torch import nn
from torch.nn import functional as F

from ewc_utils import compute_fisher_information, fisher_routes

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's word on how it pads
CLOSED, FUNC = "closed form", "torch.func"


class Net(nn.Module):
    """Parts by name and a forward(net, x) that uses them."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.rule = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.rule(self, x)


def vectors(*shape):
    return torch.randn(5, *shape)


def tokens(length=4, words=7):
    return torch.randint(words, (5, length))


def head(layer, *shape):
    """The layer, a tanh, and a linear read-out of all that it returns for an input of this shape."""
    with torch.no_grad():
        width = layer(vectors(*shape)).flatten(1).shape[1]
    return nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(width, 3)), vectors(*shape)


def normalised(layer, *shape):
    """Inputs are mixed first, so that the gradient passes through the layer as well; its own weights are not 1 and 0."""
    for p in layer.parameters():
        nn.init.normal_(p, 1.0, 0.3)
    if getattr(layer, "running_var", None) is not None:
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    mix = nn.Conv1d(shape[0], shape[0], 1) if len(shape) == 2 else nn.Conv2d(shape[0], shape[0], 1) if len(shape) == 3 else nn.Linear(*shape * 2)
    return head(nn.Sequential(mix, layer), *shape)


def moved(layer):
    """A batch-first recurrent layer, read at its last step."""
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x)[0][:, -1]
    return head(Last(), 4, 3)


def attention(batch_first):
    def forward(net, x):
        x = x if batch_first else x.transpose(0, 1)
        out = net.attend(x, x, x, need_weights=False)[0]
        return net.out((out if batch_first else out.transpose(0, 1)).mean(1))
    return Net(forward, attend=nn.MultiheadAttention(4, 2, batch_first=batch_first), out=nn.Linear(4, 3)), vectors(3, 4)


def transformer():
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, dropout=0.3)
    return Net(lambda net, x: net.out(net.layer(x).mean(1)), layer=layer, out=nn.Linear(4, 3)), vectors(3, 4)


def embedding(**how):
    return Net(lambda net, x: net.out(net.words(x).mean(1).tanh()), words=nn.Embedding(7, 3, **how), out=nn.Linear(3, 3))


def embedding_with_positions():
    """The positions are looked up once for the whole batch: no example in the first dimension."""
    def forward(net, x):
        return net.out((net.words(x) + net.places(torch.arange(x.shape[1], device=x.device))).mean(1).tanh())
    return Net(forward, words=nn.Embedding(7, 3), places=nn.Embedding(4, 3), out=nn.Linear(3, 3)), tokens()


def residual():
    def forward(net, x):
        x = x + net.a(x).tanh()
        h = net.b(x)
        h += x
        return net.out(h)
    return Net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4), out=nn.Linear(4, 3)), vectors(4)


def used_twice(layer, x):
    return Net(lambda net, x: net.out(net.layer(net.layer(x).tanh()).flatten(1)), layer=layer, out=nn.Linear(x[0].numel(), 3)), x


def tied_weights():
    """One tensor in two layers."""
    model = Net(lambda net, x: net.decode(net.words(x).mean(1).tanh()), words=nn.Embedding(7, 3), decode=nn.Linear(3, 7))
    model.decode.weight = model.words.weight
    return model, tokens()


def tied_by_function():
    return Net(lambda net, x: F.linear(net.words(x).mean(1).tanh(), net.words.weight), words=nn.Embedding(7, 3)), tokens()


def tied_for_some_examples():
    """The second use of the weight shows in none of the first three examples, by which routes are tried out."""
    def forward(net, x):
        h = net.a(x).tanh()
        out = net.out(h)
        return torch.stack([z + (F.linear(u, net.out.weight) if row[0] < 0 else 0) for z, u, row in zip(out, h, x)])
    x = vectors(4)
    x[:, 0] = torch.tensor([1.0, 1, 1, -1, -1])
    return Net(forward, a=nn.Linear(4, 3), out=nn.Linear(3, 3)), x


def experts():
    """Each example goes to one of two experts; the first three all go to the first."""
    def forward(net, x):
        h = x.new_zeros(len(x), 3)
        for rows, expert in ((x[:, 0] > 0, net.first), (x[:, 0] <= 0, net.second)):
            if rows.any():
                h = h.index_add(0, rows.nonzero()[:, 0], expert(x[rows]))
        return net.out(h.tanh())
    x = vectors(4)
    x[:, 0] = torch.tensor([1.0, 1, 1, -1, 1])
    return Net(forward, first=nn.Linear(4, 3), second=nn.Linear(4, 3), out=nn.Linear(3, 3)), x


def frozen_and_unused():
    model = Net(lambda net, x: net.out(net.b(net.a(x).tanh()).tanh()), a=nn.Linear(4, 4), b=nn.Linear(4, 4), out=nn.Linear(4, 3),
                unused=nn.Linear(2, 2), bare=nn.Parameter(torch.ones(2)))
    model.a.requires_grad_(False)
    model.b.weight.requires_grad_(False)
    model.out.bias.requires_grad_(False)
    return model, vectors(4)


def partly_without_gradient():
    def forward(net, x):
        with torch.no_grad():
            x = net.a(x)
        return net.out(x)
    return Net(forward, a=nn.Linear(4, 4), out=nn.Linear(4, 3)), vectors(4)


def bare_parameters():
    return Net(lambda net, x: (x * net.scale).tanh() @ net.matrix, scale=nn.Parameter(torch.randn(4)), matrix=nn.Parameter(torch.randn(4, 3))), vectors(4)


def returning(wrap):
    return Net(lambda net, x: wrap(net.out(x)), out=nn.Linear(4, 3)), vectors(4)


def hooked():
    """A hook that changes what a layer puts out: its closed form no longer holds."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    model[0].register_forward_hook(lambda layer, args, out: 2 * out)
    return model, vectors(4)


def custom_gradient():
    """A layer of a known type with a forward of its own."""
    class Scaled(nn.Linear):
        def forward(self, x):
            return F.linear(x, 3 * self.weight, self.bias)
    return nn.Sequential(Scaled(4, 4), nn.Tanh(), nn.Linear(4, 3)), vectors(4)


# name: (what makes the model and its inputs, {parameter: route} or one route for all, None where any will do)
CASES = {
    "Linear": (lambda: head(nn.Linear(4, 3), 4), CLOSED),
    "Linear without bias": (lambda: head(nn.Linear(4, 3, bias=False), 4), CLOSED),
    "Linear on sequences": (lambda: head(nn.Linear(4, 3), 5, 4), CLOSED),
    "Linear on grids": (lambda: head(nn.Linear(4, 3), 2, 3, 4), CLOSED),
    "Linear on one position": (lambda: head(nn.Linear(4, 3), 1, 4), CLOSED),
    "Linear, positions first": (lambda: (Net(lambda net, x: net.out(net.a(x.transpose(0, 1)).tanh().transpose(0, 1).flatten(1)),
                                            a=nn.Linear(4, 2), out=nn.Linear(6, 3)), vectors(3, 4)), None),
    "Linear, positions in the batch": (lambda: (Net(lambda net, x: net.out(net.a(x.flatten(0, 1)).tanh().view(len(x), -1)),
                                                   a=nn.Linear(4, 2), out=nn.Linear(6, 3)), vectors(3, 4)), None),
    "Conv1d": (lambda: head(nn.Conv1d(2, 3, 3), 2, 7), CLOSED),
    "Conv1d stride padding dilation": (lambda: head(nn.Conv1d(2, 3, 3, stride=2, padding=2, dilation=2), 2, 9), CLOSED),
    "Conv1d same, even kernel": (lambda: head(nn.Conv1d(2, 3, 4, padding="same", dilation=3), 2, 9), CLOSED),
    "Conv1d valid": (lambda: head(nn.Conv1d(2, 3, 4, padding="valid"), 2, 9), CLOSED),
    "Conv1d circular": (lambda: head(nn.Conv1d(2, 3, 3, padding=2, padding_mode="circular"), 2, 7), CLOSED),
    "Conv2d": (lambda: head(nn.Conv2d(2, 3, 3), 2, 5, 5), CLOSED),
    "Conv2d stride": (lambda: head(nn.Conv2d(2, 3, 3, stride=(2, 1)), 2, 6, 5), CLOSED),
    "Conv2d padding": (lambda: head(nn.Conv2d(2, 3, 3, padding=(1, 2)), 2, 4, 4), CLOSED),
    "Conv2d same, even kernel": (lambda: head(nn.Conv2d(2, 3, (2, 3), padding="same", bias=False), 2, 4, 5), CLOSED),
    "Conv2d dilation": (lambda: head(nn.Conv2d(2, 3, 2, dilation=(2, 3)), 2, 5, 6), CLOSED),
    "Conv2d groups": (lambda: head(nn.Conv2d(4, 6, 2, groups=2), 4, 3, 4), CLOSED),
    "Conv2d depthwise": (lambda: head(nn.Conv2d(3, 6, 3, groups=3, padding=1), 3, 4, 4), CLOSED),
    "Conv2d reflect": (lambda: head(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), 2, 4, 4), CLOSED),
    "Conv2d replicate": (lambda: head(nn.Conv2d(2, 2, 3, padding=2, padding_mode="replicate", stride=2), 2, 4, 4), CLOSED),
    "Conv2d circular": (lambda: head(nn.Conv2d(2, 2, 3, padding=(1, 2), padding_mode="circular"), 2, 4, 4), CLOSED),
    "Conv3d": (lambda: head(nn.Conv3d(1, 2, 2), 1, 3, 3, 3), {"0.weight": FUNC, "3.weight": CLOSED}),
    "ConvTranspose2d": (lambda: head(nn.ConvTranspose2d(2, 2, 2, stride=2), 2, 3, 3), {"0.weight": FUNC, "0.bias": FUNC, "3.weight": CLOSED}),
    "Bilinear": (lambda: (Net(lambda net, x: net.b(x, x), b=nn.Bilinear(4, 4, 3)), vectors(4)), FUNC),
    "PReLU": (lambda: head(nn.Sequential(nn.Linear(4, 4), nn.PReLU(4)), 4), {"0.0.weight": CLOSED}),
    "BatchNorm1d": (lambda: normalised(nn.BatchNorm1d(4).eval(), 4), CLOSED),
    "BatchNorm1d on sequences": (lambda: normalised(nn.BatchNorm1d(3).eval(), 3, 5), CLOSED),
    "BatchNorm2d": (lambda: normalised(nn.BatchNorm2d(3).eval(), 3, 2, 4), CLOSED),
    "LayerNorm": (lambda: normalised(nn.LayerNorm(4), 4), CLOSED),
    "LayerNorm on sequences": (lambda: normalised(nn.LayerNorm(5), 3, 5), CLOSED),
    "LayerNorm over two dimensions": (lambda: normalised(nn.LayerNorm((3, 4)), 2, 3, 4), CLOSED),
    "LayerNorm without bias": (lambda: normalised(nn.LayerNorm(4, bias=False), 4), CLOSED),
    "RMSNorm": (lambda: normalised(nn.RMSNorm(5), 3, 5), CLOSED),
    "GroupNorm": (lambda: normalised(nn.GroupNorm(2, 4), 4, 5), CLOSED),
    "GroupNorm on images": (lambda: normalised(nn.GroupNorm(2, 4), 4, 2, 3), CLOSED),
    "InstanceNorm2d": (lambda: normalised(nn.InstanceNorm2d(3, affine=True), 3, 3, 3), None),
    "Embedding": (lambda: (embedding(), tokens()), CLOSED),
    "Embedding, repeated tokens": (lambda: (embedding(), tokens(6, 2)), CLOSED),
    "Embedding, padding": (lambda: (embedding(padding_idx=0), tokens(6, 3)), CLOSED),
    "Embedding, sparse": (lambda: (embedding(sparse=True), tokens()), CLOSED),
    "Embedding of one token": (lambda: (Net(lambda net, x: net.out(net.words(x)), words=nn.Embedding(7, 3), out=nn.Linear(3, 3)),
                                        torch.randint(7, (5,))), CLOSED),
    "Embedding with positions": (embedding_with_positions, {"words.weight": CLOSED, "places.weight": FUNC, "out.weight": CLOSED}),
    "EmbeddingBag": (lambda: (Net(lambda net, x: net.out(net.bag(x).tanh()), bag=nn.EmbeddingBag(7, 3), out=nn.Linear(3, 3)), tokens()), None),
    "MultiheadAttention": (lambda: attention(True), {"attend.in_proj_weight": FUNC, "attend.out_proj.weight": FUNC, "out.weight": CLOSED}),
    "MultiheadAttention, positions first": (lambda: attention(False), {"attend.in_proj_weight": FUNC, "out.weight": CLOSED}),
    "TransformerEncoderLayer": (transformer, {"layer.self_attn.in_proj_weight": FUNC, "layer.linear1.weight": CLOSED,
                                              "layer.norm1.weight": CLOSED, "out.weight": CLOSED}),
    "RNN": (lambda: moved(nn.RNN(3, 4, batch_first=True)), {"3.weight": CLOSED}),
    "GRU": (lambda: moved(nn.GRU(3, 4, batch_first=True)), {"3.weight": CLOSED}),
    "LSTM": (lambda: moved(nn.LSTM(3, 4, batch_first=True)), {"3.weight": CLOSED}),
    "LSTM, two layers, both directions": (lambda: moved(nn.LSTM(3, 2, 2, batch_first=True, bidirectional=True, dropout=0.4)), {"3.weight": CLOSED}),
    "residual, in place": (residual, CLOSED),
    "ReLU in place": (lambda: head(nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 4)), 4), CLOSED),
    "pooling": (lambda: head(nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.MaxPool2d(2)), 1, 5, 5), CLOSED),
    "dropout": (lambda: head(nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5)), 4), CLOSED),
    "Linear used twice": (lambda: used_twice(nn.Linear(4, 4), vectors(4)), CLOSED),
    "Linear used twice on sequences": (lambda: used_twice(nn.Linear(3, 3), vectors(4, 3)), CLOSED),
    "Conv2d used twice": (lambda: used_twice(nn.Conv2d(2, 2, 3, padding=1), vectors(2, 3, 3)), CLOSED),
    "LayerNorm used twice": (lambda: used_twice(nn.LayerNorm(4), vectors(4)), CLOSED),
    "tied weights": (tied_weights, {"words.weight": FUNC, "decode.bias": CLOSED}),
    "tied by a function": (tied_by_function, FUNC),
    "tied for some examples": (tied_for_some_examples, None),
    "experts": (experts, {"out.weight": CLOSED}),
    "frozen and unused": (frozen_and_unused, {"b.bias": CLOSED, "out.weight": CLOSED}),
    "partly without gradient": (partly_without_gradient, {"out.weight": CLOSED}),
    "bare parameters": (bare_parameters, FUNC),
    "weight norm": (lambda: head(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), 4), {"0.parametrizations.weight.original0": FUNC, "3.weight": CLOSED}),
    "returns a tuple": (lambda: returning(lambda z: (z, None)), CLOSED),
    "returns a dict": (lambda: returning(lambda z: {"loss": None, "logits": z}), CLOSED),
    "returns an object": (lambda: returning(lambda z: types.SimpleNamespace(logits=z)), CLOSED),
    "hooked": (hooked, {"0.weight": FUNC, "2.weight": CLOSED}),
    "a forward of its own": (custom_gradient, {"0.weight": FUNC, "2.weight": CLOSED}),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_float64_loop_on_the_expected_route(name):
    torch.manual_seed(0)
    make, expected = CASES[name]
    model, x = make()
    model.train()
    with torch.no_grad():
        n_classes = reference.logits(model.eval()(x)).shape[1]
    y = torch.randint(n_classes, (5,))
    routes = fisher_routes(model, [(x, y)])
    if isinstance(expected, str):
        assert set(routes.values()) == {expected}
    else:
        assert {key: routes[key] for key in expected or {}} == (expected or {})
    for labels in ("exact", "empirical"):
        truth = reference.fisher(model, [(x, y)], labels)
        for batches in ([(x, y)], [(x[:1], y[:1]), (x[1:], y[1:])]):
            for max_bytes in (2**26, 1):
                found = compute_fisher_information(model, batches, nn.CrossEntropyLoss(), labels=labels, max_bytes=max_bytes)
                assert reference.error(found, truth) < 1e-4, (labels, max_bytes)


@pytest.mark.parametrize("family, criterion", [("Bernoulli", nn.BCEWithLogitsLoss()), ("Gaussian", nn.MSELoss())])
@pytest.mark.parametrize("name", ["Conv2d groups", "LSTM", "tied by a function", "MultiheadAttention", "Linear used twice on sequences"])
def test_other_likelihoods_on_every_route(name, family, criterion):
    torch.manual_seed(0)
    model, x = CASES[name][0]()
    z = reference.logits(model.eval()(x)).detach()
    y = torch.rand_like(z).round()
    for labels in ("exact", "empirical"):
        found = compute_fisher_information(model, [(x, y)], criterion, labels=labels)
        assert reference.error(found, reference.fisher(model, [(x, y)], labels, family)) < 1e-4


def test_an_unused_parameter_is_exactly_zero():
    torch.manual_seed(0)
    model, x = frozen_and_unused()
    found = compute_fisher_information(model, [(x, torch.zeros(5, dtype=torch.long))], nn.CrossEntropyLoss())
    assert set(found) == {"b.bias", "out.weight", "unused.weight", "unused.bias", "bare"}
    assert all((found[name] == 0).all() == (name in ("unused.weight", "unused.bias", "bare")) for name in found)


def test_sequences_of_several_lengths():
    """Batches need not have one shape; small ones are only joined where they fit."""
    torch.manual_seed(0)
    model = embedding(padding_idx=0)
    batches = [(torch.randint(7, (n, length)), torch.randint(3, (n,))) for n, length in ((1, 3), (2, 3), (3, 6), (1, 1), (2, 3))]
    found = compute_fisher_information(model, batches, nn.CrossEntropyLoss(), max_bytes=5000)
    assert reference.error(found, reference.fisher(model, batches)) < 1e-5


def test_a_segmentation_net_counts_positions_per_example():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1))
    x, y = vectors(1, 2, 3), torch.randint(2, (5, 2, 3))
    y[0, 0, 1] = -100
    for labels in ("exact", "empirical"):
        found = compute_fisher_information(model, [(x, y)], nn.CrossEntropyLoss(), labels=labels)
        assert reference.error(found, reference.fisher(model, [(x, y)], labels)) < 1e-4


def test_a_compiled_model_has_the_plain_names():
    """Wrapping is enough: the Fisher runs the module inside."""
    torch.manual_seed(0)
    model, x = CASES["Linear"][0]()
    y = torch.randint(3, (5,))
    wrapped = torch.compile(model)
    plain = compute_fisher_information(model, [(x, y)], nn.CrossEntropyLoss())
    found = compute_fisher_information(wrapped, [(x, y)], nn.CrossEntropyLoss())
    assert list(found) == list(plain) == [name for name, _ in model.named_parameters()]
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_data_parallel_has_the_plain_names():
    torch.manual_seed(0)
    model, x = CASES["Linear"][0]()
    y = torch.randint(3, (5,))
    found = compute_fisher_information(nn.DataParallel(model), [(x, y)], nn.CrossEntropyLoss())
    assert reference.error(found, reference.fisher(model, [(x, y)])) < 1e-5
