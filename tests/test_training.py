"""Training with the penalty: against a loop written by hand, closed forms, and problems whose answer is known."""

import copy
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, TensorDataset

from ewc_utils import SimpleMLP, TensorLoader, compute_fisher_information, ewc_loss, take_anchor, train_with_ewc

CE = nn.CrossEntropyLoss()
OPTIMIZERS = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "weight decay": lambda ps: torch.optim.SGD(ps, lr=0.1, weight_decay=0.3),
    "rates": lambda ps: torch.optim.SGD([{"params": [p], "lr": 0.1 / (i + 1)} for i, p in enumerate(ps)]),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9),
    "Nesterov": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": lambda ps: torch.optim.Adam(ps, lr=0.01),
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.1),
}


def data(n=70, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=generator, dtype=torch.float64), torch.randint(0, 3, (n,), generator=generator)


def batches(size=10, n=70):
    x, y = data(n)
    return list(zip(x.split(size), y.split(size)))


def network(seed=0):
    torch.manual_seed(seed)
    return SimpleMLP(6, (5, 4), 3).double()


def springs(model, scale=1.0):
    """A random Fisher and an anchor away from the weights."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda p: torch.rand(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)  # noqa: E731
    fisher = {name: scale * draw(p) for name, p in model.named_parameters()}
    return fisher, {name: p.detach() + draw(p) - 0.5 for name, p in model.named_parameters()}


def by_hand(model, loader, criterion, optimizer, *, penalty=None, epochs=1, scheduler=None, after=None):
    """The textbook loop. Returns the weights before the first step and after every step, and each batch's own loss."""
    model.train()
    weights, losses = [copy.deepcopy(model.state_dict())], []
    for _ in range(epochs):
        for x, y in loader:
            loss = criterion(model(x), y)
            losses.append(loss.item())
            if penalty is not None:
                loss = loss + penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if after is not None:
                after(len(losses))
            if scheduler is not None:
                scheduler.step()
            weights.append(copy.deepcopy(model.state_dict()))
    return weights, losses


def assert_same(model, state, **tolerance):
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], **(tolerance or {"rtol": 1e-9, "atol": 1e-11}), msg=lambda m: f"{name}: {m}")


def same_bits(model, state):
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# ---------------------------------------------------------------- against the loop written by hand


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_explicit_step_equals_a_loop_with_ewc_loss_as_a_term(name):
    model, twin = network(), network()
    fisher, anchor = springs(model)
    losses = train_with_ewc(model, batches(), CE, OPTIMIZERS[name](model.parameters()), fisher, anchor, 3.0, epochs=3)
    weights, own = by_hand(twin, batches(), CE, OPTIMIZERS[name](twin.parameters()), epochs=3,
                           penalty=lambda: ewc_loss(twin, fisher, anchor, 3.0))
    assert_same(model, weights[-1])
    assert losses == pytest.approx([sum(own[i:i + 7]) / 7 for i in (0, 7, 14)], rel=1e-9)  # L_B alone, without the penalty


@pytest.mark.parametrize("everywhere", [False, True])
def test_explicit_gradient_is_there_for_a_hook_that_clips_it(everywhere):
    def clip(optimizer, *_):
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.5)

    model, twin = network(), network()
    fisher, anchor = springs(model)
    optimizers = [OPTIMIZERS["SGD"](m.parameters()) for m in (model, twin)]
    hooks = [register_optimizer_step_pre_hook(clip)] if everywhere else [optimizer.register_step_pre_hook(clip) for optimizer in optimizers]
    train_with_ewc(model, batches(), CE, optimizers[0], fisher, anchor, 3.0)
    weights, _ = by_hand(twin, batches(), CE, optimizers[1], penalty=lambda: ewc_loss(twin, fisher, anchor, 3.0))
    for hook in hooks:
        hook.remove()
    assert_same(model, weights[-1])


def test_explicit_steps_of_a_bfloat16_model_add_both_forces_before_they_round():
    """Each force alone is too small to move a weight of 1 by one of bfloat16's steps; both together are not."""
    model = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    train_with_ewc(model, [(one, one)], lambda z, y: z.mean(), torch.optim.SGD(model.parameters(), lr=0.0015),
                   {"weight": one.float()}, {"weight": 0 * one}, 1.0)
    assert model.weight.item() < 1


def test_a_parameter_without_elements_is_left_alone():
    model = nn.Linear(6, 3)
    model.empty = nn.Parameter(torch.zeros(0))
    fisher, anchor = springs(model)
    for penalty in ("explicit", "implicit"):
        train_with_ewc(model, [(x.float(), y) for x, y in batches()], CE, OPTIMIZERS["SGD"](model.parameters()), fisher, anchor, 1.0, penalty=penalty)


class Noisy(nn.Module):
    """Dropout draws random numbers and BatchNorm keeps buffers: any extra draw or forward pass would show."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("dictionaries", ["given", "None"])
@pytest.mark.parametrize("penalty", ["explicit", "implicit"])
@pytest.mark.parametrize("name", ["SGD", "momentum", "Adam"])
def test_lambda_zero_is_plain_training_bit_for_bit(name, penalty, dictionaries):
    states = []
    for ours in (True, False):
        torch.manual_seed(3)
        model, (x, y) = Noisy(), data()
        loader = DataLoader(TensorDataset(x.float(), y), batch_size=16, shuffle=True)  # shuffles by the global random state
        optimizer = OPTIMIZERS[name](model.parameters())
        if ours:
            args = springs(model) if dictionaries == "given" else (None, None)
            train_with_ewc(model, loader, CE, optimizer, *args, 0, epochs=3, penalty=penalty)
        else:
            by_hand(model, loader, CE, optimizer, epochs=3)
        states.append((model.state_dict(), torch.get_rng_state()))
    (a, random_a), (b, random_b) = states
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert torch.equal(random_a, random_b)


@pytest.mark.parametrize("penalty", ["explicit", "implicit"])
def test_the_same_seed_repeats_the_same_bits_and_another_does_not(penalty):
    def run(seed):
        torch.manual_seed(seed)
        model, (x, y) = Noisy(), data()
        fisher, anchor = springs(model)
        loader = TensorLoader(x.float(), y, 16, seed=seed)
        train_with_ewc(model, loader, CE, OPTIMIZERS["SGD"](model.parameters()), fisher, anchor, 1.0, epochs=2, penalty=penalty)
        return model
    assert same_bits(run(0), run(0).state_dict())
    assert not same_bits(run(0), run(1).state_dict())


def test_any_iterable_of_batches_trains_alike():
    x, y = data()
    results = []
    for loader in (batches(), tuple(batches()), TensorLoader(x, y, 10, shuffle=False), DataLoader(TensorDataset(x, y), 10),
                   (batch for batch in batches())):
        model = network()
        train_with_ewc(model, loader, CE, OPTIMIZERS["SGD"](model.parameters()), *springs(model), 1.0)
        results.append(model.state_dict())
    assert all(same_bits(model, state) for state in results)


@pytest.mark.parametrize("penalty", ["explicit", "implicit"])
def test_scheduler_is_stepped_after_every_batch(penalty):
    model, twin = network(), network()
    fisher, anchor = springs(model)
    optimizers = [OPTIMIZERS["SGD"](m.parameters()) for m in (model, twin)]
    schedulers = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=14) for o in optimizers]
    train_with_ewc(model, batches(), CE, optimizers[0], fisher, anchor, 2.0, epochs=2, scheduler=schedulers[0], penalty=penalty)

    def pull(step):
        rate = 0.1 * (1 - 0.9 * (step - 1) / 14)  # LinearLR from 0.1 to 0.01, the rate that this step used
        with torch.no_grad():
            for name, p in twin.named_parameters():
                p.copy_(anchor[name] + (p - anchor[name]) / (1 + rate * 2.0 * fisher[name]))

    explicit = penalty == "explicit"
    weights, _ = by_hand(twin, batches(), CE, optimizers[1], epochs=2, scheduler=schedulers[1], after=None if explicit else pull,
                         penalty=(lambda: ewc_loss(twin, fisher, anchor, 2.0)) if explicit else None)
    assert_same(model, weights[-1])
    assert optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01)


@pytest.mark.parametrize("penalty", ["explicit", "implicit"])
def test_parameters_names_those_that_are_pulled(penalty):
    model, twin = network(), network()
    fisher, anchor = springs(model, 10)
    names = ["layers.1.weight", "layers.5.bias"]
    train_with_ewc(model, batches()[:1], CE, OPTIMIZERS["SGD"](model.parameters()), fisher, anchor, 1.0, penalty=penalty, parameters=names)
    weights, _ = by_hand(twin, batches()[:1], CE, OPTIMIZERS["SGD"](twin.parameters()))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, weights[-1][name])}
    assert moved == set(names)


class Words(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        self.table, self.head, self.unused = nn.Embedding(9, 4, sparse=sparse), nn.Linear(12, 3), nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.table(x).flatten(1))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("penalty", ["explicit", "implicit"])
def test_unused_parameters_and_untouched_rows_are_pulled_too(penalty, sparse):
    torch.manual_seed(0)
    model = Words(sparse).double()
    twin = copy.deepcopy(model)
    fisher, anchor = springs(model)
    x, y = torch.randint(0, 5, (20, 3)), torch.randint(0, 3, (20,))
    train_with_ewc(model, [(x, y)], CE, OPTIMIZERS["SGD"](model.parameters()), fisher, anchor, 2.0, penalty=penalty)
    start = twin.unused.weight.detach().clone()
    if penalty == "explicit":
        by_hand(twin, [(x, y)], CE, OPTIMIZERS["SGD"](twin.parameters()), penalty=lambda: ewc_loss(twin, fisher, anchor, 2.0))
    else:
        by_hand(twin, [(x, y)], CE, OPTIMIZERS["SGD"](twin.parameters()))
        with torch.no_grad():
            for name, p in twin.named_parameters():
                p.copy_(anchor[name] + (p - anchor[name]) / (1 + 0.2 * fisher[name]))
    assert_same(model, twin.state_dict())
    assert (model.unused.weight != start).all()


# ---------------------------------------------------------------- problems whose answer is known


def two_regressions():
    """Two linear-Gaussian tasks; task A's design is orthogonal, so that its diagonal Fisher is its whole Hessian."""
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    q, _ = torch.linalg.qr(torch.cat([torch.ones(300, 1, dtype=torch.float64), draw(300, 3)], 1))
    xa, xb = q[:, 1:] * torch.tensor([20.0, 15.0, 10.0], dtype=torch.float64), draw(100, 3)  # columns orthogonal to 1 and each other
    ya = xa @ draw(3, 1) + 1 + 0.5 * draw(300, 1)
    yb = xb @ draw(3, 1) - 1 + 0.5 * draw(100, 1)
    return xa, ya, xb, yb


def least_squares(x, y):
    return torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1), y).solution.flatten()


@pytest.mark.parametrize("penalty", ["explicit", "implicit"])
@pytest.mark.parametrize("momentum", [0, 0.5])
def test_ewc_at_the_ratio_of_examples_lands_on_the_joint_solution(penalty, momentum):
    xa, ya, xb, yb = two_regressions()
    model, mse = nn.Linear(3, 1).double(), nn.MSELoss()
    solution_a = least_squares(xa, ya)
    with torch.no_grad():
        model.weight.copy_(solution_a[:3])
        model.bias.copy_(solution_a[3])
    fisher = compute_fisher_information(model, [(xa, ya)], mse)
    anchor = take_anchor(model)

    def solve(lambda_ewc):
        model.load_state_dict(anchor)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
        train_with_ewc(model, [(xb, yb)], mse, optimizer, fisher, anchor, lambda_ewc, epochs=500, penalty=penalty)
        return torch.cat([model.weight.detach().flatten(), model.bias.detach()])

    joint = least_squares(torch.cat([xa, xb]), torch.cat([ya, yb]))
    torch.testing.assert_close(solve(300 / 100), joint, rtol=1e-8, atol=1e-10)
    assert (solve(1.5) - joint).abs().max() > 0.01  # a 1/2 in the wrong place would be seen


def test_an_infinite_spring_keeps_the_anchor_and_none_forgets_it():
    xa, ya, xb, yb = two_regressions()
    model, mse = nn.Linear(3, 1).double(), nn.MSELoss()
    ones, anchor = {n: torch.ones_like(p) for n, p in model.named_parameters()}, take_anchor(model)
    for lambda_ewc, goal in ((1e15, torch.cat([anchor["weight"].flatten(), anchor["bias"]])), (0, least_squares(xb, yb))):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train_with_ewc(model, [(xb, yb)], mse, optimizer, ones, anchor, lambda_ewc, epochs=500, penalty="implicit")
        torch.testing.assert_close(torch.cat([model.weight.detach().flatten(), model.bias.detach()]), goal, rtol=1e-8, atol=1e-8)


# ---------------------------------------------------------------- the implicit step


@pytest.mark.parametrize("lambda_ewc", [1e-3, 1.0, 1e3, 1e12, 1e300])
def test_implicit_step_is_the_closed_form_of_the_proximal_step(lambda_ewc):
    model, twin = network(), network()
    fisher, anchor = springs(model)
    fisher["layers.3.weight"].zero_()  # no spring: these must move freely at any lambda
    train_with_ewc(model, batches()[:1], CE, OPTIMIZERS["SGD"](model.parameters()), fisher, anchor, lambda_ewc, penalty="implicit")
    weights, _ = by_hand(twin, batches()[:1], CE, OPTIMIZERS["SGD"](twin.parameters()))
    for name, p in model.named_parameters():
        expected = anchor[name] + (weights[-1][name] - anchor[name]) / (1 + 0.1 * lambda_ewc * fisher[name])
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("lambda_ewc", [1e6, 1e30, 1e200])
def test_implicit_step_stays_finite_and_goes_to_the_anchor_for_huge_lambda(lambda_ewc, dtype):
    model = network().to(dtype)
    fisher, anchor = springs(model)
    fisher, start = {name: f.float() * 100 + 1 for name, f in fisher.items()}, take_anchor(model)
    fisher["layers.5.bias"].zero_()  # 0 times a rate that is too large for the type must be no NaN
    loader = [(x.to(dtype), y) for x, y in batches()]
    train_with_ewc(model, loader, CE, OPTIMIZERS["SGD"](model.parameters()), fisher, anchor, lambda_ewc, penalty="implicit")
    free = model.layers[5].bias.detach().clone()
    assert free.isfinite().all() and not torch.equal(free, start["layers.5.bias"])
    assert_same(model, {**anchor, "layers.5.bias": free}, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-4)


def test_implicit_equals_explicit_to_second_order_in_the_learning_rate():
    def gap(lr):
        models = []
        for penalty in ("explicit", "implicit"):
            model = network()
            fisher, anchor = springs(model)
            optimizer = torch.optim.SGD(model.parameters(), lr=lr)
            train_with_ewc(model, batches()[:1], CE, optimizer, fisher, anchor, 1.0, penalty=penalty)
            models.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        return (models[0] - models[1]).norm().item()
    assert gap(1e-3) < 1e-5  # each alone moves the weights by about 1e-3
    assert gap(2e-3) / gap(1e-3) == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize("momentum, dampening", [(0, 0), (0.9, 0), (0.9, 0.9)])
def test_implicit_equals_explicit_for_small_rates_over_many_steps(momentum, dampening):
    """With momentum too: a penalty that ignored it would come out ten times weaker."""
    def run(penalty, lambda_ewc):
        model = network()
        fisher, anchor = springs(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=2e-4, momentum=momentum, dampening=dampening)
        train_with_ewc(model, batches(), CE, optimizer, fisher, anchor, lambda_ewc, epochs=150, penalty=penalty)
        return torch.cat([p.detach().flatten() for p in model.parameters()])
    free, explicit, implicit = run("explicit", 0), run("explicit", 2.0), run("implicit", 2.0)
    assert (explicit - implicit).norm() < 0.03 * (explicit - free).norm()


def test_each_parameter_group_is_pulled_at_its_own_learning_rate():
    model, twin = network(), network()
    fisher, anchor = springs(model)
    groups = lambda m: torch.optim.SGD([{"params": list(m.layers[1].parameters()), "lr": 0.5},  # noqa: E731
                                        {"params": [p for n, p in m.named_parameters() if "layers.1." not in n]}], lr=0.01)
    train_with_ewc(model, batches()[:1], CE, groups(model), fisher, anchor, 4.0, penalty="implicit")
    weights, _ = by_hand(twin, batches()[:1], CE, groups(twin))
    for name, p in model.named_parameters():
        rate = 4.0 * (0.5 if "layers.1." in name else 0.01)
        torch.testing.assert_close(p.detach(), anchor[name] + (weights[-1][name] - anchor[name]) / (1 + rate * fisher[name]))


def test_every_sums_the_rates_and_the_last_step_of_an_epoch_is_pulled():
    model, twin = network(), network()
    fisher, anchor = springs(model)
    optimizers = [OPTIMIZERS["SGD"](m.parameters()) for m in (model, twin)]
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in optimizers]
    train_with_ewc(model, batches(), CE, optimizers[0], fisher, anchor, 5.0, epochs=2, penalty="implicit", every=3, scheduler=schedulers[0])
    waiting = []

    def after(step):
        waiting.append(0.1 * 0.9 ** (step - 1))
        if step % 3 == 0 or step in (7, 14):  # 7 batches an epoch
            with torch.no_grad():
                for name, p in twin.named_parameters():
                    p.copy_(anchor[name] + (p - anchor[name]) / (1 + sum(waiting) * 5.0 * fisher[name]))
            waiting.clear()

    weights, _ = by_hand(twin, batches(), CE, optimizers[1], epochs=2, scheduler=schedulers[1], after=after)
    assert_same(model, weights[-1])


# ---------------------------------------------------------------- stability


def spring_alone(rate, momentum, nesterov):
    """How far one weight is from its anchor after 300 steps of the explicit spring alone (x = 0: no gradient from the data)."""
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=momentum, nesterov=nesterov)
    zeros = torch.zeros(1, 1, dtype=torch.float64)
    fisher = {"weight": torch.full((1, 1), 2.0, dtype=torch.float64)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_with_ewc(model, [(zeros, zeros)] * 300, nn.MSELoss(), optimizer, fisher, {"weight": zeros}, rate)  # lr F = 1
    return model.weight.abs().item(), [str(w.message) for w in caught]


@pytest.mark.parametrize("momentum, nesterov, limit", [(0, False, 2), (0.5, False, 3), (0.9, False, 3.8), (0.9, True, 3.8 / 2.8)])
def test_warning_is_given_where_the_explicit_step_diverges_and_only_there(momentum, nesterov, limit):
    distance, messages = spring_alone(0.97 * limit, momentum, nesterov)
    assert distance < 0.01 and not messages
    distance, messages = spring_alone(1.03 * limit, momentum, nesterov)
    assert distance > 100 and len(messages) == 1
    assert "lr * lambda_ewc * max F" in messages[0] and f"{limit:.3g}" in messages[0] and "penalty='implicit'" in messages[0]


def test_following_the_advice_of_the_warning_is_stable():
    _, (message,) = spring_alone(5.0, 0, False)
    factor = float(message.split("learning rate ")[1].split(" times")[0])
    distance, messages = spring_alone(5.0 / (1.02 * factor), 0, False)
    assert distance < 0.01 and not messages


def test_no_warning_for_adam_nor_for_the_implicit_step():
    for name, penalty in (("Adam", "explicit"), ("SGD", "implicit")):
        model = network()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train_with_ewc(model, batches(), CE, OPTIMIZERS[name](model.parameters()), *springs(model), 1e4, penalty=penalty)


@pytest.mark.filterwarnings("ignore:lr . lambda_ewc")
def test_divergence_is_an_error_with_the_remedy_and_puts_everything_back():
    torch.manual_seed(0)
    model, (x, y) = Noisy().double(), data()
    fisher, anchor = springs(model)
    model.layers[3].eval()
    start, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    with pytest.raises(FloatingPointError, match=r"non-finite at step \d+ \(lambda_ewc=10000000.0\).*penalty='implicit'.*smaller learning rate"):
        train_with_ewc(model, [(x, y)] * 200, CE, OPTIMIZERS["SGD"](model.parameters()), fisher, anchor, 1e7)
    assert same_bits(model, start)
    assert [m.training for m in model.modules()] == modes and all(p.grad is None for p in model.parameters())


def test_a_weight_that_only_the_last_step_makes_infinite_is_found():
    model = nn.Linear(1, 1, bias=False)
    anchor, start = {"weight": torch.full((1, 1), -3e38)}, model.weight.detach().clone()
    with pytest.warns(UserWarning, match="max F"), pytest.raises(FloatingPointError, match="step 1"):
        train_with_ewc(model, [(torch.ones(1, 1), torch.ones(1, 1))], nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=1.0),
                       {"weight": torch.ones(1, 1)}, anchor, 10.0)
    assert torch.equal(model.weight, start)


# ---------------------------------------------------------------- callback, and what is left behind


@pytest.mark.parametrize("n, steps, due", [(7, 3, [0, 3, 6, 7]), (6, 3, [0, 3, 6]), (7, 100, [0, 7]), (7, {0, 1, 4}, [0, 1, 4, 7]), (7, (7, 0), [0, 7])])
def test_callback_comes_at_the_steps_asked_for_and_at_the_end(n, steps, due):
    model, twin, seen = network(), network(), []
    train_with_ewc(model, batches()[:n], CE, OPTIMIZERS["SGD"](model.parameters()), None, None, 0, callback_steps=steps,
                   callback=lambda step, m: seen.append((step, copy.deepcopy(m.state_dict()))))
    weights, _ = by_hand(twin, batches()[:n], CE, OPTIMIZERS["SGD"](twin.parameters()))
    assert [step for step, _ in seen] == due
    for step, state in seen:  # it sees the weights after so many steps
        assert all(torch.equal(state[name], weights[step][name]) for name in state)


def test_modes_and_gradients_are_as_they_were():
    model = Noisy().double()
    model.eval()
    model.layers[3].train()
    modes, (x, y) = [m.training for m in model.modules()], data()
    for p in model.layers[0].parameters():
        p.grad = torch.full_like(p, 7.0)
    grads = [p.grad for p in model.parameters()]
    during = []
    train_with_ewc(model, [(x, y)] * 3, CE, OPTIMIZERS["Adam"](model.parameters()), *springs(model), 1.0,
                   callback=lambda step, m: during.append(all(module.training for module in m.modules())))
    assert during == [True, True]
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads))
    assert all((grad == 7).all() for grad in grads if grad is not None)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("where", ["callback", "loader", "criterion"])
@pytest.mark.parametrize("penalty", ["explicit", "implicit"])
def test_an_interrupt_leaves_the_weights_of_the_last_whole_step(penalty, where, error):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    twin = copy.deepcopy(model).eval()
    fisher, anchor = springs(model)
    model[0].eval()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    modes, grads, random = [m.training for m in model.modules()], [p.grad for p in model.parameters()], torch.get_rng_state()
    calls = []

    def stop_at_4(kind):
        calls.append(kind)
        if kind == where and calls.count(kind) == 5:
            raise error("stop")

    def loader():
        for batch in batches():
            stop_at_4("loader")
            yield batch

    def criterion(z, y):
        stop_at_4("criterion")
        return CE(z, y)

    with pytest.raises(error):
        train_with_ewc(model, loader(), criterion, OPTIMIZERS["SGD"](model.parameters()), fisher, anchor, 2.0, penalty=penalty,
                       callback=lambda step, m: stop_at_4("callback"), callback_steps=1)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is grad and (grad == 1).all() for p, grad in zip(model.parameters(), grads))
    # four whole steps, repeated with the same random numbers
    train_with_ewc(twin, batches()[:4], CE, OPTIMIZERS["SGD"](twin.parameters()), fisher, anchor, 2.0, penalty=penalty)
    assert same_bits(model, twin.state_dict())


@pytest.fixture(autouse=True)
def ctrl_c_raises():
    """A shell's background job ignores Ctrl-C from the start, and Python leaves it at that."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


class InterruptedSGD(torch.optim.SGD):
    """Ctrl-C arrives when half of the weights of the third step are written."""

    seen = 0

    def step(self):
        self.seen += 1
        for i, p in enumerate(self.param_groups[0]["params"]):
            p.sub_(p.grad, alpha=self.param_groups[0]["lr"])
            if i == 2 and self.seen == 3:
                signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("penalty", ["explicit", "implicit"])
def test_ctrl_c_in_the_middle_of_a_step_leaves_a_whole_step(penalty):
    model, twin = network(), network()
    fisher, anchor = springs(model)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train_with_ewc(model, batches(), CE, InterruptedSGD(model.parameters(), lr=0.1), fisher, anchor, 2.0, penalty=penalty)
    assert signal.getsignal(signal.SIGINT) is handler
    train_with_ewc(twin, batches()[:3], CE, torch.optim.SGD(twin.parameters(), lr=0.1), fisher, anchor, 2.0, penalty=penalty)
    assert_same(model, twin.state_dict())


@pytest.mark.parametrize("delay", [0.01, 0.023, 0.037])
def test_ctrl_c_at_any_moment_leaves_a_whole_step(delay):
    model, twin, steps = network(), network(), []
    fisher, anchor = springs(model)
    ready, (batch,) = threading.Event(), batches()[:1]

    def press():
        ready.wait()
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGINT)

    def callback(step, m):
        ready.set()
        steps.append(step)

    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        train_with_ewc(model, [batch] * 10**6, CE, OPTIMIZERS["SGD"](model.parameters()), fisher, anchor, 2.0, callback=callback, callback_steps=1)
    thread.join()
    weights, _ = by_hand(twin, [batch] * (steps[-1] + 1), CE, OPTIMIZERS["SGD"](twin.parameters()),
                         penalty=lambda: ewc_loss(twin, fisher, anchor, 2.0))
    distances = [max((value - w[name]).abs().max().item() for name, value in model.state_dict().items()) for w in weights[-2:]]
    assert min(distances) < 1e-9  # the last step called back about, or the one whose Ctrl-C was held back


def test_ctrl_c_is_not_lost_where_the_system_handles_it():
    program = """
import signal, torch
from torch import nn
from ewc_utils import train_with_ewc
signal.signal(signal.SIGINT, signal.SIG_DFL)
class Pressed(torch.optim.SGD):
    def step(self):
        super().step()
        signal.raise_signal(signal.SIGINT)
model = nn.Linear(2, 2)
batch = torch.zeros(4, 2), torch.zeros(4, dtype=torch.long)
train_with_ewc(model, [batch], nn.CrossEntropyLoss(), Pressed(model.parameters(), lr=0.1), None, None, 0)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).resolve().parent.parent, capture_output=True)
    assert done.returncode == -signal.SIGINT if os.name == "posix" else done.returncode != 0


def test_training_works_outside_the_main_thread():
    model, twin = network(), network()
    fisher, anchor = springs(model)
    run = lambda m: train_with_ewc(m, batches(), CE, OPTIMIZERS["SGD"](m.parameters()), fisher, anchor, 2.0)  # noqa: E731
    thread = threading.Thread(target=run, args=(model,))
    thread.start()
    thread.join()
    run(twin)
    assert same_bits(model, twin.state_dict())


def test_training_changes_neither_fisher_nor_anchor():
    model = network()
    fisher, anchor = springs(model)
    before = [t.clone() for t in (*fisher.values(), *anchor.values())]
    for penalty in ("explicit", "implicit"):
        train_with_ewc(model, batches(), CE, OPTIMIZERS["SGD"](model.parameters()), fisher, anchor, 2.0, penalty=penalty)
    assert all(map(torch.equal, before, (*fisher.values(), *anchor.values())))
