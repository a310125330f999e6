"""Whether training fits into memory: the longest micro-batch is tried before training begins."""

import time

import torch

from support.config import IGNORE
from support.processes import are_several


def longest_samples(dataset, count):
    """→ samples for a micro-batch. No other one needs more memory.

    All have the length of the longest sample, and the most supervised tokens of any sample.
    """
    most = max(dataset.supervised)
    input_ids, _ = dataset[max(range(len(dataset)), key=dataset.lengths.__getitem__)]
    is_supervised = torch.arange(len(input_ids)) >= len(input_ids) - most
    return [(input_ids, input_ids.where(is_supervised, IGNORE))] * min(count, len(dataset))


class Trial:
    """Runs micro-steps on `longest`, a micro-batch on the device, to see whether they fit.

    size: what it is called in messages. On a CPU only a compiled step is tried: then compiling is
    over before anything is written.
    """

    def __init__(self, longest, size, optimizer, is_compiled):
        self.longest, self.size, self.optimizer = longest, size, optimizer
        params = optimizer.param_groups[0]["params"]
        self.device = params[0].device
        self.is_needed = self.device.type == "cuda" or is_compiled
        # Training will need more memory: for AdamW's two moments, if they are not there yet, and
        # for the message that sums the gradients of several processes.
        copies = 0 if optimizer.state else 2
        copies += 1 if are_several() else 0
        self.stand_ins = [torch.empty_like(param) for param in params for _ in range(copies)]
        self.started = time.perf_counter()

    def fits(self, micro_step):
        """Runs micro_step(batch, divisor). → False if memory runs out."""
        self.optimizer.zero_grad()  # gradients of an earlier trial hold its graphs' memory
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        if not self.is_needed:
            return True
        divisor = torch.ones((), device=self.device)
        try:
            micro_step(self.longest, divisor)
            if self.device.type == "cuda":
                self.run_again(micro_step, divisor)
            return True
        except torch.OutOfMemoryError:
            return False

    def run_again(self, micro_step, divisor):
        """Repeats the step as training will run it: the gradients exist, and then a graph does.

        A twentieth of what the first run needed must stay free, because training finds the free
        memory in other pieces than the trial did, and can use less of it.
        """
        margin = torch.empty(
            torch.cuda.max_memory_allocated() // 20, dtype=torch.uint8, device=self.device
        )
        torch.cuda.reset_peak_memory_stats()
        micro_step(self.longest, divisor)  # CUDAGraphs capture and replay it
        if hasattr(micro_step, "run_eagerly"):
            micro_step.run_eagerly(self.longest, divisor)  # as a new shape will, beside the graph
        self.peak = torch.cuda.max_memory_allocated() - margin.nbytes

    def check(self, micro_step, blocks):
        """Raises ValueError if micro_step is None. Prints what the last trial needed."""
        self.stand_ins = None
        if micro_step is None:
            raise ValueError(
                f"out of memory on the longest micro-batch, {self.size}; try a smaller "
                "--batch-size (with more --gradient-accumulation-steps the update is the same), "
                "--gradient-checkpointing all, --load-in 4bit, or a smaller --max-length"
            )
        took = f"{time.perf_counter() - self.started:.1f} s"
        if self.device.type == "cuda":
            where = f"for the longest micro-batch, {self.size}"
            print(f"memory   {self.peak / 2**30:.1f} GiB {where}, {blocks} (tried in {took})")
            torch.cuda.reset_peak_memory_stats()  # report_result prints the peak of training
        elif self.is_needed:
            print(f"compiled in {took}")


def fewest_that_fit(attempt, layers):
    """→ attempt(n) for the smallest n that fits, by binary search; None if even `layers` does not.

    attempt(n) is the micro-step with n recomputed blocks, None if it does not fit. It also sets the
    model to n, so it is called last for the n that is returned. The more blocks are recomputed, the
    less memory a step takes, and the more time.
    """
    if micro_step := attempt(0):
        return micro_step
    low, high = 1, layers
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if attempt(middle) else (middle + 1, high)
    return attempt(low)
