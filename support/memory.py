"""Whether training fits into memory: the longest micro-batch is tried before training begins."""

import argparse
import copy
import re
import time
from functools import partial
from pathlib import Path

import torch

from support import fp8
from support.config import IGNORE
from support.processes import are_several
from support.run_args import flag_of


class DoesNotFit(ValueError):
    """The longest micro-batch does not fit into the GPU's memory."""


def longest_samples(dataset, count, max_length):
    """→ `count` samples for the micro-batch that needs the most memory; fewer if none has so many.

    All have the length of the longest sample, and the most supervised tokens of any sample.
    max_length cuts them: flags_that_fit tries less than the dataset has.
    """
    samples = dataset.samples_per_epoch
    count = min(count, samples + samples // 7)  # with rows of padding: see data.make_update
    input_ids, _ = dataset[max(range(len(dataset)), key=dataset.lengths.__getitem__)]
    input_ids = input_ids[:max_length]
    most = min(max(dataset.supervised), len(input_ids) - 1)
    is_supervised = torch.arange(len(input_ids)) >= len(input_ids) - most
    return [(input_ids, input_ids.where(is_supervised, IGNORE))] * count


class Trial:
    """Runs micro-steps on `longest`, a micro-batch on the device, to see whether they fit.

    On a CPU a step is tried in two cases only: with --compile, so that compiling is over before
    anything is written, and with --dry-run.
    """

    def __init__(self, run, longest):
        self.run, self.longest, self.optimizer = run, longest, run.optimizer
        params, self.device = run.optimizer.param_groups[0]["params"], run.device
        self.is_needed = self.device.type == "cuda" or run.args.compile or run.args.dry_run
        # Training will need more memory: for AdamW's two moments, if they are not there yet, and
        # for the message that sums the gradients of several processes.
        copies = 0 if run.optimizer.state else 2
        copies += 1 if are_several() else 0
        self.stand_ins = [torch.empty_like(param) for param in params for _ in range(copies)]
        self.started = time.perf_counter()
        self.attempts, self.first_seconds, self.capture_seconds = 0, 0.0, 0.0

    def fits(self, micro_step):
        """Runs micro_step(batch, divisor). → False if memory runs out."""
        self.optimizer.zero_grad()  # gradients of an earlier trial hold its graphs' memory
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        if not self.is_needed:
            return True
        divisor = torch.ones((), device=self.device)
        self.attempts += 1
        try:
            self.first_seconds = timed(partial(micro_step, self.longest, divisor), self.device)
            if self.device.type == "cuda":
                self.run_again(micro_step, divisor)
            return True
        except torch.OutOfMemoryError:
            return False

    def run_again(self, micro_step, divisor):
        """Repeats the step as training will run it: the gradients exist, and then a graph does.

        A twentieth of what the first run needed must stay free, because training leaves more of
        the memory in pieces that are too small to use.
        """
        margin = torch.empty(
            torch.cuda.max_memory_allocated() // 20, dtype=torch.uint8, device=self.device
        )
        torch.cuda.reset_peak_memory_stats()
        # CUDAGraphs captures and replays it.
        self.capture_seconds = timed(partial(micro_step, self.longest, divisor), self.device)
        if hasattr(micro_step, "run_eagerly"):
            micro_step.run_eagerly(self.longest, divisor)  # as a new shape will, beside the graph
        self.peak = torch.cuda.max_memory_allocated() - margin.nbytes

    def check(self, micro_step, blocks):
        """Raises ValueError if micro_step is None. Prints what the last trial needed."""
        self.stand_ins = None
        size = f"the longest micro-batch, {size_of(self.longest)}"
        if micro_step is None:
            raise DoesNotFit(
                f"out of memory on {size}; try a smaller "
                "--batch-size (with more --gradient-accumulation-steps the update is the same), "
                "--gradient-checkpointing all, --load-in 4bit, or a smaller --max-length"
            )
        took = f"{time.perf_counter() - self.started:.1f} s"
        if self.device.type == "cuda":
            need = f"{self.peak / 2**30:.1f} GiB for {size}, {blocks} checkpointed"
            what = "compiling and loading kernels" if self.run.args.compile else "loading kernels"
            parts = f": {self.first_seconds:.1f} s {what}"
            if hasattr(micro_step, "run_eagerly"):
                parts += f", {self.capture_seconds:.1f} s capturing"
            if self.attempts > 1:  # the first one, which failed, has compiled
                parts = f", {self.attempts} attempts"
            print(f"memory   {need} (tried in {took}{parts})")
            self.run.peak_memory = self.peak
            torch.cuda.reset_peak_memory_stats()  # report_result prints the peak of training
        elif self.run.args.compile:
            print(f"compiled in {took}")


def wait_for(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(function, device):
    """→ the seconds that function() takes, with the work it gives to the device"""
    start = time.perf_counter()
    function()
    wait_for(device)
    return time.perf_counter() - start


def size_of(batch):
    """→ the size of a data.MicroBatch, in words"""
    rows, rest = batch.input_ids.shape
    return f"{rows} × {len(batch.prefix) + rest} tokens"


def try_evaluation(model, eval_step, longest):
    """Runs eval_step on the longest micro-batch. Raises ValueError if memory runs out."""
    model.eval()
    try:
        eval_step(longest, torch.ones((), device=model.device))
    except torch.OutOfMemoryError as error:
        where = f"on the longest micro-batch of the evaluation, {size_of(longest)}"
        raise ValueError(f"out of memory {where}; try a smaller --batch-size") from error
    finally:
        model.train()


def recompute_as_wanted(run, attempt, layers):
    """Calls attempt(n), where --gradient-checkpointing decides n. → its result

    auto means as few blocks as possible. A resumed run recomputes as many as before. Float8
    matrices are transposed first, and the transposes are dropped before more blocks are recomputed.
    attempt, layers: see fewest_that_fit
    """
    setting = run.args.gradient_checkpointing
    if run.checkpoint:
        setting = run.progress.recomputed_layers
    elif setting == "auto" and run.args.cuda_graphs and not run.args.compile:
        setting = "off"  # recomputed blocks can't be captured, unless they are compiled
    fewest = {"all": layers, "off": 0, "auto": 0}.get(setting, setting)
    fewest = min(fewest, layers)
    fp8.store_transposed(run.model)
    micro_step = attempt(fewest)
    if micro_step is None and fp8.drop_transposed(run.model):
        micro_step = attempt(fewest)
    if micro_step is None and setting == "auto":
        micro_step = fewest_that_fit(attempt, layers)
    return micro_step


def fewest_that_fit(attempt, layers):
    """→ attempt(n) for the smallest n that fits, by binary search; None if even `layers` does not.

    attempt(n) is the micro-step with n recomputed blocks, None if it does not fit. It also sets the
    model to n. So the last call is for the n that is returned. The more blocks are recomputed, the
    less memory a step takes, and the more time. attempt(0) is known not to fit.
    """
    low, high = 1, layers
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if attempt(middle) else (middle + 1, high)
    return attempt(low)


def fit_or_advise(run, make_micro_step):
    """→ make_micro_step(run). If that does not fit, DoesNotFit names flags with which it does."""
    try:
        return make_micro_step(run)
    except DoesNotFit as error:
        if run.checkpoint:  # its blocks and lengths can't change
            raise
        raise DoesNotFit(f"{error}; {flags_that_fit(run, make_micro_step)}") from error


def flags_that_fit(run, make_micro_step):
    """→ the first flags with which a trial succeeds, in words

    Smaller micro-batches come first, because with more of them the update is the same.
    """
    size, steps = run.args.batch_size, run.args.gradient_accumulation_steps
    length = max(run.dataset.lengths)
    sizes = [count for count in range(size, 0, -1) if size * steps % count == 0]  # 4, 2, 1
    lengths = [length >> i for i in range(1, 8) if length >> i >= run.dataset.prefix_length + 8]
    smaller_batches, shorter_samples = [(n, None) for n in sizes], [(1, n) for n in lengths]
    for count, most in smaller_batches + shorter_samples:
        flags = {"batch_size": count, "gradient_accumulation_steps": size * steps // count}
        flags |= {"gradient_checkpointing": "auto"} | ({"max_length": most} if most else {})
        smaller = copy.copy(run)
        smaller.args = argparse.Namespace(**vars(run.args) | flags | {"cuda_graphs": None})
        try:
            make_micro_step(smaller)
        except DoesNotFit:
            continue
        given = [f"{flag_of(name)} {value}" for name, value in flags.items()]
        left_out = ", without --cuda-graphs" if run.args.cuda_graphs else ""
        return f"this fits: {' '.join(given)}{left_out}"
    return "no smaller micro-batch that fits was found"


def peak_of_process():
    """→ the most memory that this process has used, in bytes; None where Linux doesn't tell"""
    file = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", file.read_text()) if file.exists() else None
    return int(found[1]) * 1024 if found else None
