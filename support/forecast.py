"""What a run will need: `python train.py --dry-run` measures it on a few real updates.

With CUDA graphs (train.CUDAGraphs), a micro-batch runs in one of four modes, which differ in time:

    new         eagerly: the first of its shape, and of its length
    eager       the first of its shape; the length is known
    captured    the second of its shape
    replayed    a later one

Each mode is measured. Then the modes of all coming updates are played through.

train.py passes the functions that run updates, because support/ does not import it.
"""

import itertools
import shutil
import statistics
import time
from functools import partial
from typing import NamedTuple

import torch

from support import memory
from support.checkpoints import checkpoint_files
from support.files import as_bytes, nearest_existing
from support.memory import timed, wait_for
from support.processes import largest

MOST_MEASURED = 12  # updates; fewer if they take long
# The shapes of so many updates are computed. Later updates are taken to cost as much as the second
# half of these.
MOST_COMPUTED = 1000


# --- time ---------------------------------------------------------------------------------------


class Modes:
    """Tells in which mode each micro-batch will run, as train.CUDAGraphs decides it.

    max_graphs: 0 without CUDA graphs
    """

    def __init__(self, max_graphs):
        self.max_graphs, self.seen, self.captured, self.lengths = max_graphs, set(), set(), set()

    def of_next(self, shapes):
        """→ the modes of the next micro-batches; shapes: data.MicroBatch.shapes() of each"""
        return [self._next_one(shape) for shape in shapes]

    def _next_one(self, shape):
        if shape in self.captured:
            return "replayed"
        if shape in self.seen and len(self.captured) < self.max_graphs:
            self.captured.add(shape)
            return "captured"
        self.seen.add(shape)
        is_new = shape[1] not in self.lengths  # of input_ids: libraries choose kernels by it
        self.lengths.add(shape[1])
        return "new" if is_new else "eager"


class Costs(NamedTuple):
    """Seconds of one micro-batch: of Python in each mode, and of the device."""

    new: float
    eager: float
    captured: float
    replayed: float
    device: float

    def of(self, modes):
        """→ the seconds that Python takes for micro-batches that run in these modes"""
        return sum(getattr(self, mode) for mode in modes)

    def ends(self, updates, waits_every):
        """→ the second at which each update ends; updates: for each, the modes of its micro-batches

        Python runs ahead of the device, until it waits for a result, every `waits_every` updates.
        """
        host = device = 0
        ends = []
        for number, modes in enumerate(updates, 1):
            for mode in modes:
                host += self.of([mode])
                if mode in ("captured", "replayed"):  # the device begins when Python has launched
                    device = max(device, host) + self.device
                else:  # the device works while Python launches kernels
                    device = max(device + self.device, host)
            ends.append(max(host, device))
            if number % waits_every == 0:
                host = device = ends[-1]
        return ends


def measure(run_items, shapes, modes, device):
    """→ Costs. run_items: a generator function, which yields after each item that it has run. It is
    called at least three times.

    shapes: for each item, the shapes of its micro-batches; modes: Modes that have seen what ran
    before. With CUDA graphs the first pass runs eagerly or captures, the second captures what ran
    eagerly before, and later ones only replay.
    """

    def run_one_by_one():
        """→ [(Python's seconds, the modes of its micro-batches)] of all items"""
        times = [time.perf_counter()]
        for _ in run_items():  # as in training, nothing waits for the device here
            times.append(time.perf_counter())
        wait_for(device)
        seconds = [end - start for start, end in itertools.pairwise(times)]
        return [*zip(seconds, map(modes.of_next, shapes), strict=True)]

    def run_all():
        for _ in run_items():
            pass

    first = run_one_by_one()
    second = run_one_by_one()
    totals = []
    while not totals or (len(totals) < 7 and sum(totals) < 3):
        totals.append(largest(timed(run_all, device)))  # so that all processes decide alike
    steady = statistics.median(totals) / max(1, sum(map(len, shapes)))
    costs = Costs(*[steady] * len(Costs._fields))
    if not modes.max_graphs:
        return costs
    if found := [seconds / len(ran) for seconds, ran in second if {*ran} == {"replayed"}]:
        costs = costs._replace(replayed=min(steady, statistics.median(found)))
    costs = costs._replace(captured=cost_of("captured", second, costs, costs.replayed))
    only_known = [(seconds, ran) for seconds, ran in first if "new" not in ran]
    costs = costs._replace(eager=cost_of("eager", only_known, costs, costs.captured))
    return costs._replace(new=cost_of("new", first, costs, costs.eager))


def cost_of(mode, measured, costs, otherwise):
    """→ the seconds of one micro-batch in this mode: the median over the items that have it

    measured: [(seconds, the modes of an item's micro-batches)]; costs: of the other modes;
    otherwise: the cost if no item has this mode
    """
    found = [
        (seconds - costs.of(other for other in ran if other != mode)) / ran.count(mode)
        for seconds, ran in measured
        if mode in ran
    ]
    # Noise can't make it cheaper than a replay.
    return max(costs.replayed, statistics.median(found)) if found else otherwise


def seconds_of_training(run, load, run_update, max_graphs):
    """→ the seconds of all updates that are left, forecast from a few

    run: a train.Run
    load: (epoch, [the indices of an update's samples]) → an iterable of data.Update
    run_update: data.Update → None, makes it
    """
    coming = []  # (epoch, the indices of the update's samples)
    for epoch, order in run.coming_epochs():
        coming += [(epoch, indices) for indices in order[: MOST_COMPUTED - len(coming)]]
        if len(coming) == MOST_COMPUTED:
            break
    sizes, shapes = [], []  # of the micro-batches of each of these updates
    for epoch, indices in coming:
        for update in load(epoch, [indices]):
            sizes.append(sum(batch.input_ids.numel() for batch in update.micro_batches))
            shapes.append([batch.shapes() for batch in update.micro_batches])
    by_size = sorted(range(len(coming)), key=sizes.__getitem__)

    def run_updates(numbers):
        # One loader for all, as in training: starting one takes some milliseconds.
        for update in load(coming[0][0], [coming[number][1] for number in numbers]):
            run_update(update)
            yield

    typical, modes = by_size[len(by_size) // 2], Modes(max_graphs)
    seconds = largest(timed(lambda: [*run_updates([typical] * 2)], run.device))
    modes.of_next(shapes[typical] * 2)
    most = min(MOST_MEASURED, int(40 / seconds))  # of the updates that have graphs for all shapes
    if max_graphs:
        most = min(most, max_graphs // max(map(len, shapes)))
    measured = middles(by_size, max(3, most))
    shapes_of_measured = [shapes[number] for number in measured]
    costs = measure(partial(run_updates, measured), shapes_of_measured, modes, run.device)
    modes = Modes(max_graphs)  # of the real run
    ends = costs.ends(map(modes.of_next, shapes), waits_every=run.args.logging_steps)
    beyond = run.total_steps - run.progress.step - len(ends)
    if not beyond:
        return ends[-1]
    half = len(ends) // 2
    return ends[-1] + beyond * (ends[-1] - ends[half - 1]) / (len(ends) - half)


def seconds_of_evaluations(run, batches, eval_step, max_graphs):
    """→ the seconds of all evaluations that are left

    run: a train.Run; batches: the data.MicroBatch of one evaluation; they are iterated twice
    """
    device, one = run.device, torch.ones((), device=run.device)
    all_shapes = [batch.shapes() for batch in batches]  # none, if other processes have all
    numbers = {*middles(range(len(all_shapes)), 4 * MOST_MEASURED)}
    measured = [batch for number, batch in enumerate(batches) if number in numbers]

    def run_batches():
        for batch in measured:
            eval_step(batch.to(device), one)
            yield

    run.model.eval()
    shapes = [[batch.shapes()] for batch in measured]
    costs = measure(run_batches, shapes, Modes(max_graphs), device)
    run.model.train()
    count, modes = times_due(run, run.eval_every), Modes(max_graphs)
    seconds = []
    for _ in range(min(count, 3)):  # later ones take as long as the third
        evaluation = ([mode] for mode in modes.of_next(all_shapes))
        seconds.append(max(costs.ends(evaluation, waits_every=len(all_shapes)), default=0.0))
    return sum(seconds) + (count - len(seconds)) * seconds[-1]


def middles(values, count):
    """→ the middle of each of `count` equal parts of a list; the whole list if it is shorter"""
    count = min(count, len(values))
    return [values[len(values) * (2 * i + 1) // (2 * count)] for i in range(count)]


def times_due(run, every):
    """→ how many times something is still due: after each `every` updates, and at the end"""
    total, done = run.total_steps, run.progress.step
    return total // every - done // every + (total % every > 0)


# --- what is printed ----------------------------------------------------------------------------


def print_forecast(run, load, run_update, eval_batches, eval_step, max_graphs):
    """Measures, and prints what the run will need. See seconds_of_training and _evaluations."""
    updates = run.total_steps - run.progress.step
    if not updates or run.progress.is_out_of_patience(run.args.patience):
        print("this run has already finished: there is nothing left to do")
        return
    training, evaluating = seconds_of_training(run, load, run_update, max_graphs), 0
    if run.eval_set:
        batches = eval_batches(run.args.batch_size)
        evaluating = seconds_of_evaluations(run, batches, eval_step, max_graphs)
    saves, start = times_due(run, run.args.save_steps), time.perf_counter()
    contents = checkpoint_files(run, b"")  # off the device; a thread does the rest beside training
    saving = saves * (time.perf_counter() - start)
    files = {name: as_bytes(content) for name, content in contents.items()}
    at_most = "at most " if run.args.patience else ""
    whole = f"{at_most}{in_words(training + evaluating + saving)} for {updates:,} updates"
    evaluations = f", of which evaluations {in_words(evaluating)}" if run.eval_set else ""
    print(f"time     {whole}{evaluations}, after loading and trying")
    print_disk(run, files, saves)
    print_memory(run)
    print("nothing was written")


def print_disk(run, files, saves):
    """files: {name: bytes} of a checkpoint; saves: how many checkpoints are written"""
    size, adapter = sum(map(len, files.values())), len(files["adapter_model.safetensors"])
    size += adapter if run.eval_set else 0  # the best one
    kept = min(saves, run.args.keep_checkpoints or saves)
    adapters = 2 if run.eval_set else 1  # best/ has one
    need = kept * size + adapters * adapter
    free = shutil.disk_usage(nearest_existing(run.args.output_dir)).free
    count = f"{kept} checkpoints" if kept > 1 else "a checkpoint"
    what = f"{count} of {in_bytes(size)}, and {'two adapters' if run.eval_set else 'the adapter'}"
    more = f", {in_bytes(size)} more while the next one is written" if kept < saves else ""
    print(f"disk     {in_bytes(need)} for {what}{more}; {in_bytes(free)} are free")


def print_memory(run):
    if run.device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        others = in_bytes(total - free - torch.cuda.memory_reserved())
        taken = f"CUDA and other programs have {others} of it"
        peak = max(run.peak_memory, torch.cuda.max_memory_allocated())  # of a trial; since then
        print(f"memory   {in_bytes(peak)}; the card has {in_bytes(total)}, {taken}")
    elif peak := memory.peak_of_process():
        print(f"memory   {in_bytes(peak)}, the peak of this process; training needs about as much")


def in_words(seconds):
    if seconds < 90:
        return f"{seconds:.1f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def in_bytes(count):
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
