"""Under rules of Windows, which tests/windows.py imposes: train, kill, resume, answer, merge.

python -m pytest -q tests/test_windows.py
"""

import json
import subprocess
import sys

import pytest
import windows
from conftest import LONG, ROOT, adapter_of, finish, outcome, train_main, wait_for, write_jsonl

import infer
import train
from support import export, tokenizer_files
from support.checkpoints import list_checkpoints

FLAGS = [*LONG, "--eval-split", "0.2", "--eval-steps", "2", "--keep-checkpoints", "1"]
FLAGS += ["--device", "cpu", "--output-dir"]


def run_under_rules(script, arguments):
    windows.impose()
    {"train": train, "infer": infer}[script].main(arguments)


@pytest.fixture
def start(fork):
    """start("train" or "infer", *arguments) → a process, forked as in conftest.start"""
    return lambda script, *arguments: fork(run_under_rules, script, [*map(str, arguments)])


def start_without_modules(*words):
    """Starts a process that runs these commands, with "then" between them, without fcntl and other
    modules. → subprocess.Popen"""
    command = [sys.executable, ROOT / "tests" / "windows.py", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_train_kill_resume_answer_and_merge(tmp_path, start):
    train_main(*FLAGS, tmp_path / "elsewhere")
    out = tmp_path / "out"
    process = start_without_modules("train.py", *FLAGS, out)
    wait_for(lambda: list_checkpoints(out), process)
    process.kill()
    process.wait()
    merged = tmp_path / "merged"
    merged.mkdir()  # empty: it is replaced
    merge = ["infer.py", "--adapter", out, "--merge-to", merged]
    process = start_without_modules("train.py", *FLAGS, out, "--resume", "then", *merge)
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "resumed  " in told, told
    assert outcome(out) == outcome(tmp_path / "elsewhere")
    assert len(list_checkpoints(out)) == 1 and not [*out.glob("*.part")]
    assert (merged / "model.safetensors").exists()
    finish(start("train", *FLAGS, out, "--overwrite", "--max-steps", 4))
    assert [path.name for path in list_checkpoints(out)] == ["checkpoint-4"]
    questions = write_jsonl(tmp_path / "q.jsonl", [{"instruction": "你好"}] * 3)
    answers = tmp_path / "a.jsonl"
    finish(start("infer", "--adapter", out, "--input", questions, "--output", answers))
    assert len([json.loads(line)["prediction"] for line in answers.open()]) == 3


@pytest.mark.parametrize("forbidden", ["delete", "open", "rename", "replace", "flush"])
def test_the_rules_are_imposed(tmp_path, forbidden):
    """A process that breaks one of them ends with an error."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "file").touch()
    code = f"""
import os, sys, windows
a, b, file = {str(tmp_path / "a")!r}, {str(tmp_path / "b")!r}, {str(tmp_path / "a" / "file")!r}
windows.impose()
opened = open(file)
try:
    dict(delete=lambda: os.unlink(file), open=lambda: os.open(a, os.O_RDONLY),
         rename=lambda: os.rename(a, a + "c"), replace=lambda: os.replace(b, a),
         flush=lambda: os.fsync(opened))["{forbidden}"]()
except OSError:
    sys.exit(3)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests")
    assert done.returncode == 3


def export_with_a_wrong_template(arguments):
    windows.impose()
    wrong = tokenizer_files.CHAT_TEMPLATE.replace("[gMASK]<sop>", "[gMASK]")
    tokenizer_files.CHAT_TEMPLATE = export.CHAT_TEMPLATE = wrong
    infer.main(arguments)


@pytest.mark.parametrize("flags", [["--merge-to"], ["--layout", "glm", "--merge-to"], ["--gguf"]])
def test_an_export_that_fails_its_check_is_deleted(tmp_path, fork, flags):
    """The check has opened its files. They are closed first."""
    adapter = adapter_of(tmp_path / "a")
    arguments = ["--adapter", str(adapter), *flags, str(tmp_path / "m")]
    told = finish(fork(export_with_a_wrong_template, arguments), 2)
    assert "gets the ids" in told
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
