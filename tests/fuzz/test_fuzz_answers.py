"""support/answers.py: --output holds answers already, perhaps damaged ones. infer.py adds those
that are missing, or says in one line why it doesn't.

python -m pytest -q tests/fuzz/test_fuzz_answers.py
"""

import collections
import json

import pytest
from hostile import fresh, hostile, runs_or_refuses
from hostile_inputs import (
    corrupted,
    damaged,
    json_values,
    mostly,
    raw_files,
    records,
    says_something,
    texts,
    write_small_base,
)
from hypothesis import strategies as st

import infer
from support.answers import as_line, without_prediction
from support.records import RecordReader


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_small_base(tmp_path_factory.mktemp("small"))


# Records that are equal, and records that were answered before.
few = st.sampled_from(["q", "r"]).map(lambda text: {"instruction": text, "output": "a"})
predicted = st.fixed_dictionaries(
    {"instruction": says_something, "prediction": json_values, "z": json_values}
)
questions = raw_files(mostly(few | records | predicted, few | records))


@st.composite
def answered(draw, values):
    """→ lines of --output: some of the records, in any order, with a prediction"""
    lines = []
    for i in draw(st.lists(st.integers(0, len(values) - 1), unique=True)):
        line = without_prediction(values[i]) | {"prediction": draw(texts)}
        if draw(st.booleans()):
            line["prediction_metadata"] = draw(texts)
        lines.append(as_line(line))
    return lines


@st.composite
def damaged_lines(draw, lines, values):
    """→ the bytes of --output. Some lines are dropped, cut, moved, joined, there twice, changed
    inside, without an answer, or no answers at all."""
    lines = list(lines) or [as_line(values[0])]
    for _ in range(draw(st.integers(1, 3))):
        i = draw(st.integers(0, len(lines) - 1))
        line = lines[i]
        kinds = [
            "drop",
            "cut",
            "move",
            "twice",
            "join",
            "json",
            "json",
            "bytes",
            "odd",
            "unanswered",
        ]
        kind = draw(st.sampled_from(kinds))
        if kind in ("drop", "move"):
            del lines[i]
        if kind in ("move", "twice"):
            lines.insert(draw(st.integers(0, len(lines))), line)
        elif kind == "cut":
            lines[i] = line[: draw(st.integers(0, len(line)))] + draw(st.sampled_from([b"", b"\n"]))
        elif kind == "join":
            lines[i] = line[:-1] + draw(st.sampled_from([b"", b" ", b"\r\n", b"\n\n", b"\r"]))
        elif kind == "json" and (value := as_value(line)) is not None:
            lines[i] = as_line(draw(damaged(st.just(value), most=1)))
        elif kind == "bytes":
            lines[i] = draw(corrupted(st.just(line)))
        elif kind == "odd":
            lines[i] = draw(st.sampled_from(ODD_LINES) | st.binary(max_size=20))
        elif kind == "unanswered":
            lines[i] = as_line(draw(st.sampled_from(values)))
        if not lines:
            break
    return b"".join(lines)


ODD_LINES = [b"\n", b"{}\n", b"[]\n", b"null\n", b'{"prediction": "p"}\n', b"\xef\xbb\xbf", b"{"]
ODD_LINES += [b'{"r":' * n + b"1" + b"}" * n + b"\n" for n in (100, 900, 5000)]
ODD_LINES += [b"9" * 5000 + b"\n", b'"' + b"x" * 10**6, b"\0" * 99, b"\xff\xfe{\0}\0\n\0"]


def as_value(line):
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def counted(values):
    """→ how often each record is there, answered or not"""
    texts = [json.dumps(without_prediction(value), sort_keys=True) for value in values]
    return collections.Counter(texts)


def values_of(directory, raw):
    """→ the records of a file"""
    (directory / "x").write_bytes(raw)
    return [record.value for record in RecordReader([directory / "x"], is_prompt=True)]


def goes_on(small, directory, capsys, raw, there):
    """Runs infer.py with questions, --input, and `there` in --output → whether it went on."""
    asked, answers = directory.parent / "x", fresh(directory) / "y"
    values = values_of(directory.parent, raw)
    answers.write_bytes(there)
    arguments = ["--model", small, "--no-adapter", "--greedy", "--max-new-tokens", 2]
    arguments += ["--device", "cpu", "--input", asked, "--output", answers]
    lines = runs_or_refuses(infer.main, arguments, capsys, directory)
    assert [*directory.iterdir()] == [answers]  # the lock is gone
    if lines is not None:
        assert len(lines) == 1 and len(lines[0]) < 2000 and str(answers) in lines[0], lines
        assert answers.read_bytes() == there
        return False
    now = answers.read_bytes()
    found = [json.loads(line) for line in now.decode("utf-8").split("\n")[:-1]]
    assert now.endswith(b"\n") and now.startswith(there[: there.rfind(b"\n") + 1])
    assert counted(found) == counted(values)
    assert all(isinstance(line["prediction"], str) for line in found)
    return True


@hostile(20, draw=st.data(), raw=questions)
def test_answers_that_were_stopped_go_on(tmp_path, small, monkeypatch, capsys, draw, raw):
    """Whatever was answered, and wherever in a line the run was killed."""
    monkeypatch.chdir(tmp_path)  # no adapter is here
    values = values_of(tmp_path, raw)
    lines = draw.draw(answered(values))
    last = lines.pop() if lines else b" "
    there = b"".join(lines) + last[: draw.draw(st.integers(0, len(last) - 1))]
    assert goes_on(small, tmp_path / "answers", capsys, raw, there)


@hostile(40, draw=st.data(), raw=questions)
def test_answers_that_are_damaged(tmp_path, small, monkeypatch, capsys, draw, raw):
    """Each record is answered once. Otherwise nothing of --output is changed."""
    monkeypatch.chdir(tmp_path)
    values = values_of(tmp_path, raw)
    there = draw.draw(damaged_lines(draw.draw(answered(values)), values))
    goes_on(small, tmp_path / "answers", capsys, raw, there)
