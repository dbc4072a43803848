"""The README's Python blocks run as they stand, and the penalty in them does what it is for."""

import re
from pathlib import Path

import pytest

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
