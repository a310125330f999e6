"""Several processes, one GPU each: they start, add up gradients, stop and fail together."""

import os
import signal
import sys
import time
from contextlib import suppress

import torch
import torch.distributed as dist

from support.commands import discard_output
from support.devices import find_device


def start(device):
    """Joins the processes that torchrun started. Does nothing without torchrun."""
    if not dist.is_torchelastic_launched():
        return
    cuda = find_device(device) == "cuda"
    if cuda:
        local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= gpus:
            raise ValueError(f"torchrun started more processes than the {gpus} GPUs there are")
        torch.cuda.set_device(local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    # NCCL takes its memory at the first message: before the memory for training is measured.
    dist.all_reduce(torch.zeros((), device="cuda" if cuda else "cpu"))
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")  # only the first process prints


def cores():
    """→ how many cores this process may use, if all processes of the machine share them"""
    has_affinity = hasattr(os, "sched_getaffinity")
    count = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(1, count // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def rank_and_count():
    """→ (the number of this process, counted from 0; how many there are)"""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def are_several():
    """Whether there are other processes than this one."""
    return rank_and_count()[1] > 1


def sum_over_processes(loss, grads):
    """Adds up the gradients of all processes, in place. → the sum of their losses. One message."""
    flat = torch.cat([loss.view(1), *(grad.flatten() for grad in grads)])
    dist.all_reduce(flat)
    parts = flat[1:].split([grad.numel() for grad in grads])
    torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(parts, grads, strict=True)])
    return flat[0]


def add_up(tensor):
    """Adds up a tensor of all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)


def largest(numbers):
    """A number, or a list of them → the largest of the processes', at each place"""
    numbers = torch.tensor(numbers, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return numbers.tolist()


def check_same_everywhere(value):
    """Raises ValueError in all processes if `value` is not the same in all of them."""
    if not dist.is_initialized():
        return
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    if any(other != values[0] for other in values):
        what = "arguments, data, weights or the checkpoint they found"
        raise ValueError(f"the processes differ in {what}")


# Windows lacks some of them.
STOPPING = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]
SAVING = getattr(signal, "SIGUSR1", None)


class Signals:
    """Remembers what arrives, so that the loop can answer after its update.

    The first SIGINT, SIGTERM or SIGHUP (the terminal was closed) means: save and stop. SIGUSR1
    means: save and go on. Slurm can send it before a job's time is over.
    """

    def __init__(self):
        self.stop = self.save = 0  # the number of the signal; 0: none came
        for number in STOPPING:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self.receive_stop)
        if SAVING:
            signal.signal(SAVING, self.receive_save)

    def receive_save(self, number, frame):
        self.save = number

    def receive_stop(self, number, frame):
        """The first signal is remembered. A second one ends the program at once; with several
        processes it is ignored, because torchrun repeats what they already got."""
        rank, count = rank_and_count()
        self.stop = number
        for each in STOPPING:
            if signal.getsignal(each) == self.receive_stop:
                signal.signal(each, signal.SIG_IGN if count > 1 else signal.SIG_DFL)
        if rank == 0:
            again = "; again to stop at once" if count == 1 else ""
            what = "stopping after this update, or this evaluation and an update"
            with suppress(OSError):  # whoever read stderr may have got the signal too
                os.write(2, f"\n{what}{again}\n".encode())

    def agreed(self):
        """→ (the signal to stop, the signal to save) that any process received, 0 for none.

        It waits for the other processes, but for no GPU.
        """
        saving, self.save = self.save, 0  # each one is answered once
        return tuple(map(int, largest([self.stop, saving])))


def exit_after_signal(number, step, output_dir):
    """Ends the program after signal `number`, as soon as all processes call this."""
    if dist.is_initialized():
        dist.barrier()  # the first to end makes torchrun end the others
    continues = f"--resume continues from {output_dir}/checkpoint-{step}"
    try:
        print(f"stopped  after update {step}; {continues}", flush=True)
    except OSError:  # whoever read stdout may have got the signal too
        discard_output(sys.stdout)
    sys.exit(128 + number)


def close():
    """Ends the connection to the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def wait_if_not_first(error):
    """Where several processes fail, only the first one should tell of its error.

    The others wait here, until torchrun ends them. A RuntimeError may come from a message that
    another process failed to send.
    """
    rank, count = rank_and_count()
    if rank or (count > 1 and isinstance(error, RuntimeError)):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)


def named(program):
    """→ `program`, with the number of this process if it is not the first"""
    rank, _ = rank_and_count()
    return f"{program}: process {rank}" if rank else program
