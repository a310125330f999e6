"""Under rules of Windows, which tests/windows.py imposes: train, kill, resume, answer, merge.

python -m pytest -q tests/test_windows.py
"""

import json
import subprocess
import sys

from conftest import LONG, ROOT, outcome, train_main, wait_for, write_jsonl
from windows import paths_in_use

from support.checkpoints import list_checkpoints

FLAGS = [*LONG, "--eval-split", "0.2", "--eval-steps", "2", "--keep-checkpoints", "1"]
FLAGS += ["--device", "cpu", "--output-dir"]


def start(script, *arguments):
    command = [sys.executable, ROOT / "tests" / "windows.py", script, *map(str, arguments)]
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, **options)


def run(*arguments):
    """→ what it printed"""
    process = start(*arguments)
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 0, told
    return told


def test_train_kill_resume_answer_and_merge(tmp_path):
    train_main(*FLAGS, tmp_path / "elsewhere")
    out = tmp_path / "out"
    process = start("train.py", *FLAGS, out)
    wait_for(lambda: list_checkpoints(out), process)
    process.kill()
    process.wait()
    assert "resumed  " in run("train.py", *FLAGS, out, "--resume")
    assert outcome(out) == outcome(tmp_path / "elsewhere")
    assert len(list_checkpoints(out)) == 1 and not [*out.glob("*.part")]
    run("train.py", *FLAGS, out, "--overwrite", "--max-steps", "4")
    assert [path.name for path in list_checkpoints(out)] == ["checkpoint-4"]
    questions = write_jsonl(tmp_path / "q.jsonl", [{"instruction": "你好"}] * 3)
    answers, merged = tmp_path / "a.jsonl", tmp_path / "merged"
    run("infer.py", "--adapter", out, "--input", questions, "--output", answers)
    assert len([json.loads(line)["prediction"] for line in answers.open()]) == 3
    merged.mkdir()  # empty: it is replaced
    run("infer.py", "--adapter", out, "--merge-to", merged)
    assert (merged / "model.safetensors").exists()


def test_the_rules_are_imposed(tmp_path):
    (tmp_path / "used").mkdir()
    with open(tmp_path / "used" / "file", "w"):
        assert str(tmp_path / "used" / "file") in paths_in_use()
