"""The Kronecker-factored Fisher: against dense matrices that are small enough to write down."""

import copy

import pytest
import torch
from torch import nn

from ewc_utils import SimpleMLP, compute_fisher_information, compute_kronecker_fisher, nearest_kronecker_sum, take_anchor, train_with_ewc

CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(hidden=3, seed=0):
    torch.manual_seed(seed)
    model = SimpleMLP(4, hidden, 3).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)  # probabilities away from uniform
    return model


def flat(model, layer, tensors=None):
    """[weight bias] of a layer as one vector, row after row: element o * (in + 1) + i."""
    tensors = dict(model.named_parameters()) if tensors is None else tensors
    return torch.cat([tensors[f"{layer}.weight"], tensors[f"{layer}.bias"].unsqueeze(1)], 1).flatten()


def dense_fisher(model, layer, x):
    """The layer's full Fisher block by definition: mean over x, sum over classes, p_c s s^T with s = d log p_c / d theta."""
    weight, bias = (model.get_parameter(f"{layer}.{own}") for own in ("weight", "bias"))
    total = 0
    for row in x:
        logs = model(row[None]).log_softmax(1)[0]
        for log in logs:
            s = torch.cat([g.reshape(len(weight), -1) for g in torch.autograd.grad(log, [weight, bias], retain_graph=True)], 1).flatten()
            total = total + log.detach().exp() * torch.outer(s, s)
    return total / len(x)


def kron(factors):
    a, g = factors
    return torch.kron(g, a)


# ---------------------------------------------------------------- the factors


@pytest.mark.parametrize("layer", ["layers.1", "layers.3", "layers.5"])
def test_one_example_gives_the_full_fisher_block_exactly(layer):
    model, x = network((3, 2)), draw(1, 4)
    found = compute_kronecker_fisher(model, [(x, torch.zeros(1, dtype=torch.long))], CE)
    torch.testing.assert_close(kron(found[layer]), dense_fisher(model, layer, x), rtol=1e-9, atol=1e-12)


def test_one_linear_layer_with_a_gaussian_output_is_exact_for_any_data():
    """The gradients of its outputs do not depend on the input: F is the Hessian 2 I (x) mean [x 1][x 1]^T of the squared error."""
    model, x, y = nn.Sequential(nn.Linear(4, 2)).double(), draw(20, 4), draw(20, 2, seed=1)
    found = compute_kronecker_fisher(model, [(x, y)], MSE)
    assert list(found) == ["0"]

    def summed_error(theta):  # log-likelihood of an example: the sum over its outputs
        matrix = theta.view(2, 5)
        return ((x @ matrix[:, :4].T + matrix[:, 4] - y) ** 2).sum() / len(x)

    hessian = torch.autograd.functional.hessian(summed_error, flat(model, "0").detach())
    torch.testing.assert_close(kron(found["0"]), hessian, rtol=1e-9, atol=1e-12)


def test_equal_probabilities_everywhere_make_softmax_regression_exact():
    model, x = nn.Sequential(nn.Linear(4, 3)).double(), draw(20, 4)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()  # p_c = 1/3 for every input, so that G does not depend on it
    found = compute_kronecker_fisher(model, [(x, torch.zeros(20, dtype=torch.long))], CE)
    torch.testing.assert_close(kron(found["0"]), dense_fisher(model, "0", x), rtol=1e-9, atol=1e-12)


def test_factors_are_the_mean_input_and_gradient_products_of_the_definition():
    model, x = network(), draw(30, 4)
    found = compute_kronecker_fisher(model, [(x, torch.zeros(30, dtype=torch.long))], CE)
    inputs = {"layers.1": x, "layers.3": (x @ model.layers[1].weight.T + model.layers[1].bias).clamp(min=0)}
    for layer, a in inputs.items():
        a = torch.cat([a, torch.ones(30, 1, dtype=a.dtype)], 1)
        torch.testing.assert_close(found[layer][0], a.T @ a / 30)
    p = model(x).softmax(1).detach()
    torch.testing.assert_close(found["layers.3"][1], (p.diag_embed() - p.unsqueeze(2) * p.unsqueeze(1)).mean(0))  # covariance of e_y - p


def test_with_many_examples_it_is_nearer_to_the_full_block_than_the_diagonal_is():
    model, x = network(), draw(200, 4)
    found = compute_kronecker_fisher(model, [(x, torch.zeros(200, dtype=torch.long))], CE)
    for layer, (a, g) in found.items():
        dense = dense_fisher(model, layer, x)
        error = (torch.kron(g, a) - dense).norm()
        assert error > 1e-3 * dense.norm()  # an approximation: inputs and gradients are not independent here
        assert error < (dense.diag().diag() - dense).norm()
        assert error < 0.8 * (torch.kron(a, g) - dense).norm()  # the other order is another matrix


def test_diagonal_of_one_example_agrees_with_the_diagonal_fisher():
    model, batch = network((3, 2)), (draw(1, 4), torch.tensor([2]))
    for labels in ("exact", "empirical"):
        factors = compute_kronecker_fisher(model, [batch], CE, labels=labels)
        diagonal = compute_fisher_information(model, [batch], CE, labels=labels)
        for layer, pair in factors.items():
            torch.testing.assert_close(kron(pair).diag(), flat(model, layer, diagonal), rtol=1e-9, atol=1e-12)


def test_sampled_labels_approach_the_exact_factors():
    model, x = network(), draw(10, 4).repeat(2000, 1)
    loader = [(x, torch.zeros(len(x), dtype=torch.long))]
    exact = compute_kronecker_fisher(model, loader, CE)
    sampled = compute_kronecker_fisher(model, loader, CE, labels="sampled", seed=1)
    again = compute_kronecker_fisher(model, loader, CE, labels="sampled", seed=1)
    for layer in exact:
        torch.testing.assert_close(sampled[layer][0], exact[layer][0])
        assert (sampled[layer][1] - exact[layer][1]).norm() < 0.05 * exact[layer][1].norm()
        assert torch.equal(sampled[layer][1], again[layer][1]) and not torch.equal(sampled[layer][1], exact[layer][1])


def test_batch_size_does_not_change_the_factors():
    model, x, y = network(), draw(50, 4), torch.zeros(50, dtype=torch.long)
    whole = compute_kronecker_fisher(model, [(x, y)], CE)
    parts = compute_kronecker_fisher(model, list(zip(x.split(7), y.split(7))), CE)
    for layer in whole:
        for a, b in zip(whole[layer], parts[layer]):
            torch.testing.assert_close(a, b)


def test_ignored_examples_count_in_neither_factor():
    model, x, y = network(), draw(12, 4), torch.arange(12) % 3
    y[::2] = -100
    found, kept = (compute_kronecker_fisher(model, [batch], CE) for batch in ((x, y), (x[1::2], y[1::2])))
    for layer in kept:
        for a, b in zip(found[layer], kept[layer]):
            torch.testing.assert_close(a, b)


def test_a_layer_without_bias_has_no_bias_column():
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
    (a, g), = compute_kronecker_fisher(model, [(draw(5, 4), torch.zeros(5, dtype=torch.long))], CE).values()
    assert a.shape == (4, 4) and g.shape == (3, 3)


def test_computing_it_changes_nothing_of_the_model():
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3))
    model[1].eval()
    state, modes, random = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()], torch.get_rng_state()
    compute_kronecker_fisher(model, [(draw(5, 4).float(), torch.zeros(5, dtype=torch.long))], CE)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters()) and not model[0]._forward_hooks


# ---------------------------------------------------------------- training with it


def task_b(model):
    """Factors with off-diagonal elements, an anchor away from the weights, and one batch of task B."""
    factors = {}
    for k, layer in enumerate(("layers.1", "layers.3")):
        n_out, n_in = model.get_parameter(f"{layer}.weight").shape
        a, g = draw(n_in + 1, n_in + 1, seed=10 + k), draw(n_out, n_out, seed=20 + k)
        factors[layer] = (a @ a.T, g @ g.T)
    anchor = {name: p.detach() + draw(*p.shape, seed=30) for name, p in model.named_parameters()}
    return factors, anchor, [(draw(20, 4, seed=40), torch.arange(20) % 3)]


def sgd_step(model, batches, lr, term=lambda m: 0):
    twin = copy.deepcopy(model)
    for x, y in batches:
        grads = torch.autograd.grad(CE(twin(x), y) + term(twin), list(twin.parameters()))
        with torch.no_grad():
            for p, g in zip(twin.parameters(), grads):
                p.sub_(g, alpha=lr)
    return twin


def trace_penalty(model, factors, anchor, lambda_ewc):
    """lambda/2 sum over layers of tr(G D A D^T), as it is written."""
    total = 0
    for layer, (a, g) in factors.items():
        d = (flat(model, layer) - flat(model, layer, anchor)).view(len(g), len(a))
        total = total + lambda_ewc / 2 * (g @ d @ a @ d.T).trace()
    return total


def test_trace_form_is_the_quadratic_of_the_dense_product():
    model = network()
    factors, anchor, _ = task_b(model)
    dense = sum(0.5 * (d := flat(model, layer) - flat(model, layer, anchor)) @ kron(pair) @ d for layer, pair in factors.items())
    torch.testing.assert_close(trace_penalty(model, factors, anchor, 1.0), dense)


def test_explicit_gradient_is_that_of_the_trace_penalty():
    model = network()
    factors, anchor, batches = task_b(model)
    expected = sgd_step(model, batches * 3, 1e-3, lambda m: trace_penalty(m, factors, anchor, 0.5))
    train_with_ewc(model, batches * 3, CE, torch.optim.SGD(model.parameters(), lr=1e-3), factors, anchor, 0.5)
    for p, q in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("lambda_ewc", [1e-3, 1.0, 1e4, 1e300])
def test_implicit_step_is_a_dense_linear_solve(lambda_ewc):
    model, lr = network(), 0.1
    factors, anchor, batches = task_b(model)
    moved = sgd_step(model, batches, lr)
    train_with_ewc(model, batches, CE, torch.optim.SGD(model.parameters(), lr=lr), factors, anchor, lambda_ewc, penalty="implicit")
    for layer, pair in factors.items():
        dense = torch.eye(len(kron(pair)), dtype=torch.float64) + lr * min(lambda_ewc, 1e30) * kron(pair)
        d = torch.linalg.solve(dense, flat(moved, layer) - flat(moved, layer, anchor))
        torch.testing.assert_close(flat(model, layer), flat(model, layer, anchor) + d, rtol=1e-6, atol=1e-8)


def test_implicit_step_leaves_free_directions_free():
    """A singular factor: what no example of task A excites is not held."""
    model, lr = network(), 0.1
    factors, anchor, batches = task_b(model)
    v = draw(5, seed=50)
    factors["layers.1"] = (torch.outer(v, v), torch.eye(3, dtype=torch.float64))
    moved = sgd_step(model, batches, lr)
    train_with_ewc(model, batches, CE, torch.optim.SGD(model.parameters(), lr=lr), factors, anchor, 1e8, penalty="implicit")
    found, free, fixed = (flat(m, "layers.1", t).view(3, 5) for m, t in ((model, None), (moved, None), (model, anchor)))
    along = torch.outer(v, v) / (v @ v)
    torch.testing.assert_close(found, free - (free - fixed) @ along, rtol=1e-5, atol=1e-5)


def test_a_rate_too_large_for_single_precision_stays_finite():
    model = network()
    factors, anchor, batches = ([*map(to_float, part)] if isinstance(part, list) else to_float(part) for part in task_b(model.float()))
    a = torch.eye(5)
    a[0, 0] = 0  # 0 times infinity must not become NaN
    factors["layers.1"] = (a, torch.eye(3))
    moved = sgd_step(model, batches, 0.1)
    train_with_ewc(model, batches, CE, torch.optim.SGD(model.parameters(), lr=0.1), factors, anchor, 1e200, penalty="implicit")
    torch.testing.assert_close(model.layers[1].weight[:, 0], moved.layers[1].weight[:, 0])
    torch.testing.assert_close(model.layers[1].weight.detach()[:, 1:], anchor["layers.1.weight"][:, 1:])


def to_float(part):
    """The same in single precision, through tuples and dictionaries."""
    if isinstance(part, dict):
        return {name: to_float(value) for name, value in part.items()}
    if isinstance(part, tuple):
        return tuple(map(to_float, part))
    return part.float() if part.is_floating_point() else part


@pytest.mark.parametrize("penalty", ["explicit", "implicit"])
def test_a_bfloat16_model_gets_float32_factors_and_is_pulled_alike(penalty):
    torch.manual_seed(0)
    wide, (x, y) = SimpleMLP(6, 5, 3), (torch.randn(60, 6), torch.randint(3, (60,)))
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        model, data = copy.deepcopy(wide).to(dtype), [(x.to(dtype), y)]
        factors = compute_kronecker_fisher(model, data, nn.CrossEntropyLoss())
        assert all(f.dtype == torch.float32 for pair in factors.values() for f in pair)
        anchor = {name: p + 0.5 for name, p in take_anchor(model).items()}
        train_with_ewc(model, data, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), 0.2), factors, anchor, 2.0, epochs=9, penalty=penalty)
        results.append(torch.cat([p.float().flatten() for p in model.parameters()]))
    start = torch.cat([p.detach().flatten() for p in wide.parameters()])
    assert (results[1] - results[0]).norm() < 0.05 * (results[0] - start).norm()


def test_every_sums_the_rates_of_each_parameter_group():
    model = network()
    factors, anchor, batches = task_b(model)
    groups = lambda m: [{"params": list(m.layers[1].parameters()), "lr": 0.2}, {"params": list(m.layers[3].parameters()), "lr": 0.05}]  # noqa: E731
    twin = copy.deepcopy(model)
    train_with_ewc(twin, batches * 4, CE, torch.optim.SGD(groups(twin), lr=1.0), None, None, 0)
    train_with_ewc(model, batches * 4, CE, torch.optim.SGD(groups(model), lr=1.0), factors, anchor, 2.0, penalty="implicit", every=4)
    for layer, lr in (("layers.1", 0.2), ("layers.3", 0.05)):
        dense = torch.eye(len(kron(factors[layer])), dtype=torch.float64) + 4 * lr * 2.0 * kron(factors[layer])
        d = torch.linalg.solve(dense, flat(twin, layer) - flat(twin, layer, anchor))
        torch.testing.assert_close(flat(model, layer), flat(model, layer, anchor) + d, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("penalty", ["explicit", "implicit"])
def test_two_regressions_of_any_design_land_on_the_joint_solution(penalty):
    """Where the diagonal needs an orthogonal design, the full block of a linear layer needs none."""
    xa, xb = draw(90, 3) @ draw(3, 3, seed=1), draw(60, 3, seed=2)
    ya, yb = xa @ draw(3, 1, seed=3) + draw(90, 1, seed=4), xb @ draw(3, 1, seed=5) + draw(60, 1, seed=6)
    ones = lambda x: torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)  # noqa: E731
    model, solution = nn.Sequential(nn.Linear(3, 1)).double(), torch.linalg.lstsq(ones(xa), ya).solution.flatten()
    with torch.no_grad():
        model[0].weight.copy_(solution[:3])
        model[0].bias.copy_(solution[3])
    factors, anchor = compute_kronecker_fisher(model, [(xa, ya)], MSE), take_anchor(model)
    joint = torch.linalg.lstsq(torch.cat([ones(xa), ones(xb)]), torch.cat([ya, yb])).solution.flatten()
    train_with_ewc(model, [(xb, yb)], MSE, torch.optim.SGD(model.parameters(), lr=0.03), factors, anchor, 90 / 60, epochs=1000, penalty=penalty)
    torch.testing.assert_close(flat(model, "0").detach(), joint, rtol=1e-6, atol=1e-8)
    diagonal = compute_fisher_information(model, [(xa, ya)], MSE)
    model.load_state_dict(anchor)
    train_with_ewc(model, [(xb, yb)], MSE, torch.optim.SGD(model.parameters(), lr=0.03), diagonal, anchor, 90 / 60, epochs=1000, penalty=penalty)
    assert (flat(model, "0") - joint).abs().max() > 1e-3


def test_lambda_zero_is_plain_training_bit_for_bit():
    model = network()
    factors, anchor, batches = task_b(model)
    twin = copy.deepcopy(model)
    train_with_ewc(model, batches, CE, torch.optim.SGD(model.parameters(), lr=0.1), factors, anchor, 0)
    train_with_ewc(twin, batches, CE, torch.optim.SGD(twin.parameters(), lr=0.1), None, None, 0)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


@pytest.mark.filterwarnings("error")
def test_stability_warning_goes_by_the_largest_eigenvalue():
    model = nn.Sequential(nn.Linear(2, 2, bias=False)).double()
    x, y = torch.zeros(4, 2, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.float64)
    a, g = draw(2, 2, seed=1), draw(2, 2, seed=2)
    factors, anchor = {"0": (a @ a.T, g @ g.T)}, {"0.weight": torch.zeros(2, 2, dtype=torch.float64)}
    top = torch.linalg.eigvalsh(kron(factors["0"]))[-1].item()
    with pytest.warns(UserWarning, match="penalty='implicit'"):
        train_with_ewc(model, [(x, y)], MSE, torch.optim.SGD(model.parameters(), lr=1.0), factors, anchor, 2.02 / top)
    model.load_state_dict({"0.weight": torch.ones(2, 2)})
    train_with_ewc(model, [(x, y)] * 3, MSE, torch.optim.SGD(model.parameters(), lr=1.0), factors, anchor, 1.98 / top)  # warnings are errors


def test_parameters_chooses_whole_layers():
    model = network()
    factors, anchor, batches = task_b(model)
    args = model, batches, CE, torch.optim.SGD(model.parameters(), lr=0.1), factors, anchor, 1.0
    moved = sgd_step(model, batches, 0.1)
    train_with_ewc(*args, penalty="implicit", parameters=["layers.3.weight", "layers.3.bias"])
    assert all((model.get_parameter(name) - q).abs().max() < 1e-12 for name, q in moved.named_parameters() if "layers.1" in name)
    assert all((model.get_parameter(name) - q).abs().max() > 1e-3 for name, q in moved.named_parameters() if "layers.3" in name)
    with pytest.raises(ValueError, match=r"no whole layer for \['layers.3.bias'\]"):
        train_with_ewc(*args, parameters=["layers.3.weight"])


# ---------------------------------------------------------------- the nearest product of a sum


def dense_nearest(products, n_in, n_out):
    """Van Loan & Pitsianis: reorder the dense sum so that a product is a rank-1 matrix, then truncate its SVD."""
    dense = sum(map(kron, products))
    rearranged = dense.view(n_out, n_in, n_out, n_in).permute(0, 2, 1, 3).reshape(n_out**2, n_in**2)
    u, s, v = torch.linalg.svd(rearranged, full_matrices=False)
    return s[0] * torch.kron(u[:, 0].view(n_out, n_out), v[0].view(n_in, n_in)), dense


def covariance(n, seed, scale=1.0):
    m = draw(n, n, seed=seed)
    return scale * m @ m.T


@pytest.mark.parametrize("scale", [1e-12, 1.0, 30.0])
@pytest.mark.parametrize("seed", [0, 100, 200])
def test_nearest_product_of_a_sum_is_that_of_the_dense_svd(seed, scale):
    first, second = ((covariance(4, seed + k), covariance(3, seed + k + 10, scale * (k + 1))) for k in (0, 1))
    (a, g), = nearest_kronecker_sum({"layer": first}, {"layer": second}).values()
    expected, dense = dense_nearest((first, second), 4, 3)
    torch.testing.assert_close(kron((a, g)), expected, rtol=1e-6, atol=1e-9 * dense.abs().max().item())
    assert (kron((a, g)) - dense).norm() <= (1 + 1e-9) * (expected - dense).norm()
    for factor in (a, g):
        assert (factor - factor.T).abs().max() < 1e-12 * factor.norm() and torch.linalg.eigvalsh(factor)[0] > -1e-12 * factor.norm()


def test_tiny_factors_in_single_precision_do_not_vanish():
    """A well-fitted task has G of about 1e-22: its squares leave the range of float32."""
    first, second = ((covariance(4, k).float(), covariance(3, k + 10, 1e-22).float()) for k in (0, 1))
    (a, g), = nearest_kronecker_sum({"layer": first}, {"layer": second}).values()
    expected, _ = dense_nearest([(x.double(), y.double() * 1e22) for x, y in (first, second)], 4, 3)
    torch.testing.assert_close(kron((a.double(), g.double() * 1e22)), expected, rtol=1e-3, atol=1e-4)


def test_sums_of_products_that_share_a_factor_are_exact():
    a, g, g2 = covariance(4, 1), covariance(3, 2), covariance(3, 3)
    found = nearest_kronecker_sum({"layer": (a, g)}, {"layer": (a, g2)})
    torch.testing.assert_close(kron(found["layer"]), torch.kron(g + g2, a))


# ---------------------------------------------------------------- bad input


def test_a_single_linear_layer_may_be_the_model():
    torch.manual_seed(0)
    layer, x, y = nn.Linear(4, 3), torch.randn(9, 4), torch.randint(3, (9,))
    found = []
    for model, name in ((copy.deepcopy(layer), ""), (nn.Sequential(copy.deepcopy(layer)), "0")):
        factors, anchor = compute_kronecker_fisher(model, [(x, y)], nn.CrossEntropyLoss()), take_anchor(model)
        train_with_ewc(model, [(x, 2 - y)] * 9, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), 0.5), factors, anchor, 3.0)
        found.append([*factors[name], *model.parameters()])
    assert all(map(torch.equal, *found)) and not torch.equal(found[0][2], layer.weight)


def test_parameters_outside_linear_layers_are_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"outside nn.Linear layers, \['1.bias', '1.weight'\]: freeze them"):
        compute_kronecker_fisher(model, [(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))], CE)


def test_a_layer_used_twice_or_on_sequences_is_named():
    layer = nn.Linear(3, 3)
    batch = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"layers \['0'\] are not used once"):
        compute_kronecker_fisher(nn.Sequential(layer, layer), [batch], CE)
    with pytest.raises(ValueError, match=r"layers \['0'\] are not used once with one input per example"):
        compute_kronecker_fisher(nn.Sequential(nn.Linear(3, 3), nn.Flatten()), [(torch.zeros(2, 4, 3), batch[1])], CE)


def broken(change):
    model = network()
    factors, anchor, batches = task_b(model)
    factors, anchor = change(dict(factors), dict(anchor))
    return model, batches, CE, torch.optim.SGD(model.parameters(), lr=0.1), factors, anchor, 1.0


@pytest.mark.parametrize("change, match", [
    (lambda f, a: ({"layers.1": f["layers.1"]}, a), r"no whole layer for \['layers.3.bias', 'layers.3.weight'\]"),
    (lambda f, a: (f | {"head": f["layers.1"]}, a), r"layer 'head'"),
    (lambda f, a: (f, None), r"\['layers.1.weight', 'layers.1.bias'\] are not in both"),
    (lambda f, a: (f, {k: v for k, v in a.items() if k != "layers.1.bias"}), r"\['layers.1.bias'\] are not in both"),
    (lambda f, a: (f | {"layers.1": f["layers.1"][::-1]}, a), r"'layers.1, A'.*\(5, 5\).*got \(3, 3\)"),
    (lambda f, a: (f | {"layers.3": (f["layers.3"][0] * float("nan"), f["layers.3"][1])}, a), r"'layers.3, A'.*holds nan"),
    (lambda f, a: (f, a | {"layers.3.bias": torch.zeros(7)}), r"optimal_params\['layers.3.bias'\].*\(3,\).*got \(7,\)"),
], ids=["missing layer", "unknown layer", "no anchor", "part of the anchor", "swapped", "NaN", "shape"])
def test_factors_that_do_not_fit_are_reported_by_name_before_any_step(change, match):
    args = broken(change)
    before = take_anchor(args[0])
    with pytest.raises(ValueError, match=match):
        train_with_ewc(*args)
    assert all(torch.equal(p, before[name]) for name, p in args[0].named_parameters())


def test_an_empty_loader_is_an_error():
    with pytest.raises(ValueError, match="data_loader gave 0 examples"):
        compute_kronecker_fisher(network(), [], CE)
