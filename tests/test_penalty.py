"""The penalty lambda/2 sum F (theta - theta*)^2: its value, its gradient, and what it covers."""

import pytest
import torch
from torch import nn

from ewc_utils import SimpleMLP, ewc_loss, take_anchor


def springs(model, seed=0):
    """A random Fisher and a random anchor away from the weights."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda p: torch.rand(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)  # noqa: E731
    fisher = {name: draw(p) for name, p in model.named_parameters()}
    return fisher, {name: p.detach() + draw(p) - 0.5 for name, p in model.named_parameters()}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return SimpleMLP(5, (4, 3), 2).double()


def test_penalty_equals_a_value_worked_out_by_hand():
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0]]))
        model.bias.fill_(-1.0)
    fisher = {"weight": torch.tensor([[3.0, 0.5]]), "bias": torch.tensor([2.0])}
    anchor = {"weight": torch.tensor([[0.0, 4.0]]), "bias": torch.tensor([-1.5])}
    # 4/2 * (3 * 1^2 + 0.5 * (-2)^2 + 2 * 0.5^2) = 2 * 5.5
    assert ewc_loss(model, fisher, anchor, 4).item() == 11.0


def test_penalty_and_its_gradient_are_zero_at_the_anchor(model):
    fisher, _ = springs(model)
    loss = ewc_loss(model, fisher, take_anchor(model), 1e6)
    loss.backward()
    assert loss.item() == 0
    assert all((p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize("lambda_ewc", [0, 0.3, 1000])
def test_gradient_is_lambda_f_times_the_displacement(model, lambda_ewc):
    fisher, anchor = springs(model)
    ewc_loss(model, fisher, anchor, lambda_ewc).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, lambda_ewc * fisher[name] * (p.detach() - anchor[name]), rtol=1e-12, atol=0)


def test_hessian_of_the_penalty_is_lambda_times_the_diagonal_fisher():
    model = nn.Linear(3, 2, bias=False).double()
    fisher, anchor = springs(model)
    grad, = torch.autograd.grad(ewc_loss(model, fisher, anchor, 0.7), model.weight, create_graph=True)
    rows = [torch.autograd.grad(g, model.weight, retain_graph=True)[0].flatten() for g in grad.flatten()]
    torch.testing.assert_close(torch.stack(rows), 0.7 * fisher["weight"].flatten().diag())


def test_derivatives_of_every_order_agree_with_finite_differences():
    model = nn.Linear(3, 2).double()
    fisher, anchor = springs(model)

    def penalty(weight, bias):
        model._parameters.update(weight=weight, bias=bias)
        return ewc_loss(model, fisher, anchor, 0.7).sin()  # its own derivative goes through the penalty's twice

    inputs = [p.detach().clone().requires_grad_() for p in model.parameters()]
    assert torch.autograd.gradcheck(penalty, inputs) and torch.autograd.gradgradcheck(penalty, inputs)


def test_a_graph_that_is_kept_gives_the_same_gradient_again(model):
    fisher, anchor = springs(model)
    loss = ewc_loss(model, fisher, anchor, 2.0)
    first, second, third = (torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for _ in range(3))
    assert all(map(torch.equal, first, second))
    for g in first:
        g.zero_()  # nobody else's
    assert all(map(torch.equal, second, third))
    fourth = torch.autograd.grad(3 * loss, list(model.parameters()))
    assert all(torch.allclose(3 * a, b) for a, b in zip(second, fourth))


def test_gradients_of_several_losses_at_once():
    model = nn.Linear(3, 2).double()
    fisher, anchor = springs(model)
    losses = torch.stack([model.weight.sum(), ewc_loss(model, fisher, anchor, 2.0)])
    both, = torch.autograd.grad(losses, model.weight, torch.eye(2).double(), is_grads_batched=True, retain_graph=True)
    alone, = torch.autograd.grad(losses[1], model.weight)
    torch.testing.assert_close(both, torch.stack([torch.ones_like(alone), alone]))


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16), (torch.float64, torch.float32)])
def test_gradient_is_the_same_where_it_is_to_be_differentiated_again(dtypes):
    model = nn.Linear(3, 2).to(dtypes[0])
    fisher, anchor = springs(model)
    fisher = {name: f.to(dtypes[1]) for name, f in fisher.items()}
    loss = ewc_loss(model, fisher, anchor, 1e4)
    plain, again = (torch.autograd.grad(loss, list(model.parameters()), create_graph=create, retain_graph=True) for create in (False, True))
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(plain, again))


def test_a_fisher_and_an_anchor_that_are_learned_get_their_gradients():
    model = nn.Linear(3, 2, bias=False).double()
    fisher, anchor = springs(model)
    f, a = fisher["weight"].requires_grad_(), anchor["weight"].detach().requires_grad_()
    loss = ewc_loss(model, {"weight": f}, {"weight": a}, 2.0)
    loss.backward()
    way = (model.weight - a).detach()
    torch.testing.assert_close(f.grad, way.square())
    torch.testing.assert_close(a.grad, -2 * f.detach() * way)
    torch.testing.assert_close(model.weight.grad, 2 * f.detach() * way)


def test_penalty_of_weights_that_lie_otherwise_in_memory():
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    fisher = {name: torch.rand(p.shape) for name, p in model.named_parameters()}
    anchor = {name: torch.rand(p.shape) for name, p in model.named_parameters()}
    ewc_loss(model, fisher, anchor, 2.0).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, 2 * fisher[name] * (p.detach() - anchor[name]))


def test_anchor_does_not_move_with_the_weights(model):
    anchor = take_anchor(model)
    kept = {name: t.clone() for name, t in anchor.items()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert all(torch.equal(anchor[name], kept[name]) and not anchor[name].requires_grad for name in kept)
    ones = {name: torch.ones_like(t) for name, t in anchor.items()}
    assert ewc_loss(model, ones, anchor, 2.0).item() == pytest.approx(sum(p.numel() for p in model.parameters()))


@pytest.mark.parametrize("names", ["layers.1.weight", ["layers.1.weight"], ("layers.3.bias", "layers.1.weight")])
def test_penalty_covers_only_the_named_parameters(model, names):
    fisher, anchor = springs(model)
    ewc_loss(model, fisher, anchor, 1.0, parameters=names).backward()
    chosen = {names} if isinstance(names, str) else set(names)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == chosen


def test_named_parameters_need_no_fisher_for_the_others(model):
    fisher, anchor = springs(model)
    name = "layers.3.weight"
    found = ewc_loss(model, {name: fisher[name]}, {name: anchor[name]}, 2.0, parameters=[name])
    d = model.get_parameter(name) - anchor[name]
    torch.testing.assert_close(found, (fisher[name] * d * d).sum())


def test_a_parameter_frozen_since_task_a_is_left_out(model):
    fisher, anchor = springs(model)
    model.layers[1].weight.requires_grad_(False)
    expected = sum((fisher[n] * (p - anchor[n]) ** 2).sum() for n, p in model.named_parameters() if n != "layers.1.weight") / 2
    torch.testing.assert_close(ewc_loss(model, fisher, anchor, 1.0), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_penalty_of_a_narrow_model_with_the_wider_fisher_it_gets(model, dtype):
    fisher, anchor = springs(model.to(dtype))
    wide = {name: f.float() for name, f in fisher.items()}  # compute_fisher_information returns no type below float32
    loss = ewc_loss(model, wide, anchor, 3.0)
    expected = 1.5 * sum((fisher[n].double() * (p.double() - anchor[n].double()) ** 2).sum() for n, p in model.named_parameters())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert all(p.grad.dtype == dtype and p.grad.abs().sum() > 0 for p in model.parameters())


def test_wrapped_models_have_the_plain_names(model):
    fisher, anchor = springs(model)
    expected = ewc_loss(model, fisher, anchor, 2.0)
    for wrapped in (nn.DataParallel(model), torch.compile(model), nn.DataParallel(torch.compile(model))):
        assert torch.equal(ewc_loss(wrapped, fisher, anchor, 2.0), expected)
        assert take_anchor(wrapped).keys() == take_anchor(model).keys()


def test_tied_weights_are_counted_once():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    ones, zeros = {"0.weight": torch.ones(3, 3)}, {"0.weight": torch.zeros(3, 3)}
    torch.testing.assert_close(ewc_loss(model, ones, zeros, 2.0), model[0].weight.square().sum())


def test_penalty_changes_neither_fisher_nor_anchor_nor_weights(model):
    fisher, anchor = springs(model)
    before = [t.clone() for t in (*fisher.values(), *anchor.values(), *model.parameters())]
    ewc_loss(model, fisher, anchor, 5.0).backward()
    assert all(map(torch.equal, before, (*fisher.values(), *anchor.values(), *model.parameters())))
