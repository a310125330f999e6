"""support/run_args.py and the flags' values: a run is given again by its run.args.

python -m pytest -q tests/test_run_args.py
"""

import re
import shlex
import shutil

import pytest
from conftest import (
    SHORT,
    SIX_UPDATES,
    new_run,
    outcome,
    refused,
    train_main,
    with_random_lora,
    write_jsonl,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from support.run_args import flags_text, read_flags
from support.train_flags import LINEAR_LAYERS, LORA, parse_args, run_args_of

inputs = settings(max_examples=300, derandomize=True, database=None, deadline=None)
# What a command line can hold. The first kind has what a shell or Python may take for more.
ODD = " \t\r\n'\"\\#@-=a\u3000\u2028\x0b\x0c\x85"
LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
TEXTS = st.text(ODD, max_size=9) | st.text(LETTERS, max_size=9)
TEXTS = TEXTS.filter(lambda text: text != "--")  # which argparse removes before Python 3.12


# --- a file of flags --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, words",
    [
        ("", []),
        ("# a comment\n", []),
        ("--a\n# it isn't a flag\n --b # nor is 'this\n--c#d #e", ["--a", "--b", "--c#d"]),
        ("--a '# b' \"#c\" d'#'e \\#f", ["--a", "# b", "#c", "d#e", "#f"]),
        ("--a 1 --b=2\t--c\n\n\n  3", ["--a", "1", "--b=2", "--c", "3"]),
        ("--a\r\n# b\r\n--c 'd'\r\n", ["--a", "--c", "d"]),
        ("--a '' \"\" --b=''", ["--a", "", "", "--b="]),
        ("--a 'two\nlines' \"it's\" '\"'", ["--a", "two\nlines", "it's", '"']),
        (r"""a\ b "\"\\" '\'""", ["a b", '"\\', "\\"]),
        ("@b --c @d", ["@b", "--c", "@d"]),
    ],
)
def test_words_quotes_and_comments(text, words):
    assert read_flags(text) == words


@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_a_command_on_several_lines_is_pasted_as_it_is(line_break):
    assert read_flags(f"--a 1 \\{line_break}  --b 2 \\{line_break}") == ["--a", "1", "--b", "2"]
    assert read_flags(f"'a\\{line_break}b'") == [f"a\\{line_break}b"]


def shlex_words(text):
    try:
        return shlex.split(text)
    except ValueError:
        return None


@settings(inputs, max_examples=500)
@given(TEXTS.filter(lambda text: "#" not in text and "\\\n" not in text and "\\\r" not in text))
def test_without_comments_a_file_is_read_as_shlex_reads_it(text):
    wanted = shlex_words(text)
    if wanted is None:
        with pytest.raises(ValueError, match="a quote is not closed, or a backslash"):
            read_flags(text)
    else:
        assert read_flags(text) == wanted


def told_of(capsys, tmp_path, content):
    """Runs train.py with a file of flags, which it must refuse. → what it tells of the file"""
    file = tmp_path / "my.args"
    file.write_bytes(content)
    told = refused(capsys, f"@{file}", *SHORT, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    start, name, what = told.partition(f"@{file}")
    assert start == "train.py: error: " and name
    return what


@pytest.mark.parametrize(
    "content, line",
    [
        (b"--system='abc", 1),
        (b"--seed 1\n--system='abc", 2),
        (b"--seed 1\n'", 2),
        (b"# don't\n\n--seed 1 'abc\n--lora-r 4\n", 3),
        (b"--system 'two\nlines' \"abc\n\n", 2),
        (b'\r\n\r\n  "abc\r\n', 3),
        ("--system 'a\u2028b'\n \"".encode(), 2),
        (b"--seed 1\n--system a\\", 2),
    ],
)
def test_a_quote_that_is_not_closed_is_told_with_its_line(
    capsys, tmp_path, monkeypatch, content, line
):
    monkeypatch.setattr("sys.argv", ["train.py"])
    told = told_of(capsys, tmp_path, content)
    assert told.startswith(f":{line}: a quote is not closed")


def test_a_file_that_can_t_be_read_is_told_in_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])
    assert told_of(capsys, tmp_path, b"--system=\xff").startswith(": ")
    for name, why in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        told = refused(capsys, "--seed", 1, f"@{name}")
        assert f"error: @{name}: {why}" in told and f"--flag=@{name}" in told
    (tmp_path / "my.args").write_text("@other.args")  # a file names no other file
    assert "unrecognized arguments: @other.args" in refused(capsys, f"@{tmp_path}/my.args")


def test_a_byte_order_mark_and_windows_lines_and_the_later_flag(tmp_path):
    file = tmp_path / "a b.args"
    file.write_bytes("\ufeff--seed=3\r\n--system '甲 乙' # why\r\n--lora-r 4\r\n".encode())
    args = parse_args([f"@{file}", "--lora-r", "5"])
    assert (args.seed, args.system, args.lora_r) == (3, "甲 乙", 5)
    assert parse_args(["--lora-r", "5", f"@{file}"]).lora_r == 4
    (tmp_path / "c").write_text("--seed 6 --data x y")
    args = parse_args(["--data", "z", f"@{file}", f"@{tmp_path}/c"])
    assert (args.seed, args.data, args.lora_r) == (6, ["x", "y"], 4)


# --- run.args ---------------------------------------------------------------------------------


def list_flag(name, values):
    """→ a strategy: the flag and its values; one value may begin with - or @, after "=" """
    several = st.lists(values.filter(lambda each: each[:1] not in ("-", "@")), min_size=1)
    apart = several.map(lambda found: [name, *found])
    return apart | values.map(lambda value: [f"{name}={value}"])


def one_of(name, *values):
    return st.sampled_from(values).map(lambda value: [f"{name}={value}"])


def number_flag(name, low, high):
    whole = isinstance(low, int)
    numbers = st.integers(low, high) if whole else st.floats(low, high)
    return numbers.map(lambda value: [f"{name}={value!r}"])


def text_flag(name):
    return TEXTS.map(lambda text: [f"{name}={text}"])


SHARES = st.floats(0, 1, exclude_min=True, exclude_max=True).map(
    lambda x: [f"--warmup-steps={x!r}"]
)
KEYS = TEXTS.filter(bool).map(lambda old: f"{old}=instruction")
GENERAL = [
    *map(text_flag, ("--system", "--output-dir")),
    list_flag("--data", TEXTS.filter(bool)),
    list_flag("--keys", KEYS),
    number_flag("--max-length", 8, 10**9),
    number_flag("--batch-size", 1, 10**9),
    number_flag("--max-steps", 1, 10**9),
    number_flag("--learning-rate", 0.0, 1e3),
    one_of("--lr-schedule", "linear", "cosine", "constant"),
    number_flag("--warmup-steps", 0, 10**9) | SHARES,
    number_flag("--adam-beta1", 0.0, 0.9999999),
    number_flag("--seed", 0, 10**9),
    number_flag("--eval-split", 1e-6, 0.999999),
    one_of("--gradient-checkpointing", "all", "off", "auto", 0, 2),
    one_of("--load-in", "4bit", "fp8"),
    st.sampled_from([["--cuda-graphs"], ["--no-cuda-graphs"], ["--compile"], ["--tensorboard"]]),
    number_flag("--keep-checkpoints", 1, 10**9),
]
OF_LORA = [
    number_flag("--lora-r", 1, 4096),
    number_flag("--lora-dropout", 0.0, 0.99),
    list_flag("--target-modules", TEXTS.filter(bool)),
    list_flag("--modules-to-save", TEXTS.filter(bool)),
    st.sampled_from([["--rslora"], ["--dora"], ["--target-modules", "all"]]),
]
INIT = [TEXTS.filter(bool).map(lambda text: [f"--init-adapter={text}"])]
MODEL = [TEXTS.filter(bool).map(lambda text: [f"--model={text}"])]


def command_lines(first, others):
    """→ a strategy: one of `first`, and any of `others`, as one command line"""
    parts = st.tuples(st.one_of(first), st.lists(st.one_of(others), max_size=6))
    return parts.map(lambda found: sum(found[1], found[0]))


@inputs
@given(argv=command_lines(MODEL + GENERAL, GENERAL + OF_LORA) | command_lines(INIT, GENERAL))
def test_any_values_survive(tmp_path_factory, argv):
    args = parse_args(argv)
    file = tmp_path_factory.getbasetemp() / "any.args"
    file.write_bytes(run_args_of(args))
    assert vars(parse_args([f"@{file}"])) == vars(args)


def test_every_flag_of_a_run_is_written(tmp_path):
    """But for what --init-adapter decides, and what is no part of the run."""
    wanted = {"data": ["a b", "c"], "rslora": False, "cuda_graphs": False, "seed": 0, "keys": None}
    args = parse_args(["--data", "a b", "c", "--no-cuda-graphs", "--seed", "0", "--system", ""])
    text = flags_text(args, wanted | {"cuda_graphs": None, "system": None}).decode()
    lines = ["--data 'a b' c", "--no-cuda-graphs", "--seed=0", "--system=''"]
    assert text.splitlines()[1:] == lines and text.startswith("# ")
    flags = ["--resume", "--dry-run", "--init-adapter", "x"]
    names = [word.partition("=")[0] for word in read_flags(run_args_of(parse_args(flags)).decode())]
    assert "--init-adapter" in names and "--batch-size" in names
    left_out = ["resume", "overwrite", "dry_run", "eval_only", "adapter", *LORA]
    assert not {f"--{name.replace('_', '-')}" for name in left_out} & {*names}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A directory with data, and with an adapter in a directory with a space in its name."""
    directory = tmp_path_factory.mktemp("files")
    records = [{"q#": f"n {i}", "output": "m " * (i % 7 + 1)} for i in range(30)]
    write_jsonl(directory / "a b.jsonl", records)
    lora = ["--lora-r", 4, "--lora-alpha", 6, "--target-modules", "dense", "--max-steps", 2]
    train_main(*SHORT, directory / "my adapter", *lora)
    return directory


HARD = "-@ 'a' \"b\" # c \\\n\r\nd\u3000\u2028%"
AGAIN = {
    "built-in": [],  # the only one without --model: other defaults apply
    "text": [f"--system={HARD}"],
    "no text": ["--system", ""],
    "at": ["--system=@a"],
    "data": ["--data", "a b.jsonl:0.5", "a b.jsonl:2", "--keys", "q#=instruction"],
    "expression": ["--target-modules", r".*[13]\.self_attention\..*", "--lora-dropout", 0.5],
    "paths": ["--no-cuda-graphs", "--gradient-checkpointing", 2, "--batch-size", 3],
    "optimiser": "--warmup-steps 0.34 --adam-beta1 0.5 --adam-beta2 0 --lr-schedule cosine".split(),
    "whole": "--modules-to-save final_layernorm --dora --rslora --dtype bf16".split(),
    "adapter": ["--init-adapter", "my adapter"],
    "split": "--eval-split 0.2 --eval-steps 2 --patience 3 --max-grad-norm 0".split(),
}


@pytest.mark.parametrize("flags", AGAIN.values(), ids=AGAIN.keys())
def test_a_run_is_given_again_and_resumed_by_its_run_args(files, tmp_path, monkeypatch, flags):
    monkeypatch.chdir(files)
    first, again = tmp_path / "first", tmp_path / "again"
    train_main(*(SHORT if flags else SIX_UPDATES), first, *flags)
    (tmp_path / "copied").write_bytes((first / "run.args").read_bytes())
    train_main(f"@{tmp_path}/copied", "--output-dir", again)
    assert outcome(again) == outcome(first)
    shutil.rmtree(again / "checkpoint-6")
    (again / "adapter_model.safetensors").unlink()
    train_main(f"@{again}/run.args", "--resume")
    assert outcome(again) == outcome(first)
    arguments = [(run / "training_args.json").read_bytes() for run in (first, again)]
    assert arguments[0] == arguments[1]
    lines = [
        (run / "run.args").read_text("utf-8").split("--max-length")[1] for run in (first, again)
    ]
    assert lines[0] == lines[1]


# --- values of flags --------------------------------------------------------------------------


def test_all_targets_are_the_four_linear_layers(tmp_path):
    for model in ([], ["--model", "x"]):
        assert parse_args([*model, "--target-modules", "all"]).target_modules == LINEAR_LAYERS
    assert parse_args(["--model", "x"]).target_modules == ["query_key_value"]


def test_betas_reach_the_optimizer(base):
    run = new_run(with_random_lora(base), "--adam-beta1", "0.5", "--adam-beta2", "0")
    assert run.optimizer.param_groups[0]["betas"] == (0.5, 0.0)


@pytest.mark.parametrize("share, total, steps", [(0.25, 8, 2), (0.03, 100, 3), (0.01, 10, 0)])
def test_a_share_is_the_number_of_updates_that_it_means(share, total, steps):
    rates = []
    for value in (share, steps):
        args = parse_args(["--warmup-steps", str(value)])
        rates.append([train.learning_rate(step, total, args) for step in range(total)])
    assert rates[0] == rates[1] and rates[0].index(max(rates[0])) == steps


@pytest.mark.parametrize(
    "flag, values",
    [
        ("--warmup-steps", ["1.5", "-1", "0.0", "1.0", "x", "nan", "inf", "", "-0.1"]),
        ("--adam-beta1", ["1.5", "-1", "1", "x", "nan"]),
        ("--adam-beta2", ["1.5", "-1", "1", "x", "nan"]),
    ],
)
def test_wrong_values_are_told_in_one_line(capsys, tmp_path, flag, values):
    for value in values:
        told = refused(capsys, *SHORT, tmp_path / "out", flag, value)
        assert f"argument {flag}: " in told and re.search("must be|invalid number", told)
    assert not (tmp_path / "out").exists()
