"""Fine-tunes ChatGLM3 with LoRA: one visible loop.

    python train.py                                     # a built-in tiny model, about a minute
    python train.py --model THUDM/chatglm3-6b --data huanhuan.json --system "…"  # the real job

Read it from top to bottom: the loop, one update, its data, the fast paths, preparation, flags.
"""

import argparse
import itertools
import math
import random
import re
import signal
import sys
import time
from functools import partial
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader

import data
import model as chatglm
from support import commands, memory, processes, reports
from support.bases import fingerprint, resolve_base
from support.checkpoints import find_checkpoint, restore, run_identity
from support.config import ADAPTER_DIR
from support.progress import Progress, ProgressBar, check_overflows
from support.run_directory import RunDirectory, check_output_dir


def train(args):
    """A whole run. Raises ValueError or OSError with a message for the user."""
    processes.start(args.device)
    run = prepare(args)
    progress, optimizer, scaler = run.progress, run.optimizer, run.scaler
    max_norm = args.max_grad_norm or math.inf  # 0: gradients are not clipped
    micro_step = make_micro_step(run)  # micro_step(batch, divisor) → loss
    processes.check_same_everywhere((run.identity, progress.step))
    rank, _ = processes.rank_and_count()
    directory = RunDirectory(args.output_dir, args.keep_checkpoints, is_writer=(rank == 0))
    stop_signals = processes.catch_stop_signals()
    progress.start_clock()

    with ProgressBar(run, is_shown=(rank == 0)) as bar, directory.opened(run.checkpoint):
        for update in updates(run):
            lr = learning_rate(progress.step, run.total_steps, args)
            optimizer.param_groups[0]["lr"] = lr
            seed_dropout(args.seed, progress.step, rank)
            loss, grad_norm = train_update(micro_step, update, optimizer, scaler, max_norm)
            progress.count(update, loss, grad_norm)  # progress.step += 1

            stop_signal = stop_signals.agreed()
            is_last = progress.step == run.total_steps
            must_log = progress.step % args.logging_steps == 0 or is_last
            must_save = progress.step % args.save_steps == 0 or is_last or stop_signal
            bar.advance(is_stopping=stop_signal)
            # Only here are results read from the device.
            if must_log or must_save:
                check_overflows(run, directory)
            if must_log:
                metrics = progress.take_metrics(update.epoch, lr, grad_norm, scaler.get_scale())
                bar.show(metrics)
                directory.log(metrics)
            if must_save:
                directory.save_checkpoint(run, wait=stop_signal or is_last)
            if stop_signal:
                processes.exit_after_signal(stop_signal, progress.step, directory.path)
        directory.save_result(run)
    reports.report_result(run)
    processes.close()


# --- one update -------------------------------------------------------------------------------


def train_update(micro_step, update, optimizer, scaler, max_norm):
    """One optimiser step on the mean loss over the supervised tokens of the whole update.

    Every loss is divided by update.supervised, the number of these tokens in all micro-batches and
    processes. So how the samples are split matters only to the masks of dropout.

    → (the loss, the gradients' norm before clipping), both scalar tensors on the device. If fp16
    overflowed, the norm is not finite. GradScaler then skips the step and lowers its scale.
    Progress.count counts that. See check_overflows for what happens if it goes on.
    """
    params = optimizer.param_groups[0]["params"]
    device = params[0].device
    divisor = torch.full((), update.supervised, dtype=torch.float32, device=device)
    loss = torch.zeros((), device=device)
    for batch in update.micro_batches:
        loss = loss + micro_step(batch.to(device), divisor)  # forward_backward, or a graph of it
    if processes.are_several():
        loss = processes.sum_over_processes(loss, [param.grad for param in params])
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(params, max_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=False)  # keeps the tensors: CUDA graphs add to them
    return loss, grad_norm


def forward_backward(model, scaler, batch, divisor):
    """Forward and backward of one data.MicroBatch → its part of the update's loss.

    All tensors are on the device, so that nothing here waits for the device.
    """
    mixed = model.dtype != torch.float32  # fp16 or bf16
    with torch.autocast(model.device.type, dtype=model.dtype, enabled=mixed):
        # Divide before backward. The fp16 gradients of an undivided sum could overflow.
        loss = model.summed_loss(batch) / divisor
    # The memory pool of CUDAGraphs applies to this thread only. So backward must run here too.
    with torch.autograd.set_multithreading_enabled(False):
        scaler.scale(loss).backward()
    return loss.detach()


def learning_rate(step, total_steps, args):
    """The learning rate of update `step`, counted from 0: linear warm-up, then the schedule."""
    peak, warmup_steps = args.learning_rate, args.warmup_steps
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)  # from 0 to 1
    decay = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1}
    return peak * decay[args.lr_schedule]


def seed_dropout(seed, step, rank):
    """Seeds dropout from the update and the process, so that a resumed run draws the same masks."""
    torch.manual_seed(random.Random(f"{seed} {step + 1} {rank}").getrandbits(63))


# --- what an update is made of ----------------------------------------------------------------


class Update(NamedTuple):
    """The data of one update: this process's micro-batches, and counts over all processes."""

    epoch: int  # from 0
    micro_batches: list
    samples: int
    tokens: int
    supervised: int  # supervised tokens


def updates(run):
    """Yields the Updates of the run that are not done yet."""
    first_epoch, skip = divmod(run.progress.step, run.updates_per_epoch)
    remaining = run.total_steps - run.progress.step
    for epoch in itertools.count(first_epoch):
        order = run.order_of_epoch(epoch)[skip:][:remaining]
        options = dict(batch_sampler=order, collate_fn=partial(make_update, run, epoch))
        yield from DataLoader(run.dataset, pin_memory=run.device.type == "cuda", **options)
        remaining -= len(order)
        if not remaining:
            return
        skip = 0


def make_update(run, epoch, samples):
    """[(input_ids, labels)] of a whole update → Update"""
    starts = range(0, len(samples), run.args.batch_size)
    parts = [samples[start : start + run.args.batch_size] for start in starts]
    rank, count = processes.rank_and_count()
    mine = parts[rank::count]
    micro_batches = [data.collate(part, run.dataset.prefix_length) for part in mine]
    tokens = sum(len(input_ids) for input_ids, _ in samples)
    supervised = sum(data.count_supervised(labels) for _, labels in samples)
    return Update(epoch, micro_batches, len(samples), tokens, supervised)


# --- the fast paths ---------------------------------------------------------------------------


class CUDAGraphs:
    """Replays a micro-step as one launch. Small batches otherwise wait for thousands of launches.

    The first micro-batch of a shape runs eagerly. The second is captured in a graph, which is
    replayed from then on. All graphs, at most `max_graphs`, share one pool of memory.
    """

    def __init__(self, micro_step, max_graphs=96):
        self.micro_step, self.max_graphs = micro_step, max_graphs
        self.seen_shapes, self.graphs = set(), {}
        self.pool, self.stream = torch.cuda.MemPool(), torch.cuda.Stream()

    def __call__(self, batch, divisor):
        shapes = tuple(tensor.shape for tensor in batch)
        if shapes not in self.graphs:
            if shapes not in self.seen_shapes or len(self.graphs) == self.max_graphs:
                self.seen_shapes.add(shapes)
                return self.run_eagerly(batch, divisor)
            self.graphs[shapes] = self.capture(batch, divisor)  # which computes nothing yet
        graph, inputs, loss = self.graphs[shapes]
        for static, tensor in zip(inputs, (*batch, divisor), strict=True):
            static.copy_(tensor)
        graph.replay()
        return loss.clone()  # the next replay overwrites it

    def run_eagerly(self, batch, divisor):
        """Runs the micro-step itself. It shares the graphs' memory.

        Its first run compiles, loads kernels, and allocates the gradients. The gradients must be
        allocated before any capture, because a replay overwrites what a capture allocated.
        """
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream), torch.cuda.use_mem_pool(self.pool):
            loss = self.micro_step(batch, divisor)
        torch.cuda.current_stream().wait_stream(self.stream)
        return loss.clone()  # a replay overwrites what is in the pool

    def capture(self, batch, divisor):
        """→ (graph, its input tensors, its output tensor)"""
        inputs = [tensor.clone() for tensor in (*batch, divisor)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool.id, stream=self.stream):
            loss = self.micro_step(data.MicroBatch(*inputs[:-1]), inputs[-1])
        return graph, inputs, loss


def make_micro_step(run):
    """→ micro_step(batch, divisor): forward_backward of this run's model, with its fast paths.

    On CUDA, or with --compile, the longest micro-batch is tried first, so that memory does not run
    out an hour later. --gradient-checkpointing auto recomputes no more blocks than necessary; a
    resumed run recomputes as many as before. Raises ValueError if that doesn't work or fit.
    """
    args, model, encoder = run.args, run.model, run.model.transformer.encoder
    if args.cuda_graphs and run.device.type != "cuda":
        raise ValueError("--cuda-graphs needs a CUDA device; leave it out")
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False  # only autocast casts LoRA's input
    if args.compile:
        compile_training(model)
    samples = memory.longest_samples(run.dataset, args.batch_size)
    longest = data.collate(samples, run.dataset.prefix_length).to(run.device)
    size = f"{len(samples)} × {max(run.dataset.lengths)} tokens"
    trial = memory.Trial(longest, size, run.optimizer, is_compiled=args.compile)

    def attempt(count):
        """→ the micro-step with `count` recomputed blocks, or None if that does not fit"""
        encoder.recomputed_layers = count
        micro_step = with_cuda_graphs(args, model, partial(forward_backward, model, run.scaler))
        return micro_step if trial.fits(micro_step) else None

    wanted, layers = args.gradient_checkpointing, len(encoder.layers)
    if run.checkpoint:
        wanted = run.progress.recomputed_layers
    elif wanted == "auto" and args.cuda_graphs:
        wanted = "off"  # recomputed blocks can't be captured
    if wanted == "auto":
        micro_step = memory.fewest_that_fit(attempt, layers)
    else:
        micro_step = attempt(min({"all": layers, "off": 0}.get(wanted, wanted), layers))
    trial.check(micro_step, f"{encoder.recomputed_layers} of {layers} blocks checkpointed")
    run.progress.recomputed_layers = encoder.recomputed_layers
    for param in run.optimizer.param_groups[0]["params"]:
        # A captured graph adds to the very gradients that its trial allocated.
        param.grad = torch.zeros_like(param) if param.grad is None else param.grad.zero_()
    return micro_step


def compile_training(model):
    """Compiles the blocks, once for all lengths, and the loss, which then stores no fp32 logits."""
    # The norms' eps and LoRA's scale are constants. On a CPU they would become inputs otherwise.
    torch._dynamo.config.specialize_float = True
    for layer in model.transformer.encoder.layers:
        layer.compile(dynamic=True)
    model.chunk_loss = torch.compile(model.chunk_loss, dynamic=True)


def with_cuda_graphs(args, model, micro_step):
    """→ CUDAGraphs(micro_step), or micro_step where graphs are impossible or not wanted"""
    # Recomputed dropout can't be captured, because it sets the random state; nor can 8-bit
    # products, which wait for the device. 4-bit ones have not been tried.
    recomputes = model.transformer.encoder.recomputed_layers > 0
    sets_random_state = recomputes or model.output_layer_has_dropout()
    is_possible = not sets_random_state and not args.load_in
    if args.cuda_graphs and not is_possible:
        what = "checkpointed or quantised blocks, or dropout on the output layer"
        raise ValueError(f"--cuda-graphs can't replay {what}; leave one out")
    is_wanted = args.cuda_graphs is not False  # None: neither flag was given
    use_them = model.device.type == "cuda" and is_possible and is_wanted
    return CUDAGraphs(micro_step) if use_them else micro_step


# --- preparation ------------------------------------------------------------------------------


class Run:
    """Model, data, optimiser, scaler and progress of one run."""

    def __init__(self, args, peft_model, dataset, checkpoint=None):
        self.args, self.peft_model, self.dataset = args, peft_model, dataset
        self.checkpoint = checkpoint  # the directory to continue from, or None
        self.identity = None  # what must be the same for the run to continue: checkpoints.py
        self.model = peft_model.get_base_model().train()  # our network, with LoRA inside
        self.device = self.model.device
        self.progress = Progress(self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.model.dtype == torch.half)
        # This makes the scale, which unscale_ needs even in a process that gets no samples.
        self.scaler.scale(torch.zeros((), device=self.device))
        params = [param for param in self.model.parameters() if param.requires_grad]
        fused = self.device.type == "cuda"  # a skipped step then needs no wait for the device
        self.optimizer = torch.optim.AdamW(params, weight_decay=args.weight_decay, fused=fused)
        per_process = args.batch_size * args.gradient_accumulation_steps
        self.samples_per_update = per_process * processes.rank_and_count()[1]
        self.updates_per_epoch = math.ceil(dataset.samples_per_epoch / self.samples_per_update)
        self.total_steps = args.max_steps or args.epochs * self.updates_per_epoch

    def order_of_epoch(self, epoch):
        """→ for each update of the epoch, the indices of its samples"""
        indices = data.draw_epoch(self.dataset.parts, self.args.seed, epoch)
        lengths, size = self.dataset.lengths, self.samples_per_update
        return data.update_order(indices, lengths, size, self.args.seed, epoch)

    def places_of_samples(self, step):
        """→ the places in the files of the samples of update `step`, counted from 0"""
        epoch, number = divmod(step, self.updates_per_epoch)
        return [self.dataset.places[i] for i in self.order_of_epoch(epoch)[number]]


def prepare(args):
    """→ Run. Reads, checks and loads everything, and writes nothing to --output-dir.

    Raises ValueError or OSError, with a message for the user, for a mistake in flags or files.
    """
    if args.model is None:
        commands.announce_built_in_model(sys.stdout)
    commands.check_utf8(args.output_dir, args.system, args.model, *args.data)
    check_output_dir(args.output_dir, args.resume, args.overwrite)
    checkpoint = find_checkpoint(args.output_dir, args.resume)
    path = chatglm.built_in_model() if args.model is None else resolve_base(args.model)
    tokenizer = data.ChatGLMTokenizer(path)
    dataset = data.ConversationDataset(
        args.data, tokenizer, args.max_length, args.system, args.keys
    )
    start = time.perf_counter()
    model = chatglm.load_model(path, args.device, args.dtype, args.load_in)
    reports.describe_base(model, path, time.perf_counter() - start)
    tokenizer.check_fits(model.config.padded_vocab_size)
    if args.max_length > model.config.seq_length:
        most = f"this model takes at most {model.config.seq_length} tokens"
        raise ValueError(f"--max-length {args.max_length}: {most}")
    args.base, args.tools = fingerprint(model, tokenizer.digest), dataset.reader.about_tools()
    if checkpoint:
        peft_model = chatglm.load_adapter(model, checkpoint, is_trainable=True)
    else:
        torch.manual_seed(args.seed)
        targets = args.target_modules
        if len(targets) == 1 and not re.fullmatch(r"[\w.]+", targets[0]):
            targets = targets[0]  # it is a regular expression
        lora = (args.lora_r, args.lora_alpha, args.lora_dropout, targets, args.modules_to_save)
        peft_model = chatglm.add_lora(model, *lora)
    run = Run(args, peft_model, dataset, checkpoint)
    run.identity = run_identity(run)
    reports.describe_run(run, reports.render(tokenizer, *dataset[0]))
    if checkpoint:
        restore(run)
    return run


# --- the command ------------------------------------------------------------------------------

LINEAR_LAYERS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
DEFAULTS = {  # (with --model, without): the built-in model needs more, because it is random
    "learning_rate": (1e-4, 3e-3),
    "epochs": (3, 50),
    "lora_r": (8, 16),
    "lora_dropout": (0.1, 0.0),
    "target_modules": (["query_key_value"], LINEAR_LAYERS),
}


def parse_args(argv=None):
    def default(name):
        texts = [" ".join(v) if isinstance(v, list) else str(v) for v in DEFAULTS[name]]
        return f"(default: {texts[0]}; without --model: {texts[1]})"

    number, from_0 = commands.number, commands.number(0.0, 1e6)
    parser = commands.new_parser(__doc__, usage="%(prog)s [options]")
    add = parser.add_argument_group("model and data").add_argument
    add("--model", metavar="DIR_OR_HUB_ID", help="the base; without it, the built-in tiny model")
    times = "FILE:N stands for N times in an epoch, 0.5 or 2 (default: dataset/sample.jsonl)"
    add("--data", nargs="+", metavar="FILE", help=f"JSON, JSONL, CSV or TSV; {times}")
    commands.add_keys_flag(add)
    add("--system", metavar="TEXT", help="system message for conversations without one")
    add("--output-dir", default=ADAPTER_DIR, help="where the adapter and checkpoints go")
    add("--max-length", type=number(8), default=512, help="tokens to which longer samples are cut")
    add = parser.add_argument_group("optimisation").add_argument
    add("--batch-size", type=number(1), default=4, help="samples per micro-batch")
    add("--gradient-accumulation-steps", type=number(1), default=2, help="micro-batches per update")
    add("--epochs", type=number(1), help=f"passes over the data {default('epochs')}")
    add("--max-steps", type=number(1), help="number of updates, instead of --epochs")
    peak = f"AdamW's, at its peak {default('learning_rate')}"
    add("--learning-rate", type=number(0.0, 1e3), help=peak)
    schedules = dict(choices=("linear", "cosine", "constant"), default="linear")
    add("--lr-schedule", **schedules, help="how the learning rate falls after warm-up")
    add("--warmup-steps", type=number(0), default=0, help="updates in which the rate rises")
    add("--weight-decay", type=from_0, default=0.0, help="AdamW's")
    add("--max-grad-norm", type=from_0, default=1.0, help="limit of the gradients' norm; 0: none")
    add("--seed", type=number(0), default=42, help="of LoRA's start, dropout and sample order")
    add = parser.add_argument_group("LoRA").add_argument
    add("--lora-r", type=number(1, 4096), help=f"rank {default('lora_r')}")
    add("--lora-alpha", type=from_0, default=32, help="LoRA's output is scaled by alpha / r")
    add("--lora-dropout", type=number(0.0, 0.99), help=f"on LoRA's input {default('lora_dropout')}")
    targets = f"names of layers, or a regular expression for paths {default('target_modules')}"
    add("--target-modules", nargs="+", metavar="NAME", help=targets)
    add("--modules-to-save", nargs="+", metavar="NAME", help="modules to train and save whole")
    add = parser.add_argument_group("machine").add_argument
    commands.add_device_flags(add)
    commands.add_checkpointing_flag(add)
    commands.add_load_in_flag(add)
    add("--compile", action="store_true", help="compile: faster, after up to half a minute")
    graphs = "replay micro-steps as CUDA graphs (default: on CUDA, where that is possible)"
    add("--cuda-graphs", action=argparse.BooleanOptionalAction, help=graphs)
    add = parser.add_argument_group("progress").add_argument
    add("--logging-steps", type=number(1), default=10, help="updates between lines of metrics")
    add("--save-steps", type=number(1), default=100, help="updates between checkpoints")
    add("--keep-checkpoints", type=number(1), metavar="N", help="keep only the newest N")
    resume = "continue from the newest checkpoint, or the one named; if none was saved yet, start"
    add("--resume", nargs="?", const="newest", metavar="CHECKPOINT", help=resume)
    add("--overwrite", action="store_true", help="delete the run in --output-dir, and start over")

    args = parser.parse_args(argv)
    args.data = args.data or [str(data.SAMPLE)]
    for name, (real, built_in) in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, real if args.model is not None else built_in)
    return args


def main(argv=None):
    args = parse_args(argv)
    commands.prepare_terminal()
    try:
        train(args)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)  # no update had begun: later, StopSignals receive it
    except Exception as error:
        processes.wait_if_not_first(error)
        advice = "out of memory; try --gradient-checkpointing all, or a smaller --batch-size"
        commands.exit_with(error, processes.named("train.py"), advice)


if __name__ == "__main__":
    main()
