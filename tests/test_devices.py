"""On an accelerator: the same numbers as on the CPU, for everything that holds tensors. Skipped where torch sees none."""

import copy
import math

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn

import reference
from ewc_utils import (EWC, SimpleMLP, TensorLoader, accuracy, add_ewc_gradients, compute_fisher_information, compute_kronecker_fisher, ewc_loss,
                       fisher_routes, nearest_kronecker_sum, plot_fisher_images, plot_images, run_arm, take_anchor, train_with_ewc)
from test_fisher_any_module import CASES

CE = nn.CrossEntropyLoss()


def accelerators():
    """The one that torch names; CUDA and MPS by their own functions, which older versions have too."""
    named = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") and torch.accelerator.is_available() else None
    found = {named.type} if named else set()
    return sorted(found | {name for name, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())) if there})


if not accelerators():
    pytest.skip("torch sees no accelerator here", allow_module_level=True)


@pytest.fixture(params=accelerators())
def device(request):
    return torch.device(request.param)


def data(n=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=generator), torch.randint(0, 4, (n,), generator=generator)


def network(seed=0):
    torch.manual_seed(seed)
    return SimpleMLP(6, (8, 7), 4)


def batches(size=10, **how):
    x, y = data(**how)
    return list(zip(x.split(size), y.split(size)))


def on(device, thing):
    """The same nest of tensors, or a copy of the same model, there."""
    if isinstance(thing, nn.Module):
        return copy.deepcopy(thing).to(device)
    if isinstance(thing, dict):
        return {key: on(device, value) for key, value in thing.items()}
    if isinstance(thing, (tuple, list)):
        return type(thing)(on(device, value) for value in thing)
    return thing.to(device)


def assert_close(found, wanted, device, **how):
    assert found.keys() == wanted.keys()
    for name in wanted:
        for a, b in zip(*((t if isinstance(t, tuple) else (t,)) for t in (found[name], wanted[name]))):
            assert a.device.type == device.type, name
            torch.testing.assert_close(a.cpu(), b, **{"rtol": 2e-4, "atol": 2e-6, **how})


def weights(model):
    return {name: p.detach() for name, p in model.named_parameters()}


# ---------------------------------------------------------------- the Fisher


@pytest.mark.parametrize("name", CASES)
def test_the_fisher_of_any_module(name, device):
    torch.manual_seed(0)
    if "sparse" in name and device.type != "cuda":
        pytest.skip("sparse gradients: the CPU and CUDA have them")
    model, x = CASES[name][0]()
    y = torch.randint(reference.logits(model.eval()(x)).shape[1], (5,))
    there = on(device, model)
    for labels in ("exact", "empirical"):
        truth = reference.fisher(model, [(x, y)], labels)
        for batch in ((x, y), (x.to(device), y.to(device))):
            for max_bytes in (2**26, 1):
                found = compute_fisher_information(there, [batch], CE, labels=labels, max_bytes=max_bytes)
                assert all(f.device.type == device.type for f in found.values())
                assert reference.error(on("cpu", found), truth) < 2e-4, (labels, max_bytes)
    closed, closed_there = ({k for k, route in fisher_routes(m, [(x, y)]).items() if route == "closed form"} for m in (model, there))
    assert closed == closed_there  # recurrent cells have other kernels there, of which vmap may know more or less


@pytest.mark.parametrize("labels", ["exact", "empirical", "sampled"])
@pytest.mark.parametrize("criterion", [CE, nn.CrossEntropyLoss(ignore_index=2), nn.BCEWithLogitsLoss(), nn.MSELoss()], ids=repr)
def test_every_likelihood(labels, criterion, device):
    model, (x, y) = network(), data(2000)
    y = y if isinstance(criterion, nn.CrossEntropyLoss) else torch.rand(2000, 4).round()
    here = compute_fisher_information(model, [(x, y)], criterion, labels="exact" if labels == "sampled" else labels)
    found = compute_fisher_information(on(device, model), [(x, y)], criterion, labels=labels)
    if labels == "sampled":  # other random numbers than the CPU's: the same mean, the same numbers for the same seed
        again = compute_fisher_information(on(device, model), [(x, y)], criterion, labels=labels)
        other = compute_fisher_information(on(device, model), [(x, y)], criterion, labels=labels, seed=1)
        assert all(torch.equal(found[k], again[k]) and not torch.equal(found[k], other[k]) for k in found)
        assert sum(f.sum().item() for f in found.values()) == pytest.approx(sum(f.sum().item() for f in here.values()), rel=0.15)
    else:
        assert_close(found, here, device)


def test_a_criterion_of_ones_own_with_empirical_labels(device):
    own = lambda z, y: nn.functional.cross_entropy(z.tanh(), y)  # noqa: E731
    model = network()
    assert_close(compute_fisher_information(on(device, model), batches(), own, labels="empirical"),
                 compute_fisher_information(model, batches(), own, labels="empirical"), device)


@pytest.mark.parametrize("home", ["data on the CPU", "data there"])
def test_n_samples_draws_the_same_examples(home, device):
    model, given = network(), batches()
    here = compute_fisher_information(model, given, CE, n_samples=17, seed=3)
    given = given if home == "data on the CPU" else on(device, given)
    assert_close(compute_fisher_information(on(device, model), given, CE, n_samples=17, seed=3), here, device)


def test_bfloat16(device):
    model = network().bfloat16()
    given = [(x.bfloat16(), y) for x, y in batches()]
    found = compute_fisher_information(on(device, model), given, CE)
    assert all(f.dtype == torch.float32 for f in found.values())
    assert_close(found, compute_fisher_information(model, given, CE), device, rtol=0.1, atol=1e-3)


def test_random_state_and_modes_are_left_alone(device):
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x) * self.training  # drawn in either mode

    model = nn.Sequential(nn.Linear(6, 5), Noise(), nn.Linear(5, 4)).to(device).train()
    torch.manual_seed(5)
    want = torch.rand(3, device=device)
    torch.manual_seed(5)
    compute_fisher_information(model, batches(), CE, labels="sampled")
    assert model.training and torch.equal(torch.rand(3, device=device), want)

    def stop(step, model):
        if step == 2:
            raise KeyboardInterrupt
    torch.manual_seed(5)
    with pytest.raises(KeyboardInterrupt):
        train_with_ewc(model, batches(), CE, torch.optim.SGD(model.parameters(), lr=0.1), None, None, 0, callback=stop, callback_steps=1)
    assert torch.equal(torch.rand(3, device=device), want)


# ---------------------------------------------------------------- the penalty and training


def settled(device):
    """A model, its Fisher and an anchor away from it, on the CPU and there."""
    model = network()
    fisher = compute_fisher_information(model, batches(), CE)
    return (model, fisher, take_anchor(network(1))), (on(device, model), on(device, fisher), on(device, take_anchor(network(1))))


def test_the_penalty_and_its_gradient(device):
    found = []
    for model, fisher, anchor in settled(device):
        value = ewc_loss(model, fisher, anchor, 3.0)
        value.backward()
        by_autograd = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        add_ewc_gradients(model, fisher, anchor, 3.0)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, by_autograd[name])
        (2 * ewc_loss(model, fisher, anchor, 3.0)).backward()
        found.append((value.item(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    (value, grads), (value_there, grads_there) = found
    assert value_there == pytest.approx(value, rel=1e-5) and value > 0
    assert_close(grads_there, grads, device)


@pytest.mark.parametrize("how", [{}, {"penalty": "implicit"}, {"penalty": "implicit", "every": 4}], ids=str)
@pytest.mark.parametrize("optimizer", [lambda ps: torch.optim.SGD(ps, lr=0.1), lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
                                       lambda ps: torch.optim.Adam(ps, lr=0.01)], ids=["SGD", "momentum", "Adam"])
@pytest.mark.parametrize("kind", ["diagonal", "Kronecker"])
def test_training(kind, optimizer, how, device):
    ended = []
    for model, fisher, anchor in settled(device):
        fisher = fisher if kind == "diagonal" else compute_kronecker_fisher(model, batches(), CE)
        seen = []
        losses = train_with_ewc(model, batches(seed=1), CE, optimizer(model.parameters()), fisher, anchor, 5.0, epochs=2,
                                callback=lambda step, model: seen.append(accuracy(model, *data(seed=1))), callback_steps=3, **how)
        assert all(p.grad is None for p in model.parameters()) and len(seen) == 5
        ended.append((losses, weights(model)))
    (losses, here), (losses_there, there) = ended
    assert losses_there == pytest.approx(losses, rel=1e-3)
    assert_close(there, here, device, rtol=1e-2, atol=1e-4)


def test_lambda_0_is_the_plain_loop(device):
    model, plain = on(device, network()), on(device, network())
    train_with_ewc(model, batches(), CE, torch.optim.SGD(model.parameters(), lr=0.1), None, None, 0)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for x, y in batches():
        optimizer.zero_grad()
        CE(plain(x.to(device)), y.to(device)).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(weights(model).values(), weights(plain).values()))


def test_an_arm(device):
    (model, fisher, anchor), (there, fisher_there, anchor_there) = settled(device)
    end, seen = run_arm(model, data(200), fisher, anchor, 5.0, batch_size=10, tests=[data()], look=[0, 10])
    end_there, seen_there = run_arm(there, data(200), fisher_there, anchor_there, 5.0, batch_size=10, tests=[data()], look=[0, 10])
    assert_close(weights(end_there), weights(end), device, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(seen_there, seen, rtol=0, atol=0.02)


def test_a_loader_of_tensors_there(device):
    x, y = data()
    for (a, b), (c, d) in zip(TensorLoader(x, y, 16, seed=1), TensorLoader(x.to(device), y.to(device), 16, seed=1)):
        assert c.device.type == d.device.type == device.type and torch.equal(a, c.cpu()) and torch.equal(b, d.cpu())


def test_a_loss_that_turns_nan_puts_the_weights_back(device):
    model, (x, y) = on(device, network()), data()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    x[35] = math.nan
    with pytest.raises(FloatingPointError):
        train_with_ewc(model, list(zip(x.split(10), y.split(10))), CE, torch.optim.SGD(model.parameters(), lr=0.1), None, None, 0)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("argument", ["fisher_dict", "optimal_params"])
def test_a_dictionary_left_on_the_cpu_is_told(argument, device):
    (_, fisher, anchor), (model, fisher_there, anchor_there) = settled(device)
    given = {"fisher_dict": fisher_there, "optimal_params": anchor_there, argument: fisher if argument == "fisher_dict" else anchor}
    with pytest.raises(ValueError, match=rf"{argument}\['layers.1.weight'\].* on {device.type}.* on cpu"):
        ewc_loss(model, lambda_ewc=1.0, **given)


# ---------------------------------------------------------------- many tasks, factors, figures


@pytest.mark.parametrize("rule", ["single", "online", "separate"])
def test_many_tasks_can_be_saved_there_and_loaded_anywhere(rule, device, tmp_path):
    gamma = 0.9 if rule == "online" else 1.0
    here, there = EWC(rule, gamma=gamma), EWC(rule, gamma=gamma)
    for seed in range(3):
        model = network(seed)
        fisher, anchor = compute_fisher_information(model, batches(seed=seed), CE), take_anchor(model)
        here.consolidate(fisher, anchor, weight=seed + 1.0)
        there.consolidate(on(device, fisher), on(device, anchor), weight=seed + 1.0)
    assert_close(there.fisher, here.fisher, device)
    assert_close(there.anchor, here.anchor, device)
    torch.save(there.state_dict(), tmp_path / "ewc.pt")
    loaded = EWC()
    loaded.load_state_dict(torch.load(tmp_path / "ewc.pt", weights_only=True, map_location="cpu"))
    assert_close(loaded.fisher, here.fisher, torch.device("cpu"))
    assert ewc_loss(network(), loaded.fisher, loaded.anchor, 1.0) > 0


def test_kronecker_factors_and_their_sum(device):
    first, second = ({"here": compute_kronecker_fisher(network(seed), batches(seed=seed), CE),
                      "there": compute_kronecker_fisher(on(device, network(seed)), batches(seed=seed), CE)} for seed in (0, 1))
    assert_close(first["there"], first["here"], device)
    assert_close(nearest_kronecker_sum(first["there"], second["there"]), nearest_kronecker_sum(first["here"], second["here"]), device, rtol=1e-3)


def test_figures_of_tensors_there(device):
    matplotlib.use("agg")
    plot_fisher_images({"Fisher": torch.rand(28, 28, device=device)}, "Fisher")
    plot_images({"images": (torch.rand(10, 1, 28, 28, device=device), range(10))}, "images")
    plt.close("all")
