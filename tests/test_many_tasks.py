"""Many tasks in one quadratic: against the explicit sum of one penalty per task."""

import copy

import pytest
import torch
from torch import nn

from ewc_utils import EWC, SimpleMLP, compute_fisher_information, ewc_loss, take_anchor, train_with_ewc

WEIGHTS = [1.0, 0.5, 3.0]


def network():
    torch.manual_seed(0)
    return SimpleMLP(4, 3, 2).double()


def tasks(model, n=3):
    """Random Fishers, with weights that matter to no task, and an anchor each."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda p: torch.randn(p.shape, generator=generator, dtype=torch.float64)  # noqa: E731
    params = dict(model.named_parameters())
    found = [({k: draw(p).clamp(min=0) for k, p in params.items()}, {k: draw(p) for k, p in params.items()}) for _ in range(n)]
    for fisher, _ in found:
        fisher["layers.1.weight"][0] = 0
    return found


def gradients(model, *losses):
    return torch.autograd.grad(sum(losses), list(model.parameters()))


def assert_equal_gradients(model, ewc, expected):
    for found, wanted in zip(gradients(model, ewc_loss(model, ewc.fisher, ewc.anchor, 0.7)), expected):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_one_task_is_the_plain_penalty_whatever_the_rule():
    model = network()
    (fisher, anchor), = tasks(model, 1)
    for ewc in (EWC("single"), EWC("online", gamma=0.9), EWC("separate")):
        ewc.consolidate(fisher, anchor)
        assert torch.equal(ewc_loss(model, ewc.fisher, ewc.anchor, 2.0), ewc_loss(model, fisher, anchor, 2.0))


def test_separate_pulls_like_one_penalty_per_task():
    model, ewc = network(), EWC("separate")
    known, there = tasks(model), copy.deepcopy(network())
    with torch.no_grad():
        for p in there.parameters():
            p.add_(torch.randn_like(p))
    for (fisher, anchor), weight in zip(known, WEIGHTS):
        ewc.consolidate(fisher, anchor, weight=weight)
    each = lambda m: sum(ewc_loss(m, f, a, 0.7 * w) for (f, a), w in zip(known, WEIGHTS))  # noqa: E731
    assert_equal_gradients(model, ewc, gradients(model, each(model)))
    assert_equal_gradients(there, ewc, gradients(there, each(there)))
    gap_here, gap_there = (each(m) - ewc_loss(m, ewc.fisher, ewc.anchor, 0.7) for m in (model, there))
    torch.testing.assert_close(gap_here, gap_there)  # one constant, wherever the weights are
    assert gap_here > 0.1


def test_single_sums_the_fishers_at_the_newest_anchor():
    model, ewc = network(), EWC("single")
    known = tasks(model)
    for (fisher, anchor), weight in zip(known, WEIGHTS):
        ewc.consolidate(fisher, anchor, weight=weight)
    newest = known[-1][1]
    assert_equal_gradients(model, ewc, gradients(model, *(ewc_loss(model, f, newest, 0.7 * w) for (f, _), w in zip(known, WEIGHTS))))


def test_online_forgets_old_fishers_by_powers_of_gamma():
    model, ewc = network(), EWC("online", gamma=0.6)
    known = tasks(model)
    for fisher, anchor in known:
        ewc.consolidate(fisher, anchor)
    newest = known[-1][1]
    assert_equal_gradients(model, ewc, gradients(model, *(ewc_loss(model, f, newest, 0.7 * 0.6 ** (2 - k)) for k, (f, _) in enumerate(known))))


def test_online_with_gamma_one_is_the_single_penalty():
    single, online = EWC("single"), EWC("online", gamma=1.0)
    for fisher, anchor in tasks(network()):
        single.consolidate(fisher, anchor)
        online.consolidate(fisher, anchor)
    assert all(torch.equal(single.fisher[name], online.fisher[name]) for name in single.fisher)


@pytest.mark.parametrize("rule", ["single", "separate"])
def test_three_linear_gaussian_tasks_in_sequence_reach_the_joint_solution(rule):
    """Bayes' rule, task after task. Orthogonal designs: every diagonal Fisher is a whole Hessian."""
    generator = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    sizes, model, mse, ewc = (200, 100, 50), nn.Linear(3, 1, bias=False).double(), nn.MSELoss(), EWC(rule)
    xs = [torch.linalg.qr(draw(n, 3))[0] * n**0.5 for n in sizes]
    ys = [x @ draw(3, 1) + 0.3 * draw(len(x), 1) for x in xs]
    for n, x, y in zip(sizes, xs, ys):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        springs = (ewc.fisher, ewc.anchor, 1 / n) if ewc.n_tasks else (None, None, 0)
        train_with_ewc(model, [(x, y)], mse, optimizer, *springs, epochs=600, penalty="implicit")
        alone = torch.linalg.lstsq(x, y).solution.T
        # a recursion hands on where it stands; separate penalties keep each task's own solution
        anchor = {"weight": alone} if rule == "separate" else take_anchor(model)
        ewc.consolidate(compute_fisher_information(model, [(x, y)], mse), anchor, weight=float(n))
    joint = torch.linalg.lstsq(torch.cat(xs), torch.cat(ys)).solution.T
    torch.testing.assert_close(model.weight.detach(), joint, rtol=1e-8, atol=1e-10)
    if rule == "separate":
        torch.testing.assert_close(ewc.anchor["weight"], joint, rtol=1e-8, atol=1e-10)


def test_memory_does_not_grow_with_the_tasks():
    model, ewc = network().float(), EWC("separate")
    assert ewc.nbytes == 0
    for _ in range(5):
        fisher = {name: torch.rand_like(p) for name, p in model.named_parameters()}
        ewc.consolidate(fisher, take_anchor(model))
        assert ewc.nbytes == 2 * 4 * (4 * 3 + 3 + 3 * 2 + 2)  # Fisher and anchor, float32
    assert ewc.n_tasks == 5


def test_it_keeps_its_own_copies():
    model, ewc = network(), EWC("single")
    (fisher, anchor), = tasks(model, 1)
    ewc.consolidate(fisher, anchor)
    kept = {name: t.clone() for name, t in ewc.anchor.items()}, {name: t.clone() for name, t in ewc.fisher.items()}
    for t in (*fisher.values(), *anchor.values()):
        t.add_(1)
    assert all(torch.equal(ewc.anchor[name], kept[0][name]) and torch.equal(ewc.fisher[name], kept[1][name]) for name in anchor)


@pytest.mark.parametrize("rule, gamma", [("single", 1.0), ("online", 0.8), ("separate", 1.0)])
def test_saved_and_loaded_weights_only_it_resumes_with_the_same_bits(rule, gamma, tmp_path):
    first, second, third = tasks(network())
    ewc, resumed = EWC(rule, gamma=gamma), EWC()
    ewc.consolidate(*first)
    ewc.consolidate(*second)
    torch.save(ewc.state_dict(), tmp_path / "ewc.pt")
    resumed.load_state_dict(torch.load(tmp_path / "ewc.pt", weights_only=True))
    assert (resumed.rule, resumed.gamma, resumed.n_tasks, resumed.nbytes) == (rule, gamma, 2, ewc.nbytes)
    for each in (ewc, resumed):
        each.consolidate(*third)
    assert all(torch.equal(ewc.fisher[name], resumed.fisher[name]) and torch.equal(ewc.anchor[name], resumed.anchor[name]) for name in ewc.fisher)


def test_an_empty_one_can_be_saved_too(tmp_path):
    torch.save(EWC("online", gamma=0.5).state_dict(), tmp_path / "ewc.pt")
    resumed = EWC()
    resumed.load_state_dict(torch.load(tmp_path / "ewc.pt", weights_only=True))
    assert (resumed.rule, resumed.gamma, resumed.n_tasks) == ("online", 0.5, 0)


def test_narrow_parameters_keep_their_type_and_the_fisher_its_own():
    model, ewc = network().bfloat16(), EWC("separate")
    for _ in range(2):
        ewc.consolidate({name: torch.rand(p.shape) for name, p in model.named_parameters()}, take_anchor(model))
    assert {t.dtype for t in ewc.anchor.values()} == {torch.bfloat16} and {t.dtype for t in ewc.fisher.values()} == {torch.float32}


# ---------------------------------------------------------------- models that change between tasks


def untouched(ewc, error, match, *args, **kwargs):
    before = copy.deepcopy(ewc.state_dict())
    with pytest.raises(error, match=match):
        ewc.consolidate(*args, **kwargs)
    after = ewc.state_dict()
    assert after["n_tasks"] == before["n_tasks"]
    for part in ("fisher", "anchor"):
        assert after[part].keys() == before[part].keys() and all(torch.equal(after[part][k], before[part][k]) for k in before[part])


def after_one_task():
    model, ewc = network(), EWC()
    (fisher, anchor), = tasks(model, 1)
    ewc.consolidate(fisher, anchor)
    return ewc, dict(fisher), dict(anchor)


def test_a_grown_head_is_reported_by_name_and_both_shapes():
    ewc, fisher, anchor = after_one_task()
    fisher["layers.3.weight"], anchor["layers.3.weight"] = torch.ones(5, 3), torch.ones(5, 3)
    untouched(ewc, ValueError, r"fisher_dict\['layers.3.weight'\].*\(2, 3\).*got \(5, 3\).*parameters=", fisher, anchor)


def test_added_removed_and_renamed_parameters_are_reported_by_name():
    ewc, fisher, anchor = after_one_task()
    new = torch.ones(2)
    untouched(ewc, ValueError, r"\['head.bias'\].*parameters=", fisher | {"head.bias": new}, anchor | {"head.bias": new})
    fewer = {name: f for name, f in fisher.items() if name != "layers.3.bias"}
    untouched(ewc, ValueError, r"\['layers.3.bias'\] were added, removed or renamed", fewer, anchor)
    untouched(ewc, ValueError, r"\['head.bias', 'layers.3.bias'\]", fewer | {"head.bias": new}, anchor | {"head.bias": new})


def test_names_that_only_one_dictionary_has_are_reported():
    ewc, fisher, anchor = after_one_task()
    untouched(ewc, ValueError, r"optimal_params lacks \['layers.1.bias'\]", fisher, {k: a for k, a in anchor.items() if k != "layers.1.bias"})
    untouched(ewc, ValueError, r"fisher_dict lacks \['nothing'\]", fisher, anchor, parameters=["nothing"])
    with pytest.raises(ValueError, match=r"optimal_params lacks \['layers.1.bias'"):
        EWC().consolidate(fisher, {})


def test_parameters_says_what_is_kept_when_a_head_grew():
    ewc, fisher, anchor = after_one_task()
    body = ["layers.1.weight", "layers.1.bias"]
    old = {name: f.clone() for name, f in fisher.items()}
    fisher["layers.3.weight"], anchor["layers.3.weight"] = torch.ones(5, 3), torch.ones(5, 3)
    ewc.consolidate(fisher, anchor, parameters=body)
    assert sorted(ewc.fisher) == sorted(ewc.anchor) == sorted(body)
    assert all(torch.equal(ewc.fisher[name], 2 * old[name]) for name in body)
    torch.manual_seed(0)
    grown = SimpleMLP(4, 3, 5).double()
    ewc_loss(grown, ewc.fisher, ewc.anchor, 1.0, parameters=body).backward()
    assert {name for name, p in grown.named_parameters() if p.grad is not None} == set(body)
    with pytest.raises(ValueError, match="missing .'layers.3.bias', 'layers.3.weight'"):
        ewc_loss(grown, ewc.fisher, ewc.anchor, 1.0)


@pytest.mark.parametrize("rule", ["single", "online", "separate"])
def test_a_parameter_that_joins_later_had_no_fisher_before(rule):
    ewc, (first, second) = EWC(rule), tasks(network(), 2)
    early = [name for name in first[0] if name != "layers.3.bias"]
    ewc.consolidate(*first, parameters=early)
    ewc.consolidate(*second, parameters=list(second[0]))
    assert torch.equal(ewc.fisher["layers.3.bias"], second[0]["layers.3.bias"])
    assert torch.equal(ewc.anchor["layers.3.bias"], second[1]["layers.3.bias"])


@pytest.mark.parametrize("value, match", [(-1.0, "holds -1.0"), (float("nan"), "holds nan"), (float("inf"), "holds inf")])
def test_a_bad_fisher_is_refused_and_nothing_is_changed(value, match):
    ewc, fisher, anchor = after_one_task()
    fisher["layers.3.bias"] = torch.full_like(fisher["layers.3.bias"], value)
    untouched(ewc, ValueError, r"fisher_dict\['layers.3.bias'\] " + match, fisher, anchor)


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf")])
def test_a_bad_weight_is_refused(weight):
    ewc, fisher, anchor = after_one_task()
    untouched(ewc, ValueError, "weight must be a finite number above 0, got", fisher, anchor, weight=weight)


@pytest.mark.parametrize("args, match", [(("both", 1.0), "rule must be 'single', 'online' or 'separate', got 'both'"), (("online", 0.0), "gamma"),
                                         (("online", 1.5), "gamma"), (("online", float("nan")), "gamma"), (("single", 0.9), "rule='online' only")])
def test_a_bad_rule_or_gamma_is_refused(args, match):
    with pytest.raises(ValueError, match=match):
        EWC(args[0], gamma=args[1])


def test_a_state_that_is_not_its_own_is_refused():
    with pytest.raises(ValueError, match=r"state lacks \['anchor', 'fisher'.*EWC.state_dict"):
        EWC().load_state_dict({"rule": "single", "gamma": 1.0})
