"""Fine-tunes ChatGLM3 with LoRA: one visible loop.

    python train.py                                     # a built-in tiny model, two minutes
    python train.py --model THUDM/chatglm3-6b --data huanhuan.json --system "…"  # the real job

Read it from top to bottom: the loop, one update, evaluation, the fast paths, preparation, commands.
"""

import itertools
import math
import random
import signal
import time
from functools import partial

# Until errors_for_user, Ctrl-C ends the program without a word, if it is not ignored (nohup, &).
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from support.train_flags import lora_options, parse_args, run_args_of, take_lora_flags

ARGS = parse_args() if __name__ == "__main__" else None  # a wrong flag is told before slow imports

import torch
from torch.utils.data import DataLoader

import data
import model as chatglm
from support import commands, forecast, memory, processes, reports
from support.bases import check_same_base, find_base, fingerprint, trained_with
from support.checkpoints import find_checkpoint, restore
from support.identity import check_before_loading, run_identity, samples_per_update
from support.progress import Progress, ProgressBar, check_overflows, eval_bar
from support.recomputation import recompute_all, seed_dropouts, set_up_compiler
from support.run_directory import RunDirectory, check_output_dir
from support.signals import Signals, exit_after_signal


def train(args):
    """A whole run. Raises ValueError or OSError with a message for the user."""
    run = prepare(args)
    progress, optimizer, scaler = run.progress, run.optimizer, run.scaler
    micro_step = make_micro_step(run)  # micro_step(batch, divisor) → loss
    eval_step = run.eval_set and make_eval_step(args, run.model, run.eval_set, micro_step)
    processes.check_same_everywhere((run.identity, progress.step))
    directory = RunDirectory(args, run_args_of(args))
    signals = Signals()
    progress.start_clock()

    with ProgressBar(run) as bar, directory.opened(run.checkpoint):
        for update in itertools.chain(updates(run), [None]):  # None: there is no update left
            if run.must_evaluate():  # after the checkpoint: a run that is killed here repeats it
                check_overflows(run, directory)
                with progress.clock_stopped():
                    eval_loss = evaluate(run.model, run.eval_set, args.batch_size, eval_step)
                metrics = progress.count_evaluation(run.updates_per_epoch, eval_loss)
                directory.log(metrics)
                bar.show(metrics)
                if progress.is_best():
                    directory.save_best(run)
            if update is None or progress.is_out_of_patience(args.patience):
                break
            lr = learning_rate(progress.step, run.total_steps, args)
            optimizer.param_groups[0]["lr"] = lr
            seed_dropout(args.seed, progress.step)
            loss, grad_norm = train_update(micro_step, update, optimizer, scaler, run.max_norm)
            progress.count(update, loss, grad_norm)  # progress.step += 1

            stop, save = signals.agreed()  # numbers of signals, or 0
            is_last = progress.step == run.total_steps
            must_log = progress.step % args.logging_steps == 0 or is_last
            must_save = progress.step % args.save_steps == 0 or is_last or stop or save
            bar.update()
            # Reading a result waits for the device. So it is done only when it is needed.
            if must_log or must_save:
                check_overflows(run, directory)
            if must_log:
                metrics = progress.take_metrics(update.epoch, lr, grad_norm, scaler.get_scale())
                directory.log(metrics)
                bar.show(metrics)
            if must_save:
                directory.save_checkpoint(run, wait=stop or is_last)
            if stop:
                exit_after_signal(stop, progress.step, directory.path)
        directory.save_result(run)
    reports.report_result(run)


# --- one update -------------------------------------------------------------------------------


def train_update(micro_step, update, optimizer, scaler, max_norm):
    """One optimiser step on the mean loss over the supervised tokens of the whole update.

    Every loss is divided by update.supervised, the number of these tokens in all micro-batches and
    processes. So the split into micro-batches changes only the masks of dropout.

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


def forward_loss(model, batch, divisor):
    """→ the summed loss of one data.MicroBatch, divided. Nothing in it waits for the device."""
    mixed = model.dtype != torch.float32  # fp16 or bf16
    with torch.autocast(model.device.type, dtype=model.dtype, enabled=mixed):
        return model.summed_loss(batch) / divisor


def forward_backward(model, scaler, batch, divisor):
    """Forward and backward of one data.MicroBatch → its part of the update's loss."""
    # Divide before backward. The fp16 gradients of an undivided sum could overflow.
    loss = forward_loss(model, batch, divisor)
    # The memory pool of CUDAGraphs applies to this thread only. So backward must run here too.
    with torch.autograd.set_multithreading_enabled(False):
        scaler.scale(loss).backward()
    return loss.detach()


def learning_rate(step, total_steps, args):
    """The learning rate of update `step`, counted from 0: linear warm-up, then the schedule."""
    peak, warmup_steps = args.learning_rate, args.warmup_steps
    if isinstance(warmup_steps, float):  # a share
        warmup_steps = round(warmup_steps * total_steps)
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)  # from 0 to 1
    decay = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1}
    return peak * decay[args.lr_schedule]


def seed_dropout(seed, step):
    """Seeds dropout from the update and the process, so that a resumed run draws the same masks."""
    rank, _ = processes.rank_and_count()
    torch.manual_seed(random.Random(f"{seed} {step + 1} {rank}").getrandbits(63))


def updates(run):
    """Yields the Updates of the run that are not done yet."""
    for epoch, order in run.coming_epochs():
        yield from load_updates(run, epoch, order)


def load_updates(run, epoch, order):
    """→ an iterable of data.Update. order: for each of them, the indices of its samples"""
    layout = (epoch, run.args.batch_size, run.dataset.prefix_length)
    options = dict(batch_sampler=order, collate_fn=partial(data.make_update, *layout))
    return DataLoader(run.dataset, pin_memory=run.device.type == "cuda", **options)


# --- evaluation -------------------------------------------------------------------------------


def evaluate(model, dataset, batch_size, eval_step):
    """→ the mean loss over all supervised tokens of a data.ConversationDataset, a float.

    Dropout is off. The processes share the micro-batches. Nothing that training uses is changed.
    """
    model.eval()
    device = model.device
    exact = torch.float32 if device.type == "mps" else torch.float64  # mps has no fp64
    total, one = torch.zeros((), dtype=exact, device=device), torch.ones((), device=device)
    for batch in eval_bar(data.eval_batches(dataset, batch_size, device.type == "cuda")):
        total += eval_step(batch.to(device), one)
    model.train()
    total = total.cpu()  # this waits for the device
    processes.add_up(total)
    return total.item() / sum(dataset.supervised)


def make_eval_step(args, model, dataset, micro_step=None):
    """→ eval_step(batch, divisor): forward_loss, with the fast paths of training's micro_step.

    The longest micro-batch of `dataset` is tried. Raises ValueError if it does not fit.
    """
    forward = torch.no_grad()(partial(forward_loss, model))
    eval_step = with_cuda_graphs(args, model, forward, like=micro_step)
    if model.device.type == "cuda" or args.compile:
        samples = memory.longest_samples(dataset, args.batch_size, args.max_length)
        longest = data.collate(samples, dataset.prefix_length)
        memory.try_evaluation(model, eval_step, longest.to(model.device))
    return eval_step


# --- the fast paths ---------------------------------------------------------------------------


class CUDAGraphs:
    """Replays a micro-step as one launch. Small batches otherwise wait for thousands of launches.

    The first micro-batch of a shape runs eagerly. The second is captured in a graph, which is
    replayed from then on. All graphs, at most `max_graphs`, share one pool of memory, with those
    of the CUDAGraphs `like` too.
    """

    def __init__(self, micro_step, like=None, max_graphs=96):
        self.micro_step, self.max_graphs = micro_step, max_graphs
        self.seen_shapes, self.graphs = set(), {}
        self.pool = like.pool if like else torch.cuda.MemPool()
        self.stream = like.stream if like else torch.cuda.Stream()  # memory belongs to a stream

    def __call__(self, batch, divisor):
        shapes = batch.shapes()
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
    out an hour later: see memory.recompute_as_wanted. Raises ValueError if memory runs out.
    """
    args, model, encoder = run.args, run.model, run.model.transformer.encoder
    set_up_model(args, model)
    samples = memory.longest_samples(run.dataset, args.batch_size, args.max_length)
    trial = memory.Trial(run, data.collate(samples, run.dataset.prefix_length).to(run.device))

    def attempt(count):
        """→ the micro-step with `count` recomputed blocks, or None if that does not fit"""
        encoder.recomputed_layers = count
        micro_step = with_cuda_graphs(args, model, partial(forward_backward, model, run.scaler))
        return micro_step if trial.fits(micro_step) else None

    micro_step = memory.recompute_as_wanted(run, attempt, len(encoder.layers))
    trial.check(micro_step, f"{encoder.recomputed_layers} of {len(encoder.layers)} blocks")
    run.progress.recomputed_layers = encoder.recomputed_layers
    for param in run.optimizer.param_groups[0]["params"]:
        # A captured graph adds to the very gradients that its trial allocated.
        param.grad = torch.zeros_like(param) if param.grad is None else param.grad.zero_()
    return micro_step


def set_up_model(args, model):
    """What the fast paths need of the model, before its first step"""
    # A graph reads the table where it is now. So it must not grow later.
    model.transformer.rope_for(args.max_length, model.device)
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False  # only autocast casts LoRA's input
    if args.compile:
        compile_training(model)


def compile_training(model):
    """Compiles the blocks, once for all lengths, and the loss, which then stores no fp32 logits."""
    set_up_compiler()
    seed_dropouts(model.transformer, model.transformer.encoder.layers)
    for layer in model.transformer.encoder.layers:
        layer.compile(dynamic=True)
        layer.forward_recomputed = torch.compile(layer.forward, dynamic=True, backend=recompute_all)
    model.chunk_loss = torch.compile(model.chunk_loss, dynamic=True)


def with_cuda_graphs(args, model, micro_step, like=None):
    """→ CUDAGraphs(micro_step, like), or micro_step where graphs are impossible or not wanted"""
    # torch.utils.checkpoint sets the random state, which can't be captured. Compiled blocks don't.
    recomputes = model.transformer.encoder.recomputed_layers > 0 and not args.compile
    is_possible = not (recomputes or model.output_layer_has_dropout())
    if args.cuda_graphs and not is_possible:
        what = "checkpointed blocks without --compile, or dropout on the output layer"
        raise ValueError(f"--cuda-graphs can't replay {what}; leave out --cuda-graphs")
    use_them = model.device.type == "cuda" and is_possible and args.cuda_graphs is not False
    return CUDAGraphs(micro_step, like) if use_them else micro_step


# --- preparation ------------------------------------------------------------------------------


class Run:
    """Model, data, optimiser, scaler and progress of one run."""

    def __init__(self, args, peft_model, dataset, checkpoint=None, eval_set=None):
        self.args, self.peft_model, self.dataset = args, peft_model, dataset
        self.eval_set = eval_set  # a second data.ConversationDataset, or None
        self.checkpoint = checkpoint  # the directory to continue from, or None
        self.identity = None  # what must be the same for the run to continue: identity.py
        self.peak_memory = None  # bytes, of the longest micro-batch on CUDA: memory.py
        self.model = peft_model.get_base_model().train()  # our network, with LoRA inside
        self.device = self.model.device
        self.progress = Progress(self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.model.dtype == torch.half)
        # This makes the scale, which unscale_ needs even in a process that gets no samples.
        self.scaler.scale(torch.zeros((), device=self.device))
        params = [param for param in self.model.parameters() if param.requires_grad]
        fused = self.device.type == "cuda"  # a skipped step then needs no wait for the device
        options = dict(betas=(args.adam_beta1, args.adam_beta2), weight_decay=args.weight_decay)
        self.optimizer = torch.optim.AdamW(params, **options, fused=fused)
        self.max_norm = args.max_grad_norm or math.inf  # 0: gradients are not clipped
        self.samples_per_update = samples_per_update(args)
        self.updates_per_epoch = math.ceil(dataset.samples_per_epoch / self.samples_per_update)
        self.total_steps = args.max_steps or args.epochs * self.updates_per_epoch
        self.eval_every = args.eval_steps or self.updates_per_epoch  # so many updates

    def must_evaluate(self):
        step = self.progress.step
        is_due = step % self.eval_every == 0 or step == self.total_steps
        return self.eval_set is not None and is_due and step > self.progress.evaluated_step

    def order_of_epoch(self, epoch):
        """→ for each update of the epoch, the indices of its samples"""
        indices = data.draw_epoch(self.dataset.parts, self.args.seed, epoch)
        lengths, size = self.dataset.lengths, self.samples_per_update
        return data.update_order(indices, lengths, size, self.args.seed, epoch)

    def coming_epochs(self):
        """Yields (epoch, order_of_epoch) of what is not done yet."""
        step = self.progress.step
        while step < self.total_steps:
            epoch, skip = divmod(step, self.updates_per_epoch)
            order = self.order_of_epoch(epoch)[skip:][: self.total_steps - step]
            yield epoch, order
            step += len(order)


def prepare(args):
    """→ Run. Reads, checks and loads everything, and writes nothing to --output-dir.

    Raises ValueError or OSError, with a message for the user, for a mistake in flags or files.
    """
    if args.model is None:
        commands.announce_built_in_model()
    check_output_dir(args)
    checkpoint = find_checkpoint(args.output_dir, args.resume)
    path = find_base(args.model) or chatglm.built_in_model()
    tokenizer, dataset, eval_set, model = read_inputs(args, path, checkpoint)
    args.base, args.tools = fingerprint(model, tokenizer.digest), dataset.reader.about_tools()
    if checkpoint:
        peft_model = chatglm.load_adapter(model, checkpoint, is_trainable=True)
    elif args.init_adapter:
        check_same_base(args.base, trained_with(args.init_adapter).base, path, args.init_adapter)
        peft_model = chatglm.load_adapter(model, args.init_adapter, is_trainable=True)
    else:
        torch.manual_seed(args.seed)
        peft_model = chatglm.add_lora(model, **lora_options(args))
    if args.init_adapter:  # also where the run is resumed
        take_lora_flags(args, peft_model.peft_config["default"])
    run = Run(args, peft_model, dataset, checkpoint, eval_set)
    run.identity = run_identity(run)
    reports.describe_run(run, tokenizer)
    if checkpoint:
        restore(run)
    return run


def read_inputs(args, path, checkpoint=None):
    """→ (tokenizer, dataset to train on, dataset to evaluate or None, base); path: of the base"""
    tokenizer = data.ChatGLMTokenizer(path)
    options = (tokenizer, args.max_length, args.system, args.keys)
    dataset = None if args.eval_only else data.ConversationDataset(args.data, *options)
    eval_set = data.ConversationDataset(args.eval_data, *options) if args.eval_data else None
    if args.eval_split:
        dataset, eval_set = dataset.split(args.eval_split, args.seed)
    check_before_loading(args, dataset, eval_set, checkpoint)
    start = time.perf_counter()
    model = chatglm.load_model(path, args.device, args.dtype, args.load_in)
    reports.describe_base(model, path, time.perf_counter() - start)
    tokenizer.check_fits(model.config.padded_vocab_size)
    model.config.check_length(args.max_length)
    return tokenizer, dataset, eval_set, model


# --- the command ------------------------------------------------------------------------------


def dry_run(args):
    """Makes a few updates, prints what the whole run will need, and keeps nothing."""
    run = prepare(args)
    micro_step = memory.fit_or_advise(run, make_micro_step)
    eval_step = run.eval_set and make_eval_step(args, run.model, run.eval_set, micro_step)

    def run_update(update):
        seed_dropout(args.seed, run.progress.step)
        train_update(micro_step, update, run.optimizer, run.scaler, run.max_norm)

    load, eval_batches = partial(load_updates, run), partial(data.eval_batches, run.eval_set)
    max_graphs = micro_step.max_graphs if isinstance(micro_step, CUDAGraphs) else 0
    forecast.print_forecast(run, load, run_update, eval_batches, eval_step, max_graphs)


def eval_only(args):
    """Prints the loss of the base, or of args.adapter on it, over args.eval_data."""
    path = find_base(args.model, args.adapter) or chatglm.built_in_model()
    trained = trained_with(args.adapter)
    args.system = trained.system if args.system is None else args.system
    tokenizer, _, dataset, model = read_inputs(args, path)
    check_same_base(fingerprint(model, tokenizer.digest), trained.base, path, args.adapter)
    if args.adapter:
        model = chatglm.load_adapter(model, args.adapter).get_base_model()
    set_up_model(args, model)
    start = time.perf_counter()
    loss = evaluate(model, dataset, args.batch_size, make_eval_step(args, model, dataset))
    reports.report_evaluation(dataset, loss, time.perf_counter() - start)


def main(argv=None):
    args = ARGS or parse_args(argv)
    advice = "out of memory; try --gradient-checkpointing all, or a smaller --batch-size"
    with commands.errors_for_user("train.py", advice, processes.exit_together):
        processes.start(args.device, args.timeout)
        job = eval_only if args.eval_only else dry_run if args.dry_run else train
        job(args)
        processes.close()


if __name__ == "__main__":
    main()
