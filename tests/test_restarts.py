"""`torchrun --max-restarts`: a worker that dies or hangs does not end the run.

CHATGLM3_KILLS=10 python -m pytest -q tests/test_restarts.py    # more kills, and four processes
"""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from conftest import ROOT, metrics_of, outcome

KILLS = int(os.environ.get("CHATGLM3_KILLS", "0"))
FLAGS = (
    "--save-steps 4 --keep-checkpoints 2 --logging-steps 2 --eval-split 0.2 --eval-steps 4 "
    "--batch-size 2 --gradient-accumulation-steps 1 --lora-dropout 0.1 --device cpu --resume"
).split()


class Job:
    """`torchrun --max-restarts … train.py` in a directory of its own."""

    def __init__(self, directory, count, restarts, *flags):
        directory.mkdir()
        self.directory, self.count, self.out = directory, count, directory / "out"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
        launcher += ["--nproc-per-node", count, "--max-restarts", restarts]
        # Each worker leaves a file, whose name tells its attempt, its rank and its process.
        note = f"echo > {directory}/worker-$TORCHELASTIC_RESTART_COUNT-$RANK-$BASHPID; exec "
        train = [sys.executable, ROOT / "train.py", *FLAGS, "--output-dir", self.out, *flags]
        command = [*launcher, "bash", "-c", note + " ".join(map(str, train))]
        self.log = directory / "log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen([*map(str, command)], stdout=log, stderr=log)

    def wait_for(self, condition):
        end = time.monotonic() + 120
        while not condition():
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
            time.sleep(0.001)

    def workers(self, attempt):
        """→ {rank: number of its process} of an attempt, counted from 0, when all have started"""
        found = lambda: [*self.directory.glob(f"worker-{attempt}-*")]  # noqa: E731
        self.wait_for(lambda: len(found()) == self.count)
        return {int(rank): int(pid) for _, _, rank, pid in (f.name.split("-") for f in found())}

    def lines(self):
        """The lines of metrics so far; the last one may not be whole yet."""
        file = self.out / "metrics.jsonl"
        return file.read_bytes().splitlines() if file.exists() else []

    def wait_until(self, moment):
        """Waits for a moment of the attempt that has just begun."""
        before = len(self.lines())
        if moment == "start":
            end = time.monotonic() + random.uniform(0, 3 * self.count)
            return self.wait_for(lambda: time.monotonic() > end or len(self.lines()) > before)
        self.wait_for(lambda: len(self.lines()) > before)
        if moment == "training":
            time.sleep(random.uniform(0, 0.1))
        elif moment == "save":
            self.wait_for(lambda: [*self.out.glob("checkpoint-*.part")])
        else:  # the line before an evaluation
            is_before = [b'"step": %d,' % step for step in range(0, 1000, 4)]
            self.wait_for(lambda: any(step in self.lines()[-1] for step in is_before))

    def finish(self, code=0):
        """→ what it printed"""
        assert self.process.wait(120) == code, self.log.read_text()
        return self.log.read_text()


@pytest.mark.parametrize("count", [2, 4] if KILLS else [2])
def test_workers_that_are_killed_cost_nothing(tmp_path, count):
    kills = KILLS or 3
    flags = ["--max-steps", 12 * kills]
    undisturbed = Job(tmp_path / "undisturbed", count, 0, *flags)
    undisturbed.finish()
    job = Job(tmp_path / "killed", count, kills, *flags)
    moments = itertools.cycle(("save", "start", "evaluation", "training"))
    for attempt, moment in zip(range(kills), moments, strict=False):
        workers = job.workers(attempt)
        job.wait_until(moment)
        os.kill(workers[random.randrange(count)], signal.SIGKILL)
    job.finish()
    job.workers(kills)  # so many attempts there were
    assert outcome(job.out) == outcome(undisturbed.out)
    assert metrics_of(job.out)[-1]["step"] == 12 * kills


def test_a_worker_that_hangs_is_named(tmp_path):
    job = Job(tmp_path / "hangs", 2, 1, "--max-steps", 60, "--timeout", 5)
    workers, rank = job.workers(0), random.randrange(2)
    job.wait_until("training")
    os.kill(workers[rank], signal.SIGSTOP)
    wanted = f"train.py: error: no answer from process {rank} for 5 s; --resume continues from"
    started = time.monotonic()
    job.wait_for(lambda: wanted in job.log.read_text())
    assert time.monotonic() - started < 12
    os.kill(workers[rank], signal.SIGCONT)  # else torchrun waits for half a minute
    told = job.finish()
    assert told.count("no answer from process") == 1 and "Traceback" not in told
    assert metrics_of(job.out)[-1]["step"] == 60


def test_machines_that_do_not_share_their_disk_are_told(tmp_path):
    """Each process has a directory of its own, as on two machines."""
    train = [sys.executable, str(ROOT / "train.py"), "--max-steps", "4", *FLAGS]
    command = f"mkdir -p $RANK; cd $RANK; exec {' '.join(train)} --output-dir out"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    launcher += ["--nproc-per-node", "2", "bash", "-c", command]
    run = partial(subprocess.run, launcher, capture_output=True, text=True, cwd=tmp_path)
    assert run().returncode == 0
    again = run()
    what = "--output-dir out: process 0 finds checkpoint-4 there, process 1 no checkpoint; it must"
    assert again.returncode and what in again.stderr
    assert again.stderr.count("train.py: ") == 1
