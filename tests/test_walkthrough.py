"""docs/walkthrough.ipynb: it runs, its assertions hold, and it shows what is committed.

python -m pytest -q tests/test_walkthrough.py
"""

import ast
import json
import re
import shutil

import pytest
from conftest import ROOT

FILE = ROOT / "docs" / "walkthrough.ipynb"
CELLS = json.loads(FILE.read_text("utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
MODULES = ("train", "data", "model", "infer")
CHINESE = r"[\u4e00-\u9fff]"
DECIMAL = r"-?\d+\.\d+(?:e[-+]\d+)?|\d+(?=%)"


def source(cell):
    return "".join(cell["source"])


def texts(cell):
    """→ what a code cell printed and displayed, as one text"""
    found = []
    for output in cell["outputs"]:
        found.append(output.get("text") or output["data"]["text/plain"])
    return "".join("".join(each) for each in found)


def formats(cell):
    """→ the formats of a code cell's pictures"""
    return sorted(each for output in cell["outputs"] for each in output.get("data", {}))


def test_it_runs_and_gives_the_committed_outputs(tmp_path):
    """In a copy of the project. Words, ids and counts are equal. Decimals depend on the processor:
    they may differ by a tenth. Cells with the tag "varies" print what rounding may change."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    for name in MODULES:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    for name in ("support", "dataset", "docs"):
        made_at_use = shutil.ignore_patterns("__pycache__", "model.safetensors*")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=made_at_use)
    notebook = nbformat.read(tmp_path / "docs" / FILE.name, as_version=4)
    place = {"metadata": {"path": tmp_path / "docs"}}
    # Raises for an error in any cell, which also is an assertion that does not hold.
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
    fresh = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for mine, wanted in zip(fresh, CODE, strict=True):
        assert formats(mine) == formats(wanted), source(wanted)
        if "varies" not in wanted["metadata"].get("tags", []):
            one, other = texts(mine), texts(wanted)
            assert re.sub(DECIMAL, "#", one) == re.sub(DECIMAL, "#", other)
            numbers, expected = (
                [float(number) for number in re.findall(DECIMAL, text)] for text in (one, other)
            )
            assert numbers == pytest.approx(expected, rel=0.1, abs=0.01), source(wanted)
    assert {path.name for path in (tmp_path / "docs").iterdir()} == {
        path.name for path in (ROOT / "docs").iterdir()
    }


def test_every_code_cell_is_explained_in_both_languages():
    """The text before it says what to see, in two to four sentences of each language."""
    for before, cell in zip(CELLS, CELLS[1:], strict=False):
        if cell["cell_type"] == "code":
            assert before["cell_type"] == "markdown", source(cell)
            text = re.sub(r"^## .*\n", "", source(before))
            unquoted = re.sub(r"`[^`]*`|\"[^\"]*\"|“[^”]*”", "x", text)
            english, chinese = unquoted.strip().split("\n\n")
            assert len(re.findall(r"\b[a-z]+\b", english)) >= 12, text
            assert len(re.findall(CHINESE, chinese)) >= 20, text
            assert len(re.findall(CHINESE, english)) < 10, text
            for one, end_of_sentence in ((english, r"[.!?](?=\s|$)"), (chinese, r"[。！？]")):
                assert 2 <= len(re.findall(end_of_sentence, one)) <= 4, text
    headings = [source(cell) for cell in CELLS if source(cell).startswith("## ")]
    assert [heading.split()[1] for heading in headings] == [f"{i}." for i in range(1, 15)]
    assert all(re.search(rf" · .*{CHINESE}", each.splitlines()[0]) for each in headings)


def test_it_imports_the_modules_and_copies_nothing_from_them():
    imported, mine = set(), []
    for cell in CODE:
        for node in ast.walk(ast.parse(source(cell))):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
        mine += [line.strip() for line in source(cell).splitlines()]
    assert imported >= set(MODULES)
    theirs = set()
    for name in MODULES:
        lines = (ROOT / f"{name}.py").read_text("utf-8").splitlines()
        lines = [line.strip() for line in lines if len(line.strip()) > 3]
        theirs |= set(zip(lines, lines[1:], strict=False))
    mine = [line for line in mine if len(line) > 3]
    same = [pair for pair in zip(mine, mine[1:], strict=False) if pair in theirs]
    assert all("import" in line for pair in same for line in pair), same


def test_committed_outputs_are_whole_and_tell_nothing_of_the_machine():
    assert FILE.stat().st_size < 700_000
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    for cell in CODE:
        assert {output["output_type"] for output in cell["outputs"]} <= {"stream", "display_data"}
        assert all(output.get("name") != "stderr" for output in cell["outputs"])
        assert not re.search(r"/(home|root|tmp|usr|Users|private|var)/|[A-Z]:\\", texts(cell))
        assert set(cell["metadata"]) <= {"tags"}
        draws = "plt.show()" in source(cell) or "\nboxes(" in source(cell)
        assert any(each.startswith("image/") for each in formats(cell)) == draws, source(cell)


def test_files_it_links_to_exist():
    for cell in CELLS:
        if cell["cell_type"] == "markdown":
            for target in re.findall(r"\]\(([\w./-]+)\)", source(cell)):
                assert (FILE.parent / target).exists(), target
