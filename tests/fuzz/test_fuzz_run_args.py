"""support/run_args.py and support/train_flags.py: hostile files of flags give flags, or one line.

python -m pytest -q tests/fuzz/test_fuzz_run_args.py
"""

import argparse
import re
import shlex
import shutil

import pytest
from conftest import write_jsonl
from hostile import hostile, runs_or_refuses, watched
from hostile_inputs import TRICKS, corrupted, mostly, texts, write_small_base
from hypothesis import strategies as st

import train
from support.defaults import SAMPLE
from support.run_args import read_flags
from support.train_flags import NOT_OF_THE_RUN, new_train_parser, parse_args, run_args_of

# --- what is drawn ----------------------------------------------------------------------------

ACTIONS = {action.option_strings[0]: action for action in new_train_parser()._actions[1:]}
NUMBERS = ["0", "1", "2", "8", "100", "0.5", "1e-3", "0.0", "0.999"]
WORDS = ["a", "a b", "content=instruction", "a=b=output", "dense", "all", "auto", "off", "x:2"]
WORDS += [".", "/", str(SAMPLE), f"{SAMPLE}:0.5", f"{SAMPLE}:x", "x:0", "-", "--", "-1", "-x"]
WORDS += ["@a", "--seed", "=", "#", "'", '"', "\\", "a\nb", "\r\n", "a\x85b", "\x1b[2J", "\0"]
WORDS += ["1" * 400, "1" * 5000, "x" * 300, "x" * 300 + ":2", "٣", "1_0", "1e999", "nan", " 1"]
odd_words = st.sampled_from(WORDS + NUMBERS) | st.sampled_from(TRICKS).map(str) | texts


def accepts(action, word):
    """Whether this word is a value of the flag."""
    try:
        value = action.type(word) if action.type else word
    except (argparse.ArgumentTypeError, ValueError):
        return False
    return action.choices is None or value in action.choices


@st.composite
def flags(draw, names):
    """→ the words of one flag and its values"""
    name = draw(st.sampled_from(names))
    action = ACTIONS[name]
    choices = [*(action.choices or ()), *NUMBERS, *WORDS]
    right = [word for word in choices if accepts(action, word)]
    value = mostly(st.sampled_from(right), odd_words)
    if action.nargs == 0:
        return draw(mostly(st.just([name]), st.just([f"{name}=1"])))
    if draw(st.booleans()):
        return [f"{name}={draw(value)}"]
    most = 3 if action.nargs == "+" else 1
    return [name, *draw(mostly(st.lists(value, min_size=1, max_size=most), st.lists(value)))]


QUOTES = [
    shlex.quote,
    lambda word: re.sub(r"([^\w\r\n])", r"\\\1", word),
    lambda word: '"' + re.sub(r'(["\\])', r"\\\1", word) + '"',
    lambda word: "'" + word + "'",
    str,
]
GAPS = [" ", "\t", "\n", "\n\n", "\r\n", " \\\n", "\\\r\n", " # it isn't 'a' \"flag\n", "\n#\n"]
GAPS += ["\r", "\f", "\u2028", "\n@other.args\n"]


@st.composite
def flag_files(draw, names):
    """→ the bytes of a file with some flags, in every style of quotes and gaps"""
    words = sum(draw(st.lists(flags(names), max_size=4)), [])
    text = "\ufeff" if draw(st.booleans()) else ""
    usual = st.sampled_from(QUOTES[:3])
    for word in words:
        quote = draw(mostly(usual, st.sampled_from(QUOTES)))
        text += quote(word) + draw(mostly(st.sampled_from(GAPS[:9]), st.sampled_from(GAPS)))
    return text.encode()


HUGE = ["--seed 1\n", "#", "# a\n", "\\\n", '"\\"', "'", "\\", "@x\n", "''", "a#'", '"a"', "\0"]
HUGE += ["\n", " x", "--data x ", "--system=a\\\n"]
huge_files = st.builds(
    lambda start, part, end: (start + part * (2**13 // len(part)) + end).encode(),
    st.sampled_from(["", "--data ", "--system=", "--seed=", "--system='", '"', "--x"]),
    st.sampled_from(HUGE),
    st.sampled_from(["", "'", '"', "\\"]),
)


def is_read_by_python(raw):
    """Before Python 3.12, argparse takes "--seed=--" for an empty list."""
    try:
        return not any(word.endswith("=--") for word in read_flags(raw.decode("utf-8-sig")))
    except ValueError:
        return True


ALL = [*ACTIONS]
odd_files = flag_files(ALL) | flag_files(ALL) | flag_files(ALL) | corrupted(flag_files(ALL))
odd_files |= texts.map(str.encode) | huge_files
odd_files = odd_files.filter(is_read_by_python)


# --- files of flags ---------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def as_typed(monkeypatch, tmp_path):
    """argparse tells the name of the command. Relative paths are in an empty directory."""
    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.chdir(tmp_path)


def parsed(file, capsys):
    """→ the arguments, or None if argparse refuses them: with its usage, and one line"""
    capsys.readouterr()
    try:
        with watched():
            return parse_args([f"@{file}"])
    except SystemExit as ended:
        out, err = capsys.readouterr()
        if ended.code == 0:
            assert out.startswith("usage: train.py") and err == ""  # --help is in the file
            return None
        assert ended.code == 2 and out == ""
        usage, begin, told = err.partition("\ntrain.py: error: ")
        assert usage.startswith("usage: train.py") and begin
        assert told.endswith("\n") and told[:-1].isprintable() and len(told) < 2000, told
        return None


def of_the_run(args):
    return {name: value for name, value in vars(args).items() if name not in NOT_OF_THE_RUN}


@hostile(150, raw=odd_files)
def test_a_file_of_flags(tmp_path, capsys, raw):
    """It gives flags, or argparse's lines. What a run would write of these flags gives them
    again."""
    file, again = tmp_path / "my.args", tmp_path / "run.args"
    file.write_bytes(raw)
    args = parsed(file, capsys)
    if args is not None:
        again.write_bytes(run_args_of(args))
        assert of_the_run(parsed(again, capsys)) == of_the_run(args)
        assert run_args_of(parsed(again, capsys)) == again.read_bytes()


# --- the command ------------------------------------------------------------------------------

NAMES = ["--data", "--data", "--eval-data", "--model", "--init-adapter", "--resume", "--keys"]
NAMES += ["--system", "--target-modules", "--modules-to-save", "--eval-split", "--warmup-steps"]
NAMES += ["--lora-alpha", "--lora-dropout", "--learning-rate", "--max-grad-norm", "--seed"]


def names_no_hub_id(raw):
    """Nothing is to be fetched."""
    text = raw.decode("utf-8", "replace")
    return "--model" not in text or not re.search(r"[\w-][\w.-]*/[\w-]", text)


path_files = flag_files(NAMES).filter(names_no_hub_id).filter(is_read_by_python)


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """Flags of a short run, in front of the file's, which come later and so are stronger."""
    base = write_small_base(tmp_path_factory.mktemp("base"))
    records = [{"instruction": f"q {i}", "output": "a", "content": "x"} for i in range(4)]
    file = write_jsonl(tmp_path_factory.mktemp("data") / "x", records)
    return ["--model", base, "--data", file, "--epochs", 1, "--max-length", 64]


@hostile(20, raw=path_files)
def test_train_py_with_a_file_of_flags(tmp_path, capsys, before, raw):
    """It trains with these flags, or says in one line what is wrong with them. It writes to its
    output directory only."""
    (tmp_path / "my.args").write_bytes(raw)
    if parsed("my.args", capsys) is None:
        return
    output = tmp_path / "out"
    shutil.rmtree(output, ignore_errors=True)
    after = ["--max-steps", 1, "--batch-size", 1, "--device", "cpu", "--output-dir", output]
    lines = runs_or_refuses(train.main, [*before, "@my.args", *after], capsys, output)
    assert lines is None or 1 <= len(lines) <= 21
