"""support/commands.py and support/errors.py: what both commands share, and how errors are told.

python -m pytest -q tests/test_commands.py
"""

import argparse
import io
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import KILLS, ROOT, run, wait_for

from support import commands, errors
from support.train_flags import parse_args

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


@pytest.mark.parametrize(
    "words, told",
    [
        (["--max-stepz", "3"], "--max-stepz 3; did you mean --max-steps?"),
        (["--epoch=1", "--sede", "2"], "--epoch=1 --sede 2; did you mean --epochs --seed?"),
        (["steps", "--zzz"], "steps --zzz"),
    ],
)
def test_a_misspelt_flag_is_told_with_the_one_that_is_meant(capsys, words, told):
    with pytest.raises(SystemExit) as stop:
        parse_args(words)
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: unrecognized arguments: {told}\n")


def test_bytes_that_are_not_utf_8_are_refused(capsys):
    parser = commands.new_parser("One line.", prog="x.py")
    commands.check_utf8(parser, "甄嬛", "", None)
    with pytest.raises(SystemExit) as stop:
        commands.check_utf8(parser, "fine", "a\udcff")
    assert stop.value.code == 2
    assert r"x.py: error: 'a\udcff' is not valid UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["train.py", "infer.py"])
@pytest.mark.parametrize("flag, code", [("--help", 0), ("--batch-size=x", 2)])
def test_flags_are_read_before_libraries_that_are_slow_to_import(tmp_path, script, flag, code):
    for name in ("torch", "transformers", "peft", "safetensors", "numpy"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} is imported')")
    done = run(script, flag, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == code, done.stderr
    assert f"usage: {script}" in (done.stderr if code else done.stdout)
    assert ("invalid whole number value: 'x'" if code else "") in done.stderr


# --- the terminal -----------------------------------------------------------------------------


@pytest.fixture
def stdout_to_pipe(monkeypatch):
    """stdout_to_pipe() → the descriptor that reads what is written to sys.stdout"""
    reader, writer = os.pipe()
    with open(writer, "w") as stdout:

        def stdout_to_pipe():
            monkeypatch.setattr(sys, "stdout", stdout)
            return reader

        yield stdout_to_pipe


def test_a_character_that_the_terminal_lacks_becomes_a_question_mark(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    commands.prepare_terminal()
    print("a甄", flush=True)
    assert raw.getvalue() == b"a?\n"


def test_lines_are_written_at_once_into_a_pipe(stdout_to_pipe):
    pipe = stdout_to_pipe()
    os.set_blocking(pipe, False)
    print("before")
    with pytest.raises(BlockingIOError):  # nothing is there
        os.read(pipe, 100)
    commands.prepare_terminal()
    print("after")
    assert os.read(pipe, 100) == b"before\nafter\n"
    os.close(pipe)


def keep(number, frame):
    """A handler that a program has set before."""


HANDLERS = [
    (signal.SIG_DFL, signal.default_int_handler),  # as the commands begin
    (signal.SIG_IGN, signal.SIG_IGN),
    (keep, keep),
]


@pytest.mark.parametrize("before, after", HANDLERS)
def test_ctrl_c_is_an_exception_from_then_on_unless_it_is_ignored(before, after):
    own = signal.signal(signal.SIGINT, before)
    try:
        commands.prepare_terminal()
        assert signal.getsignal(signal.SIGINT) == after
    finally:
        signal.signal(signal.SIGINT, own)


def test_messages_about_flags_are_printable(capsys):
    with pytest.raises(SystemExit):
        commands.new_parser("a test").parse_args(["\x1b[2J\n"])
    assert capsys.readouterr().err.endswith("unrecognized arguments: \\x1b[2J\\n\n")
    with pytest.raises(SystemExit):
        commands.new_parser("a test").parse_args(["x" * 5000])
    assert len(capsys.readouterr().err) < 1500


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


@pytest.mark.parametrize("end", ["\n", ""])  # written in the middle, or when all is done
def test_a_reader_that_has_gone_ends_a_command_without_a_word(stdout_to_pipe, capsys, end):
    os.close(stdout_to_pipe())
    with pytest.raises(SystemExit) as stop, commands.errors_for_user("train.py", ""):
        print("nobody reads this", end=end)
    assert stop.value.code == 128 + signal.SIGPIPE
    print("nor this", flush=True)  # nor is it an error from now on
    assert capsys.readouterr().err == ""


def test_ctrl_c_ends_a_command_without_a_word(capsys):
    with pytest.raises(SystemExit) as stop, commands.errors_for_user("train.py", ""):
        raise KeyboardInterrupt
    assert stop.value.code == 130 and capsys.readouterr() == ("", "")


def test_an_error_ends_a_command_with_the_lines_that_tell_it(capsys):
    with pytest.raises(SystemExit) as stop, commands.errors_for_user("infer.py", "take less"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "infer.py: error: take less\n"


def test_a_command_can_end_in_its_own_way(capsys):
    told, error = [], ValueError("bad")
    exit_with = lambda *arguments: told.append(arguments)  # noqa: E731
    with commands.errors_for_user("train.py", "take less", exit_with):
        raise error
    assert told == [(error, "train.py", "take less")] and capsys.readouterr().err == ""
    with pytest.raises(SystemExit) as stop, commands.errors_for_user("", "", exit_with):
        sys.exit(3)
    assert stop.value.code == 3 and len(told) == 1


def test_a_bug_leaves_a_command_as_it_is():
    bug = KeyError("x")
    with pytest.raises(KeyError) as error, commands.errors_for_user("train.py", ""):
        raise bug
    assert error.value is bug


# --- the commands, as a user starts them ------------------------------------------------------


def start(script, *arguments):
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    return subprocess.Popen([sys.executable, ROOT / script, *map(str, arguments)], **options)


def start_training(directory, steps):
    return start("train.py", "--device", "cpu", "--max-steps", steps, "--output-dir", directory)


def start_answering():
    return start("infer.py", "--device", "cpu", "--no-adapter", "--prompt", "q", "--greedy")


def wait_for_torch(process):
    """Waits until a process imports torch."""
    maps = Path(f"/proc/{process.pid}/maps")
    wait_for(lambda: "torch" in maps.read_text(), process)


def test_head_ends_both_commands_without_a_word(tmp_path):
    training, answering = start_training(tmp_path / "out", 3), start_answering()
    assert training.stdout.readline()
    for process in (training, answering):  # which has not even begun
        process.stdout.close()
    told = training.stderr.read()
    assert training.wait() == 128 + signal.SIGPIPE and "Traceback" not in told, told
    told = answering.stderr.read()
    assert answering.wait() == 128 + signal.SIGPIPE and told.count("\n") == 1, told


@pytest.mark.parametrize("number", range(max(2, KILLS)))
def test_ctrl_c_while_python_imports(tmp_path, number):
    """Before that Python itself starts, and then it prints a traceback of its own."""
    process = start_answering() if number % 2 else start_training(tmp_path / "out", 10**6)
    wait_for_torch(process)
    time.sleep(random.uniform(0, 3))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 130) and "Traceback" not in err, (out, err)


@pytest.mark.parametrize("script", ["train.py", "infer.py"])
def test_ctrl_c_stays_ignored_where_it_was(tmp_path, script):
    """A shell's script ignores it for what it starts in the background."""
    command = ["bash", "-c", "trap '' INT; exec \"$@\"", "bash", sys.executable, ROOT / script]
    with subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE) as process:
        wait_for_torch(process)
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.kill()


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
