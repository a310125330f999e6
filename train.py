"""Fine-tunes ChatGLM3 with LoRA: one visible loop.

python train.py                                                              # a built-in tiny model, under a minute
python train.py --model THUDM/chatglm3-6b --data huanhuan.json --system "…"  # the real job
"""

import argparse
import itertools
import json
import math
import os
import re
import shlex
import shutil
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import model as chatglm

# What the built-in model trains with instead of the defaults below: random weights need more to be changed.
TINY_PRESET = dict(
    learning_rate=3e-3,
    epochs=50,
    lora_r=16,
    lora_dropout=0.0,
    target_modules=["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
)


def parse_args(argv=None):
    def number(low, high=10**9, kind=int):
        def parse(text):
            value = kind(text)
            if not low <= value <= high:
                raise argparse.ArgumentTypeError(f"must be between {low} and {high}, not {text}")
            return value

        parse.__name__ = "whole number" if kind is int else "number"  # for argparse's message
        return parse

    formatter = argparse.ArgumentDefaultsHelpFormatter
    preset = ", ".join(f"{k} {' '.join(v) if isinstance(v, list) else v}" for k, v in TINY_PRESET.items())
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=f"Without --model, the defaults are instead: {preset}.",
        usage="%(prog)s [options]",
        formatter_class=formatter,
    )
    group = parser.add_argument_group("model and data")
    group.add_argument(
        "--model", help="directory or hub id of a ChatGLM3 checkpoint; without it, the built-in tiny model"
    )
    group.add_argument("--data", nargs="+", default=[str(data.SAMPLE)], metavar="FILE", help="JSON or JSONL files")
    group.add_argument("--system", metavar="TEXT", help="system message of conversations that have none")
    group.add_argument("--output-dir", default=chatglm.ADAPTER_DIR, help="where the adapter and checkpoints go")
    group.add_argument(
        "--max-length", type=number(8), default=512, help="tokens of a sample, prompt and answer together"
    )
    group = parser.add_argument_group("optimisation")
    group.add_argument("--batch-size", type=number(1), default=4, help="samples of a micro-batch")
    group.add_argument("--gradient-accumulation-steps", type=number(1), default=2, help="micro-batches of an update")
    group.add_argument("--epochs", type=number(1), default=3, help="passes over the data")
    group.add_argument("--max-steps", type=number(1), help="stop after this many updates, whatever --epochs says")
    group.add_argument(
        "--learning-rate", type=number(0.0, 1e3, float), default=1e-4, help="peak learning rate of AdamW"
    )
    group.add_argument(
        "--lr-schedule", choices=("linear", "cosine", "constant"), default="linear", help="after warm-up"
    )
    group.add_argument("--warmup-steps", type=number(0), default=0, help="updates of linear warm-up")
    group.add_argument("--weight-decay", type=number(0.0, 1e6, float), default=0.0, help="of AdamW")
    group.add_argument(
        "--max-grad-norm", type=number(0.0, 1e6, float), default=1.0, help="of gradients; 0: no clipping"
    )
    group.add_argument("--seed", type=number(0), default=42, help="of LoRA's start, dropout and the order of samples")
    group = parser.add_argument_group("LoRA")
    group.add_argument("--lora-r", type=number(1, 4096), default=8, help="rank")
    group.add_argument(
        "--lora-alpha", type=number(0.0, 1e6, float), default=32, help="the update is scaled by alpha / r"
    )
    group.add_argument("--lora-dropout", type=number(0.0, 0.99, float), default=0.1, help="on LoRA's input")
    group.add_argument(
        "--target-modules",
        nargs="+",
        default=["query_key_value"],
        metavar="NAME",
        help="names of the linear layers, or one regular expression for whole module paths",
    )
    group.add_argument("--modules-to-save", nargs="+", metavar="NAME", help="modules that are trained and saved whole")
    group = parser.add_argument_group("machine")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA if there is one")
    group.add_argument(
        "--dtype",
        choices=("auto", *chatglm.DTYPES),
        default="auto",
        help="of base and autocast; auto: fp16 on CUDA, else fp32",
    )
    group.add_argument(
        "--gradient-checkpointing",
        type=lambda text: text if text in ("all", "off", "auto") else number(0)(text),
        default="auto",
        metavar="all|off|N|auto",
        help="how many blocks recompute their activations in backward; auto: as few as memory allows",
    )
    group.add_argument("--load-in", choices=("4bit", "8bit"), help="quantise the base, with bitsandbytes")
    group.add_argument("--compile", action="store_true", help="compile the blocks: faster on CUDA, after a minute")
    group.add_argument(
        "--cuda-graphs",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="replay the micro-step instead of launching its kernels one by one; default: on CUDA, unless blocks are checkpointed or quantised",
    )
    group = parser.add_argument_group("progress")
    group.add_argument("--logging-steps", type=number(1), default=10, help="updates between lines of metrics.jsonl")
    group.add_argument("--save-steps", type=number(1), default=100, help="updates between checkpoints")

    if parser.parse_args(argv).model is None:
        parser.set_defaults(**TINY_PRESET)
    return parser.parse_args(argv)


TENSORS = ("input_ids", "positions", "targets")  # of a micro-batch, what goes to the device


# --- one update -------------------------------------------------------------------------------------------------------


def learning_rate(step, total_steps, peak, warmup_steps, schedule):
    """Of update number `step`, counted from 0."""
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * {"linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2, "constant": 1}[schedule]


def micro_step(model, scaler, input_ids, positions, targets, supervised):
    """Forward and backward of one micro-batch (data.collate) → its part of the update's loss. All are on the device, the
    number of the update's supervised tokens too, so that nothing here waits for the device."""
    with torch.autocast(model.device.type, dtype=model.dtype, enabled=model.dtype != torch.float32):
        # Divided before backward: fp16 gradients of a sum over a thousand tokens would overflow.
        loss = model.summed_loss(input_ids, positions, targets) / supervised
    scaler.scale(loss).backward()
    return loss.detach()


class CUDAGraphs:
    """micro_step, captured once for each shape of micro-batch and then replayed: one launch instead of thousands, which
    small batches otherwise wait for. The graphs share one pool of memory; shapes after the first `most` are not captured."""

    def __init__(self, step, params, most=96):
        self.step, self.params, self.most = step, params, most
        self.graphs, self.pool = {}, torch.cuda.graph_pool_handle()

    def __call__(self, *batch):
        shapes = tuple(tensor.shape for tensor in batch)
        if shapes not in self.graphs:
            if len(self.graphs) == self.most:
                return self.step(*batch)
            self.graphs[shapes] = self.capture(batch)
        graph, inputs, loss = self.graphs[shapes]
        for mine, tensor in zip(inputs, batch, strict=True):
            mine.copy_(tensor)
        graph.replay()
        return loss.clone()

    def capture(self, batch):
        inputs = [tensor.clone() for tensor in batch]
        grads = [None if p.grad is None else p.grad.clone() for p in self.params]
        random_state = torch.cuda.get_rng_state()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(
            stream
        ):  # a trial compiles, loads kernels and makes the gradients: that can't be captured
            self.step(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.set_rng_state(random_state)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            loss = self.step(*inputs)
        for param, grad in zip(self.params, grads, strict=True):  # as they were before the trial
            param.grad.zero_() if grad is None else param.grad.copy_(grad)
        return graph, inputs, loss


def train_update(step, micro_batches, optimizer, scaler, max_grad_norm):
    """One optimiser step on the mean loss over the supervised tokens of all `micro_batches`, however they are split; `step`
    is micro_step for a model. → (that loss, the gradients' norm before clipping), on the device. A norm that is not finite
    means that GradScaler skipped the step and lowered its scale."""
    params = optimizer.param_groups[0]["params"]
    device = params[0].device
    supervised = torch.full((), sum(batch["supervised"] for batch in micro_batches), device=device)
    loss = 0
    for batch in micro_batches:
        tensors = (batch[name].to(device, non_blocking=True) for name in TENSORS)
        loss = loss + step(*tensors, supervised)
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(params, max_grad_norm or math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=False)  # a captured graph adds to these very tensors
    return loss, grad_norm


def samples_per_step(args):
    return args.batch_size * args.gradient_accumulation_steps


def updates(dataset, args, device):
    """Yields (epoch, the micro-batches of one update) without end."""
    split = args.batch_size
    for epoch in itertools.count():
        loader = DataLoader(
            dataset,
            batch_sampler=data.batch_order(dataset.lengths, samples_per_step(args), args.seed, epoch),
            collate_fn=lambda samples: [data.collate(samples[i : i + split]) for i in range(0, len(samples), split)],
            pin_memory=device.type == "cuda",
        )
        for micro_batches in loader:
            yield epoch, micro_batches


def fit_in_memory(step, encoder, batch, wanted):
    """Sets how many blocks recompute their activations (`wanted`: all, off, a number or auto), and tries it on `batch`, the
    longest there is, so that memory doesn't run out later. Raises ValueError with what would fit."""
    layers = len(encoder.layers)
    cuda = batch[0].device.type == "cuda"

    def peak(checkpointed_layers):
        encoder.checkpointed_layers = checkpointed_layers
        torch.cuda.reset_peak_memory_stats()
        try:
            step(*batch)
            return torch.cuda.max_memory_allocated()
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return math.inf

    first = {"all": layers, "off": 0, "auto": 0}.get(wanted, wanted)
    encoder.checkpointed_layers = min(first, layers)
    if not cuda or peak(encoder.checkpointed_layers) < math.inf:
        return
    if wanted == "auto" and (least := peak(layers)) < math.inf:
        a_layer = peak(layers - 1) - least  # what storing one more block's activations costs
        room = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - least
        for checkpointed_layers in range(max(1, layers - int(room / a_layer)), layers + 1):
            if peak(checkpointed_layers) < math.inf:
                return
    rows, length = batch[0].shape
    raise ValueError(
        f"out of memory on the longest micro-batch, {rows} × {length} tokens; try a smaller --batch-size (with more "
        "--gradient-accumulation-steps the result is the same), --gradient-checkpointing all, --load-in 4bit, or a "
        "smaller --max-length"
    )


def make_step(args, model, scaler, dataset):
    """micro_step for `model`, with the fast paths that `args` asks for around it. Raises ValueError for what can't be had."""
    encoder, cuda = model.transformer.encoder, model.device.type == "cuda"
    if args.cuda_graphs and not cuda:
        raise ValueError("--cuda-graphs needs a CUDA device; leave it out")
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False  # autocast sees to it; peft would cast to fp32 first
    if args.compile:
        for layer in encoder.layers:
            layer.compile(dynamic=True)  # one compilation for all lengths
    step = partial(micro_step, model, scaler)
    longest = dataset[max(range(len(dataset)), key=dataset.lengths.__getitem__)]
    batch = data.collate([longest] * args.batch_size)
    batch = [batch[name].to(model.device) for name in TENSORS] + [torch.ones((), device=model.device)]
    started = time.perf_counter()
    fit_in_memory(step, encoder, batch, args.gradient_checkpointing)
    if cuda:
        shape, took = " × ".join(map(str, batch[0].shape)), time.perf_counter() - started
        print(f"memory   {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB ", end="")
        print(f"for the longest micro-batch, {shape} tokens, ", end="")
        print(f"{encoder.checkpointed_layers} of {len(encoder.layers)} blocks checkpointed (tried in {took:.1f} s)")
    params = [p for p in model.parameters() if p.requires_grad]
    for param in params:
        param.grad = None
    # What can't be captured: checkpointing saves the random state, and 8-bit products wait for the device.
    capturable = cuda and not encoder.checkpointed_layers and not args.load_in
    if args.cuda_graphs and not capturable:
        raise ValueError("--cuda-graphs can't replay checkpointed or quantised blocks; leave one of the two out")
    return CUDAGraphs(step, params) if capturable and args.cuda_graphs is not False else step


# --- the run ----------------------------------------------------------------------------------------------------------


def save(peft_model, directory, args):
    """Writes the adapter, and the arguments it was trained with (infer.py reads the system message there), to `directory`.
    They are written beside it first and then renamed: a file, and a new directory, is there whole or not at all."""
    part = directory.with_name(f"{directory.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    chatglm.save_adapter(peft_model, part)
    text = json.dumps(vars(args), ensure_ascii=False, indent=2)
    (part / "training_args.json").write_text(text + "\n", "utf-8")
    if not directory.exists():
        os.replace(part, directory)
        return
    for file in part.iterdir():
        os.replace(file, directory / file.name)
    part.rmdir()


def set_up(args):
    """→ (peft model, tokenizer, dataset). Every mistake of the user's is found here, before anything is written: raises
    ValueError or OSError with a message for them."""
    for text in (args.output_dir, args.system or "", *args.data):
        text.encode()  # training_args.json keeps them: UnicodeEncodeError, a ValueError, for bytes that are not UTF-8
    there = next(p for p in (Path(args.output_dir).absolute(), *Path(args.output_dir).absolute().parents) if p.exists())
    if not args.output_dir or not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"{args.output_dir}: cannot write there; choose another --output-dir")
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
    torch.manual_seed(args.seed)
    targets = args.target_modules
    if len(targets) == 1 and not re.fullmatch(r"[\w.]+", targets[0]):
        targets = targets[0]  # a regular expression
    peft_model = chatglm.add_lora(model, args.lora_r, args.lora_alpha, args.lora_dropout, targets, args.modules_to_save)
    return peft_model, tokenizer, dataset


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
    size = f"{args.batch_size} × {args.gradient_accumulation_steps} samples"
    print(f"updates  {total_steps:,}, each of {size}", flush=True)


def main(argv=None):
    args = parse_args(argv)
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to stop
    if args.model is None:
        print("The built-in tiny model, random weights. For the real job: --model DIR_OR_HUB_ID --data FILE")
    chatglm.quiet_libraries()
    try:
        peft_model, tokenizer, dataset = set_up(args)
        total_steps = args.max_steps or args.epochs * math.ceil(len(dataset) / samples_per_step(args))
        describe(args, peft_model, tokenizer, dataset, total_steps)
        model = peft_model.get_base_model().train()  # the network itself, LoRA layers inside: no wrapper around it
        if args.model is None and model.device.type == "cpu":
            torch.set_num_threads(1)  # its matrices are too small to share; waiting for a busy core costs more
        scaler = torch.amp.GradScaler(model.device.type, enabled=model.dtype == torch.float16)
        step_fn = make_step(args, model, scaler, dataset)
    except (ValueError, OSError) as error:
        sys.stderr.writelines(f"train.py: error: {line}\n" for line in str(error).splitlines())
        sys.exit(2)

    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(args.seed)
    device = model.device
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, weight_decay=args.weight_decay, fused=device.type == "cuda")
    metrics = open(output_dir / "metrics.jsonl", "w", encoding="utf-8")
    bar = tqdm(total=total_steps, unit="update", dynamic_ncols=True, mininterval=0.1 if sys.stderr.isatty() else 10)
    # Sums since the last line of metrics; those on the device are read only there, because reading waits for the device.
    window_loss, overflows, supervised, tokens, started = 0.0, 0, 0, 0, time.perf_counter()
    all_samples, all_tokens, training_started = 0, 0, started

    for step, (epoch, micro_batches) in enumerate(itertools.islice(updates(dataset, args, device), total_steps), 1):
        lr = learning_rate(step - 1, total_steps, args.learning_rate, args.warmup_steps, args.lr_schedule)
        optimizer.param_groups[0]["lr"] = lr
        loss, grad_norm = train_update(step_fn, micro_batches, optimizer, scaler, args.max_grad_norm)

        count = sum(batch["supervised"] for batch in micro_batches)
        window_loss += loss * count
        supervised += count
        tokens += sum(batch["tokens"] for batch in micro_batches)
        all_samples += sum(len(batch["input_ids"]) for batch in micro_batches)
        overflows += ~torch.isfinite(grad_norm)
        bar.update()
        log, checkpoint = step % args.logging_steps == 0 or step == total_steps, step % args.save_steps == 0
        if (log or checkpoint) and not scaler.is_enabled() and int(overflows):
            bar.close()
            sys.exit(f"train.py: update {step}: the loss is no longer a finite number; try a lower --learning-rate")
        if log:
            mean = float(window_loss) / supervised  # over the supervised tokens since the last line
            line = {
                "step": step,
                "epoch": epoch,
                "loss": mean if math.isfinite(mean) else None,
                "grad_norm": float(grad_norm) if math.isfinite(grad_norm) else None,  # None: this update overflowed
                "learning_rate": lr,
                "tokens": tokens,
                "loss_scale": scaler.get_scale(),
                "skipped": int(overflows),  # updates since the start that GradScaler skipped
            }
            metrics.write(json.dumps(line, allow_nan=False) + "\n")
            metrics.flush()
            speed = tokens / (time.perf_counter() - started)
            overflow = {"skipped": line["skipped"]} if line["skipped"] else {}
            bar.set_postfix({"loss": f"{mean:.4f}", "lr": f"{lr:.2e}", "tok/s": f"{speed:,.0f}", **overflow})
            all_tokens += tokens
            window_loss, supervised, tokens, started = 0.0, 0, 0, time.perf_counter()
        if checkpoint:
            save(peft_model, output_dir / f"checkpoint-{step}", args)

    bar.close()
    metrics.close()
    save(peft_model, output_dir, args)
    took = time.perf_counter() - training_started
    print(f"speed    {all_samples:,} samples in {took:.1f} s: ", end="")
    print(f"{all_samples / took:.1f} samples/s, {all_tokens / took:,.0f} tokens/s")
    if scaler.is_enabled():
        print(f"         {int(overflows)} updates skipped because fp16 overflowed; loss scale {scaler.get_scale():g}")
    if device.type == "cuda":
        print(f"         peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    adapter = "" if args.output_dir == chatglm.ADAPTER_DIR else f" --adapter {shlex.quote(args.output_dir)}"
    print(f"saved    {output_dir}/adapter_model.safetensors; try it:")
    infer = os.path.relpath(Path(__file__).with_name("infer.py"))
    print(f'         python {infer}{adapter} --prompt "你是谁？"')


if __name__ == "__main__":
    main()
