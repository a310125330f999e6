"""Measures this project's loop against transformers' Trainer: same network, samples and device.

    python tests/benchmarks/training.py --vocabulary tokenizer.model --data huanhuan.json

The network has chatglm3-6b's shape on CUDA. On a CPU it is the built-in model with the official
vocabulary. Its weights are random. An update is 8 samples. Each configuration of the loop sees the
same batches three times: twice to warm up (to compile, then to capture), then with the clock.
"""

import argparse
import datetime
import gc
import platform
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import transformers
from random_checkpoint import random_base

sys.path.insert(0, str(Path(__file__).parents[2]))
import data
import model as chatglm
import train
from support import fp8
from support.memory import timed, wait_for

EIGHT = "--batch-size 8 --gradient-accumulation-steps 1"
ALL = "--gradient-checkpointing all"
OFF = "--gradient-checkpointing off"
LOOPS = {  # name: (how the base is loaded, flags)
    "loop, eager, 4 × 2": (None, "--no-cuda-graphs"),
    "loop, eager, 4 × 2, checkpointing": (None, f"--no-cuda-graphs {ALL}"),
    "loop, defaults, 4 × 2": (None, ""),
    "loop, defaults, 8 × 1": (None, EIGHT),
    "loop, compiled, no graphs, 8 × 1": (None, f"{EIGHT} --compile --no-cuda-graphs"),
    "loop, compiled, 8 × 1": (None, f"{EIGHT} --compile"),
    "loop, compiled, 8 × 1, checkpointing": (None, f"{EIGHT} --compile {ALL}"),
    "loop, compiled, 4 × 2, checkpointing": (None, f"--compile {ALL}"),
    "loop, fp8, 8 × 1": ("fp8", EIGHT),
    "loop, fp8, compiled, 8 × 1": ("fp8", f"{EIGHT} --compile"),
    "loop, fp8 stored once, compiled, 8 × 1": ("fp8 once", f"{EIGHT} --compile"),
    "loop, fp8 stored once, compiled, 4 × 2, checkpointing": ("fp8 once", f"--compile {ALL}"),
    "loop, 4bit, defaults, 4 × 2": ("4bit", ""),
    "loop, 4bit, compiled, 8 × 1": ("4bit", f"{EIGHT} --compile"),
    "loop, 4bit, compiled, 8 × 1, checkpointing": ("4bit", f"{EIGHT} --compile {ALL}"),
    "loop, 4bit, compiled, 4 × 2, checkpointing": ("4bit", f"--compile {ALL}"),
}
# Full sequences of random tokens: (base, tokens a sample, samples, flags).
# 8,192 tokens are chatglm3-6b's whole context.
FULL = {
    "512 tokens, 4 × 2": (None, 512, 160, ""),
    "512 tokens, compiled, 4 × 2": (None, 512, 160, "--compile"),
    "512 tokens, compiled, 4 × 2, checkpointing": (None, 512, 160, f"--compile {ALL}"),
    "8,192 tokens, compiled, 1 × 1, checkpointing": (None, 8192, 6, f"--compile {ALL}"),
    "512 tokens, fp8, compiled, 4 × 2": ("fp8", 512, 160, "--compile"),
    "512 tokens, fp8 stored once, compiled, 4 × 2": ("fp8 once", 512, 160, "--compile"),
    "512 tokens, 4bit, compiled, 4 × 2, checkpointing": ("4bit", 512, 160, f"--compile {ALL}"),
    "8,192 tokens, 4bit, compiled, 1 × 1, checkpointing": ("4bit", 8192, 6, f"--compile {ALL}"),
}
CPU_LOOPS = ("loop, defaults, 4 × 2", "loop, defaults, 8 × 1")
TRAINERS = {  # name: (base, padded to so many tokens, checkpointing)
    "Trainer, padded to 512, checkpointing": (None, 512, True),
    "Trainer, dynamic padding": (None, None, False),
    "Trainer, 4bit, dynamic padding, checkpointing (QLoRA)": ("4bit", None, True),
}


class RandomTokens(torch.utils.data.Dataset):
    """Samples of `length` random tokens, all supervised but the first."""

    prefix_length = 0

    def __init__(self, length, size):
        self.lengths, self.supervised = [length] * size, [length - 1] * size
        self.parts, self.samples_per_epoch = [(range(size), 1.0)], size
        self.rows = torch.randint(
            3, 64789, (size, length), generator=torch.Generator().manual_seed(0)
        )

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i], self.rows[i]


def matmul_flops(device, dtype, size):
    """→ FLOP/s of a large matrix product of random numbers: (the best of a few, kept up).

    The first is the ceiling. Within seconds a GPU slows down, to keep within its power.
    """
    a, b, c = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    wait_for(device)
    best = min(timed(lambda: a @ b, device) for _ in range(8))
    many = max(1, round(3 / best))
    return 2 * size**3 / best, 2 * size**3 * many / timed(
        lambda: [torch.mm(a, b, out=c) for _ in range(many)], device
    )


def padded(batch):
    """→ the tokens of a micro-batch, if each row had a prefix of its own"""
    rows, rest = batch.input_ids.shape
    return rows * (len(batch.prefix) + rest)


def computed(batch):
    """→ the tokens of a micro-batch that are computed"""
    return len(batch.prefix) + batch.input_ids.numel()


def measure_loop(dataset, flags, updates, base):
    """→ what main prints, of `updates` updates after warm-up"""
    args = train.parse_args(["--model", "base", *flags.split(), "--max-steps", str(updates)])
    args.max_length = max(dataset.lengths)
    torch.manual_seed(args.seed)
    lora = (args.lora_r, args.lora_alpha, args.lora_dropout, args.target_modules)
    run = train.Run(args, chatglm.add_lora(base, *lora), dataset)
    model, optimizer, scaler = run.model, run.optimizer, run.scaler
    optimizer.param_groups[0]["lr"] = args.learning_rate
    start = time.perf_counter()
    micro_step = train.make_micro_step(run)
    todo = list(train.updates(run))

    def all_updates():
        for update in todo:
            loss, _ = train.train_update(micro_step, update, optimizer, scaler, args.max_grad_norm)
        return loss

    all_updates()
    first = all_updates().item()
    warm_up = time.perf_counter() - start
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    wait_for(model.device)
    seconds = timed(all_updates, model.device)
    batches = [batch for update in todo for batch in update.micro_batches]
    result = dict(
        seconds=seconds,
        samples=sum(update.samples for update in todo),
        tokens=sum(update.tokens for update in todo),
        padded=sum(map(padded, batches)),
        computed=sum(map(computed, batches)),
        checkpointed=model.transformer.encoder.recomputed_layers > 0,
        longest=f"{run.peak_memory / 2**30:.1f}" if run.peak_memory else "",
        note=f"warm-up {warm_up:.0f} s, loss {first:.3f}",
    )
    fp8.drop_transposed(model)
    for layer in model.transformer.encoder.layers:
        layer._compiled_call_impl = None
        vars(layer).pop("forward_recomputed", None)  # the compiled ones
    vars(model).pop("chunk_loss", None)
    model.transformer._forward_pre_hooks.clear()  # of seeded dropout
    run.peft_model.unload()
    return result


def measure_trainer(dataset, pad_to, checkpointing, updates, base):
    """The same for Trainer, as the tutorial uses it: 4 × 2 samples, shuffled."""
    args = train.parse_args(["--model", "base"])
    peft_model = chatglm.add_lora(
        base, args.lora_r, args.lora_alpha, args.lora_dropout, args.target_modules
    )
    model = peft_model.get_base_model().train()
    model.accepts_loss_kwargs = False
    model.transformer.encoder.recomputed_layers = (
        len(model.transformer.encoder.layers) * checkpointing
    )
    count = dict(samples=0, tokens=0, padded=0)

    def collate(samples):
        length = pad_to or max(len(ids) for ids, _ in samples)
        count["samples"] += len(samples)
        count["tokens"] += sum(len(ids) for ids, _ in samples)
        count["padded"] += length * len(samples)
        rows = [
            [
                torch.nn.functional.pad(t, (0, length - len(t)), value=v)
                for t, v in zip(s, (0, -100), strict=True)
            ]
            for s in samples
        ]
        return dict(
            zip(("input_ids", "labels"), map(torch.stack, zip(*rows, strict=True)), strict=True)
        )

    class Clock(transformers.TrainerCallback):
        warm_up = 3

        def on_step_end(self, training_args, state, control, **kwargs):
            if state.global_step == self.warm_up:
                wait_for(model.device)
                count.update(samples=0, tokens=0, padded=0)
                self.start = time.perf_counter()

    clock = Clock()
    trainer = transformers.Trainer(
        model=peft_model,
        train_dataset=dataset,
        data_collator=collate,
        callbacks=[clock],
        args=transformers.TrainingArguments(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_steps=updates + clock.warm_up,
            learning_rate=args.learning_rate,
            fp16=model.dtype == torch.float16,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=model.device.type == "cpu",
        ),
    )
    trainer.train()
    wait_for(model.device)
    result = dict(
        count,
        computed=count["padded"],
        seconds=time.perf_counter() - clock.start,
        checkpointed=checkpointing,
        longest="",
        note="",
    )
    result["samples"] = updates * 8  # the loader collates ahead of the last step
    peft_model.unload()
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--vocabulary", type=Path, required=True, help="the official tokenizer.model"
    )
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--system")
    parser.add_argument("--updates", type=int, default=60)
    only = "measure the configurations whose name contains one of these"
    parser.add_argument("--only", nargs="+", metavar="TEXT", help=only)
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    config = (
        chatglm.ChatGLMConfig()
        if cuda
        else chatglm.ChatGLMConfig.from_pretrained(str(chatglm.BUILT_IN))
    )
    config.padded_vocab_size = 65024
    dtype = torch.float16 if cuda else torch.float32
    torch.manual_seed(0)
    with torch.device("meta"):
        empty = chatglm.ChatGLMForCausalLM(config)
    weights = sum(param.numel() for param in empty.parameters())
    weights -= empty.get_input_embeddings().weight.numel()
    dataset = data.ConversationDataset(
        args.data, data.ChatGLMTokenizer(args.vocabulary.parent), 512, args.system
    )
    ceiling, kept_up = matmul_flops(device, dtype, 8192 if cuda else 1024)
    name = (
        torch.cuda.get_device_name()
        if cuda
        else f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    )
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{datetime.date.today()}, {name}, {versions}")
    print(f"{weights:,} random weights besides the embedding, {str(dtype)[6:]}; ", end="")
    print(f"matrix product {ceiling / 1e12:.2f} TFLOP/s, kept up {kept_up / 1e12:.2f}\n")
    columns = ["", "samples/s", "tokens/s", "padding", "peak GiB", "longest GiB", "of ceiling", ""]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    runs = [  # (name, base, base → what is printed)
        (name, load_in, partial(measure_loop, dataset, flags, args.updates))
        for name, (load_in, flags) in LOOPS.items()
    ]
    for name, (load_in, *how) in TRAINERS.items():
        runs.append((name, load_in, partial(measure_trainer, dataset, *how, min(args.updates, 20))))
    for name, (load_in, length, size, flags) in FULL.items() if cuda else ():
        split = "--batch-size 1 --gradient-accumulation-steps 1" if length > 512 else ""
        updates = size if length > 512 else size // 8
        measure = partial(measure_loop, RandomTokens(length, size), f"{flags} {split}", updates)
        runs.append((name, load_in, measure))
    order = [None, "fp8", "fp8 once", "4bit"]
    base, loaded = None, "nothing yet"
    for name, load_in, measure in sorted(runs, key=lambda each: order.index(each[1])):
        is_for_cpu = load_in is None and (name in CPU_LOOPS or name not in LOOPS)
        if not any(each in name for each in args.only or [""]) or not (cuda or is_for_cpu):
            continue
        if load_in != loaded:
            del base
            gc.collect()
            torch.manual_seed(0)
            base = random_base(config, device, dtype, load_in and load_in.split()[0])
            loaded = load_in
            if load_in == "fp8 once":  # as where the device has no room for both layouts
                fp8.store_transposed = lambda model: None
        if cuda:
            torch._C._cuda_clearCublasWorkspaces()  # each stream of a row before has some
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            r = measure(base)
        except Exception as error:  # the other rows are worth measuring
            print(f"| {name} | {type(error).__name__}: {str(error).splitlines()[0][:80]} |")
            continue
        peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if cuda else ""
        flops = r["computed"] * weights * (6 if r["checkpointed"] else 4)
        seconds = r["seconds"]
        row = [
            name,
            f"{r['samples'] / seconds:.1f}",
            f"{r['tokens'] / seconds:,.0f}",
            f"{1 - r['tokens'] / r['padded']:.0%}",
            peak,
            r["longest"],
            f"{flops / seconds / ceiling:.0%}",
            r["note"],
        ]
        print(f"| {' | '.join(row)} |", flush=True)
        gc.collect()
        torch._dynamo.reset()


if __name__ == "__main__":
    main()
