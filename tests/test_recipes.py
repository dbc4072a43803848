"""The README's Python blocks run as they stand, and the penalty in them does what it is for."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import ewc_utils as ewc
from ewc_utils import accuracy, ewc_loss

README = Path(__file__).resolve().parent.parent / "README.md"
OPTIONAL = re.compile(r"# .*\b(Transformers|Lightning)\b")  # in the first line: a library that the tests do without
PENALTY = "lambda_ewc=1.0"


def blocks():
    return re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def executed():
    return [block for block in blocks() if not OPTIONAL.match(block)]


def run(sources):
    """Execute in order in one namespace; after each block that sets lambda_ewc: (penalty at 1, accuracy on A, on B)."""
    here, after = {}, []
    for number, source in enumerate(sources, 1):
        exec(compile(source, f"README.md, Python block {number}", "exec"), here)
        if "lambda_ewc=" in source:
            far = ewc_loss(here["model"], here["fisher"], here["anchor"], 1.0).item()
            after.append((far, *(accuracy(here["model"], here[task].x, here[task].y) for task in ("task_a", "task_b"))))
    return after


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a block may write files


def test_every_block_is_valid_python():
    for number, block in enumerate(blocks(), 1):
        compile(block, f"README.md, Python block {number}", "exec")


def test_blocks_run_in_order_as_they_stand():
    assert len(executed()) >= 2
    run(executed())


def test_loops_with_the_penalty_learn_and_forget_less_than_without():
    with_penalty, without = run(executed()), run([block.replace(PENALTY, "lambda_ewc=0.0") for block in executed()])
    assert sum(PENALTY in block for block in executed()) >= 2, "the loop with ewc_loss and the one with add_ewc_gradients"
    for block, (far, on_a, on_b), (free_far, free_on_a, _) in zip([b for b in executed() if "lambda_ewc=" in b], with_penalty, without):
        if PENALTY in block:
            assert far < free_far / 2 and on_a > free_on_a and on_b > 0.85


def test_loss_term_and_added_gradient_train_the_same_weights():
    (far, *scores), (same_far, *same_scores) = run(executed())[:2]
    assert same_far == pytest.approx(far, rel=1e-3)
    assert same_scores == pytest.approx(scores, abs=2e-3)


@pytest.fixture
def toy():
    """A small model right after task A, and loaders for both tasks, under the names the README uses."""
    torch.manual_seed(0)
    model, task = ewc.SimpleMLP(784, 8, 10), lambda: (torch.rand(64, 1, 28, 28), torch.randint(0, 10, (64,)))
    loader_a, loader_b = (ewc.TensorLoader(*task(), batch_size=16, shuffle=False) for _ in range(2))
    ewc.train_with_ewc(model, loader_a, nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters(), 1e-2), None, None, 0, epochs=3)
    return {"model": model, "loader_a": loader_a, "loader_b": loader_b}


def test_the_fused_gradient_trains_as_the_loss_term_does(toy):
    """Both against a loop in float64 with the penalty's gradient written out."""
    model, criterion, lr, lambda_ewc = toy["model"], nn.CrossEntropyLoss(), 0.05, 5.0
    fisher = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    anchor = {name: p.detach() + 0.1 * torch.randn_like(p) for name, p in model.named_parameters()}
    by_loss, fused, truth = (copy.deepcopy(model) for _ in range(3))
    truth.double()
    for x, y in toy["loader_b"]:
        for net in (by_loss, fused):
            optimizer = torch.optim.SGD(net.parameters(), lr)
            penalty = ewc.ewc_loss(net, fisher, anchor, lambda_ewc) if net is by_loss else 0
            (criterion(net(x), y) + penalty).backward()
            if net is fused:
                ewc.add_ewc_gradients(net, fisher, anchor, lambda_ewc)
            optimizer.step()
            optimizer.zero_grad()
        grads = torch.autograd.grad(criterion(truth(x.double()), y), list(truth.parameters()))
        with torch.no_grad():
            for (name, p), g in zip(truth.named_parameters(), grads):
                p -= lr * (g + lambda_ewc * fisher[name].double() * (p - anchor[name].double()))
    free = copy.deepcopy(model)
    ewc.train_with_ewc(free, toy["loader_b"], criterion, torch.optim.SGD(free.parameters(), lr), None, None, 0)
    for (name, wanted), a, b, c in zip(truth.named_parameters(), by_loss.parameters(), fused.parameters(), free.parameters()):
        torch.testing.assert_close(a.double(), wanted, rtol=1e-4, atol=1e-6, msg=f"{name} by ewc_loss")
        torch.testing.assert_close(b.double(), wanted, rtol=1e-4, atol=1e-6, msg=f"{name} by add_ewc_gradients")
        assert not torch.allclose(c.double(), wanted, rtol=1e-4, atol=1e-6), f"{name}: the penalty did nothing"


def test_fused_gradients_come_to_parameters_without_one_and_vanish_for_lambda_0(toy):
    model = toy["model"]
    fisher, anchor = {n: torch.ones_like(p) for n, p in model.named_parameters()}, ewc.take_anchor(model)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.5
    model.zero_grad()
    ewc.add_ewc_gradients(model, fisher, anchor, 0)
    assert all(p.grad is None for p in model.parameters())
    ewc.add_ewc_gradients(model, fisher, anchor, 3.0)
    for p in model.parameters():
        torch.testing.assert_close(p.grad, torch.full_like(p, 1.5))
