"""The Fisher is what its equation says, leaves no trace, and refuses bad input in plain words."""

import contextlib
import copy
import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import reference
import torch
from reference import BCE, CE, CRITERIA, MSE, Net, assert_close, draw, refused, same_bits
from torch import nn
from torch.nn import functional as F

from ewc_utils import TensorLoader, compute_fisher_information

LABELS, NAN = ("exact", "sampled", "empirical"), math.nan
FAMILIES = pytest.mark.parametrize("family", CRITERIA)
EXACT_AND_EMPIRICAL = pytest.mark.parametrize("labels", ["exact", "empirical"])


def small_mlp(n_in=5, hidden=4, n_out=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(n_in, hidden), nn.Tanh(), nn.Linear(hidden, n_out))


def data(n, family="categorical", n_in=5, n_out=3):
    x, z = draw(n, n_in).float(), draw(n, n_out, seed=1).float()
    return x, {"categorical": z.argmax(1), "Bernoulli": (z > 0).float(), "Gaussian": z}[family]


@FAMILIES
def test_linear_models_have_the_closed_form(family):
    """That of W_cj is the mean of v_c x_j^2, that of b_c the mean of v_c, with the scores' variance
    v = p (1 - p) of a softmax or a sigmoid, and v = 1 / sigma^2 = 2 of the Gaussian."""
    torch.manual_seed(0)
    model, x = nn.Linear(5, 1000 if family == "categorical" else 30), torch.randn(20, 5)
    z = model(x).double().detach()
    p = z.softmax(1) if family == "categorical" else z.sigmoid()
    v = 0 * z + 2 if family == "Gaussian" else p * (1 - p)
    y = z.argmax(1) if family == "categorical" else 0 * z
    found = compute_fisher_information(model, [(x, y)], CRITERIA[family])
    truth = {"weight": v.T @ x.double() ** 2 / 20, "bias": v.mean(0)}
    assert reference.error(found, truth) < 1e-5


@EXACT_AND_EMPIRICAL
@FAMILIES
def test_equals_the_float64_loop(family, labels):
    model, (x, y) = small_mlp(), data(400, family)
    loader = TensorLoader(x, y, 150)
    found = compute_fisher_information(model, loader, CRITERIA[family], labels=labels)
    assert reference.error(found, reference.fisher(model, [(x, y)], labels, family)) < 2e-6
    assert all((f >= 0).all() and not f.requires_grad for f in found.values())


@FAMILIES
def test_sampled_labels_are_unbiased_and_repeat_by_seed(family):
    """Means over 50 seeds lie within five standard errors of the exact Fisher."""
    model, (x, y) = small_mlp(n_in=2, hidden=2), data(5, family, n_in=2)
    batches, how = [(x.repeat(200, 1), y.repeat(200, *[1] * (y.dim() - 1)))], {"labels": "sampled"}
    fisher = partial(compute_fisher_information, model, batches, CRITERIA[family], **how)
    draws = list(ThreadPoolExecutor(2).map(lambda seed: fisher(seed=seed), range(50)))
    assert same_bits(fisher(seed=3), draws[3]) and same_bits(fisher(), draws[0])
    for name, truth in reference.fisher(model, [(x, y)], family=family).items():
        found = torch.stack([d[name] for d in draws]).double()
        assert found.std(0).min() > 0  # other seeds, other labels
        assert ((found.mean(0) - truth).abs() / found.std(0) * 50**0.5).max() < 5


@pytest.mark.parametrize("labels", LABELS)
@FAMILIES
def test_the_batch_size_does_not_change_the_result(family, labels):
    """Not even where it varies: small batches are joined, and the sampled labels stay the same."""
    model, (x, y) = small_mlp(), data(1700, family)

    def fisher(*sizes):
        batches = list(zip(x.split(sizes), y.split(sizes)))
        return compute_fisher_information(model, batches, CRITERIA[family], labels=labels)

    for sizes in ([1] * 1700, [7] * 242 + [6], [10, 1000, 690], [800, 5, 895]):
        assert_close(fisher(*sizes), fisher(1700), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("family, saved", [("categorical", 1), ("Bernoulli", 0), ("Gaussian", 0)])
def test_the_cost_is_that_many_backward_passes(family, saved, monkeypatch):
    """T (C - 1) for cross-entropy, T C for the others, and one for the other labels; here T = 4."""
    passes, grad = [], torch.autograd.grad

    def counted(outputs, inputs, *args, **how):
        passes.extend([1] if isinstance(inputs, (list, tuple)) else [])  # not the score by itself
        return grad(outputs, inputs, *args, **how)

    def count(n_out, labels):
        passes.clear()
        y = torch.zeros(5, 4).long() if family == "categorical" else torch.zeros(5, n_out, 4)
        args = nn.Conv1d(2, n_out, 1), [(torch.ones(5, 2, 4), y)], CRITERIA[family]
        compute_fisher_information(*args, labels=labels)
        return len(passes)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    assert count(3, "sampled") == count(5, "sampled") == count(5, "empirical")
    assert count(5, "exact") - count(5, "sampled") == 4 * (5 - saved) - 1


TYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 0.05}


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_sums_are_float32_or_wider(dtype):
    torch.manual_seed(0)
    layers = nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh(), nn.Unflatten(1, (2, 4))
    model = nn.Sequential(*layers, nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Linear(9, 3)).to(dtype)
    x, y = data(40)
    found = compute_fisher_information(model, [(x.to(dtype), y)], CE)
    assert {f.dtype for f in found.values()} == {torch.promote_types(dtype, torch.float32)}
    assert reference.error(found, reference.fisher(model, [(x.to(dtype), y)])) < TYPES[dtype]
    # p = (1/2, 1/2) and x = 1e-4: F = x^2 / 4 = 2.5e-9, where float16 has no number but 0
    model, x = nn.Linear(1, 2).to(dtype), torch.full((3, 1), 1e-4, dtype=dtype)
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    found = compute_fisher_information(model, [(x, torch.zeros(3, dtype=torch.long))], CE)
    assert found["weight"].flatten().tolist() == pytest.approx([2.5e-9] * 2, rel=5e-3)


@pytest.mark.parametrize("ignored", [-100, 1])
@EXACT_AND_EMPIRICAL
def test_positions_add_up_in_the_log_likelihood_and_ignored_ones_do_not_count(labels, ignored):
    """The reference writes out all 3^4 joint labels of an example. One is ignored as a whole."""
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Conv2d(3, 3, 1)
    model, x, y = nn.Sequential(*layers), torch.randn(5, 2, 3, 3), torch.randint(3, (5, 2, 2))
    y[0, 0, 1] = y[1, 1, 0] = y[2] = ignored
    criterion = nn.CrossEntropyLoss(ignore_index=ignored)
    found = compute_fisher_information(model, [(x, y)], criterion, labels=labels)
    truth = reference.fisher(model, [(x, y)], labels, ignore_index=ignored)
    assert reference.error(found, truth) < 1e-5


@EXACT_AND_EMPIRICAL
@pytest.mark.parametrize("family", ["Bernoulli", "Gaussian"])
@pytest.mark.parametrize("n", [1, 769])  # also a last batch of one
def test_one_number_per_example_may_come_as_a_column_or_flat_or_squeezed(family, labels, n):
    torch.manual_seed(0)
    column, x, y = nn.Linear(5, 1), torch.randn(n, 5), torch.rand(n, 1).round()
    truth = reference.fisher(column, [(x, y)], labels, family)
    forms = {lambda z: z: y, lambda z: z.flatten(): y[:, 0], lambda z: z.squeeze(): y[:, 0]}
    for form, target in forms.items():
        model = Net(lambda net, x, form=form: form(net.a(x)), a=column)
        loader = TensorLoader(x, target, 768)
        found = compute_fisher_information(model, loader, CRITERIA[family], labels=labels)
        assert reference.error({name[2:]: f for name, f in found.items()}, truth) < 1e-5


CLASSES, NUMBERS = torch.arange(15).view(5, 3) % 3, draw(5, 3, 3)
OWN = type("Own", (nn.CrossEntropyLoss,), {})()
UNHASHABLE = type("Unhashable", (nn.SmoothL1Loss,), {"__eq__": lambda *_: False})()  # no __hash__
OTHERS = [(partial(CE), CLASSES), (OWN, CLASSES), (F.smooth_l1_loss, NUMBERS)]
OTHERS += [(UNHASHABLE, NUMBERS)]


@pytest.mark.parametrize("criterion, y", OTHERS)
def test_any_other_criterion_is_taken_as_it_comes_for_the_empirical_fisher(criterion, y):
    """CrossEntropyLoss counts the sum over an example's positions, a wrapper its own mean."""
    torch.manual_seed(0)
    model, x, truth = nn.Conv1d(2, 3, 2).double(), draw(5, 2, 4), {}
    found = compute_fisher_information(model, TensorLoader(x, y, 2), criterion, labels="empirical")
    for row, target in zip(x.split(1), y.split(1)):
        grads = torch.autograd.grad(criterion(model(row), target), list(model.parameters()))
        truth = {name: truth.get(name, 0) + g**2 / 5 for name, g in zip(found, grads)}
    assert reference.error(found, truth) < 1e-9
    if y is CLASSES:
        plain = compute_fisher_information(model, [(x, y)], CE, labels="empirical")
        assert_close(plain, {name: 9 * f for name, f in found.items()})


INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
FUNCTIONS = (F.cross_entropy, F.binary_cross_entropy_with_logits, F.mse_loss)


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("family, function", zip(CRITERIA, FUNCTIONS))
def test_integer_labels_of_every_type_and_functions_serve_alike(family, function, labels):
    model, (x, y) = small_mlp(), data(9, family if family != "Gaussian" else "Bernoulli")
    wanted = compute_fisher_information(model, [(x, y)], CRITERIA[family], labels=labels)
    for dtype in INTEGERS:
        found = compute_fisher_information(model, [(x, y.to(dtype))], function, labels=labels)
        assert same_bits(found, wanted)


def test_a_loader_may_fill_one_buffer_again_and_again_and_give_empty_batches():
    model, (x, y) = small_mlp(), data(20)

    def loader():
        buffer = torch.empty_like(x[:5])
        for a, b in zip(x.split(5), y.split(5)):
            yield x[:0], y[:0]
            yield buffer.copy_(a), b

    found = compute_fisher_information(model, loader(), CE)
    assert_close(found, compute_fisher_information(model, [(x, y)], CE))


class Restless(nn.Module):
    """All that could be disturbed: dropout, statistics, buffers, attributes, a random train()."""

    def __init__(self):
        super().__init__()
        layers = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Dropout(0.5)
        self.body, self.bare = nn.Sequential(*layers, nn.Linear(4, 3)), nn.Parameter(torch.randn(3))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.register_buffer("changed", torch.zeros(1))
        self.attribute, self.broken = torch.zeros(1), False

    def train(self, mode=True):
        torch.rand(2)
        return super().train(mode)

    def forward(self, x):
        if self.broken:
            raise RuntimeError("forward broke")
        self.changed += 1
        self.attribute = self.attribute + 1
        return self.body(x) + self.bare

    def traces(self):
        """All that a call could change, in plain values."""
        tensors = [*self.parameters(), *self.buffers(), self.attribute]
        grads = [p.grad for p in self.parameters()]
        return (
            [(id(t), t.tolist(), t.requires_grad) for t in tensors],
            [(id(g), g if g is None else g.tolist()) for g in grads],
            [(m.training, len(m._forward_hooks), len(m._backward_hooks)) for m in self.modules()],
            [torch.get_rng_state().tolist(), torch.is_grad_enabled(), torch.backends.cudnn.enabled],
        )


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, RuntimeError, "forward"])
@pytest.mark.parametrize("labels", LABELS)
def test_nothing_of_the_model_is_changed_also_when_it_breaks_half_way(labels, error):
    torch.manual_seed(0)
    model, (x, y) = Restless(), data(8)
    F.cross_entropy(model(x), y).backward()
    model.bare.grad = None
    model.body[1].eval()  # mixed modes: a frozen normalisation in a model that trains
    model.body[0].register_forward_hook(lambda *_: None)
    model.broken = error == "forward"
    before = model.traces()

    def loader():
        yield x[:4], y[:4]
        if error in (KeyboardInterrupt, RuntimeError):
            raise error
        yield x[4:, None].squeeze(1), y[4:]

    with contextlib.suppress(KeyboardInterrupt, RuntimeError):
        assert compute_fisher_information(model, loader(), CE, labels=labels) and error is None
    assert model.traces() == before


@pytest.mark.parametrize("grads", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("mode", [True, False])
def test_evaluation_mode_is_what_counts_and_gradients_may_be_off(mode, grads):
    """Dropout is off and batch statistics are the stored ones, whatever mode the model is in."""
    torch.manual_seed(0)
    model, batch = Restless(), data(8)
    with grads():
        found = compute_fisher_information(model.train(mode), [batch], CE)
    assert reference.error(found, reference.fisher(model, [batch])) < 1e-5


X, Y = torch.ones(6, 4), torch.zeros(6, dtype=torch.long)
LINEAR = nn.Linear(4, 3)


def changed(t, value):
    return t.index_fill(0, torch.tensor(2), value)


def then(change):
    return Net(lambda net, x: change(net.layer(x)), layer=LINEAR)


def case(error, *words, model=LINEAR, criterion=CE, x=X, y=Y, **options):
    loader = options.pop("loader", [(x, y)])
    return error, words, (model, loader, criterion), options


V, T = ValueError, TypeError
WEIGHTED, SMOOTH = (nn.CrossEntropyLoss(torch.ones(3)), nn.CrossEntropyLoss(label_smoothing=0.1))
POS_WEIGHT = nn.BCEWithLogitsLoss(pos_weight=torch.ones(3))
SUM = nn.CrossEntropyLoss(reduction="sum")
SICK = copy.deepcopy(LINEAR)
SICK.weight.data[1, 2] = NAN
NO_DATA = {  # these need no data, so they are told before any is read
    "labels unknown": case(V, "labels", *LABELS, "'true'", labels="true"),
    "criterion sums": case(V, "criterion", "mean", "CrossEntropyLoss", criterion=SUM),
    "class weights": case(V, "criterion", "plain", criterion=WEIGHTED),
    "class weights, empirical": case(V, "plain", criterion=WEIGHTED, labels="empirical"),
    "pos_weight": case(V, "criterion", "plain", criterion=POS_WEIGHT),
    "label smoothing": case(V, "criterion", "plain", criterion=SMOOTH),
    "no distribution": case(V, "L1Loss", "'empirical'", criterion=nn.L1Loss()),
    "none to draw from": case(V, "'empirical'", criterion=F.multi_margin_loss, labels="sampled"),
    "complex weights": case(V, "model", "real", "bias", model=nn.Linear(4, 3, dtype=torch.cfloat)),
}
BATCH_NORM = nn.Sequential(LINEAR, nn.BatchNorm1d(3, track_running_stats=False))
OVERFLOW, SCORES = then(lambda z: z * 1e38 * 1e38), then(lambda z: {"scores": z})
PAIRS, NO_EXAMPLES = ("loader", "(x, y)"), ("data_loader", "0 examples")
NANS, FLAT, TWOS = torch.full((6, 3), NAN), nn.Linear(4, 3, bias=False), torch.full((6, 3), 2)
nn.init.zeros_(FLAT.weight)
BAD_DATA = {
    "NaN weight": case(V, "weights", "not finite", model=SICK),
    "batch statistics": case(V, "'1'", "track_running_stats", model=BATCH_NORM),
    "no gradient": case(V, "model", "do not depend", model=then(torch.Tensor.detach)),
    "model returns no logits": case(T, "model", "'logits'", "scores", model=SCORES),
    "outputs overflow": case(V, "outputs", "finite", "weights", model=OVERFLOW),
    "empty loader": case(V, *NO_EXAMPLES, "empty", loader=[]),
    "all labels ignored": case(V, *NO_EXAMPLES, "ignored", y=Y - 100),
    "loader of dicts": case(T, *PAIRS, loader=[{"x": X, "y": Y}]),
    "loader of lists": case(T, *PAIRS, "list", x=X.tolist()),
    "more inputs than labels": case(T, *PAIRS, "6, 4", "5", y=Y[:5]),
    "NaN input": case(V, "outputs", "x ", "finite", x=changed(X, NAN)),
    "one logit": case(V, "labels y", "two classes", model=nn.Linear(4, 1)),
    "label too large": case(V, "labels y", "0..2", "got 3", y=changed(Y, 3)),
    "soft labels": case(V, "labels y", "class indices", "(6, 3)", y=X[:, :3] / 3),
    "BCE out of range": case(V, "labels y", "0..1", "2", y=TWOS, criterion=BCE),
    "MSE would broadcast": case(V, "labels y", "(6, 3)", "(6, 1)", y=Y[:, None], criterion=MSE),
    "MSE of NaN": case(FloatingPointError, "clean y", y=NANS, criterion=MSE, labels="empirical"),
    "overflow": case(FloatingPointError, "'weight'", "scale x", x=1e20 * X, model=FLAT),
    "late NaN input": case(V, "x ", "finite", loader=[(X, Y)] * 900 + [(changed(X, NAN), Y)]),
    "late label": case(V, "labels y", "got 7", loader=[(X, Y)] * 900 + [(X, changed(Y, 7))]),
}


@pytest.mark.parametrize("name", NO_DATA | BAD_DATA)
def test_bad_input_is_told_in_plain_words_before_any_data_is_read_that_it_does_not_need(name):
    error, words, (model, loader, criterion), options = (NO_DATA | BAD_DATA)[name]

    def unread():
        raise AssertionError("data was read")
        yield

    with refused(error, *words):
        loader = unread() if name in NO_DATA else loader
        compute_fisher_information(model, loader, criterion, **options)
