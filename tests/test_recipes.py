"""The Python blocks of README.md and tests/RECIPES.md run as they stand, and the penalty helps."""

import contextlib
import copy
import io
import re
from functools import partial
from pathlib import Path

import pytest
import reference
import torch
from reference import Net

import ewc_utils
from ewc_utils import add_ewc_gradients, compute_fisher_information, ewc_loss, take_anchor

ROOT = Path(__file__).resolve().parent.parent
README, RECIPES = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "tests/RECIPES.md")
)
PRINTED = re.compile(r"lambda_ewc = +(\d+): (\d+)% on task A, (\d+)% on task B")
NOISE = ["the Fisher ", "'pin_memory' argument", ".*litlogger"]
pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}") for text in NOISE]


def blocks(text):
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


(FIRST,) = blocks(README)
RECIPE = dict(zip(re.findall(r"^## (.*)$", RECIPES, re.MULTILINE), blocks(RECIPES)))
IN_PLACE, PARTS, MIXED, FROZEN, GROWN, HEADS, _, PACKED, _, LORA, TEXT, LIGHTNING = RECIPE
GAIN = {HEADS: 5, PACKED: 5}  # points on task A, at least; 10 for the others


def run(source, names):
    """Execute a block; return [(lambda, accuracy on A, on B) in percent, as printed]."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        exec(compile(source, "Python block", "exec"), names)
    return [tuple(map(int, found)) for found in PRINTED.findall(text.getvalue())]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """(names, printed) after README's first block, on the bundled sample, in an empty folder."""
    names = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EWC_DATA", str(ewc_utils.SAMPLE))
        patch.chdir(tmp_path_factory.mktemp("recipes"))
        torch.manual_seed(0)
        printed = run(FIRST, names)
        yield names, printed


@pytest.fixture(scope="module")
def recipe(first):
    """recipe(title): (names, printed) after that block alone, run once."""
    done = {}

    def get(title):
        library = re.match(r"# (\w+)\n", RECIPE[title])
        if library:
            pytest.importorskip(library[1])
        if title not in done:
            torch.manual_seed(0)
            names = dict(first[0])
            done[title] = names, run(RECIPE[title], names)
        return done[title]

    return get


def trained(train, model, loader, penalty, **kwargs):
    learner = copy.deepcopy(model)
    train(learner, loader, penalty, **kwargs)
    return take_anchor(learner)


def penalty_for(model):
    fisher, anchor = reference.random_penalty(model)
    return fisher, anchor, 0.5


def few(task, n=4):
    """The first batches for training, 50 images each."""
    return task[0][:n]


# ---------------------------------------------------------------- the texts


def test_the_readme_is_short_every_recipe_has_one_block_and_no_block_is_wide():
    assert README[: README.index("## References")].count("\n") <= 150
    sections = RECIPES.split("\n## ")[1:]
    assert [section.count("```python") for section in sections] == [1] * len(RECIPE)
    lines = "".join([FIRST, *RECIPE.values()]).splitlines()
    assert [line for line in lines if len(line) > 100] == []


def test_every_relative_link_leads_to_a_file_and_every_recipe_has_its_links():
    for text, folder in ((README, ROOT), (RECIPES, ROOT / "tests")):
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        links = re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", prose)
        assert [file for file, _ in links if not (folder / file).exists()] == []
        anchors = [re.sub(r"[^\w-]", "", title.replace(" ", "-")).lower() for title in RECIPE]
        assert [anchor for _, anchor in links if anchor] == anchors


def test_the_map_of_the_module_names_its_sections_and_what_is_there():
    source = (ROOT / "ewc_utils.py").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w[\w ]*) \| (.*) \| (.*`test_\w+\.py`.*) \|$", README, re.MULTILINE)
    sections = re.findall(r"^# -{8,} ([\w ]+)", source, re.MULTILINE)
    assert [row[0] for row in rows] == sections[: sections.index("engine") + 1]
    for section, what, files in rows:
        part = source.split(f"# -------- {section}")[1].split("# -----")[0]
        for name in re.findall(r"`(\w+)`", what):
            assert re.search(rf"^(def|class) {name}\b", part, re.MULTILINE), name
        assert all((ROOT / "tests" / file).exists() for file in re.findall(r"`(.*?)`", files))


# ---------------------------------------------------------------- what they print


def test_the_first_loop_prints_what_the_readme_says(first):
    """62 % on task A instead of 34 %, and 90 % on task B in both cases."""
    (zero, free_a, free_b), (_, on_a, on_b) = first[1]
    assert zero == 0
    claim = re.search(r"about (\d+) % on task A instead of (\d+) %, and (\d+) % on task B", README)
    wanted = [int(number) for number in claim.groups()]
    assert [on_a, free_a, on_b] == pytest.approx(wanted, abs=6)
    assert free_b == pytest.approx(wanted[2], abs=3)


@pytest.mark.parametrize("title", RECIPE)
def test_with_the_penalty_less_is_forgotten_and_task_b_is_learned(title, recipe):
    (zero, free_a, free_b), (strength, on_a, on_b) = recipe(title)[1]
    assert zero == 0 < strength
    assert on_a >= free_a + GAIN.get(title, 10)
    assert on_b >= max(80, free_b - 8)


# ---------------------------------------------------------------- what they compute


def test_all_loops_take_the_same_steps(first, recipe):
    """The loss term, the gradient in place, five parts of a batch, and a batch not cut evenly."""
    names, task = first[0], few(first[0]["task_b"])
    model, penalty = names["model"], penalty_for(names["model"])
    in_place = recipe(IN_PLACE)[0]["train_in_place"]
    in_parts = recipe(PARTS)[0]["train_in_parts"]
    wanted = trained(names["train"], model, task, penalty)
    free = trained(names["train"], model, task, (*penalty[:2], 0))
    for found in (
        trained(in_place, model, task, penalty),
        trained(in_parts, model, task, penalty),
        trained(in_parts, model, task, penalty, parts=3),
    ):
        reference.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
    assert max((wanted[k] - free[k]).abs().max() for k in wanted) > 0.05


def test_the_factor_of_the_scaler_reaches_neither_the_penalty_nor_the_clip(first, recipe):
    names, scaler, found = recipe(MIXED)[0], torch.amp.GradScaler, []
    penalty = penalty_for(names["model"])
    for factor in (1.0, 2.0**12):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.amp, "GradScaler", partial(scaler, init_scale=factor))
            task = few(names["task_b"])
            found.append(trained(names["train_mixed"], names["model"], task, penalty))
    reference.assert_close(*found, rtol=1e-3, atol=1e-5)


def test_frozen_batchnorm_keeps_its_statistics_and_may_remember_less(first, recipe):
    names, printed = recipe(FROZEN)
    frozen, free = (copy.deepcopy(names["normalised"]) for _ in range(2))
    before, task = copy.deepcopy(frozen.layers[2]), few(names["task_b"])
    penalty = penalty_for(frozen)
    names["train_frozen"](frozen, task, penalty)
    names["train"](free, task, penalty)
    assert torch.equal(frozen.layers[2].running_mean, before.running_mean)
    assert torch.equal(frozen.layers[2].running_var, before.running_var)
    assert not torch.equal(free.layers[2].running_mean, before.running_mean)
    torch.manual_seed(0)
    adapting = run(RECIPE[FROZEN].replace(", train_frozen,", ", train,"), dict(first[0]))
    assert adapting[1][1] > printed[1][1]


def test_a_grown_head_computes_the_old_logits_and_its_new_rows_are_free(recipe):
    names, _ = recipe(GROWN)
    model = ewc_utils.SimpleMLP(784, 16, 8)
    fisher, anchor = reference.random_penalty(model)
    x = torch.rand(5, 784)
    old = model(x)
    model.layers[-1] = names["grown"](model.layers[-1], 2)
    torch.testing.assert_close(model(x)[:, :8], old)
    fisher, anchor = names["padded"](fisher, model), names["padded"](anchor, model)
    energy = ewc_loss(model, fisher, anchor, 1.0).item()
    with torch.no_grad():
        model.layers[-1].weight[8:] += 1
        model.layers[-1].bias[8:] += 1
    assert ewc_loss(model, fisher, anchor, 1.0).item() == energy > 0
    with torch.no_grad():
        model.layers[-1].weight[:8] += 1
    assert ewc_loss(model, fisher, anchor, 1.0).item() > energy


def test_only_the_adapters_of_lora_have_a_fisher_and_move(recipe):
    pytest.importorskip("peft")
    names, _ = recipe(LORA)
    net = names["get_peft_model"](copy.deepcopy(names["model"]), names["config"])
    names["train"](net, few(names["task_a"]))  # at the start one factor of each adapter is 0
    x, y = few(names["task_a"])[0]
    fisher, anchor = compute_fisher_information(net, [(x, y)], names["criterion"]), take_anchor(net)
    assert fisher.keys() == anchor.keys() and len(fisher) == 4
    assert all("lora_" in name for name in fisher)
    assert reference.error(fisher, reference.fisher(net, [(x.double(), y)])) < 1e-4
    before = copy.deepcopy(net.state_dict())
    names["train"](net, few(names["task_b"]), (fisher, anchor, 1.0))
    moved = {k for k, t in net.state_dict().items() if not torch.equal(t, before[k])}
    assert moved == fisher.keys()


@pytest.mark.parametrize("title", [PACKED, TEXT])
def test_the_fisher_of_padded_texts_is_that_of_the_texts_alone(title, recipe):
    """So the lengths and the attention mask count: with the padding read as words it differs."""
    names, _ = recipe(title)
    if title == PACKED:
        net, loader = names["Reader"](), names["texts"](False)[0]
        whole = lambda m, x: m.net.head(m.net.gru(m.net.embedding(x))[1][0])  # noqa: E731
        short = lambda m, x: m.net(x[:, : (x[0] > 0).sum()])  # noqa: E731
        batch = ids, y = [torch.cat(parts) for parts in zip(*loader[:4])]
    else:
        net, loader = names["BertForSequenceClassification"](names["config"]), names["texts"](0)[0]
        whole = lambda m, x: m.net(input_ids=x).logits  # noqa: E731
        short = lambda m, x: whole(m, x[:, : (x[0] > 0).sum()])  # noqa: E731
        batch = {name: torch.cat([parts[name] for parts in loader[:4]]) for name in loader[0]}
        ids, y = batch["input_ids"], batch["labels"]
    assert {3, 8} <= set((ids > 0).sum(1).tolist()), "short texts and one that needs no padding"
    found = compute_fisher_information(net, [batch], names["criterion"])
    found = {f"net.{name}": f for name, f in found.items()}
    alone, unmasked = (reference.fisher(Net(f, net=net), [(ids, y)]) for f in (short, whole))
    assert reference.error(found, alone) < 1e-3 and reference.error(found, unmasked) > 0.1


def test_transformers_adds_the_penalty_once_per_optimizer_step(recipe, monkeypatch):
    """Also with gradient accumulation, before the step, and to the weights that are trained."""
    pytest.importorskip("transformers")
    names, _ = recipe(TEXT)
    options, steps, pulls = names["TrainingArguments"], [], []
    accumulating = lambda *a, **k: options(*a, **k, gradient_accumulation_steps=2)  # noqa: E731
    monkeypatch.setitem(names, "TrainingArguments", accumulating)
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *a: steps.append(1) or step(*a))

    def counted(model, *penalty):
        before = model.classifier.weight.grad.clone()
        add_ewc_gradients(model, *penalty)
        pulls.append((len(steps), not torch.equal(model.classifier.weight.grad, before)))

    monkeypatch.setitem(names, "add_ewc_gradients", counted)
    model = names["BertForSequenceClassification"](names["config"])
    names["train_text"](model, names["texts"](0)[0][:6], penalty_for(model))
    assert pulls == [(n, True) for n in range(3 * 3)]


def test_lightning_takes_the_steps_of_the_loop_and_its_hook_moves_the_penalty(recipe):
    """With one batch an epoch, because it draws another order of the batches."""
    pytest.importorskip("lightning")
    names, _ = recipe(LIGHTNING)
    task, penalty = few(names["task_b"], 1), penalty_for(names["model"])
    wanted = trained(names["train"], names["model"], task, penalty)
    found = trained(names["fit"], names["model"], task, penalty)
    reference.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
    learner = names["Learner"](copy.deepcopy(names["model"]))
    learner.penalty = penalty_for(learner.net)
    learner.to("meta").on_train_start()
    assert all(t.is_meta for values in learner.penalty[:2] for t in values.values())
    assert learner.penalty[2] == 0.5
