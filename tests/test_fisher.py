"""The Fisher is what its equation says: against closed forms, float64 loops, divergences; and it leaves no trace."""

import copy
import math

import pytest
import reference
import torch
from torch import nn
from torch.nn import functional as F

from ewc_utils import SimpleMLP, TensorLoader, compute_fisher_information, fisher_routes

CRITERIA = {"categorical": nn.CrossEntropyLoss(), "Bernoulli": nn.BCEWithLogitsLoss(), "Gaussian": nn.MSELoss()}


def small_mlp(*, seed=0, n_in=5, hidden=4, n_out=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(n_in, hidden), nn.Tanh(), nn.Linear(hidden, n_out))


def data(n, family="categorical", *, seed=1, n_in=5, n_out=3):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, n_in, generator=g)
    if family == "categorical":
        return x, torch.randint(n_out, (n,), generator=g)
    z = torch.randn(n, n_out, generator=g)
    return x, z if family == "Gaussian" else (z > 0).float()


# ---------------------------------------------------------------- the numbers


def test_softmax_regression_has_the_closed_form():
    """For logits W x + b the Fisher of W_cj is the mean of p_c (1 - p_c) x_j^2, of b_c the mean of p_c (1 - p_c)."""
    torch.manual_seed(0)
    model, (x, y) = nn.Linear(5, 3), data(50)
    p = (x.double() @ model.weight.double().T + model.bias.double()).softmax(1).detach()
    spread = p * (1 - p)
    found = compute_fisher_information(model, [(x, y)], nn.CrossEntropyLoss())
    torch.testing.assert_close(found["weight"].double(), spread.T @ x.double() ** 2 / 50, rtol=1e-5, atol=0)
    torch.testing.assert_close(found["bias"].double(), spread.mean(0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("labels", ["exact", "empirical"])
@pytest.mark.parametrize("family", CRITERIA)
def test_equals_the_float64_loop(family, labels):
    model, (x, y) = small_mlp(), data(20, family)
    found = compute_fisher_information(model, TensorLoader(x, y, 8), CRITERIA[family], labels=labels)
    assert reference.error(found, reference.fisher(model, [(x, y)], labels, family)) < 1e-5


@pytest.mark.parametrize("family", CRITERIA)
def test_sampled_labels_are_unbiased(family):
    """Over 40,000 draws the sampled Fisher lies within five standard errors of the exact one, element by element."""
    model, repeats = small_mlp(n_in=2, hidden=2), 8000
    x, y = data(5, family, n_in=2)
    exact = reference.fisher(model, [(x, y)], family=family)
    variance = dict.fromkeys(exact, 0.0)  # of the mean over the five examples, for one draw of each
    for row, label in zip(x.split(1), y.split(1)):
        for name, v in squared_score_variance(model, row, label, family).items():
            variance[name] = variance[name] + v / 25
    found = compute_fisher_information(model, [(x.repeat(repeats, 1), y.repeat(repeats, *[1] * (y.dim() - 1)))],
                                       CRITERIA[family], labels="sampled")
    for name, truth in exact.items():
        deviation = (found[name].double() - truth).abs() / (variance[name] / repeats).sqrt()
        assert deviation.max() < 5, name
        assert deviation.max() > 1e-3, f"{name}: this is no sample"


def squared_score_variance(model, x, y, family):
    """Var(s^2) = E s^4 - (E s^2)^2 of one example; for the Gaussian s is normal, so that it is 2 (E s^2)^2."""
    second = reference.fisher(model, [(x, y)], family=family)
    if family == "Gaussian":
        return {name: 2 * v ** 2 for name, v in second.items()}
    fourth = dict.fromkeys(second, 0.0)
    z = model.double()(x.double())[0].detach()
    for probability, label in reference.outcomes(z if family == "Bernoulli" else z[None], family):
        label = label[None] if family == "Bernoulli" else label
        for name, squares in reference.fisher(model, [(x, label)], "empirical", family).items():
            fourth[name] = fourth[name] + probability * squares ** 2
    model.float()
    return {name: fourth[name] - second[name] ** 2 for name in second}


def test_sampled_labels_repeat_by_seed():
    model, (x, y) = small_mlp(), data(30)
    runs = [compute_fisher_information(model, [(x, y)], nn.CrossEntropyLoss(), labels="sampled", seed=s) for s in (3, 3, 4)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not any(torch.equal(runs[0][name], runs[2][name]) for name in runs[0])


class TwoBiases(nn.Module):
    """The same gradient reaches a bias with a closed form and a bare parameter without one."""

    def __init__(self):
        super().__init__()
        self.layer, self.bare = nn.Linear(5, 3), nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return self.layer(x) + self.bare


def test_sampled_labels_are_the_same_on_every_route():
    torch.manual_seed(0)
    model, (x, y) = TwoBiases(), data(30)
    routes = fisher_routes(model, [(x, y)])
    assert routes["layer.bias"] != routes["bare"]
    found = compute_fisher_information(model, [(x, y)], nn.CrossEntropyLoss(), labels="sampled")
    torch.testing.assert_close(found["layer.bias"], found["bare"])


@pytest.mark.parametrize("labels", ["exact", "sampled", "empirical"])
@pytest.mark.parametrize("family", CRITERIA)
def test_does_not_depend_on_the_batch_size(family, labels):
    model, (x, y) = small_mlp(), data(23, family)
    for max_bytes in (2**26, 1000):
        found = [compute_fisher_information(model, TensorLoader(x, y, size, shuffle=False), CRITERIA[family], labels=labels,
                                            max_bytes=max_bytes) for size in (1, 2, 7, 23)]
        for other in found[1:]:
            for name in other:
                torch.testing.assert_close(other[name], found[0][name], rtol=1e-5, atol=1e-9)


def test_doubling_the_data_changes_nothing():
    """A mean over examples, not a sum; and not the square of a batch's mean gradient, which a copy would leave and a
    sign-flipped one would cancel."""
    model, (x, y) = small_mlp(), data(10)
    once = compute_fisher_information(model, [(x, y)], nn.CrossEntropyLoss())
    twice = compute_fisher_information(model, [(x, y), (x, y)], nn.CrossEntropyLoss())
    for name in once:
        torch.testing.assert_close(once[name], twice[name])


def test_divergence_of_a_small_step_along_one_coordinate():
    """KL(p_theta || p_theta+d) = 1/2 F_i d_i^2 + O(d^3), mean over the examples, for every parameter of an MLP."""
    model, (x, y) = small_mlp().double(), data(12)
    found, x, step = compute_fisher_information(model, [(x.double(), y)], nn.CrossEntropyLoss()), x.double(), 1e-4
    with torch.no_grad():
        before = model(x).log_softmax(1)
        for name, p in model.named_parameters():
            for i in range(p.numel()):
                kl = 0.0
                for d in (step, -step):  # the cubic term cancels
                    p.view(-1)[i] += d
                    kl += (before.exp() * (before - model(x).log_softmax(1))).sum(1).mean().item() / 2
                    p.view(-1)[i] -= d
                assert kl == pytest.approx(found[name].view(-1)[i].item() * step**2 / 2, rel=1e-4), (name, i)


@pytest.mark.parametrize("family", ["Bernoulli", "Gaussian"])
def test_divergence_of_any_small_step_where_the_fisher_is_diagonal(family):
    """Inputs that are unit vectors and independent outputs make the whole Fisher diagonal: KL = 1/2 d^T F d for every d."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3, bias=False).double(), torch.eye(4, dtype=torch.float64)
    y = torch.zeros(4, 3, dtype=torch.float64)
    fisher = compute_fisher_information(model, [(x, y)], CRITERIA[family])["weight"]
    d = 1e-4 * torch.randn(3, 4, dtype=torch.float64)
    z = model.weight.detach().T

    def divergence(z, other):
        if family == "Gaussian":
            return ((z - other) ** 2).sum(1).mean()  # / (2 sigma^2) with sigma^2 = 1/2
        p, q = z.sigmoid(), other.sigmoid()
        return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1).mean()

    kl = (divergence(z, z + d.T) + divergence(z, z - d.T)) / 2
    assert kl.item() == pytest.approx(0.5 * (fisher * d**2).sum().item(), rel=1e-5)


def test_float32_is_within_2e6_of_float64():
    """Sums of several thousand examples lose no accuracy: at most 2e-6 relative error in every tensor."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    x, y = data(3000, n_in=30, n_out=4)
    truth = reference.fisher(model, [(x, y)])
    for max_bytes in (2**26, 2**20):
        assert reference.error(compute_fisher_information(model, [(x, y)], nn.CrossEntropyLoss(), max_bytes=max_bytes), truth) < 2e-6


@pytest.mark.parametrize("dtype, wanted, tolerance", [(torch.float64, torch.float64, 1e-12), (torch.float32, torch.float32, 1e-5),
                                                      (torch.bfloat16, torch.float32, 0.05)])
def test_sums_are_float32_or_wider(dtype, wanted, tolerance):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    x, y = data(40)
    found = compute_fisher_information(model, [(x.to(dtype), y)], nn.CrossEntropyLoss())
    assert {f.dtype for f in found.values()} == {wanted}
    assert reference.error(found, reference.fisher(model, [(x.to(dtype), y)])) < tolerance


def test_a_thousand_classes():
    torch.manual_seed(0)
    model, x = nn.Linear(6, 1000), torch.randn(9, 6)
    found = compute_fisher_information(model, [(x, torch.zeros(9, dtype=torch.long))], nn.CrossEntropyLoss())
    p = model(x).double().softmax(1).detach()
    truth = {"weight": (p * (1 - p)).T @ x.double() ** 2 / 9, "bias": (p * (1 - p)).mean(0)}
    assert reference.error(found, truth) < 1e-5


# ---------------------------------------------------------------- positions, targets, criteria


def test_positions_of_an_example_add_up_in_its_log_likelihood():
    """A segmentation: one example, many pixels. The reference writes out all 3^4 joint labels of an example."""
    torch.manual_seed(0)
    model, x, y = nn.Conv2d(2, 3, 2), torch.randn(4, 2, 3, 3), torch.randint(3, (4, 2, 2))
    for labels in ("exact", "empirical"):
        found = compute_fisher_information(model, [(x, y)], nn.CrossEntropyLoss(), labels=labels)
        assert reference.error(found, reference.fisher(model, [(x, y)], labels)) < 1e-5


@pytest.mark.parametrize("ignored", [-100, 1])
@pytest.mark.parametrize("labels", ["exact", "empirical"])
def test_ignored_positions_do_not_count(labels, ignored):
    """Neither do examples all of whose positions are ignored: the third one here."""
    torch.manual_seed(0)
    model, x, y = nn.Conv1d(2, 3, 2), torch.randn(5, 2, 5), torch.randint(3, (5, 4))
    y[0, 1] = y[1, 2] = ignored
    y[2] = ignored
    found = compute_fisher_information(model, [(x, y)], nn.CrossEntropyLoss(ignore_index=ignored), labels=labels)
    assert reference.error(found, reference.fisher(model, [(x, y)], labels, ignore_index=ignored)) < 1e-5
    without = [i for i in range(5) if i != 2]
    other = compute_fisher_information(model, [(x[without], y[without])], nn.CrossEntropyLoss(ignore_index=ignored), labels=labels)
    assert reference.error(found, {name: f.double() for name, f in other.items()}) < 1e-6


@pytest.mark.parametrize("family", ["Bernoulli", "Gaussian"])
def test_one_number_per_example(family):
    """Outputs of shape (n,) as well as (n, 1)."""
    torch.manual_seed(0)
    column, x = nn.Linear(5, 1), torch.randn(8, 5)
    y = torch.rand(8, 1).round()
    flat = nn.Sequential(column, nn.Flatten(0))
    for model, target in ((column, y), (flat, y[:, 0])):
        for labels in ("exact", "empirical"):
            found = compute_fisher_information(model, [(x, target)], CRITERIA[family], labels=labels)
            assert reference.error(found, reference.fisher(model, [(x, target)], labels, family)) < 1e-5


def test_functions_name_the_same_likelihoods():
    for family, function in (("categorical", F.cross_entropy), ("Bernoulli", F.binary_cross_entropy_with_logits), ("Gaussian", F.mse_loss)):
        model, (x, y) = small_mlp(), data(6, family)
        found = compute_fisher_information(model, [(x, y)], function)
        assert reference.error(found, reference.fisher(model, [(x, y)], family=family)) < 1e-5


def test_any_other_criterion_gives_the_empirical_fisher():
    """A hinge loss, by a plain loop over the examples."""
    def hinge(z, y):
        return F.multi_margin_loss(z, y)

    model, (x, y) = small_mlp(), data(15)
    found = compute_fisher_information(model, TensorLoader(x, y, 4), hinge, labels="empirical")
    exact, total = copy.deepcopy(model).double(), None
    for i in range(15):
        grads = torch.autograd.grad(hinge(exact(x[i:i + 1].double()), y[i:i + 1]), list(exact.parameters()))
        total = [g**2 for g in grads] if total is None else [t + g**2 for t, g in zip(total, grads)]
    assert reference.error(found, {name: t / 15 for (name, _), t in zip(exact.named_parameters(), total)}) < 1e-5


def test_byte_labels_are_class_indices_too():
    model, (x, y) = small_mlp(), data(9)
    for labels in ("exact", "sampled", "empirical"):
        a, b = (compute_fisher_information(model, [(x, target)], nn.CrossEntropyLoss(), labels=labels) for target in (y, y.byte()))
        assert all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------- cost


def test_n_samples_draws_uniformly_and_without_replacement():
    """With one-hot inputs the Fisher of a linear model shows which examples were drawn. Inclusion has probability 1/3 each."""
    model, x, y = nn.Linear(6, 1, bias=False), torch.eye(6), torch.zeros(6, 1)
    counts, runs = torch.zeros(6), 400
    for seed in range(runs):
        drawn = compute_fisher_information(model, TensorLoader(x, y, 4, shuffle=False), nn.MSELoss(), n_samples=2, seed=seed)["weight"][0]
        assert sorted(drawn.tolist()) == pytest.approx([0, 0, 0, 0, 1, 1])  # 2 x_j^2 over 2 examples
        counts += drawn
    deviation = (counts - runs / 3) / math.sqrt(runs * (1 / 3) * (2 / 3))
    assert deviation.abs().max() < 5


def test_n_samples_draws_alike_from_batches_of_several_lengths():
    """Sequences of 2 and of 3 tokens, each of its own word, so that the embedding's Fisher shows which were drawn."""
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(6, 1)

        def forward(self, x):
            return self.words(x).sum(1)

    torch.manual_seed(0)
    model, y, counts, runs = Bag(), torch.zeros(3, 1), torch.zeros(6), 400
    batches = [(torch.tensor([[0] * 2, [1] * 2, [2] * 2]), y), (torch.tensor([[3] * 3, [4] * 3, [5] * 3]), y)]
    for seed in range(runs):
        drawn = compute_fisher_information(model, batches, nn.MSELoss(), n_samples=2, seed=seed)["words.weight"][:, 0]
        drawn /= torch.tensor([4.0] * 3 + [9.0] * 3)  # 2 (length)^2 over 2 examples
        assert sorted(drawn.tolist()) == pytest.approx([0, 0, 0, 0, 1, 1])
        counts += drawn
    assert ((counts - runs / 3) / math.sqrt(runs * (1 / 3) * (2 / 3))).abs().max() < 5


@pytest.mark.parametrize("n_samples", [None, 8])
def test_a_loader_may_fill_one_buffer_again_and_again(n_samples):
    model, (x, y) = small_mlp(), data(20)

    def loader():
        buffer = torch.empty_like(x[:5])
        for rows in torch.arange(20).split(5):
            buffer.copy_(x[rows])
            yield buffer, y[rows]

    found, wanted = (compute_fisher_information(model, batches, nn.CrossEntropyLoss(), n_samples=n_samples)
                     for batches in (loader(), TensorLoader(x, y, 5, shuffle=False)))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_n_samples_repeats_and_more_than_all_is_all():
    model, (x, y) = small_mlp(), data(20)
    def fisher(n, **how):
        return compute_fisher_information(model, TensorLoader(x, y, 6, shuffle=False), nn.CrossEntropyLoss(), n_samples=n, **how)
    assert torch.equal(fisher(7)["0.weight"], fisher(7)["0.weight"])
    assert not torch.allclose(fisher(7)["0.weight"], fisher(7, seed=1)["0.weight"])
    assert reference.error(fisher(99), reference.fisher(model, [(x, y)])) < 1e-5


class Watched(nn.Module):
    """Notes how many examples come at once."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.sizes = inner, []

    def forward(self, x):
        self.sizes.append(len(x))
        return self.inner(x)


@pytest.mark.parametrize("layer, out", [(nn.Conv1d(1, 4, 3, padding=1), 200), (nn.ConvTranspose1d(1, 4, 3, padding=1), 200)])
def test_max_bytes_bounds_a_chunk_and_not_the_result(layer, out):
    """Few weights, long activations: what is held at once must follow the activations, on the closed-form route and the general one."""
    torch.manual_seed(0)
    model = Watched(nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(4 * out, 2)))
    x, y = torch.randn(40, 1, out), torch.randint(2, (40,))
    truth, max_bytes = reference.fisher(model.inner, [(x, y)]), 10 * 4 * 4 * out * 4  # ten tanh layers' worth of examples
    for limit in (2**26, max_bytes, 1):
        model.sizes.clear()
        found = compute_fisher_information(model, [(x, y)], nn.CrossEntropyLoss(), max_bytes=limit)
        assert reference.error({name.removeprefix("inner."): f for name, f in found.items()}, truth) < 1e-5
        if limit <= max_bytes:
            assert max(model.sizes[4:]) <= 10, "more activations at once than max_bytes holds"


# ---------------------------------------------------------------- no trace


class Nervous(nn.Module):
    """Everything that could be disturbed: dropout, batch statistics, buffers that forward replaces or changes, a train() that draws."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(4, 3))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.register_buffer("replaced", torch.zeros(1))
        self.register_buffer("changed", torch.zeros(1))
        self.bare, self.calls, self.fail_at = nn.Parameter(torch.randn(3)), 0, math.inf

    def train(self, mode=True):
        torch.rand(2)
        return super().train(mode)

    def forward(self, x):
        self.calls += 1
        if self.calls > self.fail_at:
            raise RuntimeError("forward broke")
        self.replaced = self.replaced + 1
        self.changed += 1
        torch.rand(3)
        return self.body(x) + self.bare


def state(model):
    tensors = {name: t.clone() for name, t in (*model.named_parameters(), *model.named_buffers())}
    return {"tensors": tensors, "identities": [id(t) for t in (*model.parameters(), *model.buffers())],
            "modes": [m.training for m in model.modules()], "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
            "grad ids": [id(p.grad) for p in model.parameters()], "requires_grad": [p.requires_grad for p in model.parameters()],
            "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
            "random": torch.get_rng_state(), "grad mode": torch.is_grad_enabled(),
            "threads": torch.get_num_threads(), "default": torch.get_default_dtype()}


def assert_same(a, b):
    for key in a:
        assert same(a[key], b[key]), f"{key} was changed"


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) and torch.is_tensor(b) else a == b


def interrupted_loader(x, y, error):
    yield x[:4], y[:4]
    torch.rand(5)
    yield x[4:8], y[4:8]
    if error is not None:
        raise error


@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), RuntimeError("loader broke"), "forward"])
@pytest.mark.parametrize("labels", ["exact", "sampled", "empirical"])
def test_nothing_of_the_model_is_changed(labels, error):
    """Modes module by module, gradients, buffers, hooks, requires_grad, random state; also when it breaks half-way."""
    torch.manual_seed(0)
    model, (x, y) = Nervous(), data(8)
    F.cross_entropy(model(x), y).backward()
    model.bare.grad = None
    model.body[1].eval()  # mixed modes: a frozen normalisation in a model that trains
    model.frozen.eval()
    hook = model.body[0].register_forward_hook(lambda *_: None)
    if error == "forward":
        model.fail_at = model.calls + 9
    before = state(model)
    loader = interrupted_loader(x, y, error if isinstance(error, BaseException) else None)
    if error is None:
        compute_fisher_information(model, loader, nn.CrossEntropyLoss(), labels=labels, max_bytes=1)
    else:
        with pytest.raises(type(error) if isinstance(error, BaseException) else RuntimeError):
            compute_fisher_information(model, loader, nn.CrossEntropyLoss(), labels=labels, max_bytes=1)
    assert_same(before, state(model))
    hook.remove()


def test_routes_leave_no_trace_either():
    torch.manual_seed(0)
    model, (x, y) = Nervous(), data(8)
    before = state(model)
    assert set(fisher_routes(model, [(x, y)])) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert_same(before, state(model))


def test_works_under_no_grad_and_returns_plain_tensors():
    model, (x, y) = small_mlp(), data(8)
    with torch.no_grad():
        found = compute_fisher_information(model, [(x, y)], nn.CrossEntropyLoss())
    assert reference.error(found, reference.fisher(model, [(x, y)])) < 1e-5
    assert all(not f.requires_grad and f.grad_fn is None and (f >= 0).all() for f in found.values())


def test_evaluation_mode_is_what_counts():
    """Dropout is off and batch statistics are the stored ones, whatever mode the model is in."""
    torch.manual_seed(0)
    model, (x, y) = Nervous(), data(8)
    truth = reference.fisher(model, [(x, y)])
    for mode in (True, False):
        assert reference.error(compute_fisher_information(model.train(mode), [(x, y)], nn.CrossEntropyLoss()), truth) < 1e-5


def test_simple_mlp_goes_by_closed_form():
    model = SimpleMLP(6, (5, 4), 3)
    assert set(fisher_routes(model, [(torch.randn(4, 2, 3), torch.zeros(4, dtype=torch.long))]).values()) == {"closed form"}
