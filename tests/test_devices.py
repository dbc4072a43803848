"""On an accelerator: the same numbers as on the CPU. Skipped where torch sees none."""

import copy

import pytest
import reference
import torch
from reference import CE, draw
from test_fisher_any_module import CASES, NOISE
from torch.utils._pytree import tree_leaves, tree_map

import ewc_utils as ewc

CPU, SGD = torch.device("cpu"), torch.optim.SGD
THERE = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{NOISE}"),
    pytest.mark.skipif(not any(THERE.values()), reason="torch sees no accelerator here"),
]
DEVICE = torch.device(max(THERE, key=THERE.get))


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    """Convolutions and recurrent layers in float32: by default cuDNN rounds to ten bits (TF32)."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def data(seed=0):
    return draw(60, 6, seed=seed).float(), draw(60, 4, seed=seed + 1).argmax(1)


def batches(seed=0):
    return list(zip(*(t.split(10) for t in data(seed))))


def network(seed=0):
    torch.manual_seed(seed)
    return ewc.SimpleMLP(6, (8, 7), 4)


def on(device, thing):
    """The same nest of tensors, or a copy of the same model, there."""
    return tree_map(lambda leaf: copy.deepcopy(leaf).to(device), thing)


@pytest.mark.parametrize("name", CASES)
def test_the_fisher_of_any_module(name):
    if "sparse" in name and DEVICE.type != "cuda":
        pytest.skip("the CPU and CUDA have sparse tensors")
    if "scripted" in name:
        pytest.skip("torch moves no scripted module that was used")
    torch.manual_seed(0)
    model, x = CASES[name]()
    with torch.no_grad():
        model.eval()(x)
    y, there = torch.randint(3, (6,)), on(DEVICE, model)
    for labels in ("exact", "empirical"):
        found = ewc.compute_fisher_information(there, [(x, y)], CE, labels=labels)
        assert all(f.device.type == DEVICE.type for f in found.values())
        assert reference.error(on(CPU, found), reference.fisher(model, [(x, y)], labels)) < 2e-4


def story(device, compute, how):
    """Two tasks, the penalty, its gradients, and training against it: all that there is, there."""
    model, other, memory = on(device, network()), on(device, network(1)), ewc.EWC("separate")
    torch.manual_seed(5)
    numbers = torch.rand(3, device=device)
    torch.manual_seed(5)
    fisher, anchor = compute(model, batches(), CE), ewc.take_anchor(other)
    assert torch.equal(torch.rand(3, device=device), numbers)  # the random state is left alone
    ewc.ewc_loss(model, fisher, anchor, 3.0).backward()
    by_loss = [p.grad.clone() for p in model.parameters()]
    ewc.add_ewc_gradients(model, fisher, anchor, 3.0)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.5)
    by_hand = [p.grad.clone() for p in model.parameters()]
    loader = ewc.TensorLoader(*on(device, data(1)), 16)
    args = loader, CE, optimizer, fisher, anchor, 5.0
    losses = torch.tensor(ewc.train_with_ewc(model, *args, **how), device=device)
    share = torch.tensor(ewc.accuracy(model, *data(1)), device=device)
    for m in (model, other):  # the random numbers come from the CPU: sampled labels are the same
        task = ewc.compute_fisher_information(m, batches(), CE, labels="sampled")
        memory.consolidate(task, ewc.take_anchor(m), weight=2.0)
    kronecker = [ewc.compute_kronecker_fisher(model, batches(seed), CE) for seed in (0, 1)]
    total = ewc.nearest_kronecker_sum(*kronecker)
    found = fisher, by_loss, by_hand, losses, share, ewc.take_anchor(model), kronecker, total
    return [*found, memory.fisher, memory.anchor]


HOW = [{}, {"penalty": "implicit"}, {"penalty": "implicit", "every": 4}]


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("name", ["compute_fisher_information", "compute_kronecker_fisher"])
def test_two_tasks_from_the_loader_to_the_sum_of_their_penalties(name, how):
    here, there = (story(d, getattr(ewc, name), how) for d in (CPU, DEVICE))
    assert all(t.device.type == DEVICE.type for t in tree_leaves(there))
    torch.testing.assert_close(on(CPU, there), here, rtol=1e-2, atol=1e-4)
