"""Fine-tunes ChatGLM3 with LoRA: one visible loop.

python train.py                                                              # a built-in tiny model, about a minute
python train.py --model THUDM/chatglm3-6b --data huanhuan.json --system "…"  # the real job
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import textwrap
import time
from bisect import bisect_left
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import model as chatglm

# The built-in model's defaults, instead of those below: random weights have further to go.
TINY_PRESET = dict(
    learning_rate=3e-3,
    epochs=50,
    lora_r=16,
    lora_dropout=0.0,
    target_modules=["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
)


def parse_args(argv=None):
    number = chatglm.number
    preset = (f"--{k.replace('_', '-')} {' '.join(v) if isinstance(v, list) else v}" for k, v in TINY_PRESET.items())
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=f"Without --model, the defaults are {' '.join(preset)}.",
        usage="%(prog)s [options]",
        allow_abbrev=False,
        formatter_class=chatglm.HelpFormatter,
    )
    add = parser.add_argument_group("model and data").add_argument
    add("--model", help="directory or hub id of a ChatGLM3 checkpoint; without it, the built-in tiny model")
    add("--data", nargs="+", metavar="FILE", help="JSON or JSONL files; without it, the sample in dataset/")
    add("--system", metavar="TEXT", help="system message of conversations that have none")
    add("--output-dir", default=chatglm.ADAPTER_DIR, help="where the adapter and checkpoints go")
    add("--max-length", type=number(8), default=512, help="tokens of a sample, prompt and answer together")
    add = parser.add_argument_group("optimisation").add_argument
    add("--batch-size", type=number(1), default=4, help="samples of a micro-batch")
    add("--gradient-accumulation-steps", type=number(1), default=2, help="micro-batches of an update")
    add("--epochs", type=number(1), default=3, help="passes over the data")
    add("--max-steps", type=number(1), help="number of updates, instead of --epochs")
    add("--learning-rate", type=number(0.0, 1e3), default=1e-4, help="peak learning rate of AdamW")
    add("--lr-schedule", choices=("linear", "cosine", "constant"), default="linear", help="after warm-up")
    add("--warmup-steps", type=number(0), default=0, help="updates of linear warm-up")
    add("--weight-decay", type=number(0.0, 1e6), default=0.0, help="of AdamW")
    add("--max-grad-norm", type=number(0.0, 1e6), default=1.0, help="gradients are clipped to this norm; 0: not at all")
    add("--seed", type=number(0), default=42, help="of LoRA's start, dropout and the order of samples")
    add = parser.add_argument_group("LoRA").add_argument
    add("--lora-r", type=number(1, 4096), default=8, help="rank")
    add("--lora-alpha", type=number(0.0, 1e6), default=32, help="LoRA's output is scaled by alpha / r")
    add("--lora-dropout", type=number(0.0, 0.99), default=0.1, help="on LoRA's input")
    add(
        "--target-modules",
        nargs="+",
        default=["query_key_value"],
        metavar="NAME",
        help="names of the linear layers, or one regular expression for whole module paths",
    )
    add("--modules-to-save", nargs="+", metavar="NAME", help="modules that are trained and saved whole")
    add = parser.add_argument_group("machine").add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA if there is one")
    dtypes = ("auto", *chatglm.DTYPES)
    add("--dtype", choices=dtypes, default="auto", help="of base and autocast; auto: fp16 on CUDA, else fp32")
    add(
        "--gradient-checkpointing",
        type=blocks,
        default="auto",
        metavar="all|off|N|auto",
        help="how many blocks recompute their activations in backward; auto: as few as memory allows",
    )
    add("--load-in", choices=("4bit", "8bit"), help="quantise the base, with bitsandbytes")
    add("--compile", action="store_true", help="compile the blocks and the loss: faster, after half a minute or less")
    add(
        "--cuda-graphs",
        action=argparse.BooleanOptionalAction,
        help="replay the micro-step instead of launching its kernels one by one; without either flag: on CUDA, unless "
        "blocks are checkpointed or quantised",
    )
    add = parser.add_argument_group("progress").add_argument
    add("--logging-steps", type=number(1), default=10, help="updates between lines of metrics.jsonl")
    add("--save-steps", type=number(1), default=100, help="updates between checkpoints")
    add("--keep-checkpoints", type=number(1), metavar="N", help="keep only the newest N")
    add(
        "--resume",
        nargs="?",
        const="newest",
        metavar="CHECKPOINT",
        help="continue the run in --output-dir from its newest checkpoint, or from the one named; without any, start it",
    )
    add("--overwrite", action="store_true", help="start over where --output-dir is not empty; deletes the run there")

    if parser.parse_args(argv).model is None:
        parser.set_defaults(**TINY_PRESET)
    parser.set_defaults(data=[str(data.SAMPLE)])
    return parser.parse_args(argv)


def blocks(text):
    return text if text in ("all", "off", "auto") else chatglm.number(0)(text)


blocks.__name__ = "number of blocks"  # in argparse's message


# --- one update -------------------------------------------------------------------------------------------------------


def learning_rate(step, total_steps, peak, warmup_steps, schedule):
    """The learning rate of update `step`, counted from 0."""
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * {"linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2, "constant": 1}[schedule]


def micro_step(model, scaler, prefix, input_ids, positions, targets, supervised):
    """Forward and backward of one micro-batch (data.collate) → its part of the update's loss. All are on the device, the
    number of the update's supervised tokens too, so that nothing here waits for the device."""
    with torch.autocast(model.device.type, dtype=model.dtype, enabled=model.dtype != torch.float32):
        # Divided before backward: fp16 gradients of a sum over a thousand tokens would overflow.
        loss = model.summed_loss(prefix, input_ids, positions, targets) / supervised
    with torch.autograd.set_multithreading_enabled(False):  # in this thread: use_mem_pool (CUDAGraphs) knows no other
        scaler.scale(loss).backward()
    return loss.detach()


class CUDAGraphs:
    """micro_step in CUDA graphs: one launch instead of thousands, which small batches otherwise wait for. A shape of
    micro-batch is launched as it is the first time, captured the second time, and then replayed. All share one pool of
    memory; shapes after the first `most` are not captured."""

    def __init__(self, step, most=96):
        self.step, self.most = step, most
        self.seen, self.graphs = set(), {}
        self.pool, self.stream = torch.cuda.MemPool(), torch.cuda.Stream()

    def __call__(self, *batch):
        shapes = tuple(tensor.shape for tensor in batch)
        if shapes not in self.graphs:
            if shapes not in self.seen or len(self.graphs) == self.most:
                self.seen.add(shapes)
                return self.launch(batch)
            self.graphs[shapes] = self.capture(batch)
        graph, inputs, loss = self.graphs[shapes]
        for mine, tensor in zip(inputs, batch, strict=True):
            mine.copy_(tensor)
        graph.replay()
        return loss.clone()

    def launch(self, batch):
        """The step itself, in the graphs' memory. It compiles, loads kernels and makes gradients, which can't be captured. What
        outlives it must be made in the first launch, before any capture, as gradients are: replays write over the rest."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream), torch.cuda.use_mem_pool(self.pool):
            loss = self.step(*batch)
        torch.cuda.current_stream().wait_stream(self.stream)
        return loss.clone()  # outside that memory

    def capture(self, batch):
        inputs = [tensor.clone() for tensor in batch]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool.id, stream=self.stream):
            loss = self.step(*inputs)
        return graph, inputs, loss


def train_update(step, micro_batches, supervised, optimizer, scaler, max_grad_norm):
    """One optimiser step on the mean loss over `supervised` tokens: those of all `micro_batches` of all processes, however
    they are split; `step` is micro_step for a model. → (that loss, the gradients' norm before clipping), on the device. A
    norm that is not finite means that GradScaler skipped the step and lowered its scale."""
    params = optimizer.param_groups[0]["params"]
    device = params[0].device
    supervised = torch.full((), supervised, dtype=torch.float32, device=device)
    loss = torch.zeros((), device=device)
    for batch in micro_batches:
        tensors = (tensor.to(device, non_blocking=True) for tensor in batch.values())
        loss = loss + step(*tensors, supervised)
    if dist.is_initialized():
        loss = add_up(loss, [p.grad for p in params])
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(params, max_grad_norm or math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=False)  # a captured graph adds to these very tensors
    return loss, grad_norm


def add_up(loss, grads):
    """Sums over the processes, in one all_reduce: the gradients in place, and the loss, which is returned."""
    flat = torch.cat([loss.view(1), *(grad.flatten() for grad in grads)])
    dist.all_reduce(flat)
    sums = flat[1:].split([grad.numel() for grad in grads])
    torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(sums, grads, strict=True)])
    return flat[0]


def processes():
    """→ (rank, world size)"""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def samples_per_step(args):
    return args.batch_size * args.gradient_accumulation_steps * processes()[1]


def updates_per_epoch(dataset, args):
    return math.ceil(len(dataset) / samples_per_step(args))


def batch_order(dataset, args, epoch):
    return data.batch_order(dataset.lengths, samples_per_step(args), args.seed, epoch)


def updates(dataset, args, device, first=0):
    """Yields (epoch, this process's micro-batches, counts of samples, tokens and supervised tokens over all processes) of
    update `first`, counted from 0, and those after it, without end."""
    rank, size = processes()

    def split(samples):
        parts = [samples[i : i + args.batch_size] for i in range(0, len(samples), args.batch_size)]
        micro_batches = [data.collate(part, dataset.shared) for part in parts[rank::size]]
        tokens = sum(len(input_ids) for input_ids, _ in samples)
        supervised = sum(int((labels[1:] != data.IGNORE).sum()) for _, labels in samples)
        return micro_batches, {"samples": len(samples), "tokens": tokens, "supervised": supervised}

    start, skip = divmod(first, updates_per_epoch(dataset, args))
    for epoch in itertools.count(start):
        order = batch_order(dataset, args, epoch)[skip:]
        for batch in DataLoader(dataset, batch_sampler=order, collate_fn=split, pin_memory=device.type == "cuda"):
            yield epoch, *batch
        skip = 0


def longest_batch(dataset, batch_size):
    """A micro-batch that takes as much memory as any can: all as long as the longest sample, and with as many supervised
    tokens as any."""
    most = max(int((labels[1:] != data.IGNORE).sum()) for _, labels in dataset)
    input_ids, _ = dataset[max(range(len(dataset)), key=dataset.lengths.__getitem__)]
    labels = input_ids.where(torch.arange(len(input_ids)) >= len(input_ids) - most, data.IGNORE)
    return data.collate([(input_ids, labels)] * min(batch_size, len(dataset)), dataset.shared)


def make_step(args, model, scaler, optimizer, dataset, decided=None):
    """micro_step for `model`, with the fast paths that `args` asks for around it. On CUDA it has run on the longest
    micro-batch that can occur, so that memory doesn't run out later; --gradient-checkpointing auto takes the fewest blocks
    that fit, or those `decided` when a run that is resumed began. Raises ValueError for what can't be had, or doesn't fit."""
    encoder, cuda = model.transformer.encoder, model.device.type == "cuda"
    layers, wanted = len(encoder.layers), args.gradient_checkpointing if decided is None else decided
    if args.cuda_graphs and not cuda:
        raise ValueError("--cuda-graphs needs a CUDA device; leave it out")
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False  # autocast sees to it; peft would cast to fp32 first
    if args.compile:
        torch._dynamo.config.specialize_float = True  # eps and LoRA's scale are constants, not inputs on the CPU
        for layer in encoder.layers:
            layer.compile(dynamic=True)  # one compilation for all lengths
        model._loss = torch.compile(model._loss, dynamic=True)  # which then stores no logits in fp32
    step, params = partial(micro_step, model, scaler), [p for p in model.parameters() if p.requires_grad]

    def with_graphs(checkpointed):
        # What can't be captured: recomputed dropout restores the random state, and 8-bit products wait for the device.
        capturable = cuda and not checkpointed and not args.load_in and not model.output_layer_drops()
        if args.cuda_graphs and not capturable:
            raise ValueError(
                "--cuda-graphs can't replay checkpointed or quantised blocks, or dropout on the output layer; leave one out"
            )
        return CUDAGraphs(step) if capturable and args.cuda_graphs is not False else step

    longest = [tensor.to(model.device) for tensor in longest_batch(dataset, args.batch_size).values()]
    longest.append(torch.ones((), device=model.device))
    # Training holds more than the trial: AdamW's moments, where there are none yet, and what add_up sends.
    copies = 2 * (not optimizer.state) + (processes()[1] > 1)
    held = [torch.empty_like(p) for p in params for _ in range(copies)]

    def fits(checkpointed):
        nonlocal chosen
        encoder.checkpointed_layers, chosen = checkpointed, with_graphs(checkpointed)
        if not cuda and not args.compile:
            return True
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        try:
            chosen(*longest)
            if isinstance(chosen, CUDAGraphs):
                chosen(*longest)  # captured
                chosen.launch(longest)  # as another shape will be, beside what the graph holds
            return True
        except torch.OutOfMemoryError:
            chosen = None  # frees what it holds, once the gradients in its pool are gone too
            optimizer.zero_grad()
            return False
        finally:
            if cuda:
                torch.cuda.empty_cache()

    chosen, started = None, time.perf_counter()
    size = f"{min(args.batch_size, len(dataset))} × {max(dataset.lengths)} tokens"
    fewest = min({"all": layers, "off": 0, "auto": 0}.get(wanted, wanted), layers)
    if not fits(fewest):
        auto = wanted == "auto" and not args.cuda_graphs
        fewest = bisect_left(range(layers + 1), True, lo=1, key=fits) if auto else layers + 1
        if fewest > layers or not fits(fewest):
            raise ValueError(
                f"out of memory on the longest micro-batch, {size}; try a smaller --batch-size (with more "
                "--gradient-accumulation-steps the update is the same), --gradient-checkpointing all, --load-in 4bit, or a "
                "smaller --max-length"
            )
    took = time.perf_counter() - started
    if cuda:
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(f"memory   {peak:.1f} GiB for the longest micro-batch, {size}, ", end="")
        print(f"{fewest} of {layers} blocks checkpointed (tried in {took:.1f} s)")
    elif args.compile:
        print(f"compiled in {took:.1f} s")
    del held
    for param in params:  # the trial left gradients, in the tensors that a graph adds to
        param.grad = torch.zeros_like(param) if param.grad is None else param.grad.zero_()
    return chosen


# --- checkpoints ------------------------------------------------------------------------------------------------------

ADAPTER = ("adapter_model.safetensors", "adapter_config.json", "training_args.json")
STATE = ("training_state.safetensors", "training_state.json", "metrics.jsonl")
WHOLE = ADAPTER + STATE  # what SHA256SUMS lists
# How far a run is. loss, supervised and tokens are sums since the last line of metrics; checkpointed counts blocks.
START = {"step": 0, "loss": 0.0, "supervised": 0, "tokens": 0, "skipped": 0, "skipped_in_a_row": 0, "checkpointed": 0}
# Arguments that may change when a run is resumed: they don't affect the result, or run_identity has them in another form.
FREE = "model base data device dtype batch_size gradient_accumulation_steps output_dir save_steps keep_checkpoints resume overwrite"


def run_identity(args, model, dataset):
    """{name: value} of all that must be the same for a run to continue as if nothing had happened."""
    same = {f"--{name.replace('_', '-')}": value for name, value in vars(args).items() if name not in FREE.split()}
    same["--device"], same["--dtype"] = model.device.type, str(model.dtype)[6:]
    same["--batch-size × --gradient-accumulation-steps × processes"] = samples_per_step(args)
    return same | {"--model": args.base, "--data": dataset.digest}


def adapter_files(peft_model, args):
    """→ {name: content}: the adapter in peft's layout, and the arguments that it was trained with, where infer.py looks for
    the system message and the base's fingerprint."""
    kept = {k: v for k, v in vars(args).items() if k not in ("output_dir", "resume", "overwrite")}
    return chatglm.adapter_files(peft_model) | {"training_args.json": as_json(kept)}


def checkpoint_files(peft_model, optimizer, scaler, progress, run, args, metrics):
    """→ {name: content} of all that a run needs to continue bit for bit: the adapter, AdamW's moments, the scaler, `progress`
    (place in the data, sums since the last line of metrics), the metrics so far, and `run` (run_identity). There is no
    random state to keep: dropout is seeded anew for each update. Tensors are copies: training continues."""
    moments = optimizer.state_dict()["state"]
    copies = ((f"{i}.{name}", t.to("cpu", copy=True)) for i, state in moments.items() for name, t in state.items())
    progress = {name: value.item() if torch.is_tensor(value) else value for name, value in progress.items()}
    files = adapter_files(peft_model, args)
    files["training_state.safetensors"] = dict(copies)
    files["training_state.json"] = as_json({"progress": progress, "scaler": scaler.state_dict(), "run": run})
    files["metrics.jsonl"] = metrics
    return files


def write_checkpoint(directory, files, keep=None):
    """Writes `files` and their SHA256SUMS, which tell whether all is there and intact, then removes all but the newest `keep`
    checkpoints."""
    files = {name: chatglm.as_bytes(content) for name, content in files.items()}
    files["SHA256SUMS"] = "".join(f"{sha256(files[name])}  {name}\n" for name in WHOLE).encode()
    part = write(directory.with_suffix(".part"), files)
    if directory.exists():  # damaged, or of a run that was resumed from an earlier one
        remove(directory)
    os.replace(part, directory)
    flush(directory.parent)
    found = checkpoints(directory.parent)
    older = found[found.index(directory) :]  # a run resumed from an earlier one keeps those it has yet to come to
    for old in older[keep or len(older) :]:
        remove(old)


def write_result(output_dir, files):
    """Puts the adapter into `output_dir`, each file whole or not at all."""
    part = write(output_dir / "adapter.part", files)
    for name in files:
        os.replace(part / name, output_dir / name)
    part.rmdir()
    flush(output_dir)


def write(directory, files):
    """Writes `files` into a new directory, and flushes them to the disk → the directory"""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for name, content in files.items():
        (directory / name).write_bytes(chatglm.as_bytes(content))
        flush(directory / name)
    flush(directory)
    return directory


def flush(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def as_json(value):
    return json.dumps(value, ensure_ascii=False, indent=2).encode() + b"\n"


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def checkpoints(output_dir):
    """train.py's, the newest first."""
    found = [p for p in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{1,9}", p.name)]
    found = [p for p in found if (p / "training_state.json").exists() or (p / "SHA256SUMS").exists()]
    return sorted(found, key=lambda p: -int(p.name.partition("-")[2]))


def unfinished(output_dir):
    return [*output_dir.glob("checkpoint-*.part"), *output_dir.glob("adapter.part")]


def remove(checkpoint):
    """Renames it first, so that a checkpoint is never there in part."""
    gone = checkpoint.with_name(f"{checkpoint.name}.old.part")
    shutil.rmtree(gone, ignore_errors=True)
    checkpoint.rename(gone)
    delete(gone)


def delete(path):
    path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path)


def is_intact(checkpoint):
    try:
        lines = (checkpoint / "SHA256SUMS").read_text("ascii").splitlines()
        return lines == [f"{sha256((checkpoint / name).read_bytes())}  {name}" for name in WHOLE]
    except (OSError, ValueError):
        return False


def find_checkpoint(output_dir, wanted):
    """--resume's checkpoint: the newest that is intact, or the one named; None where a run ended before its first. Raises
    ValueError if there is none to continue from."""
    if wanted != "newest":
        checkpoint = output_dir / Path(wanted).name
        here = Path(wanted).parent == Path() or Path(wanted).resolve() == checkpoint.resolve()  # its name, or its path
        if not here or not is_intact(checkpoint):
            intact = ", ".join(each.name for each in checkpoints(output_dir) if is_intact(each)) or "none"
            raise ValueError(f"--resume {wanted}: no intact checkpoint of {output_dir}; these are: {intact}")
        return checkpoint
    for checkpoint in checkpoints(output_dir):
        if is_intact(checkpoint):
            return checkpoint
        if processes()[0] == 0:
            print(f"{checkpoint} is damaged (see its SHA256SUMS): skipped", file=sys.stderr)
    if set(output_dir.glob("*")) - {output_dir / "metrics.jsonl", *unfinished(output_dir)}:
        raise ValueError(f"{output_dir} has no intact checkpoint to resume from; --overwrite starts over")
    print(f"{output_dir} has no checkpoint yet: from the start")
    return None


def resume(checkpoint, run, total_steps, optimizer, scaler):
    """Sets `optimizer` and `scaler` as they were → progress (see START). Raises ValueError if the checkpoint is of another run
    than `run` (run_identity), or isn't one of train.py's."""
    params = optimizer.param_groups[0]["params"]
    shapes = [{"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape} for p in params]
    try:
        state = json.loads((checkpoint / "training_state.json").read_text("utf-8"))
        changed = [name for name in run if state["run"].get(name) != run[name]]
        progress = {name: type(value)(state["progress"][name]) for name, value in START.items()}
        tensors = load_file(checkpoint / "training_state.safetensors")
        moments = {i: {name: tensors[f"{i}.{name}"] for name in shapes[i]} for i in range(len(params)) if tensors}
        fit = all(moments[i][name].shape == shapes[i][name] for i in moments for name in shapes[i])
        fit = fit and all(tensor.dtype == torch.float32 for tensor in tensors.values())
        fit = fit and all(0 <= progress[name] < 2**53 for name in progress if name != "loss")
        if not fit or progress["step"] > total_steps:
            raise ValueError("training_state doesn't fit the adapter or the run")
        if not changed:
            optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
            scaler.load_state_dict(state["scaler"])
    except Exception as error:  # whatever the readers raise on a file that train.py didn't write
        raise ValueError(f"{checkpoint}: not a checkpoint of train.py: {chatglm.brief(error)}") from error
    if changed:
        told = []
        for name in changed:
            was, now = (chatglm.printable(str(value)) for value in (state["run"].get(name), run[name]))
            told.append(name if name in ("--model", "--data") else f"{name} was {was}, is {now}")
        raise ValueError(
            f"{checkpoint} is of a run with other settings: {'; '.join(told)}; give those, or --overwrite starts over"
        )
    return progress


def start_writing(output_dir, checkpoint):
    """→ the lines of metrics.jsonl up to `checkpoint`. Without one, what an earlier run left is removed."""
    for part in unfinished(output_dir):
        delete(part)
    if not checkpoint:
        for old in checkpoints(output_dir):
            remove(old)
        for name in ADAPTER:
            (output_dir / name).unlink(missing_ok=True)
    lines = (checkpoint / "metrics.jsonl").read_bytes() if checkpoint else b""
    (output_dir / "metrics.jsonl").write_bytes(lines)
    return lines


def last_intact(output_dir, disk):
    """The newest intact checkpoint, once the thread `disk` has ended, or None."""
    disk.shutdown()
    return next(filter(is_intact, checkpoints(output_dir)), None)


@contextmanager
def alone(output_dir):
    """Makes `output_dir`, and keeps other runs from writing to it. Raises ValueError if one does."""
    output_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(output_dir, os.O_RDONLY)
    try:
        chatglm.lock(descriptor, output_dir)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def writing(output_dir, disk):
    """Turns the error of a full or lost disk into one that names the checkpoint to resume from."""
    try:
        yield
    except OSError as error:
        checkpoint = last_intact(output_dir, disk)
        for part in unfinished(output_dir):
            shutil.rmtree(part, ignore_errors=True)
        rest = "there is no checkpoint yet"
        if checkpoint:
            rest = f"once that is mended, --resume continues from {checkpoint}, which is intact"
        raise OSError(f"{output_dir}: cannot write: {error.strerror or error}; {rest}") from error


# --- the run ----------------------------------------------------------------------------------------------------------


def start_processes(args):
    """Joins the processes that torchrun started, one GPU each. Does nothing without torchrun."""
    if not dist.is_torchelastic_launched():
        return
    cuda = args.device != "cpu" and torch.cuda.is_available()
    if cuda:
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= torch.cuda.device_count():
            raise ValueError(f"torchrun started more processes than the {torch.cuda.device_count()} GPUs there are")
        torch.cuda.set_device(local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    dist.all_reduce(torch.zeros((), device="cuda" if cuda else "cpu"))  # NCCL takes its memory before make_step tries
    if dist.get_rank():  # only the first process prints
        sys.stdout = open(os.devnull, "w")


def catch_signals():
    """→ a list: the first SIGINT or SIGTERM is put there, for the loop to end after its update. A second one ends the program
    at once, except where there are several processes: torchrun repeats to them what they already got."""
    received = []
    rank, size = processes()

    def receive(number, frame):
        received.append(number)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN if size > 1 else signal.SIG_DFL)
        if rank == 0:
            with suppress(OSError):  # the reader of stderr, `| tee` for example, may have got the signal too
                os.write(
                    2, b"\nstopping after this update" + (b"; again to stop at once" if size == 1 else b"") + b"\n"
                )

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, receive)
    return received


def agreed(received):
    """The signal that any process received, 0 for none. It is told between the CPUs: no GPU is waited for."""
    number = torch.tensor(received[0] if received else 0)
    if dist.is_initialized():
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def set_up(args):
    """→ (peft model, tokenizer, dataset, run_identity, the checkpoint to resume from or None). Every mistake of the user's is
    found here, before anything is written: raises ValueError or OSError with a message for them."""
    for text in (args.output_dir, args.system or "", args.model or "", *args.data):
        if re.search("[\ud800-\udfff]", text):  # they are kept or printed
            raise ValueError(f"{chatglm.printable(text)}: not UTF-8")
    output_dir = Path(args.output_dir)
    there = next(p for p in (output_dir.absolute(), *output_dir.absolute().parents) if p.exists())
    if not args.output_dir or not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"--output-dir {args.output_dir}: cannot write there; choose another")
    if args.resume is not None and args.overwrite:
        raise ValueError("--resume continues a run, --overwrite starts it over: leave one of the two out")
    if output_dir.exists() and any(output_dir.iterdir()):
        if not (output_dir / "metrics.jsonl").exists() and not checkpoints(output_dir):
            raise ValueError(f"{output_dir} is not empty, and has no run of train.py; choose another --output-dir")
        if args.resume is None and not args.overwrite:
            raise ValueError(f"{output_dir} has a run; --resume continues it, --overwrite starts over")
    if others := set(output_dir.glob("checkpoint-*")) - {*checkpoints(output_dir), *unfinished(output_dir)}:
        raise ValueError(f"{min(others)} is not a checkpoint of train.py; move it away, or choose another --output-dir")
    checkpoint = find_checkpoint(output_dir, args.resume) if args.resume is not None else None
    path = chatglm.find_model(args.model)
    tokenizer = data.ChatGLMTokenizer(path)
    dataset = data.ConversationDataset(args.data, tokenizer, args.max_length, args.system)
    start = time.perf_counter()
    model = chatglm.load_model(path, args.device, args.dtype, args.load_in)
    tokenizer.check_fits(model.config.padded_vocab_size)
    args.base = {"vocabulary": tokenizer.digest, **chatglm.fingerprint(model)}  # saved with the other arguments
    if args.max_length > model.config.seq_length:
        raise ValueError(f"--max-length {args.max_length}: this model takes at most {model.config.seq_length} tokens")
    total = sum(p.numel() for p in model.parameters())
    took = time.perf_counter() - start
    print(f"model    {path}: {total:,} parameters, {str(model.dtype)[6:]} on {model.device}, loaded in {took:.1f} s")
    run = run_identity(args, model, dataset)
    if checkpoint:
        return chatglm.load_adapter(model, checkpoint, is_trainable=True), tokenizer, dataset, run, checkpoint
    torch.manual_seed(args.seed)
    targets = args.target_modules
    if len(targets) == 1 and not re.fullmatch(r"[\w.]+", targets[0]):
        targets = targets[0]  # a regular expression
    peft_model = chatglm.add_lora(model, args.lora_r, args.lora_alpha, args.lora_dropout, targets, args.modules_to_save)
    return peft_model, tokenizer, dataset, run, None


def check_finite(progress, scaler, dataset, args, disk):
    """Raises ValueError where the last updates' gradients were not finite: GradScaler gets over a few by lowering its scale,
    but without it the first one has spoilt the adapter."""
    in_a_row = int(progress["skipped_in_a_row"])
    if in_a_row < (20 if scaler.is_enabled() else 1):
        return
    first = progress["step"] - in_a_row
    epoch, number = divmod(first, updates_per_epoch(dataset, args))
    samples = ", ".join(dataset.places[i] for i in batch_order(dataset, args, epoch)[number])
    raise ValueError(
        f"the loss or its gradients have been NaN or infinite since update {first + 1}, of the samples at {samples}; the last "
        f"intact checkpoint is {last_intact(Path(args.output_dir), disk) or 'none'}; look at these samples, or try a lower "
        "--learning-rate"
    )


def describe(args, peft_model, tokenizer, dataset, total_steps):
    """What will be trained, for the user to check before it takes its time."""
    lengths = sorted(dataset.lengths)
    total = sum(lengths)
    print(f"data     {len(lengths):,} samples: {total:,} tokens, ", end="")
    print(f"{dataset.supervised / total:.1%} of them supervised; ", end="")
    print(f"a sample has {total / len(lengths):.1f} (median {lengths[len(lengths) // 2]}, longest {lengths[-1]})")
    print(f"         longer than --max-length {args.max_length}: {dataset.cut} cut, {dataset.dropped} dropped")
    print(f"sample   {dataset.places[0]}, supervised between ⟦ and ⟧:")
    print(textwrap.indent(data.render(tokenizer, *(t.tolist() for t in dataset[0])), "         "))
    params = [p for p in peft_model.parameters() if p.requires_grad]
    print(f"trained  {sum(p.numel() for p in params):,} parameters in {len(params)} tensors: ", end="")
    whole = f", and whole: {' '.join(args.modules_to_save)}" if args.modules_to_save else ""
    print(f"LoRA r {args.lora_r}, alpha {args.lora_alpha:g} on {' '.join(args.target_modules)}{whole}")
    size, count = f"{args.batch_size} × {args.gradient_accumulation_steps} samples", processes()[1]
    print(f"updates  {total_steps:,}, each of {size}{f' × {count} processes' if count > 1 else ''}", flush=True)


def report(args, samples, tokens, took, progress, scaler, device):
    """What was done, and what to do with it."""
    if samples:
        rates = f"{samples / took:.1f} samples/s, {tokens / took:,.0f} tokens/s"
        print(f"speed    {samples:,} samples in {took:.1f} s: {rates}")
    else:
        print("         this run had already finished: there was nothing left to do")
    if scaler.is_enabled():
        skipped = int(progress["skipped"])
        print(f"         {skipped} updates skipped because fp16 overflowed; loss scale {scaler.get_scale():g}")
    if device.type == "cuda":
        print(f"         peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    print(f"saved    {args.output_dir}/adapter_model.safetensors; try it:")
    infer = os.path.relpath(Path(__file__).with_name("infer.py"))
    adapter = "" if args.output_dir == chatglm.ADAPTER_DIR else f" --adapter {shlex.quote(args.output_dir)}"
    print(f'         python {infer}{adapter} --prompt "你是谁？"')


def train(args):
    """The whole run. Raises ValueError or OSError with a message for the user."""
    start_processes(args)
    rank, size = processes()
    if args.model is None:
        print("The built-in tiny model, random weights. For the real job: --model DIR_OR_HUB_ID --data FILE")
    peft_model, tokenizer, dataset, run, checkpoint = set_up(args)
    total_steps = args.max_steps or args.epochs * updates_per_epoch(dataset, args)
    describe(args, peft_model, tokenizer, dataset, total_steps)
    model = peft_model.get_base_model().train()  # the network itself, LoRA layers inside: no wrapper around it
    device, params = model.device, [p for p in model.parameters() if p.requires_grad]
    scaler = torch.amp.GradScaler(device.type, enabled=model.dtype == torch.float16)
    scaler.scale(torch.zeros((), device=device))  # creates the scale, in case this process has no share of an update
    optimizer = torch.optim.AdamW(params, weight_decay=args.weight_decay, fused=device.type == "cuda")
    progress = dict(START)
    if checkpoint:
        progress = resume(checkpoint, run, total_steps, optimizer, scaler)
        print(f"resumed  {checkpoint}, {progress['step']:,} of {total_steps:,} updates done")
    decided = progress["checkpointed"] if checkpoint else None
    step_fn = make_step(args, model, scaler, optimizer, dataset, decided)
    progress["checkpointed"] = model.transformer.encoder.checkpointed_layers
    if dist.is_initialized():  # nothing is written before every process got here
        everyone = [None] * size
        dist.all_gather_object(everyone, (run, progress["step"]))
        if any(other != everyone[0] for other in everyone):
            raise ValueError("the processes differ in arguments, data, weights or the checkpoint they found")

    output_dir = Path(args.output_dir)
    disk = ThreadPoolExecutor(1)  # writes a checkpoint while training continues
    saving = disk.submit(int)  # nothing yet
    look = dict(disable=rank > 0, dynamic_ncols=True, mininterval=0.1 if sys.stderr.isatty() else 10)
    bar = tqdm(total=total_steps, initial=progress["step"], unit="update", **look)
    received = catch_signals()
    samples, tokens, started = 0, 0, time.perf_counter()
    window_started = started

    rest = itertools.islice(updates(dataset, args, device, progress["step"]), total_steps - progress["step"])
    with bar, writing(output_dir, disk), alone(output_dir) if rank == 0 else nullcontext():
        metrics = start_writing(output_dir, checkpoint) if rank == 0 else b""
        for step, (epoch, micro_batches, counts) in enumerate(rest, progress["step"] + 1):
            lr = learning_rate(step - 1, total_steps, args.learning_rate, args.warmup_steps, args.lr_schedule)
            optimizer.param_groups[0]["lr"] = lr
            torch.manual_seed(random.Random(f"{args.seed} {step} {rank}").getrandbits(63))  # of dropout
            supervised = counts["supervised"]
            loss, grad_norm = train_update(step_fn, micro_batches, supervised, optimizer, scaler, args.max_grad_norm)

            # On the device: reading waits for it, so it is read only where a line is logged or a checkpoint saved.
            overflow = ~torch.isfinite(grad_norm)
            progress["step"] = step
            progress["loss"] += loss * supervised
            progress["supervised"] += supervised
            progress["tokens"] += counts["tokens"]
            progress["skipped"] += overflow
            progress["skipped_in_a_row"] = (progress["skipped_in_a_row"] + 1) * overflow
            samples, tokens = samples + counts["samples"], tokens + counts["tokens"]

            stop, last = agreed(received), step == total_steps
            # After Ctrl-C the reader of stderr, `| tee` for example, may be gone, and an error would cost this update.
            bar.disable |= bool(stop)
            bar.update()
            log, save = step % args.logging_steps == 0 or last, step % args.save_steps == 0 or last or stop
            if log or save:
                check_finite(progress, scaler, dataset, args, disk)
            if log:
                mean = float(progress["loss"]) / progress["supervised"]  # of the supervised tokens since the last line
                line = {
                    "step": step,
                    "epoch": epoch,
                    "loss": mean if math.isfinite(mean) else None,
                    "grad_norm": float(grad_norm) if math.isfinite(grad_norm) else None,  # None: this update overflowed
                    "learning_rate": lr,
                    "tokens": progress["tokens"],
                    "loss_scale": scaler.get_scale(),
                    "skipped": int(progress["skipped"]),  # updates since the start that GradScaler skipped
                }
                speed = progress["tokens"] / (time.perf_counter() - window_started)
                overflows = {"skipped": line["skipped"]} if line["skipped"] else {}
                bar.set_postfix({"loss": f"{mean:.4f}", "lr": f"{lr:.2e}", "tok/s": f"{speed:,.0f}", **overflows})
                progress |= {"loss": 0.0, "supervised": 0, "tokens": 0}
                window_started = time.perf_counter()
                line = json.dumps(line, allow_nan=False).encode() + b"\n"
                metrics += line
                if rank == 0:
                    with open(output_dir / "metrics.jsonl", "ab") as file:
                        file.write(line)
            if save and rank == 0:
                files = checkpoint_files(peft_model, optimizer, scaler, progress, run, args, metrics)
                saving.result()  # raises what happened to the one before
                saving = disk.submit(write_checkpoint, output_dir / f"checkpoint-{step}", files, args.keep_checkpoints)
                if stop or last:
                    saving.result()
            if stop:
                if dist.is_initialized():
                    dist.barrier()  # the first that is gone makes torchrun end the others
                try:
                    print(
                        f"stopped  after update {step}; --resume continues from {output_dir}/checkpoint-{step}",
                        flush=True,
                    )
                except OSError:  # nor may the reader of stdout be there
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                sys.exit(128 + stop)
        if rank == 0:
            write_result(output_dir, adapter_files(peft_model, args))
    disk.shutdown()
    report(args, samples, tokens, time.perf_counter() - started, progress, scaler, device)
    if dist.is_initialized():
        dist.destroy_process_group()


def main(argv=None):
    args = parse_args(argv)
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to stop
    chatglm.quiet_libraries()
    try:
        train(args)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)  # before the first update: there is nothing to save
    except Exception as error:
        rank, size = processes()
        if rank or (size > 1 and isinstance(error, RuntimeError)):
            # Another process may have failed first, or in the same way: then torchrun ends this one, and it's told once.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(10)
        hint = "the GPU's memory ran out; try --gradient-checkpointing all, or a smaller --batch-size"
        chatglm.end(error, f"train.py: process {rank}" if rank else "train.py", hint)


if __name__ == "__main__":
    main()
