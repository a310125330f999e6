"""support/forecast.py: what --dry-run prints and leaves behind, and the flags that would fit.

python -m pytest -q tests/test_forecast.py
"""

import re
import shutil
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SIX_UPDATES, outcome, refused, train_main, write_jsonl
from test_train import CPU_AND_CUDA

import data
import train
from support import forecast, memory

QUICK = ["--batch-size", 2, "--gradient-accumulation-steps", 1, *SIX_UPDATES]
CPU = torch.device("cpu")
SPLIT = ["--eval-split", 0.2, "--eval-steps", 1]


def told_by(capsys, *arguments):
    """Runs train.py. → what it prints"""
    train_main(*arguments)
    return capsys.readouterr().out


@pytest.fixture
def few(monkeypatch):
    """No more than three updates are measured."""
    monkeypatch.setattr(forecast, "MOST_MEASURED", 3)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The directory of a run of six updates, with a checkpoint after every second one."""
    directory = tmp_path_factory.mktemp("done") / "out"
    train_main(*QUICK, directory)
    return directory


@pytest.fixture
def runs(tmp_path, done):
    """A directory with two copies of it: as it is, and as if it had been killed after update 4"""
    shutil.copytree(done, tmp_path / "runs" / "done")
    shutil.copytree(done, tmp_path / "runs" / "cut")
    shutil.rmtree(tmp_path / "runs" / "cut" / "checkpoint-6")
    return tmp_path / "runs"


def tree(directory):
    """→ {path: (time of the last change, size)} of all that is there, directories too"""
    stats = ((path, path.lstat()) for path in [directory, *directory.rglob("*")])
    return {path: (stat.st_mtime_ns, stat.st_size) for path, stat in stats}


PLACES_AND_FLAGS = (
    "new, new --eval-split 0.2, new --tensorboard, new --resume, new --init-adapter ../runs/done, "
    "done, done --overwrite, done --resume, cut --resume"
).split(", ")


@pytest.mark.parametrize("given", PLACES_AND_FLAGS)
def test_it_leaves_no_file(runs, tmp_path, monkeypatch, capsys, few, given):
    """Neither in --output-dir, nor in the working directory, nor beside the built-in model."""
    name, *flags = given.split()
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    before = tree(tmp_path), tree(ROOT / "dataset")
    told = told_by(capsys, *QUICK, f"../runs/{name}", "--dry-run", *flags)
    last = {"done --resume": "this run has already finished: there is nothing left to do"}
    assert last.get(given, "\nnothing was written\n") in told
    assert (tree(tmp_path), tree(ROOT / "dataset")) == before


def test_the_run_after_it_is_as_if_there_had_been_none(done, runs, few):
    for flags in (["--dry-run"], []):
        train_main(*QUICK, runs / "new", *flags)
        train_main(*QUICK, runs / "cut", "--resume", *flags)
    assert outcome(runs / "new") == outcome(runs / "cut") == outcome(done)


# --- what is printed --------------------------------------------------------------------------


def test_it_prints_what_there_is_and_what_the_run_needs(tmp_path, capsys, few):
    told = told_by(capsys, *QUICK, tmp_path / "out", "--dry-run", *SPLIT)
    for line in (
        r"data     95 samples: 2,549 tokens, 56.1% of them supervised; .* longest 52\)",
        r"evaluate 24 samples, 353 supervised tokens, after every 1 updates and at the end",
        r"trained  249,856 parameters in 32 tensors: LoRA r 16, alpha 32 on query_key_value .*",
        r"time     [\d.]+ s for 6 updates, of which evaluations [\d.]+ s, .*",
        r"disk     \d+ MiB for 3 checkpoints of 4 MiB, and two adapters; [\d.]+ [GM]iB are free",
        *([r"memory   [\d.]+ [GM]iB, the peak .*"] if sys.platform == "linux" else []),
        r"         attention: \w+ attention kernel",
    ):
        assert re.search(f"^{line}$", told, re.M), line
    samples = re.split(r"^sample   .*sample.jsonl:(\d+), .*$", told, flags=re.M)[1:]
    assert samples[::2] == ["1", "57", "119"]
    marks = [(text.count("⟦"), text.count("⟧")) for text in samples[1::2]]
    assert marks == [(1, 1), (1, 1), (1, 1)] and "\033" not in told
    assert "⟦\n          Yes.</s>⟧" in samples[-1] and "<|system|>" in samples[-1]


@pytest.mark.parametrize("is_terminal, no_color", [(True, ""), (True, "1"), (False, "")])
def test_colours_are_for_terminals(tmp_path, monkeypatch, capsys, few, is_terminal, no_color):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    monkeypatch.setenv("NO_COLOR", no_color)
    told = told_by(capsys, *QUICK, tmp_path / "out", "--dry-run")
    count = 3 if is_terminal and not no_color else 0
    assert told.count("\033[32m⟦") == told.count("⟧\033[0m") == count
    assert told.count("\033") == 2 * count and told.count("⟦") >= 3


@pytest.mark.parametrize("flags", [[], ["--keep-checkpoints", 2], SPLIT, ["--dora"], ["--resume"]])
def test_the_disk_is_what_the_run_then_writes(runs, monkeypatch, capsys, few, flags):
    out = runs / ("cut" if "--resume" in flags else "new")
    (runs / "cut" / "adapter_model.safetensors").unlink()
    before = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    monkeypatch.setattr(forecast, "in_bytes", lambda count: f"{count} bytes")
    told = told_by(capsys, *QUICK, out, *flags, "--dry-run")
    train_main(*QUICK, out, *flags)
    written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) - before
    found = re.search(r"^disk     (\d+) bytes for", told, re.M)[1]
    assert int(found) == pytest.approx(written, rel=0.02)


# --- time -------------------------------------------------------------------------------------


def test_the_time_of_a_run_on_a_cpu(tmp_path, monkeypatch, capsys, few):
    """Its samples have very different lengths. What other programs do to the core is left out."""
    monkeypatch.setattr(time, "perf_counter", time.process_time)
    records = [{"instruction": "q", "output": "a b " * (i % 16 * 4 + 1)} for i in range(48)]
    flags = ["--data", write_jsonl(tmp_path / "d.jsonl", records), "--max-steps", 24]
    command = [*QUICK, tmp_path / "out", *flags]
    told = told_by(capsys, *command, "--dry-run") + told_by(capsys, *command)
    seconds = re.search(r"^time     ([\d.]+) s for 24 updates,", told, re.M)[1]
    took = re.search(r"^speed    48 samples in ([\d.]+) s:", told, re.M)[1]
    assert float(seconds) == pytest.approx(float(took), rel=0.5)


class LoggedGraphs(train.CUDAGraphs):
    """CUDAGraphs that notes what it does. On a CPU, a stand-in takes the place of each graph."""

    def __init__(self, max_graphs, device):
        self.log, self.device, self.max_graphs = [], device, max_graphs
        if device == "cuda":
            super().__init__(self.micro_step, max_graphs=max_graphs)
        self.seen_shapes, self.graphs = set(), {}

    def micro_step(self, batch, divisor):
        return batch.targets.sum() / divisor

    def run_eagerly(self, *inputs):
        self.log.append("eager")
        return super().run_eagerly(*inputs) if self.device == "cuda" else self.micro_step(*inputs)

    def capture(self, batch, divisor):
        self.log.append("captured")
        if self.device == "cuda":
            return super().capture(batch, divisor)
        inputs, loss = [tensor.clone() for tensor in (*batch, divisor)], torch.zeros(())
        graph = SimpleNamespace(replay=lambda: loss.copy_(self.micro_step(batch, inputs[-1])))
        return graph, inputs, loss

    def run(self, batch):
        """→ (the loss, the mode in which the micro-batch ran)"""
        self.log.clear()
        loss = self(batch, torch.ones((), device=self.device)).item()
        return loss, *(self.log or ["replayed"])


class Machine:
    """A clock, on which micro-batches take as long as CUDA graphs might make them.

    With graphs, Python gives work to the device, and goes on until `wait`.
    """

    def __init__(self, max_graphs, monkeypatch=None, captured=0.02):
        self.seconds = dict(new=0.08, eager=0.03, captured=captured, replayed=0.002)
        self.graphs, self.clock, self.lengths = LoggedGraphs(max_graphs, "cpu"), 0.0, set()
        self.device_ends, self.device_seconds = 0.0, 0.01 if max_graphs else 0.0
        if monkeypatch:
            monkeypatch.setattr(time, "perf_counter", lambda: self.clock)
            for module in (forecast, memory):
                monkeypatch.setattr(module, "wait_for", lambda device: self.wait())

    def wait(self):
        self.clock = self.device_ends = max(self.clock, self.device_ends)

    def run(self, batch, divisor=None):
        mode, length = self.graphs.run(batch)[1], batch.input_ids.shape
        is_new = mode == "eager" and self.graphs.max_graphs and length not in self.lengths
        self.lengths.add(length)
        self.clock += self.seconds["new" if is_new else mode]
        if mode == "eager":
            self.device_ends = max(self.device_ends + self.device_seconds, self.clock)
        else:
            self.device_ends = max(self.device_ends, self.clock) + self.device_seconds


def micro_batch(size, device="cpu"):
    """`size` targets; sizes 4 to 7 share a length, 8 to 11 the next one, and so on"""
    length = size - size % 4
    shapes = ((0,), (2, length), (size,), (2, size))
    return data.MicroBatch(*(torch.ones(shape, device=device) for shape in shapes))


def load(epoch, updates):  # as train.load_updates, but with sizes in place of indices
    return [SimpleNamespace(micro_batches=[*map(micro_batch, lengths)]) for lengths in updates]


@pytest.mark.parametrize("max_graphs, tolerance", [(0, 1e-6), (96, 0.02), (3, 0.3)])
@pytest.mark.parametrize("computed", [40, 1000])
@pytest.mark.parametrize("captured", [0.02, 0.05])
def test_the_time_counts_each_mode(monkeypatch, max_graphs, tolerance, computed, captured):
    machine = Machine(max_graphs, monkeypatch, captured)
    alone = Machine(max_graphs, captured=captured)
    monkeypatch.setattr(forecast, "MOST_COMPUTED", computed)
    epochs = [(i, [(5, 5), (5, 9), (7, 7), (9, 11), (13, 5), (5, 7), (13, 17)]) for i in range(20)]
    run = SimpleNamespace(device=CPU, total_steps=140, progress=SimpleNamespace(step=0))
    run.coming_epochs, run.args = lambda: epochs, SimpleNamespace(logging_steps=10)

    def run_update(update):
        [*map(machine.run, update.micro_batches)]

    told = forecast.seconds_of_training(run, load, run_update, max_graphs)
    updates = (update for epoch in epochs for update in load(*epoch))
    for number, update in enumerate(updates, 1):
        [*map(alone.run, update.micro_batches)]
        if number % 10 == 0:
            alone.wait()
    assert told == pytest.approx(alone.clock, rel=tolerance)


@pytest.mark.parametrize("max_graphs", [0, 96])
def test_the_time_of_all_evaluations(monkeypatch, max_graphs):
    machine, alone = Machine(max_graphs, monkeypatch), Machine(max_graphs)
    run = SimpleNamespace(device=CPU, total_steps=21, progress=SimpleNamespace(step=5))
    run.eval_every, run.model = 2, torch.nn.Module()
    batches = [*map(micro_batch, (9, 9, 7, 5, 5))]
    told = forecast.seconds_of_evaluations(run, batches, machine.run, max_graphs)
    for _ in range(9):  # after updates 6, 8, … 20 and 21
        [*map(alone.run, batches)]
        alone.wait()
    assert told == pytest.approx(alone.clock, rel=0.05) and run.model.training


@pytest.mark.parametrize("max_graphs", [0, 96])
def test_a_process_without_a_micro_batch_forecasts_nothing(monkeypatch, max_graphs):
    """Of several processes, some may have none of an evaluation."""
    run = SimpleNamespace(device=CPU, total_steps=21, progress=SimpleNamespace(step=5))
    run.eval_every, run.model = 2, torch.nn.Module()
    assert forecast.seconds_of_evaluations(run, [], None, max_graphs) == 0


@pytest.mark.parametrize("device", CPU_AND_CUDA)
@pytest.mark.parametrize("max_graphs", [2, 96])
def test_modes_are_those_of_cuda_graphs(device, max_graphs):
    sizes = torch.randint(1, 7, (60,), generator=torch.manual_seed(0)).tolist()
    batches = [micro_batch(size, device) for size in sizes]
    losses, modes = zip(*map(LoggedGraphs(max_graphs, device).run, batches), strict=True)
    assert [*losses] == [2 * size for size in sizes]
    found = forecast.Modes(max_graphs).of_next(batch.shapes() for batch in batches)
    assert found.count("new") == 2
    assert [mode.replace("new", "eager") for mode in found] == [*modes]
    assert modes.count("captured") == min(max_graphs, 6)


def test_modes_by_hand():
    shapes = "a1 a1 b1 a1 c2 b1 b1 c2 c2".split()
    for max_graphs, wanted in ((2, "ncerncree"), (96, "ncerncrcr"), (0, "neeeneeee")):
        assert [mode[0] for mode in forecast.Modes(max_graphs).of_next(shapes)] == [*wanted]


# --- flags that fit ---------------------------------------------------------------------------


def advice(size, steps, fits, lengths=(40, 130, 9), prefix_length=20):
    """→ (what flags_that_fit says, [(batch size, length)] of its trials). fits(size, length)"""
    args = train.parse_args(["--no-cuda-graphs", "--gradient-checkpointing", "off", "--seed=7"])
    args.batch_size, args.gradient_accumulation_steps = size, steps
    dataset = SimpleNamespace(lengths=list(lengths), prefix_length=prefix_length)
    run, tried = SimpleNamespace(args=args, dataset=dataset), []

    def make_micro_step(smaller):
        now, length = smaller.args, min(smaller.args.max_length, max(lengths))
        assert now.batch_size * now.gradient_accumulation_steps == size * steps
        assert (now.gradient_checkpointing, now.cuda_graphs, now.seed) == ("auto", None, 7)
        tried.append((now.batch_size, length))
        if not fits(*tried[-1]):
            raise memory.DoesNotFit("out of memory")

    told = memory.flags_that_fit(run, make_micro_step)
    assert run.args is args
    return told, tried


def test_smaller_micro_batches_come_before_shorter_ones():
    told, tried = advice(8, 3, lambda size, length: size <= 2)
    flags = "--batch-size 2 --gradient-accumulation-steps 12 --gradient-checkpointing auto"
    assert told == f"this fits: {flags}" and tried[-3:] == [(4, 130), (3, 130), (2, 130)]
    told, tried = advice(4, 2, lambda size, length: length <= 65)
    flags = "--batch-size 1 --gradient-accumulation-steps 8 --gradient-checkpointing auto"
    assert told == f"this fits: {flags} --max-length 65" and tried[2:] == [(1, 130), (1, 65)]
    told, tried = advice(1, 1, lambda size, length: False)
    assert told == "no smaller micro-batch that fits was found"
    assert [length for _, length in tried] == [130, 65, 32]  # none is below the prefix
    for size in range(2, 13):  # advice checks that the update keeps its samples
        assert advice(size, 1, lambda size, length: False)[1][-1] == (1, 32)


def test_the_advice_of_a_dry_run_can_be_followed(tmp_path, monkeypatch, capsys, few):
    plain = train.forward_backward

    def forward_backward(model, scaler, batch, divisor):
        if batch.input_ids.numel() > 60:  # the longest sample has 52 tokens
            raise torch.OutOfMemoryError("out of memory")
        return plain(model, scaler, batch, divisor)

    monkeypatch.setattr(train, "forward_backward", forward_backward)
    command = [*QUICK, tmp_path / "out", "--dry-run"]
    told, _, flags = refused(capsys, *command).partition("; this fits: ")
    assert "out of memory on the longest micro-batch" in told
    assert flags.startswith("--batch-size 1 --gradient-accumulation-steps 2 ")
    assert "nothing was written" in told_by(capsys, *command, *flags.split())
