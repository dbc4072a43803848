"""The penalty lambda/2 sum F (theta - theta*)^2: its value, its gradient, and what it covers."""

import math

import numpy as np
import pytest
import torch
from reference import Net, assert_close, random_penalty, refused
from torch import nn

from ewc_utils import SimpleMLP, add_ewc_gradients, ewc_loss, take_anchor

W = "layers.1.weight"  # (4, 5)
BOTH_WAYS = pytest.mark.parametrize("way", ["loss", "gradients"])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return SimpleMLP(5, (4, 3), 2).double()


def gradients(model, fisher, anchor, lambda_ewc, way):
    """The penalty's gradients, by autograd or in place on top of a gradient of 1."""
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    if way == "loss":
        ewc_loss(model, fisher, anchor, lambda_ewc).backward()
    else:
        add_ewc_gradients(model, fisher, anchor, lambda_ewc)
    return {name: p.grad - 1 for name, p in model.named_parameters()}


def test_the_penalty_equals_a_value_worked_out_by_hand():
    model = nn.Linear(2, 1)
    nn.utils.vector_to_parameters(torch.tensor([1.0, 2.0, -1.0]), model.parameters())
    fisher = {"weight": torch.tensor([[3.0, 0.5]]), "bias": torch.tensor([2.0])}
    anchor = {"weight": torch.tensor([[0.0, 4.0]]), "bias": torch.tensor([-1.5])}
    # 4/2 * (3 * 1^2 + 0.5 * (-2)^2 + 2 * 0.5^2) = 2 * 5.5
    assert ewc_loss(model, fisher, anchor, 4).item() == 11.0


NUMBERS = 0, 0.3, np.float32(2), np.int64(1000), torch.tensor(2.0), torch.tensor(2)


@BOTH_WAYS
@pytest.mark.parametrize("lambda_ewc", NUMBERS)
def test_the_gradient_is_lambda_f_times_the_displacement(model, lambda_ewc, way):
    """Whatever the order of the weights in memory; and nothing but the gradient is changed."""
    model.layers[1].weight.data = model.layers[1].weight.data.T.contiguous().T
    fisher, anchor = random_penalty(model)
    before = [t.clone() for t in (*fisher.values(), *anchor.values(), *model.parameters())]
    found = gradients(model, fisher, anchor, lambda_ewc, way)
    wanted = {n: lambda_ewc * fisher[n] * (p - anchor[n]) for n, p in take_anchor(model).items()}
    assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    model.zero_grad()  # where there is no gradient, as where there is one
    add_ewc_gradients(model, fisher, anchor, lambda_ewc)
    assert_close({name: p.grad for name, p in model.named_parameters()}, wanted)
    assert all(map(torch.equal, before, (*fisher.values(), *anchor.values(), *model.parameters())))


@BOTH_WAYS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_f_and_lambda_are_multiplied_before_a_narrow_type_sees_them(dtype, way):
    """F = 1e-8 is 0 in float16 and lambda = 1e8 infinite; together they are 1."""
    model = nn.Linear(1, 1, bias=False).to(dtype)
    nn.init.constant_(model.weight, 0.5)
    penalty = {"weight": torch.full((1, 1), 1e-8)}, {"weight": torch.zeros(1, 1, dtype=dtype)}, 1e8
    assert ewc_loss(model, *penalty).item() == pytest.approx(0.125)
    found = gradients(model, *penalty, way)["weight"]
    assert found.dtype == dtype and found.item() == pytest.approx(0.5, rel=0.01)


def test_with_a_scaler_gradients_are_unscaled_first_and_clipped_afterwards(model):
    """As the docstring says: otherwise the penalty would count 128 times less."""
    fisher, anchor = random_penalty(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    wanted = gradients(model, fisher, anchor, 0.3, "loss")
    before, scaler = take_anchor(model), torch.amp.GradScaler("cpu", init_scale=128)
    optimizer.zero_grad()
    scaler.scale(0 * sum(p.sum() for p in model.parameters())).backward()
    scaler.unscale_(optimizer)
    add_ewc_gradients(model, fisher, anchor, 0.3)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    scaler.step(optimizer)
    moved = {name: (before[name] - p) * norm / 0.1 for name, p in take_anchor(model).items()}
    assert_close(moved, wanted, rtol=1e-4, atol=1e-6)
    assert "unscale" in add_ewc_gradients.__doc__


def test_zeros_leave_a_parameter_free_and_a_frozen_one_needs_no_entries(model):
    fisher, anchor = random_penalty(model)
    zeros = fisher | {W: torch.zeros_like(fisher[W])}
    wanted = ewc_loss(model, zeros, anchor, 1.0).item()
    assert wanted < ewc_loss(model, fisher, anchor, 1.0).item()
    assert not gradients(model, zeros, anchor, 1.0, "loss")[W].any()
    model.layers[1].weight.requires_grad_(False)
    assert ewc_loss(model, fisher, anchor, 1.0).item() == wanted
    del fisher[W], anchor[W]
    assert ewc_loss(model, fisher, anchor, 1.0).item() == pytest.approx(wanted)


@BOTH_WAYS
def test_tied_weights_count_once_and_empty_ones_not_at_all(way):
    a, b = (nn.Linear(3, 3, bias=False) for _ in range(2))
    b.weight = a.weight
    model = Net(None, a=a, b=b, e=nn.Parameter(torch.zeros(3, 0)))
    ones, zeros = ({"a.weight": t(3, 3), "e": t(3, 0)} for t in (torch.ones, torch.zeros))
    torch.testing.assert_close(ewc_loss(model, ones, zeros, 2.0), a.weight.square().sum())
    wanted = {"a.weight": 2 * a.weight.detach(), "e": torch.zeros(3, 0)}
    assert_close(gradients(model, ones, zeros, 2.0, way), wanted)


NAN, INF = math.nan, math.inf
BAD_LAMBDAS = [-1, -1e-9, NAN, INF, np.float64(NAN), torch.tensor(-1.0), None, "1"]
F, A = "fisher_dict", "optimal_params"


def with_entry(value):
    return torch.ones(4, 5).index_put((torch.tensor(2), torch.tensor(3)), torch.tensor(value))


LACKS = "lacks", "it has", "pad", "rename", "freeze"  # what to do is told, too
CHANGES = {  # the change of a dictionary, what the error must name
    "no tensor": (lambda d: d | {W: [1.0]}, (W, "tensor", "[1.0]")),
    "another shape": (lambda d: d | {W: torch.ones(5, 4)}, (W, "(4, 5)", "(5, 4)")),
    "another device": (lambda d: d | {W: d[W].to("meta")}, (W, "cpu", "meta", ".to(device)")),
    "NaN": (lambda d: d | {W: with_entry(NAN)}, (W, "nan", "finite")),
    "infinity": (lambda d: d | {W: with_entry(INF)}, (W, "inf", "finite")),
    "a layer that is new": (lambda d: {k: d[k] for k in d if k != W}, (W, *LACKS)),
    "a wrapper's prefix": (lambda d: {f"module.{k}": d[k] for k in d}, ("module." + W, *LACKS)),
}


@BOTH_WAYS
@pytest.mark.parametrize("argument", [F, A])
@pytest.mark.parametrize("change", CHANGES)
def test_an_entry_that_does_not_fit_is_told_by_name(model, change, argument, way):
    given, (change, words) = dict(zip((F, A), random_penalty(model))), CHANGES[change]
    given[argument] = change(given[argument])
    with refused(ValueError, argument, *words):
        gradients(model, *given.values(), 1.0, way)


@BOTH_WAYS
def test_other_mistakes_are_told_by_name(model, way):
    fisher, anchor = random_penalty(model)
    for lambda_ewc in BAD_LAMBDAS:
        with refused((ValueError, TypeError), "lambda_ewc", repr(lambda_ewc)):
            gradients(model, fisher, anchor, lambda_ewc, way)
    with refused(ValueError, F, W, "-0.25", ">= 0"):
        gradients(model, fisher | {W: with_entry(-0.25)}, anchor, 1.0, way)
    for live in (model.state_dict(), dict(model.named_parameters())):  # they move with the weights
        with refused(ValueError, A, "live", "take_anchor"):
            gradients(model, fisher, live, 1.0, way)
    for given, argument in (((None, anchor), F), ((fisher, [1, 2]), A)):
        with refused(TypeError, argument, "dict"):
            gradients(model, *given, 1.0, way)
