"""The Fisher is what its equation says, leaves no trace, and refuses bad input in plain words."""

import contextlib
import copy
import gc
import itertools
import math
import multiprocessing
import re
import sys
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import reference
import torch
from reference import BCE, CE, CRITERIA, MSE, Net, assert_close, draw, refused, same_bits
from torch import nn
from torch.nn import functional as F

from ewc_utils import TensorLoader, compute_fisher_information, take_anchor

LABELS, NAN, INF = ("exact", "sampled", "empirical"), math.nan, math.inf
ALL_LABELS = pytest.mark.parametrize("labels", LABELS)
FAMILIES = pytest.mark.parametrize("family", CRITERIA)
EXACT_AND_EMPIRICAL = pytest.mark.parametrize("labels", ["exact", "empirical"])


def small_mlp(n_in=5, hidden=4, n_out=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(n_in, hidden), nn.Tanh(), nn.Linear(hidden, n_out))


def data(n, family="categorical", n_in=5, n_out=3):
    x, z = draw(n, n_in).float(), draw(n, n_out, seed=1).float()
    return x, {"categorical": z.argmax(1), "Bernoulli": (z > 0).float(), "Gaussian": z}[family]


@FAMILIES
def test_sampled_labels_are_unbiased_and_repeat_by_seed(family):
    """Means over 50 seeds lie within five standard errors of the exact Fisher."""
    model, (x, y) = small_mlp(n_in=2, hidden=2), data(5, family, n_in=2)
    batches, how = [(x.repeat(200, 1), y.repeat(200, *[1] * (y.dim() - 1)))], {"labels": "sampled"}
    fisher = partial(compute_fisher_information, model, batches, CRITERIA[family], **how)
    draws = [fisher(seed=seed) for seed in range(50)]
    assert same_bits(fisher(seed=3), draws[3]) and same_bits(fisher(), draws[0])
    for off in (torch.no_grad, torch.inference_mode):  # gradients may be off around the call
        assert same_bits(off()(fisher)(), draws[0])
    for name, truth in reference.fisher(model, [(x, y)], family=family).items():
        found = torch.stack([d[name] for d in draws]).double()
        assert found.std(0).min() > 0  # other seeds, other labels
        assert ((found.mean(0) - truth).abs() / found.std(0) * 50**0.5).max() < 5


@ALL_LABELS
@FAMILIES
def test_the_batch_size_does_not_change_the_result(family, labels):
    """Not even where it varies: small batches are joined, and the sampled labels stay the same."""
    model, (x, y) = small_mlp(), data(1700, family)

    def fisher(*sizes):
        batches = list(zip(x.split(sizes), y.split(sizes)))
        return compute_fisher_information(model, batches, CRITERIA[family], labels=labels)

    for sizes in ([1] * 1700, [7] * 242 + [6], [10, 1000, 690], [800, 5, 895]):
        assert_close(fisher(*sizes), fisher(1700), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("criterion, cost", [(CE, 32 * 1999), (BCE, 32 * 2000)])
def test_a_long_exact_fisher_is_announced_before_it_starts(criterion, cost):
    passes, y = [], torch.zeros(2, 32).long() if criterion is CE else torch.zeros(2, 2000, 32)

    def forward(net, x):
        z = net.a(x)
        z.register_hook(lambda g: passes.append(len(g)))
        return z.unflatten(1, (2000, 32))

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # so the warning also ends the call
        with pytest.raises(UserWarning, match="sampled") as raised:
            model = Net(forward, a=nn.Linear(1, 64000))
            compute_fisher_information(model, [(torch.ones(2, 1), y)], criterion)
        assert str(cost) in str(raised.value).replace(",", "") and len(passes) < 99
        compute_fisher_information(small_mlp(), [data(40)], CE)  # no word where it is short


TYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 0.02, torch.bfloat16: 0.05}
WAYS = {  # in which the gradients of examples are found
    "one row": (nn.Linear, (4, 3), lambda net, x: net.a(x[:, 0, 0])),
    "many classes": (nn.Linear, (4, 500), lambda net, x: net.a(x[:, 0, 0])),
    "rows": (nn.Linear, (4, 3), lambda net, x: net.a(x[:, 0]).sum(1)),
    "patches": (nn.Conv2d, (2, 3, 2), lambda net, x: net.a(x).sum((2, 3))),
    "another module": (nn.LayerNorm, (4,), lambda net, x: net.a(x)[:, 0, 0]),
    "outside of the module": (nn.Linear, (4, 3), lambda net, x: x[:, 0, 0] @ net.a.weight.T),
    "used twice": (nn.Linear, (4, 4), lambda net, x: net.a(x[:, 0, 0]) + net.a(x[:, 1, 0])),
}


@pytest.mark.filterwarnings("ignore:.*one example at a time")
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_squared_in_float32_or_wider(way, dtype):
    """Gradients of 1e-4 have squares of 1e-8, where float16 has no number but 0."""
    torch.manual_seed(0)
    kind, sizes, forward = WAYS[way]
    model = Net(lambda net, x: 1e-4 * forward(net, x), a=kind(*sizes)).to(dtype)
    batch = torch.randn(6, 2, 3, 4).to(dtype), torch.arange(6) % 3
    found = compute_fisher_information(model, [batch], CE)
    assert {f.dtype for f in found.values()} == {torch.promote_types(dtype, torch.float32)}
    assert reference.error(found, reference.fisher(model, [batch])) < TYPES[dtype]


AUTOCAST = torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("where", ["around the call", "inside forward", "matrix products"])
def test_in_mixed_precision_the_fisher_is_right_to_its_rounding(where):
    torch.manual_seed(0)
    layers = nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 4, 2), nn.Tanh(), nn.Flatten(), nn.LayerNorm(16)
    parts, forward = {"a": nn.Sequential(*layers, nn.Linear(16, 3))}, lambda net, x: net.a(x)
    truth = reference.fisher(Net(forward, **parts), [data(40)])
    model = Net(AUTOCAST(forward) if where == "inside forward" else forward, **parts)
    fisher = AUTOCAST(compute_fisher_information) if where[0] == "a" else compute_fisher_information
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if where == "matrix products" else precision)
    found = fisher(model, [data(40)], CE)
    torch.set_float32_matmul_precision(precision)
    assert {f.dtype for f in found.values()} == {torch.float32}
    assert reference.error(found, truth) < 0.05


@pytest.mark.parametrize("ignored", [-100, 1])
@EXACT_AND_EMPIRICAL
def test_positions_add_up_in_the_log_likelihood_and_ignored_ones_do_not_count(labels, ignored):
    """The reference writes out all 3^4 joint labels of an example. One is ignored as a whole."""
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Conv2d(3, 3, 1)
    model, x, y = nn.Sequential(*layers), torch.randn(5, 2, 3, 3), torch.randint(3, (5, 2, 2))
    y[0, 0, 1] = y[1, 1, 0] = y[2] = ignored
    truth = reference.fisher(model, [(x, y)], labels, ignore_index=ignored)
    for kind, last in ((nn.CrossEntropyLoss, nn.Identity()), (nn.NLLLoss, nn.LogSoftmax(1))):
        whole, criterion = nn.Sequential(*layers, last), kind(ignore_index=ignored)
        found = compute_fisher_information(whole, [(x, y)], criterion, labels=labels)
        assert reference.error(found, truth) < 1e-5


@EXACT_AND_EMPIRICAL
@pytest.mark.parametrize("value", [-INF, torch.finfo(torch.float32).min])
def test_masked_logits_are_classes_that_cannot_be(value, labels):
    """The Fisher is that of the model with the other classes alone."""
    torch.manual_seed(0)
    (x, y), a, mask = data(40), nn.Linear(5, 3), torch.tensor([False, True, False])
    model = Net(lambda net, x: net.a(x).masked_fill(mask, value), a=a)
    rest = Net(lambda net, x: net.a(x)[:, ~mask], a=a)
    found = compute_fisher_information(model, [(x, 2 * (y > 0))], CE, labels=labels)
    assert reference.error(found, reference.fisher(rest, [(x, (y > 0).long())], labels)) < 1e-5


def test_a_uniform_number_of_zero_draws_no_impossible_class_and_no_infinite_target(monkeypatch):
    rand, (x, y) = torch.rand, data(5)
    monkeypatch.setattr(torch, "rand", lambda *size, **how: rand(*size, **how).zero_())
    mask = torch.tensor([True, False, True])
    certain = Net(lambda net, x: net.a(x).masked_fill(mask, -INF), a=nn.Linear(5, 3))
    found = compute_fisher_information(certain, [(x, 0 * y + 1)], CE, labels="sampled")
    assert not any(f.any() for f in found.values())
    found = compute_fisher_information(nn.Linear(5, 3), [(x, x[:, :3])], MSE, labels="sampled")
    assert all(f.isfinite().all() and f.any() for f in found.values())


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
OTHERS = [(partial(CE), CLASSES), (OWN, CLASSES), (F.smooth_l1_loss, NUMBERS)]
OTHERS += [(nn.KLDivLoss(reduction="batchmean"), NUMBERS.softmax(1))]


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


MIXING = {
    "a contrastive loss": lambda z, y: F.cross_entropy(z @ z.T, torch.arange(len(z))),
    "a centred reward": lambda z, y: (z.log_softmax(1)[:, 0] * (y - y.mean())).mean(),
    "class weights": lambda z, y: F.cross_entropy(z, y.long(), torch.tensor([1.0, 2.0, 3.0])),
    "a sum": lambda z, y: F.mse_loss(z[:, 0], y, reduction="sum"),
}


@pytest.mark.parametrize("size", [2, 6])
@pytest.mark.parametrize("name", MIXING)
def test_a_criterion_that_mixes_or_weights_examples_is_refused(name, size):
    """On an example alone its gradient is another one, or 0."""
    torch.manual_seed(0)
    loader = TensorLoader(torch.randn(6, 4), torch.arange(6.0) % 3, size, shuffle=False)
    with refused(ValueError, "criterion", "mixes or weights examples"):
        compute_fisher_information(nn.Linear(4, 3), loader, MIXING[name], labels="empirical")


INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
FUNCTIONS = [F.cross_entropy, F.binary_cross_entropy_with_logits, F.mse_loss, F.nll_loss]


@ALL_LABELS
@pytest.mark.parametrize("family, function", zip([*CRITERIA, "categorical"], FUNCTIONS))
def test_integer_labels_of_every_type_and_functions_serve_alike(family, function, labels):
    """The logarithm of a softmax has itself as its logits."""
    model = small_mlp().append(nn.LogSoftmax(1) if family == "categorical" else nn.Identity())
    x, y = data(9, "Bernoulli" if family == "Gaussian" else family)
    wanted = compute_fisher_information(model, [(x, y)], CRITERIA[family], labels=labels)
    for dtype in INTEGERS:
        found = compute_fisher_information(model, [(x, y.to(dtype))], function, labels=labels)
        assert same_bits(found, wanted)


@pytest.mark.parametrize("size", [5, 400])
def test_a_loader_may_fill_one_buffer_again_and_give_empty_batches_and_inference_tensors(size):
    model, (x, y) = small_mlp(), data(4 * size)

    @torch.inference_mode()
    def loader():
        buffer = torch.empty_like(x[:size])
        for a, b in zip(x.split(size), y.split(size)):
            yield x[:0], y[:0]
            yield buffer.copy_(a), b

    found = compute_fisher_information(model, loader(), CE)
    assert_close(found, compute_fisher_information(model, [(x, y)], CE))


@pytest.mark.parametrize("form", reference.FORMS)
def test_a_batch_may_have_several_inputs_by_position_or_by_name(form):
    """The batches stay as they were, and the first two of them serve as a loader."""
    torch.manual_seed(0)
    model, (x, y) = reference.TwoInputs(), data(13)
    plain = list(zip(x.split(5), y.split(5)))
    batches = [reference.FORMS[form](*a.split([3, 2], 1), b) for a, b in plain]
    before, twin = str(batches), copy.deepcopy(model)
    for labels in ("exact", "empirical"):
        some = itertools.islice(batches, 2)
        found = compute_fisher_information(model, some, CE, labels=labels)
        assert reference.error(found, reference.fisher(model, plain[:2], labels)) < 1e-5
    ours, wanted = (reference.all_that_runs(*each) for each in ((model, batches), (twin, plain)))
    assert_close(*(runs["Kronecker"]() for runs in (ours, wanted)))
    for name in ("accuracy", "training"):
        assert ours[name]() == pytest.approx(wanted[name](), rel=1e-5)
    assert_close(take_anchor(model), take_anchor(twin))
    assert str(batches) == before


@pytest.mark.parametrize("name", ["Fisher", "Kronecker", "accuracy", "training"])
def test_inputs_and_labels_go_to_the_device_of_the_model(name, monkeypatch):
    (x, y), to, sent = data(6), torch.Tensor.to, []
    run = reference.all_that_runs(small_mlp(), [(x, y)])[name]
    noted = lambda t, *where: sent.append((t, *where)) or to(t, *where)  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "to", noted)
    run()
    for t in (x, y):
        assert any(each is t and t.device in where for each, *where in sent)


@ALL_LABELS
def test_random_numbers_devices_and_settings_are_left_to_the_user_meanwhile(labels, monkeypatch):
    """They belong to the process. Another thread that uses them (here the loader) sees no change,
    and draws on where it was."""
    model, cudnn, (x, y), seen, drawn = nn.Linear(5, 3), torch.backends.cudnn, data(6), [], []
    monkeypatch.setattr(cudnn, "deterministic", True)
    newer = getattr(cudnn, "conv", SimpleNamespace(fp32_precision=None))  # torch 2.9 and later
    precision, run = newer.fp32_precision, partial(compute_fisher_information, labels=labels)

    def loader():
        drawn.append(torch.rand((), device="cpu").item())
        yield x, y
        seen.append((cudnn.enabled, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark))

    torch.manual_seed(0)
    wanted = torch.rand(2).tolist()
    torch.manual_seed(0)
    found = run(model, loader(), CE)
    assert [*drawn, torch.rand(()).item()] == wanted and list(loader()) and seen[0] == seen[1]
    try:
        torch.set_default_device("meta")
        newer.fp32_precision = "ieee"
        assert same_bits(found, run(model, [(x, y)], CE))
    finally:
        newer.fp32_precision = precision
        torch.set_default_device(None)


def test_no_graph_outlives_the_call():
    counts, model, batch = [], small_mlp(), data(9)
    for _ in range(2):
        compute_fisher_information(model, [batch], CE)
        counts.append(sum(map(torch.is_tensor, gc.get_objects())))
    assert counts[0] == counts[1]


class Restless(nn.Module):
    """All that could be disturbed: dropout, statistics, buffers, max_norm, a random train()."""

    def __init__(self):
        super().__init__()
        layers = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Dropout(0.5)
        self.body, self.bare = nn.Sequential(*layers, nn.Linear(4, 3)), nn.Parameter(torch.randn(3))
        self.words = nn.Embedding(2, 3, max_norm=0.5)
        self.frozen = nn.Embedding(2, 3, max_norm=0.5).requires_grad_(False)
        self.register_buffer("changed", torch.zeros(1))
        self.register_buffer("graph", torch.eye(2).to_sparse())
        self.register_buffer("grown", torch.zeros(1), persistent=False)
        self.broken = False

    def train(self, mode=True):
        torch.rand(2)
        return super().train(mode)

    def forward(self, x):
        if self.broken:
            raise RuntimeError("forward broke")
        self.changed += 1
        self.grown = torch.cat([self.grown, self.changed])
        word = (x[:, 0] > 0).long()
        return self.body(x) + self.bare + self.words(word) + self.frozen(word)

    def traces(self):
        """All that a call could change, in plain values."""
        grads = [p.grad for p in self.parameters()]
        parts = [(k, v) for m in self.modules() for k, v in vars(m).items()]
        return (
            [(id(p), p.tolist(), p.requires_grad) for p in self.parameters()],
            [(id(g), g if g is None else g.tolist()) for g in grads],
            [(name, b.to_dense().tolist()) for name, b in self.named_buffers()],
            [(k, v if k == "training" else k.endswith("hooks") and len(v)) for k, v in parts],
            [torch.get_rng_state().tolist(), torch.is_grad_enabled()],
        )


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, RuntimeError, "forward"])
@ALL_LABELS
def test_nothing_of_the_model_is_changed_also_when_it_breaks_half_way(labels, error):
    torch.manual_seed(0)
    model, (x, y) = Restless(), data(8)
    F.cross_entropy(model(x), y).backward()
    model.bare.grad = None
    model.body[1].eval()  # mixed modes: a frozen normalisation in a model that trains
    model.body[0].register_forward_hook(lambda *_: None)
    model.frozen.weight.data.mul_(9), model.words.weight.data.mul_(9)
    model.broken = error == "forward"
    before = model.traces()

    def loader():
        yield x[:4], y[:4]
        if error in (KeyboardInterrupt, RuntimeError):
            raise error
        yield x[4:, None].squeeze(1), y[4:]

    kind = RuntimeError if error == "forward" else error
    with contextlib.nullcontext() if error is None else pytest.raises(kind):
        compute_fisher_information(model, loader(), CE, labels=labels)
    assert model.traces() == before


X, Y = torch.ones(6, 4), torch.zeros(6, dtype=torch.long)
LINEAR = small_mlp(4, 3)[0]


def changed(t, value):
    return t.index_fill(0, torch.tensor(2), value)


def then(change):
    return Net(lambda net, x: change(net.layer(x)), layer=LINEAR)


def case(error, *words, model=LINEAR, criterion=CE, x=X, y=Y, **options):
    loader = options.pop("loader", [(x, y)])
    return error, words, (model, loader, criterion), options


V, T = ValueError, TypeError
ONES = torch.ones(3)
WEIGHTED, SMOOTH = nn.CrossEntropyLoss(ONES), nn.CrossEntropyLoss(label_smoothing=0.1)
POS_WEIGHT, SUM = nn.BCEWithLogitsLoss(pos_weight=ONES), nn.CrossEntropyLoss(reduction="sum")
SICK = copy.deepcopy(LINEAR)
SICK.weight.data[1, 2] = NAN
NO_DATA = {  # these need no data, so they are told before any is read
    "labels unknown": case(V, "labels", *LABELS, "'true'", labels="true"),
    "criterion sums": case(V, "criterion", "mean", "CrossEntropyLoss", criterion=SUM),
    "class weights": case(V, "weight", "plain", criterion=WEIGHTED),
    "class weights, empirical": case(V, "weight", "plain", criterion=WEIGHTED, labels="empirical"),
    "class weights, NLL": case(V, "weight", "plain", criterion=nn.NLLLoss(ONES)),
    "pos_weight": case(V, "pos_weight", "plain", criterion=POS_WEIGHT),
    "label smoothing": case(V, "label_smoothing", "plain", criterion=SMOOTH),
    "no distribution": case(V, "L1Loss", "'empirical'", criterion=nn.L1Loss()),
    "none to draw from": case(V, "'empirical'", criterion=F.multi_margin_loss, labels="sampled"),
    "complex weights": case(V, "model", "real", "bias", model=nn.Linear(4, 3, dtype=torch.cfloat)),
}
BATCH_NORM = nn.Sequential(LINEAR, nn.BatchNorm1d(3, track_running_stats=False))
OVERFLOW, SCORES = then(lambda z: z.abs() * 1e38 * 1e38), then(lambda z: {"scores": z})
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
    "no labels": case(T, "loader", "labels", loader=[{"x": X, "y": Y}]),
    "more inputs than labels": case(T, *PAIRS, "6, 4", "5", y=Y[:5]),
    "NaN input": case(V, "outputs", "x ", "finite", x=changed(X, NAN)),
    "soft labels": case(V, "labels y", "class indices", "float32", "3)", y=X[:, :3] / 3),
    "BCE out of range": case(V, "labels y", "0..1", "2", y=TWOS, criterion=BCE),
    "MSE would broadcast": case(V, "labels y", "3)", "1)", y=Y[:, None], criterion=MSE),
    "MSE of NaN": case(FloatingPointError, "clean y", y=NANS, criterion=MSE, labels="empirical"),
    "overflow": case(FloatingPointError, "'weight'", "scale x", x=1e20 * X, model=FLAT),
    "late NaN input": case(V, "x ", "finite", loader=[(X, Y)] * 900 + [(changed(X, NAN), Y)]),
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


@pytest.mark.parametrize("n", [1, 6])
def test_outputs_that_are_random_are_told_as_such(n):
    torch.manual_seed(0)
    noisy, latent = lambda z: z + 0.01 * torch.randn_like(z), torch.distributions.Normal
    for change in (lambda z: F.dropout(z, 0.5), noisy, lambda z: latent(z, 1.0).rsample()):
        model = Net(lambda net, x, change=change: change(net.a(x)), a=nn.Linear(5, 50))
        runs = reference.all_that_runs(model, [data(n)] * 9)
        for name in ("Fisher", "Kronecker"):
            with refused(ValueError, "outputs", "random"):
                runs[name]()


def small_batches_of_images():
    layers = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    batches = [(torch.randn(4, 3, 64, 64), torch.arange(4)) for _ in range(24)]
    return model, batches, compute_fisher_information


def frozen_base():
    base = nn.utils.skip_init(nn.Linear, 2**20, 32).requires_grad_(False)  # 134 MB
    base.weight.fill_(1e-4), base.bias.fill_(0)

    def work(model, batches, criterion):
        for run in reference.all_that_runs(model, batches, criterion).values():
            run()

    batches = [(torch.randn(1, 2**20), torch.zeros(1).long())] * 3
    return nn.Sequential(base, nn.Linear(32, 5)), batches, work


def added_memory(make):
    """MB that a training step adds to this process at its peak, and that all the work adds."""

    def memory(kind):  # not ru_maxrss, which begins with what the parent process holds
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.search(rf"{kind}:\s+(\d+) kB", status)[1]) / 1024

    model, batches, work = make()
    work(copy.deepcopy(model[-1:]), [(torch.randn(4, model[-1].in_features), torch.arange(4))], CE)
    start = memory("VmRSS")
    CE(model(batches[0][0]), batches[0][1]).backward()
    step = memory("VmHWM") - start
    work(model, batches, CE)
    return step, memory("VmHWM") - start


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process cannot be read")
@pytest.mark.parametrize("make", [small_batches_of_images, frozen_base])
def test_memory_is_that_of_two_training_steps(make, monkeypatch):
    """And at most 64 MB. A Fisher of these models has less than 1 MB."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed is given back at once
    with multiprocessing.get_context("spawn").Pool(1) as process:
        step, total = process.apply(added_memory, (make,))
    assert total < 2 * step + 64 + 16
