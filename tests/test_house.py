"""The shape of the project: what stands where, who imports whom, and how long it is to read.

python -m pytest -q tests/test_house.py
"""

import ast
import re

import pytest
from conftest import ROOT

MODULES = ("train", "data", "model", "infer")
SUPPORT = sorted((ROOT / "support").glob("*.py"))


def tree(file):
    return ast.parse(file.read_text("utf-8"))


def imported(file):
    """→ the first names of all modules that a file imports, anywhere in it"""
    names = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


def functions(file):
    """Yields (name, lines) of every function and method."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.end_lineno - node.lineno + 1


def test_four_modules_stand_at_the_top():
    assert {file.stem for file in ROOT.glob("*.py")} == set(MODULES)


@pytest.mark.parametrize("file", SUPPORT, ids=lambda file: file.name)
def test_support_imports_none_of_the_four(file):
    assert not imported(file) & set(MODULES)


def test_data_and_model_do_not_know_each_other():
    assert not imported(ROOT / "data.py") & {"model", "train", "infer"}
    assert not imported(ROOT / "model.py") & {"data", "train", "infer"}


def test_train_and_infer_do_not_know_each_other():
    assert "infer" not in imported(ROOT / "train.py")
    assert "train" not in imported(ROOT / "infer.py")


def test_nothing_imports_what_only_some_systems_have():
    for file in [*ROOT.glob("*.py"), *SUPPORT]:
        assert not imported(file) & {"fcntl", "resource", "pty", "termios"}, file


def test_files_and_functions_are_short_enough_to_read():
    lengths = {}
    for name in MODULES:
        lengths[name] = len((ROOT / f"{name}.py").read_text("utf-8").splitlines())
    assert max(lengths.values()) <= 450 and sum(lengths.values()) <= 1650, lengths
    for file in SUPPORT:
        assert len(file.read_text("utf-8").splitlines()) <= 300, file
    for file in [*ROOT.glob("*.py"), *SUPPORT]:
        for name, lines in functions(file):
            assert lines <= 60 or name == "parse_args", f"{file}: {name} has {lines} lines"


def test_a_name_of_a_function_means_one_thing():
    """No two of the files define a function of the same name, but for those that are a fixed
    name of Python, torch or the command line."""
    places = {}
    for file in [*ROOT.glob("*.py"), *SUPPORT]:
        for node in tree(file).body:
            if isinstance(node, ast.FunctionDef):
                places.setdefault(node.name, []).append(file.name)
    fixed = {"main", "parse_args"}
    assert {name: at for name, at in places.items() if len(at) > 1 and name not in fixed} == {}


def test_the_loop_fits_on_a_screen():
    text = (ROOT / "train.py").read_text("utf-8")
    first = re.search(r"^(def|class) (\w+)", text, re.M)
    assert first[2] == "train"
    assert dict(functions(ROOT / "train.py"))["train"] <= 60
