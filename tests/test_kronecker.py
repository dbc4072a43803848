"""The Kronecker-factored Fisher: against dense matrices that are small enough to write down."""

import copy
import math
from functools import partial

import pytest
import torch
from reference import CE, Net, assert_close, draw, refused, same_bits
from torch import nn
from torch.nn import functional as F

import ewc_utils as ewc
from ewc_utils import SimpleMLP, compute_kronecker_fisher, take_anchor, train_with_ewc

SGD = torch.optim.SGD
AUTOCAST = torch.autocast("cpu", dtype=torch.bfloat16)


def network(*hidden):
    torch.manual_seed(0)
    model = SimpleMLP(4, hidden or 3, 3).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)  # probabilities away from uniform
    return model


def some(n):
    return draw(n, 4), torch.arange(n) % 3


def flat(layer, tensors):
    """[weight bias] of a layer as one vector, row after row: element o * (in + 1) + i."""
    tensors = dict(tensors.named_parameters()) if isinstance(tensors, nn.Module) else tensors
    return torch.cat([tensors[f"{layer}.weight"], tensors[f"{layer}.bias"][:, None]], 1).flatten()


def dense_fisher(model, layer, x):
    """The layer's full Fisher block: mean over x, sum over c, p_c s s^T with s = d log p_c."""
    params, total = [model.get_parameter(f"{layer}.{own}") for own in ("weight", "bias")], 0
    for log in (log for row in x for log in model(row[None]).log_softmax(1)[0]):
        grads = torch.autograd.grad(log, params, retain_graph=True)
        s = torch.cat([grads[0], grads[1][:, None]], 1).flatten()
        total = total + log.detach().exp() * torch.outer(s, s) / len(x)
    return total


def kron(factors):
    return torch.kron(factors[1], factors[0])


def covariance(n, seed, scale=1.0):
    m = draw(n, n, seed=seed)
    return scale * m @ m.T


def test_one_example_gives_the_full_fisher_block_exactly():
    model, batch = network(3, 2), some(1)
    for layer, pair in compute_kronecker_fisher(model, [batch], CE).items():
        wanted = dense_fisher(model, layer, batch[0])
        torch.testing.assert_close(kron(pair), wanted, rtol=1e-9, atol=1e-12)
    diagonal = ewc.compute_fisher_information(model, [batch], CE, labels="empirical")
    for layer, pair in compute_kronecker_fisher(model, [batch], CE, labels="empirical").items():
        wanted = flat(layer, diagonal)
        torch.testing.assert_close(kron(pair).diag(), wanted, rtol=1e-9, atol=1e-12)


def test_the_factors_are_the_mean_products_of_the_definition():
    """Whatever the batch size, and without the examples that are ignored."""
    model, (x, y) = network(), some(30)
    hidden = (x @ model.layers[1].weight.T + model.layers[1].bias).clamp(min=0)
    a, b = (F.pad(t, (0, 1), value=1.0) for t in (x, hidden))
    p = model(x).softmax(1).detach()
    covariance_of_scores = (p.diag_embed() - p[:, :, None] * p[:, None, :]).mean(0)  # of e_y - p
    x, y = torch.cat([x, x + 1]), torch.cat([y, 0 * y - 100])
    for size in (7, 60):
        found = compute_kronecker_fisher(model, list(zip(x.split(size), y.split(size))), CE)
        torch.testing.assert_close(found["layers.1"][0], a.T @ a / 30)
        torch.testing.assert_close(found["layers.3"], (b.T @ b / 30, covariance_of_scores))
    wanted = tuple(f.float() for f in found["layers.3"])
    with AUTOCAST:
        mixed = compute_kronecker_fisher(model.float(), [(x.float(), y)], CE)["layers.3"]
    torch.testing.assert_close(mixed, wanted, rtol=0.1, atol=0.1 * wanted[0].max().item())


def test_sampled_labels_approach_the_exact_factors_and_repeat_by_seed():
    """Without a trace in the model and in the random state, under inference_mode too."""
    model, (x, y) = network(), some(10)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    fisher = partial(compute_kronecker_fisher, model, [(x.repeat(2000, 1), y.repeat(2000))], CE)
    with torch.inference_mode():
        sampled, again, other = (fisher(labels="sampled", seed=seed) for seed in (1, 1, 2))
    assert same_bits(model.state_dict(), state) and torch.equal(torch.get_rng_state(), random)
    assert model.training and all(p.grad is None for p in model.parameters())
    for layer, (a, g) in fisher().items():
        assert all(map(torch.equal, sampled[layer], again[layer]))
        assert not torch.equal(sampled[layer][1], other[layer][1])
        torch.testing.assert_close(sampled[layer][0], a)
        assert 0 < (sampled[layer][1] - g).norm() < 0.05 * g.norm()


def test_without_a_trainable_bias_there_is_no_bias_column():
    """Neither for a layer without one, nor for a frozen one; and training goes on with them."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3, bias=False)).double()
    model[0].bias.requires_grad_(False)
    factors = compute_kronecker_fisher(model, [some(9)], CE)
    assert [len(f) for pair in factors.values() for f in pair] == [4, 3, 3, 3]
    anchor = take_anchor(model)
    args = SGD(model.parameters(), lr=0.1), factors, anchor, 1e9
    train_with_ewc(model, [some(9)] * 3, CE, *args, penalty="implicit")
    assert_close(take_anchor(model), anchor, rtol=0, atol=1e-3)


def test_sums_are_float32_or_wider():
    """Gradients of 1e-4 have products of 1e-8, where float16 has no number but 0."""
    torch.manual_seed(0)
    model, (x, y) = Net(lambda net, x: 1e-4 * net.a(x), a=nn.Linear(4, 3)).half(), some(6)
    narrow = compute_kronecker_fisher(model, [(x.half(), y)], CE)["a"]
    wide = compute_kronecker_fisher(model.double(), [(x.half().double(), y)], CE)["a"]
    for f, wanted in zip(narrow, wide):
        assert (f - wanted).norm() < 0.01 * wanted.norm() and f.dtype == torch.float32


def task_b(model):
    """Factors with off-diagonal elements, an anchor away from the weights, one batch of task B."""
    factors = {"layers.1": (covariance(5, 10), covariance(3, 20))}
    factors["layers.3"] = covariance(4, 11), covariance(3, 21)
    anchor = {name: p.detach() + draw(*p.shape, seed=30) for name, p in model.named_parameters()}
    return factors, anchor, [some(20)]


def dense_penalty(model, factors, anchor, lambda_ewc):
    """lambda/2 sum over layers of d^T (G (x) A) d."""
    moved = {layer: flat(layer, model) - flat(layer, anchor) for layer in factors}
    return lambda_ewc / 2 * sum(d @ kron(factors[layer]) @ d for layer, d in moved.items())


def after_sgd(model, batches, lr):
    twin = copy.deepcopy(model)
    train_with_ewc(twin, batches, CE, SGD(twin.parameters(), lr=lr), None, None, 0)
    return twin


def solved(layer, pair, moved, anchor, rate):
    """theta* + (I + rate F)^-1 (theta - theta*), with the dense matrix F."""
    matrix = torch.eye(len(kron(pair)), dtype=torch.float64) + min(rate, 1e30) * kron(pair)
    fixed = flat(layer, anchor)
    return fixed + torch.linalg.solve(matrix, flat(layer, moved) - fixed)


def test_penalty_gradients_and_explicit_step_are_those_of_the_dense_product(monkeypatch):
    """The energy tr(G D A D^T) needs no eigenvectors, which would cost more than all the rest."""
    model = network()
    factors, anchor, batches = task_b(model)
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", None)
        ewc.ewc_loss(model, factors, anchor, 0.5)
    losses = [penalty(model, factors, anchor, 0.5) for penalty in (ewc.ewc_loss, dense_penalty)]
    torch.testing.assert_close(*losses)
    by_loss, wanted = (torch.autograd.grad(loss, list(model.parameters())) for loss in losses)
    ewc.add_ewc_gradients(model, factors, anchor, 0.5)
    torch.testing.assert_close(by_loss, wanted)
    torch.testing.assert_close(tuple(p.grad for p in model.parameters()), wanted)
    moved = after_sgd(model, batches, 1e-3)
    train_with_ewc(model, batches, CE, SGD(model.parameters(), lr=1e-3), factors, anchor, 0.5)
    for p, free, g in zip(model.parameters(), moved.parameters(), wanted):
        torch.testing.assert_close(p, free - 1e-3 * g)


def test_in_mixed_precision_displacements_are_taken_before_they_are_rounded():
    """The weights are 1e-4 from the anchor, less than bfloat16 can tell. The loss has no pull."""
    model, double = network().float(), network()
    factors, _, [(x, y)] = task_b(double)
    anchor = {name: p.detach() + 1e-4 * draw(*p.shape) for name, p in double.named_parameters()}
    loss = dense_penalty(double, factors, anchor, 5.0)
    pulls = torch.autograd.grad(loss, list(double.parameters()))
    factors = {name: tuple(f.float() for f in pair) for name, pair in factors.items()}
    args = factors, {name: a.float() for name, a in anchor.items()}, 5.0
    with AUTOCAST:
        assert ewc.ewc_loss(model, *args).item() == pytest.approx(loss.item(), rel=0.01)
        ewc.add_ewc_gradients(model, *args)
        for p, pull in zip(model.parameters(), pulls):
            torch.testing.assert_close(p.grad.double(), pull, rtol=0.01, atol=1e-5)
        how = [(x.float(), y)], lambda z, y: 0 * z.sum(), SGD(model.parameters(), lr=1.0), *args
        train_with_ewc(model, *how, penalty="implicit")
    for layer, pair in factors.items():
        wanted = solved(layer, [f.double() for f in pair], double, anchor, 5.0)
        torch.testing.assert_close(flat(layer, model).double(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("lambda_ewc", [0, 1e-3, 1.0, 1e4, 1e300])
def test_the_implicit_step_is_a_dense_linear_solve(lambda_ewc, every):
    """The rates of each group and step add up, and lambda 0 is plain training."""
    model, plain = network(), network()
    (factors, anchor, batches), rates = task_b(model), {"layers.1": 0.2, "layers.3": 0.05}
    for m, penalty in ((model, (factors, anchor, lambda_ewc)), (plain, (None, None, 0))):
        groups = [{"params": m.get_submodule(k).parameters(), "lr": lr} for k, lr in rates.items()]
        args = SGD(groups, lr=1.0), *penalty
        train_with_ewc(m, batches * every, CE, *args, penalty="implicit", every=every)
    assert lambda_ewc or same_bits(model.state_dict(), plain.state_dict())
    for layer, pair in factors.items():
        wanted = solved(layer, pair, plain, anchor, every * rates[layer] * lambda_ewc)
        torch.testing.assert_close(flat(layer, model), wanted, rtol=1e-6, atol=1e-8)


FREE = [(draw(5), 1e8, 0), (torch.eye(5)[2], 1e200, 0), (draw(5), 0.9e10, 1e-9)]


@pytest.mark.parametrize("v, lambda_ewc, below", FREE)
def test_an_implicit_step_of_any_stiffness_leaves_free_directions_free(v, lambda_ewc, below):
    """A singular factor: what no example of task A excites is not held. 0 times inf is no NaN,
    and rounding below 0 does not repel."""
    model, (x, y) = network().to(v.dtype), some(20)
    anchor = {name: p.detach() + 1 for name, p in model.named_parameters()}
    singular = torch.outer(v, v) - below * torch.eye(5, dtype=v.dtype)
    factors = {"layers.1": (singular, torch.eye(3, dtype=v.dtype))}
    factors["layers.3"] = torch.eye(4, dtype=v.dtype), torch.eye(3, dtype=v.dtype)
    batches = [(x.to(v.dtype), y)]
    moved = after_sgd(model, batches, 0.1)
    args = SGD(model.parameters(), lr=0.1), factors, anchor, lambda_ewc
    train_with_ewc(model, batches, CE, *args, penalty="implicit")
    found, free, fixed = (flat("layers.1", t).view(3, 5) for t in (model, moved, anchor))
    wanted = free - (free - fixed) @ torch.outer(v, v) / (v @ v)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    held = flat("layers.3", anchor)
    torch.testing.assert_close(flat("layers.3", model), held, rtol=1e-5, atol=1e-6)


def test_weight_and_bias_of_a_layer_need_one_learning_rate_for_the_implicit_step():
    """Their entries move together. Two groups of one rate are fine."""
    model = network()
    (factors, anchor, batches), (weight, bias, *rest) = task_b(model), model.parameters()
    optimizer = SGD([{"params": [weight, *rest]}, {"params": [bias], "lr": 0.0}], lr=0.1)
    args = batches, CE, optimizer, factors, anchor, 1.0
    with refused(ValueError, "layers.1", "weight", "bias", "one learning rate"):
        train_with_ewc(model, *args, penalty="implicit")
    assert same_bits(model.state_dict(), network().state_dict())
    optimizer.param_groups[1]["lr"] = 0.1
    train_with_ewc(model, *args, penalty="implicit")


@pytest.mark.parametrize("scale", [1e-12, 1.0, 30.0])
@pytest.mark.parametrize("seed", [0, 36, 55])
def test_the_nearest_product_of_a_sum_is_that_of_the_dense_svd(seed, scale):
    """Van Loan & Pitsianis: reorder the sum so that a product has rank 1, and truncate its SVD."""
    first = covariance(4, seed), covariance(3, seed + 10, scale)
    second = covariance(4, seed + 1), covariance(3, seed + 11, 2 * scale)
    found = ewc.nearest_kronecker_sum({"layer": first}, {"layer": second})["layer"]
    dense = kron(first) + kron(second)
    rearranged = dense.view(3, 4, 3, 4).permute(0, 2, 1, 3).reshape(9, 16)
    u, s, v = torch.linalg.svd(rearranged, full_matrices=False)
    wanted = s[0] * torch.kron(u[:, 0].view(3, 3), v[0].view(4, 4))
    torch.testing.assert_close(kron(found), wanted, rtol=1e-6, atol=1e-9 * dense.abs().max().item())
    assert all(torch.linalg.eigvalsh(f)[0] > -1e-12 * f.norm() for f in found)


def test_sums_that_are_products_are_exact_also_of_zeros_and_of_tiny_factors():
    """A well-fitted task has G of about 1e-22: its squares leave the range of float32."""
    a, g, g2 = covariance(4, 1), covariance(3, 2), covariance(3, 3)
    tiny, zero = (g * 1e-22).float(), 0 * g
    cases = [(a, g, g2, g + g2), (a, g, zero, g), (a, zero, zero, zero)]
    cases += [(x.float(), tiny, 2 * tiny, 3 * tiny) for x in (a, 1e-22 * a)]
    for x, one, two, total in cases:
        found = ewc.nearest_kronecker_sum({"layer": (x, one)}, {"layer": (x, two)})["layer"]
        assert [f.dtype for f in found] == [one.dtype] * 2
        found, wanted = (kron([f.double() for f in pair]) for pair in (found, (x, total)))
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6 * wanted.max().item())


def test_models_and_data_that_do_not_serve_are_told_in_plain_words():
    (x, y), linear = some(6), nn.Linear(4, 4).double()
    centred = Net(lambda net, z: z - z.mean(0))
    cases = [
        (nn.Sequential(linear, nn.LayerNorm(4)).double(), x, ("1.weight", "freeze")),
        (nn.Sequential(linear, linear), x, ("0.weight", "once")),
        (Net(lambda net, z: net.a(z) + z @ net.a.weight, a=linear), x, ("a.weight", "once")),
        (nn.Sequential(linear, nn.Flatten()), draw(6, 2, 4), ("0.weight", "once")),
        (linear, x * math.nan, ("x ", "finite")),
        (linear, x[:0], ("data_loader", "0 examples")),
        (nn.Sequential(linear, centred), x, ("no example may influence",)),
    ]
    for model, inputs, words in cases:
        with refused(ValueError, *words):
            compute_kronecker_fisher(model, [(inputs, y[: len(inputs)])], CE)
    with refused(ValueError, "criterion", "plain"):
        compute_kronecker_fisher(linear, [(x, y)], nn.CrossEntropyLoss(label_smoothing=0.1))


def test_factors_that_do_not_fit_are_told_by_name_before_any_step():
    cases = [
        (lambda f, a: f.pop("layers.3"), ("layers.3.weight", "layers.3.bias")),
        (lambda f, a: a.pop("layers.1.bias"), ("layers.1.bias", "optimal_params")),
        (lambda f, a: f["layers.3"][0].mul_(math.nan), ("layers.3", "A", "nan")),
    ]
    model = network()
    for change, words in cases:
        factors, anchor, batches = task_b(model)
        change(factors, anchor)
        with refused(ValueError, *words):
            train_with_ewc(model, batches, CE, SGD(model.parameters(), 0.1), factors, anchor, 1.0)
    assert same_bits(model.state_dict(), network().state_dict())
