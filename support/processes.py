"""Several processes, one GPU each: they start, add up gradients and fail together."""

import os
import signal
import sys
import threading
import time
import uuid
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from support import commands
from support.devices import find_device
from support.errors import one_line


class Links:
    """The connection to the other processes. Without torchrun the first three are None."""

    store = None  # torchrun's dist.Store, which all processes read and write
    nccl_group = None  # a dist.ProcessGroup, for tensors on GPUs
    timeout = None  # --timeout, in seconds
    messages = 0  # how many of the messages between all processes this one has entered
    stopped = 0  # the number of the signal that told this process to stop


def start(device, timeout):
    """Joins the processes that torchrun started. Does nothing without torchrun.

    timeout: seconds that the processes wait for one another. Raises ValueError if one of them does
    not start in this time, if there are more processes than GPUs, or if these can't be connected.
    """
    if not dist.is_torchelastic_launched():
        return
    found = find_device(device)
    if found not in ("cuda", "cpu"):
        raise ValueError(f"--device {found}: several processes need cuda or cpu")
    if found == "cuda":
        local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= gpus:
            what = "torchrun started more processes than this machine has GPUs"
            raise ValueError(f"{what}; give --nproc-per-node {gpus}")
        if not dist.is_nccl_available():  # on Windows
            raise ValueError("this PyTorch lacks NCCL, which several GPUs need; give --device cpu")
        torch.cuda.set_device(local_rank)
    wait, Links.timeout = timedelta(seconds=timeout), timeout
    try:
        store, rank, count = next(dist.rendezvous("env://", timeout=wait))
        Links.store = store_of_attempt(store, rank, count, timeout)
        options = dict(store=Links.store, rank=rank, world_size=count, timeout=wait)
        dist.init_process_group("gloo", **options)
        if found == "cuda":
            connect_gpus()
    except dist.DistError as error:
        what = f"the processes can't connect ({one_line(error)})"
        raise ValueError(f"{what}; read what the others print, or raise --timeout") from error
    if rank:
        sys.stdout = open(os.devnull, "w")  # only the first process prints


def connect_gpus():
    """Makes Links.nccl_group. If that takes longer than --timeout, the program ends with a message.

    NCCL connects two GPUs at the first call that needs them. That call waits for the other GPU's
    process, without a limit. So all are connected here. Later calls return at once: see add_up.
    """
    os.environ.setdefault("NCCL_RUNTIME_CONNECT", "0")  # 1: some wait for the first large message
    meet()
    # NCCL's timeout aborts the program without a message. So gloo's has to come first.
    wait = timedelta(seconds=2 * Links.timeout)
    Links.nccl_group = dist.new_group(backend="nccl", timeout=wait)
    connected = threading.Event()
    threading.Thread(target=exit_unless, args=(connected,), daemon=True).start()
    try:
        # This connects. NCCL's memory is then allocated before training's is measured.
        add_up(torch.zeros((), device="cuda"))
        torch.cuda.synchronize()
    finally:
        connected.set()


def exit_unless(connected):
    """Ends the program if an Event is not set in time. The first process tells, and torchrun then
    ends the others; they wait a little longer."""
    rank, _ = rank_and_count()
    if not connected.wait(Links.timeout + 5 * (rank > 0)):
        what = f"process {rank} could not connect the GPUs within {Links.timeout} s"
        commands.ErrorOutput().write(f"train.py: error: {what}; NCCL_DEBUG=INFO tells more\n")
        os._exit(2)


def store_of_attempt(store, rank, count, timeout):
    """→ the part of torchrun's dist.Store that only this attempt uses. All processes call this.

    When a process dies, torchrun starts all of them again, and the store still has the addresses of
    the dead ones. So the first process makes up a name for the attempt. Each of the others writes a
    token under the name that it reads, and the first process repeats it. A process that read an old
    name gets no echo, and reads the name again. Raises ValueError with the process that does not
    come within `timeout` seconds.
    """
    unique, end, missing = uuid.uuid4().hex, time.monotonic() + timeout, 0
    try:
        if rank == 0:  # `unique` is the attempt's name
            store.set("attempt", unique)
            for missing in range(1, count):  # get waits for the token
                store.set(f"{unique} echo {missing}", store.get(f"{unique} token {missing}"))
            return dist.PrefixStore(unique, store)
        while time.monotonic() < end:  # it is the token
            attempt = store.get("attempt").decode()  # waits until there is one
            store.set(f"{attempt} token {rank}", unique)
            echo = f"{attempt} echo {rank}"
            for _ in range(20):  # after 0.2 s, the name is read again
                if store.check([echo]) and store.get(echo).decode() == unique:
                    return dist.PrefixStore(attempt, store)
                time.sleep(0.01)
    except dist.DistStoreError:
        pass
    what = f"process {missing} has not started within {timeout} s"
    raise ValueError(f"{what}; read what it prints, or raise --timeout")


def cores():
    """→ this process's share of the machine's cores"""
    has_affinity = hasattr(os, "sched_getaffinity")
    count = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(1, count // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def rank_and_count():
    """→ (the number of this process, counted from 0; how many there are)"""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def are_several():
    """Whether there are other processes than this one."""
    return rank_and_count()[1] > 1


def enter():
    """Tells the others that this process enters the next message: see name_who_hangs."""
    Links.messages += 1
    Links.store.set(f"entered {dist.get_rank()}", f"{Links.messages} {time.time()}")


def sum_over_processes(loss, grads):
    """Adds up the gradients of all processes, in place. → the sum of their losses."""
    flat = torch.cat([loss.view(1), *(grad.flatten() for grad in grads)])
    add_up(flat)
    parts = flat[1:].split([grad.numel() for grad in grads])
    torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(parts, grads, strict=True)])
    return flat[0]


def add_up(tensor):
    """Adds up a tensor of all processes, in place."""
    if dist.is_initialized():
        enter()
        dist.all_reduce(tensor, group=Links.nccl_group if tensor.is_cuda else None)
        if tensor.is_cuda:
            # NCCL's kernel occupies the GPU until every process has started its own. If another
            # kernel is used for the first time meanwhile, CUDA has to load it, and blocks the CPU
            # until NCCL's kernel has ended. That has no limit, so the CPU first waits in gloo.
            meet()


def meet():
    """Waits until all processes have called this, at most for --timeout: see exit_together."""
    largest([0])  # a barrier that counts as a message: see enter


def largest(numbers):
    """→ the largest of all processes' numbers; of lists, place by place"""
    numbers = torch.tensor(numbers, dtype=torch.float64)
    if dist.is_initialized():
        enter()
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return numbers.tolist()


def gather(value):
    """→ the values of all processes, in their order"""
    values = [value] * rank_and_count()[1]
    if dist.is_initialized():
        enter()
        dist.all_gather_object(values, value)
    return values


def check_same_everywhere(value):
    """Raises ValueError in all processes if `value` is not the same in all of them."""
    values = gather(value)
    if any(other != values[0] for other in values):
        what = "the processes differ in arguments, data, weights or checkpoint"
        raise ValueError(f"{what}; give all of them the same")


def check_shared(directory, found):
    """Raises ValueError in all processes if they found different things in `directory`.

    found: what this process found, in words
    """
    all_found = gather(found)
    for rank, other in enumerate(all_found):
        if other != all_found[0]:
            what = f"process 0 finds {all_found[0]} there, process {rank} {other}"
            advice = "the directory must be on a disk that all machines share"
            raise ValueError(f"--output-dir {directory}: {what}; {advice}")


def close():
    """Ends the connection to the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def exit_together(error, program, out_of_memory):
    """commands.exit_with, for one of several processes.

    If several fail, only process 0 tells of its error. The others give torchrun 10 s to end them.
    So does process 0 after a RuntimeError, because another process may have caused it.
    """
    rank, count = rank_and_count()
    if dist.is_torchelastic_launched() and not dist.is_initialized():  # still in `start`
        rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    may_come_from_others = count > 1 and isinstance(error, RuntimeError)
    text = str(error).lower() if may_come_from_others else ""  # gloo has one class for all errors
    timed_out = "timed out" in text
    is_lost = timed_out or "connection" in text
    if timed_out and Links.store:
        with suppress(dist.DistError):  # the store has gone
            name_who_hangs(rank, count, program)
    # After a lost connection, sys.exit could wait for ever for a message on the GPU.
    if is_lost and Links.stopped:  # torchrun ends this process, because another one died
        os._exit(128 + Links.stopped)
    if rank or may_come_from_others:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun's then ends this process
        time.sleep(10)
    named = f"{program}: process {rank}" if rank else program
    if is_lost:
        what = "lost the connection to another process, which failed first"
        commands.ErrorOutput().write(f"{named}: error: {what}\n")
        os._exit(2)
    commands.exit_with(error, named, out_of_memory)


def name_who_hangs(rank, count, program):
    """Ends the program with a message that names the processes which do not answer.

    Of the processes that notice, only the first one does that. In the others this returns.
    """
    Links.store.set(f"waits {rank}", "")
    keys = [f"entered {each}" for each in range(count)]
    entered = [Links.store.get(key).decode() if Links.store.check([key]) else "0 0" for key in keys]
    messages, times = zip(*((int(n), float(t)) for n, t in map(str.split, entered)), strict=True)
    silent = [each for each in range(count) if messages[each] < messages[rank]]
    if not silent:  # one hangs inside this message; by then, all others have noticed too
        late = max(times) + Links.timeout + 2 - time.time()
        time.sleep(max(0, min(late, Links.timeout)))
        silent = [each for each in range(count) if not Links.store.check([f"waits {each}"])]
    if Links.store.add("told", 1) > 1:
        return
    what = f"no answer from process {', '.join(map(str, silent))} for {Links.timeout} s"
    if not silent:
        what = f"the processes have waited for one another for {Links.timeout} s"
    advice = "--resume continues from the newest checkpoint; if that was only slow, raise --timeout"
    # A progress bar may stand in this line.
    commands.ErrorOutput().write(f"\n{program}: error: {what}; {advice}\n")
    os._exit(2)  # see exit_together
