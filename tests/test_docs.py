"""docs/: every example of a format is trained on, and every command runs at small scale.

python -m pytest -q tests/test_docs.py
"""

import io
import json
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
from conftest import PERSONA, ROOT, finish, metrics_of, reference, start_several, train_main
from pages import ENGLISH, blocks, commands_of, files_of, sections

import data
import infer
import train
from support import curves
from support.defaults import SAMPLE
from support.signals import STOPPING

DOCUMENT = (ROOT / "docs" / "data.md").read_text("utf-8")
EXAMPLES = {  # title: (kind of file, content)
    title: (kind, content)
    for title, kind, content in re.findall(
        r"^### (.+?)\n(?:(?!^###).)*?^```(jsonl|csv)\n(.*?)^```", DOCUMENT, re.M | re.S
    )
}


def test_every_format_of_the_table_has_an_example():
    table = DOCUMENT.partition("## Formats")[2].partition("### ")[0]
    titles = [title.lower() for title in re.findall(r"^\| \[(.+?)\]", table, re.M)]
    assert titles == [title.lower() for title in EXAMPLES]
    assert all(content.count("\n") == 2 for _, content in EXAMPLES.values())


@pytest.mark.parametrize("title", EXAMPLES)
def test_an_example_is_trained_on(tmp_path, capsys, title):
    kind, content = EXAMPLES[title]
    file, out = tmp_path / f"d.{kind}", tmp_path / "out"
    file.write_text(content, "utf-8")
    flags = ["--data", str(file), "--output-dir", str(out), "--device", "cpu", "--max-steps", "8"]
    flags += ["--logging-steps", "1"]
    flags += ["--keys", "content=instruction", "summary=output"] if title == "Other names" else []
    train.main(flags)
    told = capsys.readouterr().out
    assert f"{content.count(chr(10)) - (kind == 'csv')} samples" in told
    assert "0 cut, 0 dropped" in told and "not read" not in told and "are dropped" not in told
    assert ("2 answers with loss false are not learnt" in told) == ("not learnt" in title)
    losses = [line["loss"] for line in metrics_of(out)]
    assert losses[-1] < losses[0]


# --- commands ---------------------------------------------------------------------------------

# Sections with commands. The Chinese pages have the same ones; README.zh.md has some more.
SECTIONS = {
    f"{page.name}: {title}": text
    for page in [*ENGLISH, ROOT / "README.zh.md"]
    for title, text in sections(page.read_text("utf-8")).items()
    if any(len(command.words) > 1 for command in commands_of(text))
}
ONE_UPDATE = ["--max-steps", "1", "--logging-steps", "1", "--device", "cpu"]
ENVIRONMENT = re.compile(r"[A-Z0-9_]+=")
OTHERS = (
    "pip",
    "modelscope",
    "ollama",
    "git",
    "ruff",
    "curl",
    "llama-server",
    "vllm",
)  # programs that are not this project's


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """The --output-dir of a run of one update."""
    directory = tmp_path_factory.mktemp("small") / "run"
    train_main(*ONE_UPDATE, "--output-dir", directory)
    return directory


@pytest.fixture
def own_signals():
    """Puts back the handlers of signals, which both commands replace."""
    handlers = {number: signal.getsignal(number) for number in STOPPING}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def small_scale(words):
    """A command's arguments → those that a CPU can do in a second: see docs/recipes.md"""
    small, words = [], list(words)
    while words:
        word = words.pop(0)
        if word in ("--model", "--load-in"):
            words.pop(0)
        elif word == "--max-length":
            small += [word, str(min(1024, int(words.pop(0))))]
        elif word != "--compile":
            small.append(word)
    return small


def make_files(words, files):
    """Writes the files that a command reads: those that the page shows, or a few of the sample."""
    for i, word in enumerate(words):
        name = word.partition(":")[0]
        if not re.search(r"\.jsonl?$", name) or words[i - 1] == "--output":
            continue
        Path(name).parent.mkdir(exist_ok=True)
        if name in files:
            Path(name).write_text(files[name], "utf-8")
        elif not Path(name).exists():
            shutil.copy(SAMPLE, name)


def is_run(program, arguments, start, monkeypatch):
    """Runs one of this project's commands at small scale. → False if it is another program's"""
    if program == ["python", "train.py"] and "--dry-run" in arguments:
        train.parse_args(arguments)  # tests/test_forecast.py runs it; it measures for seconds
    elif program == ["python", "train.py"]:
        train_main(*small_scale(arguments), *ONE_UPDATE)
    elif program == ["python", "infer.py"]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"/exit\n")))
        infer.main([*small_scale(arguments), "--device", "cpu", "--max-new-tokens", "4"])
    elif program == ["torchrun"]:
        at = arguments.index("train.py")
        for process in start_several(start, 2, *small_scale(arguments[at + 1 :]), *ONE_UPDATE):
            finish(process)
    elif program == ["python", "-m"] and arguments[0] == "support.curves":
        curves.main(arguments[1:])
    else:
        return False
    return True


@pytest.mark.parametrize("section", SECTIONS)
def test_its_commands_run(section, tmp_path, monkeypatch, small_run, start, own_signals):
    """Each command runs, or it is marked, and names something that is there."""
    monkeypatch.chdir(tmp_path)
    text, commands = SECTIONS[section], commands_of(SECTIONS[section])
    if not any("train.py" in command.words for command in commands):
        shutil.copytree(small_run, "output/ChatGLM")
        shutil.copytree(small_run, "output/zhenhuan")
    for words, needs in commands:
        words = [word for word in words if not ENVIRONMENT.match(word)]
        words = words[1:] if words[0] == "srun" else words
        size = 1 if words[0] == "torchrun" else 2
        program, arguments = words[:size], words[size:]
        make_files(arguments, files_of(text))
        if "--model" in arguments and program[0] != "modelscope":
            assert "weights" in needs or "权重" in needs, words
        if {"--load-in", "--compile"} & {*arguments} or program == ["torchrun"]:
            assert "GPU" in needs or "显卡" in needs, words
        if not is_run(program, arguments, start, monkeypatch):
            assert needs or words[0] in ("ruff",) or "pytest" in words, words
            is_known = words[0] in OTHERS or words[1:3] == ["-m", "sglang.launch_server"]
            assert is_known or (ROOT / words[1]).exists() or "pytest" in words, words
            files = [word for word in words if re.search(r"^(tests/|requirements).+\.\w+$", word)]
            assert all((ROOT / file).exists() for file in files), words


def test_right_answers_are_counted(trained, tmp_path, monkeypatch, capsys, own_signals):
    """The commands and the script of the section, with the built-in model and its sample.

    The Chinese page has the same ones: see test_readme.py.
    """
    adapter, device = trained
    monkeypatch.chdir(tmp_path)
    with open(SAMPLE, encoding="utf-8") as file:
        lines = [line for line in file if "output" in json.loads(line)][:109]
    Path("test.jsonl").write_text("".join(lines), "utf-8")
    section = sections((ROOT / "docs" / "answers.md").read_text("utf-8"))["Counting right answers"]
    for command in commands_of(section):
        assert command.words[:2] == ["python", "infer.py"]
        flags = [] if "--no-adapter" in command.words else ["--adapter", str(adapter)]
        infer.main([*command.words[2:], *flags, "--device", device])
    (script,) = (code for language, code in blocks(section) if language == "python")
    (shown,) = (code for language, code in blocks(section) if language == "text")
    capsys.readouterr()
    exec(script, {})
    printed = capsys.readouterr().out
    line = re.compile(r"^(\w+)\.jsonl: (\d+) of 109 word for word, overlap ([\d.]+)$", re.M)
    for text in (printed, shown):  # training may differ a little by processor
        before, after = line.findall(text)
        assert before[:2] == ("before", "0") and float(before[2]) < 0.1
        assert after[0] == "after" and int(after[1]) > 100 and float(after[2]) > 0.95


def test_every_command_stands_in_a_section():
    for page in ENGLISH:
        text = page.read_text("utf-8")
        assert len(commands_of(text)) == sum(map(len, map(commands_of, sections(text).values())))
        for language, code in blocks(text):
            assert language, f"{page.name}: a block without a language:\n{code}"


def test_recipes_tell_the_numbers_of_huanhuan(official_tokenizer):
    file = reference("data/huanhuan.json")
    records = json.loads(file.read_text("utf-8"))
    who = [record["output"] for record in records if record["instruction"] == "你是谁？"]
    dataset = data.ConversationDataset([file], official_tokenizer, 512, system=PERSONA)
    size = f"{len(dataset):,} samples: {sum(dataset.lengths):,} tokens, "
    size += f"{sum(dataset.supervised) / sum(dataset.lengths):.1%} of them supervised"
    for name in ("recipes.md", "recipes.zh.md"):
        text = (ROOT / "docs" / name).read_text("utf-8")
        assert size in text and f"{len(records):,}" in text
        assert (
            str(len(who)) in text and str(who.count("我是甄嬛，家父是大理寺少卿甄远道。")) in text
        )
