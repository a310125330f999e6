"""support/processes.py: signals, and several processes, which together make the run of one.

python -m pytest -q tests/test_processes.py
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import (
    LONG,
    ROOT,
    SHORT,
    finish,
    has_metrics,
    metrics_of,
    outcome,
    refused,
    start_several,
    train_main,
    wait_for,
    write_jsonl,
)

import model as chatglm
from support.checkpoints import is_intact, list_checkpoints

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


# --- signals ----------------------------------------------------------------------------------

SAVES_LITTLE = [*LONG, "--save-steps", 1000]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed") / "out"
    train_main(*SAVES_LITTLE, "--device", "cpu", "--output-dir", directory)
    return outcome(directory)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_run_after_its_update_and_saves(tmp_path, start, undisturbed, number):
    out, arguments = tmp_path / "out", [*SAVES_LITTLE, "--output-dir"]
    process = start(*arguments, out)
    wait_for(lambda: has_metrics(out), process)
    os.kill(process.pid, number)
    told = finish(process, 128 + number)
    step = int(re.search(r"stopped  after update (\d+); --resume continues from", told)[1])
    assert [path.name for path in list_checkpoints(out)] == [f"checkpoint-{step}"]
    told = finish(start(*arguments, out, "--resume"))
    assert f"checkpoint-{step}, {step} of 30 updates done" in told
    assert outcome(out) == undisturbed


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_ends_at_once(tmp_path, start, number):
    out = tmp_path / "out"
    size = ["--batch-size", 1, "--gradient-accumulation-steps", 10**6]  # an update of minutes
    file = write_jsonl(tmp_path / "d.jsonl", [{"instruction": "q", "output": "a"}] * 10_000)
    process = start(*LONG, *size, "--data", file, "--output-dir", out)
    wait_for((out / "metrics.jsonl").exists, process)
    time.sleep(1)
    os.kill(process.pid, number)
    told = "stopping after this update, or this evaluation and an update; again to stop at once"
    wait_for(lambda: told in process.log.read_text(), process)
    os.kill(process.pid, number)
    process.join(10)
    assert process.exitcode == -number and not list_checkpoints(out)


def test_sigusr1_saves_and_goes_on(tmp_path, start, undisturbed):
    """Slurm can send it before the time of a job is over."""
    out, arguments = tmp_path / "out", [*SAVES_LITTLE, "--output-dir"]
    process = start(*arguments, out)
    wait_for(lambda: has_metrics(out), process)
    os.kill(process.pid, signal.SIGUSR1)
    wait_for(lambda: list_checkpoints(out), process)
    saved = list_checkpoints(out)[0]
    assert "stopped" not in finish(process) and outcome(out) == undisturbed
    assert is_intact(saved) and saved.name != "checkpoint-30"


def in_a_terminal_that_is_closed(out, *wrapper):
    """Starts a run in a pseudo-terminal, closes that, and waits for the end. → the exit code"""
    shown, terminal = os.openpty()
    command = [*wrapper, sys.executable, ROOT / "train.py", *SAVES_LITTLE]
    options = dict(stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True)
    make_it_control = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    make_it_control += "os.execvp(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", make_it_control, *map(str, command)]
    process = subprocess.Popen([*command, "--device", "cpu", "--output-dir", out], **options)
    os.close(terminal)
    os.set_blocking(shown, False)

    def has_begun():
        with contextlib.suppress(OSError):  # nothing to read, or nohup has left the terminal
            os.read(shown, 4096)  # else the terminal fills, and the run waits for its reader
        return has_metrics(out)

    wait_for(has_begun, process)
    os.close(shown)
    return process.wait(60)


def test_closing_the_terminal_saves_and_stops(tmp_path, start, undisturbed):
    out, arguments = tmp_path / "out", [*SAVES_LITTLE, "--output-dir"]
    assert in_a_terminal_that_is_closed(out) == 128 + signal.SIGHUP
    assert is_intact(list_checkpoints(out)[0])
    finish(start(*arguments, out, "--resume"))
    assert outcome(out) == undisturbed


def test_nohup_goes_on_when_the_terminal_is_closed(tmp_path, monkeypatch):
    """nohup ignores SIGHUP for the command that it starts."""
    monkeypatch.chdir(tmp_path)  # where nohup.out goes
    assert in_a_terminal_that_is_closed(tmp_path / "out", "nohup") == 0
    assert list_checkpoints(tmp_path / "out")[-1].name == "checkpoint-30"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_ctrl_c_under_a_pipe_whose_reader_it_ends_too(tmp_path, unbuffered):
    out = tmp_path / "out"
    command = [sys.executable, ROOT / "train.py", *LONG, "--device", "cpu", "--output-dir", out]
    options = dict(stdout=subprocess.PIPE, text=True)
    options["env"] = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    for stderr in (subprocess.PIPE, subprocess.STDOUT):
        process = subprocess.Popen(command, stderr=stderr, **options)
        wait_for(lambda: has_metrics(out), process)
        process.stdout.close()
        process.send_signal(signal.SIGINT)
        told = process.stderr.read() if process.stderr else ""
        assert process.wait() == 130 and "error" not in told and "Broken" not in told, told
        assert is_intact(list_checkpoints(out)[0])
        shutil.rmtree(out)


def test_a_signal_saves_nothing_that_is_not_finite(tmp_path, monkeypatch, capsys):
    plain, calls = chatglm.ChatGLMForCausalLM.summed_loss, []

    def spoilt(*args):
        calls.append(0)
        if len(calls) == 12:  # the sixth update
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args) * (torch.nan if len(calls) > 8 else 1)

    monkeypatch.setattr(chatglm.ChatGLMForCausalLM, "summed_loss", spoilt)
    flags = "--max-steps 9 --save-steps 4 --logging-steps 9 --device cpu".split()
    flags += ["--keep-checkpoints", "1", "--output-dir", tmp_path / "out"]
    told = refused(capsys, *flags)
    assert "since update 5" in told
    assert f"last intact checkpoint is {tmp_path}/out/checkpoint-4;" in told


# --- several processes ------------------------------------------------------------------------


def losses_and_norms(directory):
    lines = [[line["loss"], line["grad_norm"]] for line in metrics_of(directory)]
    return torch.tensor(lines, dtype=torch.float64)


def test_several_processes_make_the_updates_of_one(tmp_path, start):
    """21 samples, 8 an update: the last update of an epoch has 5 samples, of uneven lengths.

    Of these, some of four processes get two samples, and some only one.
    """
    texts = [("a " * (i % 7 * 5 + 1), "b " * (i % 5 * 9 + 1)) for i in range(21)]
    records = [{"instruction": question, "output": answer} for question, answer in texts]
    file = write_jsonl(tmp_path / "d.jsonl", records)
    flags = "--max-steps 20 --logging-steps 1 --save-steps 10 --device cpu --batch-size 2".split()
    common = ["--data", file, *flags, "--gradient-accumulation-steps"]

    def run_of(count, directory, *more):
        arguments = [*common, 4 // count, "--output-dir", directory, *more]
        for process in start_several(start, count, *arguments):
            finish(process)
        found = losses_and_norms(directory)
        assert found.shape == (20, 2)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)

    one = tmp_path / "1"
    finish(start(*common, 4, "--output-dir", one))
    wanted = losses_and_norms(one)
    run_of(2, tmp_path / "2")
    run_of(4, tmp_path / "4")
    shutil.rmtree(tmp_path / "4" / "checkpoint-20")
    run_of(2, tmp_path / "4", "--resume")  # the run of four continues as one of two


def test_processes_stop_together(tmp_path, start):
    never = ["--max-steps", 10**6, "--save-steps", 10**6]
    processes = start_several(start, 2, *LONG, *never, "--output-dir", tmp_path)
    wait_for(lambda: has_metrics(tmp_path), processes[0])
    os.kill(processes[1].pid, signal.SIGTERM)
    told = [finish(process, 143) for process in processes]
    assert len(list_checkpoints(tmp_path)) == 1
    assert "stopped  after update" in told[0] and "stopped  after update" not in told[1]


def torchrun(directory, *command):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", "2"]
    options = dict(capture_output=True, encoding="utf-8", timeout=300, cwd=directory)
    return subprocess.run([*launcher, *command], **options)


def test_torchrun_and_a_mistake_that_all_its_processes_find(tmp_path):
    first = torchrun(tmp_path, ROOT / "train.py", *SHORT, "out")
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("updates  6, each of") == 1
    again = torchrun(tmp_path, ROOT / "train.py", *SHORT, "out")
    assert again.returncode != 0 and again.stderr.count("train.py: ") == 1, again.stderr
    assert "train.py: error: out has a run; --resume" in again.stderr


def test_a_process_that_fails_alone_ends_the_others_with_its_message(tmp_path):
    write_jsonl(tmp_path / "0.jsonl", [{"instruction": "q", "output": "a"}])
    train = f"{sys.executable} {ROOT / 'train.py'} {' '.join(SHORT)} out"
    command = f"exec {train} --data $LOCAL_RANK.jsonl"
    result = torchrun(tmp_path, "--no-python", "bash", "-c", command)
    assert result.returncode != 0 and not (tmp_path / "out").exists()
    assert result.stderr.count("train.py: ") == 1, result.stderr
    assert "train.py: process 1: error: 1.jsonl: No such file or directory" in result.stderr
