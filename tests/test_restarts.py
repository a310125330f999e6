"""`torchrun --max-restarts`: a worker that dies or hangs does not end the run.

CHATGLM3_KILLS=10 python -m pytest -q tests/test_restarts.py    # more kills, and four processes

With two GPUs, processes on GPUs are killed too.
"""

import itertools
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import KILLS, ROOT, finish, metrics_of, outcome, start_several

FLAGS = (
    "--save-steps 4 --keep-checkpoints 2 --logging-steps 2 --eval-split 0.2 --eval-steps 4 "
    "--batch-size 2 --gradient-accumulation-steps 1 --lora-dropout 0.1 --resume"
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
        pattern = f"worker-{attempt}-*"
        self.wait_for(lambda: len([*self.directory.glob(pattern)]) == self.count)
        names = (file.name.split("-") for file in self.directory.glob(pattern))
        return {int(rank): int(pid) for _, _, rank, pid in names}

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


@pytest.mark.parametrize(
    "device, count", [("cpu", 2), *([("cpu", 4)] if KILLS else []), ("cuda", 2)]
)
def test_workers_that_die_or_hang_cost_nothing(tmp_path, start, device, count):
    """Whatever a worker does when it is killed. The last one is stopped, and named."""
    if device == "cuda" and torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} CUDA devices")
    kills = KILLS or 1
    timeout = 30 if device == "cuda" else 10  # NCCL takes some seconds to connect
    flags = ["--device", device, "--max-steps", 12 * (kills + 1), "--timeout", timeout]
    undisturbed = tmp_path / "undisturbed"
    for process in start_several(start, count, *FLAGS, *flags, "--output-dir", undisturbed):
        finish(process)
    job = Job(tmp_path / "disturbed", count, kills + 1, *flags)
    moments = ["start", "save", "evaluation", "training"]
    moments = itertools.cycle(random.sample(moments, len(moments)))
    for attempt, moment in zip(range(kills), moments, strict=False):
        workers = job.workers(attempt)
        job.wait_until(moment)
        os.kill(workers[random.randrange(count)], signal.SIGKILL)
    workers, rank = job.workers(kills), random.randrange(count)
    job.wait_until("training")
    os.kill(workers[rank], signal.SIGSTOP)
    started = time.monotonic()
    wanted = (
        f"train.py: error: no answer from process {rank} for {timeout} s; --resume continues from"
    )
    job.wait_for(lambda: wanted in job.log.read_text())
    assert time.monotonic() - started < timeout + 10
    os.kill(workers[rank], signal.SIGCONT)  # else torchrun waits for half a minute
    assert job.finish().count("no answer from process") == 1
    job.workers(kills + 1)  # so many attempts there were
    assert outcome(job.out) == outcome(undisturbed)
    assert metrics_of(job.out)[-1]["step"] == 12 * (kills + 1)


def test_machines_that_do_not_share_their_disk_are_told(tmp_path, start):
    """Each process has a directory of its own, as on two machines."""
    for code in (0, 2):
        directories = (["--output-dir", tmp_path / name] for name in "ab")
        arguments = [*FLAGS, "--device", "cpu", "--max-steps", 4]
        processes = start_several(start, 2, *arguments, each=directories)
        told = finish(processes[0], code)
        processes[1].kill()  # torchrun would
    what = "process 0 finds checkpoint-4 there, process 1 no checkpoint; the directory must be on"
    assert f"error: --output-dir {tmp_path / 'a'}: {what} a disk that all machines share" in told
