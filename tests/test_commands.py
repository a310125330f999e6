"""support/commands.py and support/errors.py: what both commands share, and how errors are told.

python -m pytest -q tests/test_commands.py
"""

import argparse
import io
import pickle
import sys

import pytest
import torch

from support import commands, errors

# --- arguments --------------------------------------------------------------------------------


def refusal(parse, text):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        parse(text)
    return str(error.value)


def test_a_number_has_limits_and_a_kind():
    whole, ratio = commands.number(1), commands.number(0.0, 0.99)
    assert (whole("7"), ratio("0.5"), ratio("0")) == (7, 0.5, 0.0)
    assert isinstance(whole("7"), int) and isinstance(ratio("0"), float)
    assert refusal(whole, "0") == "must be between 1 and 1000000000, not 0"
    assert refusal(whole, "9" * 30).startswith("must be between 1 and")
    assert refusal(whole, "1.5") == "invalid whole number value: '1.5'"
    assert refusal(ratio, "1") == "must be between 0.0 and 0.99, not 1"
    assert refusal(ratio, "nan").startswith("must be between 0.0 and")
    assert refusal(ratio, "much") == "invalid number value: 'much'"


def test_a_number_of_blocks_may_be_a_word():
    texts = ("all", "off", "auto", "0", "12")
    assert [commands.number_of_blocks(text) for text in texts] == ["all", "off", "auto", 0, 12]
    for text in ("most", "-1", "1.5"):
        told = refusal(commands.number_of_blocks, text)
        assert told == f"must be all, off, auto, or a number of blocks, not {text!r}"


def test_help_shows_the_defaults_that_are_values():
    parser = commands.new_parser("One line.")
    parser.add_argument("--size", default=7, help="how large")
    parser.add_argument("--name", help="what it is called")
    parser.add_argument("--fast", action="store_true", help="hurry")
    shown = " ".join(parser.format_help().split())
    assert "One line." in shown
    assert "how large (default: 7)" in shown and shown.count("(default: ") == 1


def test_bytes_that_are_not_utf_8_are_refused():
    commands.check_utf8("甄嬛", "", None)
    with pytest.raises(ValueError, match=r"'a\\udcff' is not valid UTF-8"):
        commands.check_utf8("fine", "a\udcff")


def test_a_character_that_the_terminal_lacks_becomes_a_question_mark(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    commands.prepare_terminal()
    print("a甄", flush=True)
    assert raw.getvalue() == b"a?\n"


# --- the end of a command ---------------------------------------------------------------------


def last_lines(capsys, error):
    """What is told of an error. The exit code is 2."""
    with pytest.raises(SystemExit) as stop:
        commands.exit_with(error, "train.py", "the memory ran out; take less")
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()


def test_a_user_is_told_of_an_error_in_lines_that_name_the_program(capsys):
    lines = last_lines(capsys, ValueError("a.json:1: no key\nb.json:2: no value"))
    assert lines == ["train.py: error: a.json:1: no key", "train.py: error: b.json:2: no value"]
    lines = last_lines(capsys, FileNotFoundError(2, "No such file or directory", "a.json"))
    assert lines == ["train.py: error: a.json: No such file or directory"]
    assert last_lines(capsys, OSError("out: full")) == ["train.py: error: out: full"]


def test_memory_and_compilation_have_advice(capsys):
    lines = last_lines(capsys, torch.OutOfMemoryError("CUDA out of memory. Tried to …\nGPU 0 …"))
    assert lines == ["train.py: error: the memory ran out; take less"]
    (line,) = last_lines(capsys, torch._dynamo.exc.InternalTorchDynamoError("no g++\nmore"))
    assert line.startswith("train.py: error: --compile: ") and "no g++; leave it out" in line


def test_a_bug_is_raised_again():
    for bug in (KeyError("x"), RuntimeError("x"), AssertionError()):
        with pytest.raises(type(bug)) as error:
            commands.exit_with(bug, "train.py", "")
        assert error.value is bug


# --- messages ---------------------------------------------------------------------------------


def test_names_out_of_files_are_printable_and_short():
    assert errors.printable("甄嬛") == "甄嬛"
    assert errors.printable("a\n\x1b[2J") == r"'a\n\x1b[2J'"
    assert errors.printable("x" * 1000) == "x" * 300


def test_a_library_s_message_becomes_one_line():
    assert errors.one_line(ValueError(" it is bad\nand more")) == "it is bad"
    assert errors.one_line(KeyError("weight")) == "KeyError: 'weight'"
    assert errors.one_line(ValueError("")) == "no message"
    told = errors.one_line(pickle.UnpicklingError("set weights_only=False to run what is inside"))
    assert told == "it is damaged, or holds more than tensors"


def test_of_many_faults_the_first_are_told():
    faults = [f"fault {i}" for i in range(25)]
    assert errors.first_few(faults) == "fault 0; fault 1; fault 2; and 22 more"
    assert errors.first_few(faults[:3]) == "fault 0; fault 1; fault 2"
    assert errors.first_few(["a\nb"]) == r"'a\nb'"
    lines = errors.one_a_line(faults, "a.json: ").split("\n")
    assert lines == [*faults[:20], "a.json: and 5 more"]
    assert errors.one_a_line(faults[:20]).split("\n") == faults[:20]
    assert errors.one_a_line(["x" * 5000]) == "x" * 1000 + "…"
