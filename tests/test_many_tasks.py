"""Many tasks in one quadratic: against the explicit sum of one penalty per task."""

import math

import pytest
import torch
from reference import MSE, draw, refused, same_bits
from torch import nn

import ewc_utils
from ewc_utils import EWC, SimpleMLP, compute_fisher_information, ewc_loss, take_anchor

WEIGHTS = [1.0, 0.5, 3.0]
RULES = {"single": 1.0, "online": 0.6, "separate": 1.0}
EVERY_RULE = pytest.mark.parametrize("rule", RULES)


def network():
    torch.manual_seed(0)
    return SimpleMLP(4, 3, 2).double()


def tasks(n=3):
    """n Fishers with zeros, also for weights that matter to no task, and an anchor each."""
    found = []
    for k in range(n):
        fisher, anchor = {}, {}
        for i, (name, p) in enumerate(network().named_parameters()):
            fisher[name] = draw(*p.shape, seed=10 * k + i).clamp(min=0)
            anchor[name] = draw(*p.shape, seed=10 * k + i + 5)
        fisher["layers.1.weight"][0] = 0
        found.append((fisher, anchor))
    return found


def learned(rule, known, weights=(1.0,) * 9):
    ewc = EWC(rule, gamma=RULES[rule])
    for (fisher, anchor), weight in zip(known, weights):
        ewc.consolidate(fisher, anchor, weight=weight)
    return ewc


def same(one, other):
    return same_bits(one.fisher, other.fisher) and same_bits(one.anchor, other.anchor)


@EVERY_RULE
def test_the_penalty_pulls_like_the_sum_of_the_penalties_that_the_rule_stands_for(rule):
    """separate: each at its own anchor. single and online: at the newest, faded by gamma."""
    model, known = network(), tasks()
    ewc, total = learned(rule, known, WEIGHTS), 0
    for k, (fisher, anchor) in enumerate(known):
        at = anchor if rule == "separate" else known[-1][1]
        total = total + ewc_loss(model, fisher, at, 0.7 * WEIGHTS[k] * RULES[rule] ** (2 - k))
    loss, params = ewc_loss(model, ewc.fisher, ewc.anchor, 0.7), list(model.parameters())
    for pair in zip(torch.autograd.grad(loss, params), torch.autograd.grad(total, params)):
        torch.testing.assert_close(*pair, rtol=1e-10, atol=1e-12)


def test_three_linear_gaussian_tasks_in_sequence_reach_the_joint_solution():
    """Bayes' rule, task by task. Orthogonal designs: every diagonal Fisher is a whole Hessian."""
    model, ewc = nn.Linear(3, 1, bias=False).double(), EWC("single")
    xs = [torch.linalg.qr(draw(n, 3))[0] * n**0.5 for n in (200, 100, 50)]
    ys = [x @ draw(3, 1, seed=len(x)) + 0.3 * draw(len(x), 1, seed=7) for x in xs]
    for x, y in zip(xs, ys):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        penalty = (ewc.fisher, ewc.anchor, 1 / len(x)) if ewc.n_tasks else (None, None, 0)
        how = {"epochs": 600, "penalty": "implicit"}
        ewc_utils.train_with_ewc(model, [(x, y)], MSE, optimizer, *penalty, **how)
        fisher = compute_fisher_information(model, [(x, y)], MSE)
        ewc.consolidate(fisher, take_anchor(model), weight=len(x))
    joint = torch.linalg.lstsq(torch.cat(xs), torch.cat(ys)).solution.T
    torch.testing.assert_close(model.weight.detach(), joint, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("n", [0, 2])
@EVERY_RULE
def test_saved_and_loaded_weights_only_it_resumes_with_the_same_bits(rule, n, tmp_path):
    """And its size does not depend on the number of tasks: two tensors per parameter."""
    *early, last = tasks(n + 1)
    ewc, resumed = learned(rule, early), EWC()
    torch.save(ewc.state_dict(), tmp_path / "ewc.pt")
    resumed.load_state_dict(torch.load(tmp_path / "ewc.pt", weights_only=True))
    assert (resumed.rule, resumed.gamma, resumed.n_tasks) == (rule, RULES[rule], n)
    for each in (ewc, resumed):
        each.consolidate(*last)
    if n == 0:  # one task is the plain penalty, whatever the rule
        assert same_bits(ewc.fisher, last[0]) and same_bits(ewc.anchor, last[1])
    assert same(ewc, resumed) and ewc.fisher.keys() == ewc.anchor.keys() == last[0].keys()
    assert sorted(ewc.state_dict()) == ["anchor", "fisher", "gamma", "n_tasks", "rule"]


def test_narrow_anchors_keep_their_type_and_the_fisher_its_own():
    fisher, anchor = tasks(1)[0]
    narrow = {name: a.bfloat16() for name, a in anchor.items()}
    ewc = learned("separate", [(fisher, narrow)] * 2)
    assert same_bits(ewc.anchor, narrow)
    assert {t.dtype for t in ewc.anchor.values()} == {torch.bfloat16}
    assert {t.dtype for t in ewc.fisher.values()} == {torch.float64}


@EVERY_RULE
def test_a_parameter_padded_with_zeros_joins_later(rule):
    """A new head had no Fisher before: zeros for the old tasks, and any anchor. All are copied."""
    (first, second), new, zero = tasks(2), {"head": torch.ones(2)}, {"head": torch.zeros(2)}
    padded = [first[0] | zero, first[1] | {"head": torch.full((2,), 9.0)}]
    ewc = learned(rule, [padded, [second[0] | new, second[1] | zero]])
    assert torch.equal(ewc.fisher.pop("head"), new["head"])
    assert torch.equal(ewc.anchor.pop("head"), zero["head"])
    assert same(ewc, learned(rule, [first, second]))
    for t in (*first[0].values(), *first[1].values(), *second[0].values(), *second[1].values()):
        t.add_(1)
    assert same(ewc, learned(rule, tasks(2)))


NEW, NAME = torch.ones(2), "layers.3.bias"
MISFITS = {  # the changes of Fisher and anchor, what the error must name
    "a grown head": ({NAME: torch.ones(5)}, {NAME: torch.ones(5)}, ("fisher_dict", "(2,)", "(5,)")),
    "a new name": ({"head": NEW}, {"head": NEW}, ("pad", "zeros")),
    "only a Fisher": ({"head": NEW}, {}, ("pad", "zeros")),
    "a negative Fisher": ({NAME: -NEW}, {}, ("fisher_dict", NAME, "-1.0", ">= 0")),
    "an infinite Fisher": ({NAME: NEW * math.inf}, {}, ("fisher_dict", NAME, "inf", "finite")),
    "a NaN anchor": ({}, {NAME: NEW * math.nan}, ("optimal_params", NAME, "nan", "finite")),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_is_told_by_name_and_nothing_is_changed(misfit):
    (fisher, anchor, words), known = MISFITS[misfit], tasks(1)
    ewc = learned("single", known)
    with refused(ValueError, *words):
        ewc.consolidate(known[0][0] | fisher, known[0][1] | anchor)
    assert ewc.n_tasks == 1 and same(ewc, learned("single", known))


def test_a_bad_weight_a_missing_name_and_a_bad_rule_or_state_are_refused():
    ewc, (fisher, anchor) = learned("single", tasks(1)), tasks(1)[0]
    for weight in (-1, 0, math.nan, math.inf):
        with refused(ValueError, "weight", "above 0", repr(weight)):
            ewc.consolidate(fisher, anchor, weight=weight)
    del fisher[NAME], anchor[NAME]
    with refused(ValueError, NAME, "pad", "zeros"):
        ewc.consolidate(fisher, anchor)
    assert ewc.n_tasks == 1 and same(ewc, learned("single", tasks(1)))
    with refused((TypeError, ValueError), "nearest_kronecker_sum"):
        ewc.consolidate({"layers.3": (torch.eye(4), torch.eye(2))}, anchor)
    for rule, gamma in (("both", 1), ("online", 0), ("online", 1.5), ("single", 0.9)):
        with refused(ValueError, "rule", "gamma", "'online'"):
            EWC(rule, gamma=gamma)
    with refused(KeyError, "n_tasks"):
        ewc.load_state_dict({"rule": "single", "gamma": 1.0})
