"""The notebooks as files: what a reader sees on a web page, before any cell is run."""

import base64
import builtins
import contextlib
import dis
import io
import re
import statistics
from pathlib import Path
from unittest import mock

import nbformat
import pytest
import torch

import ewc_utils

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "Elastic_Weight_Consolidation.ipynb"
WORKED = ROOT / "tests" / "worked_examples.ipynb"
README = (ROOT / "README.md").read_text(encoding="utf-8")
BOTH = pytest.mark.parametrize("path", [NOTEBOOK, WORKED], ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def text_of(output):
    """The text of a stored output, whatever its kind."""
    text = output.get("text") or output.get("data", {}).get("text/plain", "")
    return text if isinstance(text, str) else "".join(text)


def images(cell):
    data = [output.get("data", {}) for output in cell.outputs]
    return [base64.b64decode(kinds["image/png"]) for kinds in data if "image/png" in kinds]


def cells_of_table(text):
    """The rows of a markdown table as lists of cells, without the rule under the header."""
    rows = [
        [entry.strip() for entry in line.strip().strip("|").split("|")]
        for line in text.splitlines()
        if line.strip().startswith("|")
    ]
    return [row for row in rows if not all(re.fullmatch(r":?-+:?", entry) for entry in row)]


@BOTH
def test_is_a_valid_notebook_that_any_machine_can_open(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    # GitHub does not show a file with widgets that lack their state.
    assert "widgets" not in notebook.metadata
    assert all(cell.source.strip() and "execution" not in cell.metadata for cell in notebook.cells)


@BOTH
def test_was_executed_from_top_to_bottom_in_one_fresh_run(path):
    counts = [cell.execution_count for cell in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1)) and counts


@BOTH
def test_stores_no_error_and_nothing_from_stderr(path):
    for cell in code_cells(path):
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr", cell.source


@BOTH
def test_names_no_folder_of_one_machine(path):
    """A path of two or more folders from the root of a disk; addresses on the web are left out."""
    text = re.sub(
        r"\w+://\S+",
        "",
        "\n".join(
            part
            for cell in read(path).cells
            for part in (cell.source, *(text_of(output) for output in cell.get("outputs", [])))
        ),
    )
    found = re.findall(r"(?<![\w.)}\]/])/\w[\w.-]*/\w\S*|\b[A-Z]:\\\w\S*", text)
    assert found == []


@BOTH
def test_never_more_than_two_code_cells_in_a_row(path):
    kinds = "".join("c" if cell.cell_type == "code" else "t" for cell in read(path).cells)
    assert "ccc" not in kinds and kinds.startswith("t") and kinds.endswith("t")


@BOTH
def test_code_cells_are_short_and_as_narrow_as_the_module(path):
    lengths = [len(cell.source.splitlines()) for cell in code_cells(path)]
    assert max(lengths) <= 20 and statistics.median(lengths) <= 13
    assert all(len(line) <= 100 for cell in code_cells(path) for line in cell.source.splitlines())


def test_every_figure_stands_between_two_texts():
    cells = read(NOTEBOOK).cells
    figures = [i for i, cell in enumerate(cells) if cell.cell_type == "code" and images(cell)]
    assert figures
    for i in figures:
        before = [cell.cell_type for cell in cells[max(i - 2, 0) : i]]
        assert "markdown" in before and cells[i + 1].cell_type == "markdown", cells[i].source


def test_every_image_is_a_png():
    """SVG figures are text that changes from run to run."""
    assert set(re.findall(r'"(image/\w+)', NOTEBOOK.read_text(encoding="utf-8"))) == {"image/png"}


@BOTH
def test_inline_equations_survive_markdown(path):
    """Between $ and $, markdown reads * as emphasis, | as a table and < as a tag."""
    for cell in read(path).cells:
        if cell.cell_type == "markdown":
            prose = re.sub(r"```.*?```|`[^`]*`|\$\$.*?\$\$", "", cell.source, flags=re.S)
            assert [
                eq for eq in re.findall(r"\$([^$\n]+)\$", prose) if re.search(r"[*<|]", eq)
            ] == []
            assert not re.search(r"^#.*\$", cell.source, re.M)


def tagged(tag):
    """The one cell of the notebook with this tag."""
    (cell,) = [cell for cell in code_cells(NOTEBOOK) if tag in cell.metadata.get("tags", [])]
    return cell


def results():
    return cells_of_table("\n".join(text_of(output) for output in tagged("results").outputs))


def test_the_readme_shows_the_results_that_the_notebook_printed():
    shown = re.findall(r"<!-- results -->(.*?)<!-- /results -->", README, re.DOTALL)
    assert len(shown) == 1, "README.md holds one table between the two comments"
    assert len(results()) >= 3 and len({len(row) for row in results()}) == 1
    assert cells_of_table(shown[0]) == results()


def test_the_top_shows_three_rows_of_the_results_and_the_figure_that_the_notebook_made():
    first, picture, second = read(NOTEBOOK).cells[:3]
    assert cells_of_table(second.source) == [
        row for row in results() if row[0] in ("method", "fine-tuning", "L2", "EWC")
    ]
    assert not first.get("attachments"), "GitHub and Colab do not show attachments"
    (drawn,) = images(tagged("hero"))
    (shown,) = images(picture)
    assert shown == drawn == (ROOT / ".github" / "forgetting.png").read_bytes()


def test_the_numbers_of_the_caption_are_those_of_the_results():
    """The accuracies on task A, rounded, and what it was before: it is not forgotten yet."""
    (caption,) = re.findall(r"!\[(.*?)\]\(\.github/forgetting\.png\)", README)
    means = [[float(entry.split()[0]) for entry in row[2:]] for row in results()[1:]]
    known = {round(on_a) for on_a, _, _ in means} | {round(on_a + lost) for on_a, _, lost in means}
    assert {int(number) for number in re.findall(r"(\d+) %", caption)} <= known


def test_the_plan_for_a_class_names_the_code_cells_of_each_section():
    counts, title = {}, ""
    for cell in read(NOTEBOOK).cells:
        title = ([title] + re.findall(r"^## (.*)$", cell.source, re.M))[-1]
        if cell.cell_type == "code":
            counts.setdefault(title, []).append(str(cell.execution_count))
    plan = re.findall(r"\*([^*]+)\* \(\D*(\d+) to (\d+)", README)
    assert len(plan) == 5
    for title, *ends in plan:
        assert ends == [counts[title][0], counts[title][-1]]


def test_has_a_readable_length_and_rhythm():
    part_one, part_two = parts()
    kinds = [cell.cell_type for cell in part_one + part_two]
    assert len(kinds) <= 95 and len(part_one) <= 52
    assert kinds.count("markdown") >= 0.8 * kinds.count("code")
    assert NOTEBOOK.stat().st_size < 2_000_000


def test_the_stored_results_come_from_the_full_data():
    outputs = "\n".join(text_of(output) for cell in code_cells(NOTEBOOK) for output in cell.outputs)
    assert "full data" in outputs and "bundled sample" not in outputs


def test_choose_takes_the_value_with_the_best_mean(monkeypatch):
    monkeypatch.setattr("IPython.display.display", mock.MagicMock())
    scores = {1: [90, 20], 2: [60, 60], 3: [10, 80]}
    trials, chosen = ewc_utils.choose(lambda _, v: scores[v], {"a": (1, 2), "b": (1, 3)})
    assert trials == {"a": {1: [90, 20], 2: [60, 60]}, "b": {1: [90, 20], 3: [10, 80]}}
    assert chosen == {"a": 2, "b": 1}


def test_side_by_side_keeps_the_order_and_raises_what_a_job_raises(monkeypatch):
    monkeypatch.setattr("IPython.display.display", mock.MagicMock())
    threads = torch.get_num_threads()
    assert ewc_utils.side_by_side(pow, [(2, 3), (3, 2), (5, 1)]) == [8, 9, 5]
    with pytest.raises(ZeroDivisionError):
        ewc_utils.side_by_side(divmod, [(1, 1), (1, 0)])
    assert torch.get_num_threads() == threads


def test_a_table_shows_the_mean_and_the_standard_deviation_over_seeds(capsys):
    ewc_utils.table("a | b | c", {"x": [0.12345, torch.tensor([1.0, 3.0])]})
    assert cells_of_table(capsys.readouterr().out) == [["a", "b", "c"], ["x", "0.123", "2.0 ± 1.4"]]


@pytest.mark.parametrize("cell", [c for c in code_cells(NOTEBOOK) if images(c)])
def test_every_figure_has_a_description(cell):
    found = [output.metadata for output in cell.outputs if "image/png" in output.get("data", {})]
    assert all(len(data["image/png"]["alt"]) > 10 for data in found), cell.source


# ---------------------------------------------------------------- what its cells need


def parts():
    """The cells of Part I, with those above it, and of Part II."""
    cells = read(NOTEBOOK).cells
    at = next(i for i, cell in enumerate(cells) if re.search(r"^# Part II", cell.source, re.M))
    return cells[:at], cells[at:]


def plain(cell):
    """Its code without the lines that only IPython understands."""
    return re.sub(r"^%.*$", "", cell.source, flags=re.M)


def names(source):
    """(used, defined): the global names of a piece of code, functions included."""
    used, defined, pieces = set(), set(), [compile(source, "cell", "exec")]
    while pieces:
        piece = pieces.pop()
        pieces += [constant for constant in piece.co_consts if hasattr(constant, "co_code")]
        for step in dis.get_instructions(piece):
            if step.opname in ("LOAD_NAME", "LOAD_GLOBAL"):
                used.add(step.argval)
            elif step.opname in ("STORE_NAME", "STORE_GLOBAL"):
                defined.add(step.argval)
    return used, defined


def names_in(cells):
    """(used, defined) by all these cells together."""
    found = [names(plain(cell)) for cell in cells if cell.cell_type == "code"]
    return [set().union(*sets) for sets in zip(*found)] or [set(), set()]


def test_each_section_of_part_two_needs_only_part_one():
    """And the code before the first section of Part II."""
    part_one, part_two = parts()
    starts = [i for i, cell in enumerate(part_two) if re.search(r"^## ", cell.source, re.M)]
    known = names_in(part_one + part_two[: starts[0]])[1] | set(dir(builtins))
    assert len(starts) > 3
    for start, stop in zip(starts, [*starts[1:], len(part_two)]):
        used, defined = names_in(part_two[start:stop])
        assert used - defined - known == set(), part_two[start].source[:60]


def solutions(cells):
    """The code of the solutions to the exercises."""
    texts = [cell.source for cell in cells if cell.cell_type == "markdown"]
    hidden = re.findall(r"<details>.*?</details>", "\n".join(texts), re.DOTALL)
    return [code for text in hidden for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]


def needed(source, cells):
    """The code cells, in order, whose names the code uses, directly or through other cells."""
    used, chosen = names(source)[0], []
    for cell in reversed([cell for cell in cells if cell.cell_type == "code"]):
        own, defined = names(plain(cell))
        if defined & used:
            chosen.insert(0, cell)
            used = used - defined | own
    return chosen


@pytest.mark.parametrize("part", [0, 1], ids=["Part I", "Part II"])
def test_the_solutions_of_the_exercises_run(part, monkeypatch):
    """On the sample, after the cells that they need: no assert of those stops them."""
    cells, own = sum(parts()[: part + 1], []), solutions(parts()[part])
    assert len(own) >= 2
    monkeypatch.setenv("EWC_DATA", str(ewc_utils.SAMPLE))
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setattr("IPython.display.display", mock.MagicMock())
    monkeypatch.chdir(ROOT)
    wanted = needed("\n".join(own), cells)
    known = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for source in [plain(cell) for cell in wanted]:
            exec(compile(source, "a cell", "exec"), known)
        for source in own:
            exec(compile(source, "a solution", "exec"), dict(known))
