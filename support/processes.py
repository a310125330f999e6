"""Several processes, one GPU each: they start, add up gradients, stop and fail together."""

import os
import signal
import sys
import time
import uuid
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from support import commands
from support.devices import find_device


class Links:
    """What connects this process with the others. Without torchrun, it has none."""

    store = None  # torchrun's dist.Store, which all processes read and write
    gpus = None  # the dist.ProcessGroup of NCCL
    timeout = None  # --timeout, in seconds


def start(device, timeout):
    """Joins the processes that torchrun started. Does nothing without torchrun.

    timeout: how many seconds the processes wait for one of them. Raises ValueError if one does not
    come.
    """
    if not dist.is_torchelastic_launched():
        return
    cuda, wait = find_device(device) == "cuda", timedelta(seconds=timeout)
    if cuda:
        local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= gpus:
            raise ValueError(f"torchrun started more processes than the {gpus} GPUs there are")
        torch.cuda.set_device(local_rank)
    try:
        store, rank, count = next(dist.rendezvous("env://", timeout=wait))
        Links.store, Links.timeout = store_of_attempt(store, rank, count, timeout), timeout
        options = dict(store=Links.store, rank=rank, world_size=count, timeout=wait)
        dist.init_process_group("gloo", **options)
    except dist.DistError as error:
        what = f"not all processes have started within {timeout} s"
        raise ValueError(f"{what}; look at the others, or give --timeout more") from error
    if cuda:
        # NCCL's own timeout aborts the program without a word. gloo's, an error, comes first.
        Links.gpus = dist.new_group(backend="nccl", timeout=2 * wait)
        # NCCL takes its memory at the first message: before the memory for training is measured.
        dist.all_reduce(torch.zeros((), device="cuda"), group=Links.gpus)
    if rank:
        sys.stdout = open(os.devnull, "w")  # only the first process prints


def store_of_attempt(store, rank, count, timeout):
    """→ the part of torchrun's dist.Store that only this attempt uses. All processes call this.

    When a process dies, torchrun starts all of them again, and the store still has the addresses of
    the dead ones. So the first process makes up a name for the attempt. The others may read an old
    name at first. They know the right one by the answer: the first process repeats what they wrote.
    """
    mine, end = uuid.uuid4().hex, time.monotonic() + timeout
    if rank == 0:
        store.set("attempt", mine)
        for other in range(1, count):
            store.set(f"{mine} answer {other}", store.get(f"{mine} question {other}"))
        return dist.PrefixStore(mine, store)
    while time.monotonic() < end:
        attempt = store.get("attempt").decode()  # waits until it is there
        answer = f"{attempt} answer {rank}"
        store.set(f"{attempt} question {rank}", mine)
        for _ in range(20):  # then the name may be a new one
            if store.check([answer]) and store.get(answer).decode() == mine:
                return dist.PrefixStore(attempt, store)
            time.sleep(0.01)
    raise dist.DistStoreError("no answer from the first process")


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
    add_up(flat)
    parts = flat[1:].split([grad.numel() for grad in grads])
    torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(parts, grads, strict=True)])
    return flat[0]


def add_up(tensor):
    """Adds up a tensor of all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor, group=Links.gpus if tensor.is_cuda else None)


def largest(numbers):
    """A number, or a list of them → the largest of the processes', at each place"""
    numbers = torch.tensor(numbers, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return numbers.tolist()


def gather(value):
    """→ the values of all processes, in their order"""
    values = [value] * rank_and_count()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def check_same_everywhere(value):
    """Raises ValueError in all processes if `value` is not the same in all of them."""
    values = gather(value)
    if any(other != values[0] for other in values):
        what = "arguments, data, weights or the checkpoint they found"
        raise ValueError(f"the processes differ in {what}")


def check_shared(directory, found):
    """Raises ValueError in all processes if not all of them found the same in a directory.

    found: what this process found, in words
    """
    all_found = gather(found)
    for rank, other in enumerate(all_found):
        if other != all_found[0]:
            what = f"process 0 finds {all_found[0]} there, process {rank} {other}"
            advice = "it must be on a disk that all machines share"
            raise ValueError(f"--output-dir {directory}: {what}; {advice}")


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
        commands.discard_output(sys.stdout)
    sys.exit(128 + number)


def close():
    """Ends the connection to the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def exit_together(error, program, out_of_memory):
    """commands.exit_with, for one of several processes.

    Where several of them fail, only the first one should tell. The others wait here, until torchrun
    ends them. So does one with a RuntimeError, which may come from a message that another process
    failed to send.
    """
    rank, count = rank_and_count()
    text = str(error).lower() if count > 1 else ""  # gloo has no classes for its errors
    is_late, is_lost = "timed out" in text, "connection" in text
    if is_late:
        tell_who_hangs(rank, count)
    if rank or (count > 1 and isinstance(error, RuntimeError)):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
    if isinstance(error, RuntimeError) and (is_late or is_lost):
        error = ConnectionError("lost the connection to another process, which failed first")
    named = f"{program}: process {rank}" if rank else program
    commands.exit_with(error, named, out_of_memory)


def tell_who_hangs(rank, count):
    """Ends the program with a message that names the processes which do not answer.

    It returns in all processes but the first of those that wait for an answer.
    """
    Links.store.set(f"waits {rank}", "")
    time.sleep(max(2, Links.timeout / 10))  # the others notice a little later
    waiting = [each for each in range(count) if Links.store.check([f"waits {each}"])]
    if rank > waiting[0]:
        return
    silent = [str(each) for each in range(count) if each not in waiting] or ["another process"]
    what = f"no answer from process {', '.join(silent)} for {Links.timeout} s"
    advice = "--resume continues from the last checkpoint; if it was only slow, give --timeout more"
    commands.ErrorOutput().write(f"\ntrain.py: error: {what}; {advice}\n")  # perhaps beside a bar
    os._exit(2)  # sys.exit could wait for a message on the GPU
