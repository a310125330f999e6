"""What train.py prints before the first update and after the last one."""

import itertools
import os
import shlex
import textwrap
import time
from pathlib import Path

import torch

from support.config import ADAPTER_DIR, IGNORE, dtype_name
from support.processes import rank_and_count


def render(tokenizer, input_ids, labels):
    """A sample, two tensors, as text, with its supervised parts between ⟦ and ⟧."""
    text = ""
    pairs = zip(input_ids.tolist(), labels.tolist(), strict=True)
    for is_supervised, group in itertools.groupby(pairs, lambda pair: pair[1] != IGNORE):
        ids = [id for id, _ in group]
        part = tokenizer.decode(ids) + ("</s>" if ids[-1] == tokenizer.eos_id else "")
        text += f"⟦{part}⟧" if is_supervised else part
    return text


def describe_base(model, path, seconds):
    """Prints which base was loaded. path: its directory or hub id."""
    size = f"{sum(param.numel() for param in model.parameters()):,} parameters"
    where = f"{dtype_name(model.dtype)} on {model.device}"
    print(f"model    {path}: {size}, {where}, loaded in {seconds:.1f} s")


def describe_run(run, sample):
    """Prints what will be trained, so that the user can check it. `sample` is rendered text."""
    args, dataset, params = run.args, run.dataset, run.optimizer.param_groups[0]["params"]
    lengths, total = sorted(dataset.lengths), sum(dataset.lengths)
    share = f"{sum(dataset.supervised) / total:.1%} of them supervised"
    middle, longest = lengths[len(lengths) // 2], lengths[-1]
    has = f"a sample has {total / len(lengths):.1f} (median {middle}, longest {longest})"
    print(f"data     {len(lengths):,} samples: {total:,} tokens, {share}; {has}")
    lost = f"{dataset.cut} cut, {dataset.dropped} dropped"
    print(f"         longer than --max-length {args.max_length}: {lost}")
    describe_unused(dataset)
    print(f"sample   {dataset.places[0]}, supervised between ⟦ and ⟧:")
    print(textwrap.indent(sample, "         "))
    count = f"{sum(p.numel() for p in params):,} parameters in {len(params)} tensors"
    lora = f"LoRA r {args.lora_r}, alpha {args.lora_alpha:g} on {' '.join(args.target_modules)}"
    whole = f", and whole: {' '.join(args.modules_to_save)}" if args.modules_to_save else ""
    print(f"trained  {count}: {lora}{whole}")
    size = f"{args.batch_size} × {args.gradient_accumulation_steps} samples"
    processes = rank_and_count()[1]
    size += f" × {processes} processes" if processes > 1 else ""
    print(f"updates  {run.total_steps:,}, each of {size}", flush=True)


def describe_unused(dataset):
    """Prints what of the records is not used, by reason, and how much an epoch uses."""
    reader = dataset.reader
    reasons = {
        "answers with loss false are not learnt": reader.not_learnt,
        "last questions without an answer are dropped": reader.unanswered,
    }
    told = [f"{count:,} {what}" for what, count in reasons.items() if count]
    told += [reader.about_unread()] if reader.unread else []
    if dataset.samples_per_epoch != len(dataset):
        told.append(f"an epoch has {dataset.samples_per_epoch:,} samples")
    for line in told:
        print(f"         {line}")


def report_result(run):
    """Prints what was done, and the command that tries the result."""
    progress, output_dir = run.progress, run.args.output_dir
    took = time.perf_counter() - progress.started
    samples, tokens = progress.samples_here, progress.tokens_here
    if samples:
        rates = f"{samples / took:.1f} samples/s, {tokens / took:,.0f} tokens/s"
        print(f"speed    {samples:,} samples in {took:.1f} s: {rates}")
    else:
        print("         this run had already finished: there was nothing left to do")
    if run.scaler.is_enabled():
        skipped = f"{int(progress.skipped)} updates skipped because fp16 overflowed"
        print(f"         {skipped}; loss scale {run.scaler.get_scale():g}")
    if run.device.type == "cuda":
        print(f"         peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    print(f"saved    {output_dir}/adapter_model.safetensors; try it:")
    infer = os.path.relpath(Path(__file__).parents[1] / "infer.py")
    adapter = "" if output_dir == ADAPTER_DIR else f" --adapter {shlex.quote(output_dir)}"
    print(f'         python {infer}{adapter} --prompt "你是谁？"')
