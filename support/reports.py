"""What train.py prints before the first update and after the last one."""

import itertools
import os
import shlex
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import torch

from support.bases import trained_with
from support.checkpoints import BEST
from support.config import IGNORE, dtype_name
from support.defaults import ADAPTER_DIR
from support.devices import attention_kernel
from support.memory import peak_of_process
from support.processes import rank_and_count
from support.progress import perplexity_of


def in_colour():
    """Whether stdout is a terminal that shows colours."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def shortened(text, most=1000):
    """`text`, or its beginning and its end"""
    left_out = len(text) - most
    if left_out <= 0:
        return text
    return f"{text[: most // 2]} … ({left_out:,} characters) … {text[-most // 2 :]}"


def render(tokenizer, input_ids, labels, with_colour=False):
    """A sample, two tensors, as text, with its supervised parts between ⟦ and ⟧, and in green."""
    text = ""
    green, plain = ("\033[32m", "\033[0m") if with_colour else ("", "")
    pairs = zip(input_ids.tolist(), labels.tolist(), strict=True)
    for is_supervised, group in itertools.groupby(pairs, lambda pair: pair[1] != IGNORE):
        ids = [id for id, _ in group]
        part = tokenizer.decode(ids) + ("</s>" if ids[-1] == tokenizer.eos_id else "")
        text += f"{green}⟦{shortened(part)}⟧{plain}" if is_supervised else shortened(part)
    return text


def describe_base(model, path, seconds):
    """Prints which base was loaded. path: its directory or hub id."""
    size = f"{sum(param.numel() for param in model.parameters()):,} parameters"
    where = f"{dtype_name(model.dtype)} on {model.device}"
    print(f"model    {path}: {size}, {where}, loaded in {seconds:.1f} s")


def describe_run(run, tokenizer):
    """Prints what will be trained, so that the user can check it: with --dry-run, three samples."""
    args, dataset, params = run.args, run.dataset, run.optimizer.param_groups[0]["params"]
    lengths, total = sorted(dataset.lengths), sum(dataset.lengths)
    share = f"{sum(dataset.supervised) / total:.1%} of them supervised"
    middle, longest = lengths[len(lengths) // 2], lengths[-1]
    has = f"a sample has {total / len(lengths):.1f} tokens (median {middle}, longest {longest})"
    print(f"data     {len(lengths):,} samples: {total:,} tokens, {share}; {has}")
    lost = f"{dataset.cut} cut, {dataset.dropped} dropped"
    print(f"         longer than --max-length {args.max_length}: {lost}")
    describe_unused(dataset)
    last = len(dataset) - 1
    for i in sorted({0, last // 2, last}) if args.dry_run else [0]:
        print(f"sample   {dataset.places[i]}, supervised between ⟦ and ⟧:")
        print(textwrap.indent(render(tokenizer, *dataset[i], in_colour()), "         "))
    if run.eval_set:
        tokens = f"{sum(run.eval_set.supervised):,} supervised tokens"
        when = f"after every {run.eval_every:,} updates and at the end"
        print(f"evaluate {len(run.eval_set):,} samples, {tokens}, {when}")
        if args.eval_data:  # with --eval-split, the lines about the data have told this
            print(f"         {run.eval_set.cut} cut, {run.eval_set.dropped} dropped")
            describe_unused(run.eval_set)
            trained = {*dataset.samples.digests()}
            if both := sum(each in trained for each in run.eval_set.samples.digests()):
                print(f"         warning: {both:,} of these samples are also trained on")
    count = f"{sum(p.numel() for p in params):,} parameters in {len(params)} tensors"
    lora = f"LoRA r {args.lora_r}, alpha {args.lora_alpha:g} on {' '.join(args.target_modules)}"
    whole = f", and whole: {' '.join(args.modules_to_save)}" if args.modules_to_save else ""
    kinds = " and ".join(kind for kind in ("rslora", "dora") if getattr(args, kind))
    print(f"trained  {count}: {lora}{whole}{kinds and f', {kinds}'}")
    if args.init_adapter:
        system = trained_with(args.init_adapter).system
        note = f"; it was trained with the system message {system!r}" if system else ""
        print(f"         starting from {args.init_adapter}{note if system != args.system else ''}")
    for warning in pointless(args, run.total_steps):
        print(f"         warning: {warning}")
    size = f"{args.batch_size} × {args.gradient_accumulation_steps} samples"
    processes = rank_and_count()[1]
    size += f" × {processes} processes" if processes > 1 else ""
    print(f"updates  {run.total_steps:,}, each of {size}")
    print(f"         attention: {attention_kernel(run.model)} kernel", flush=True)


def pointless(args, total_steps):
    """→ sentences about flags with which the run learns nothing, or less than it could"""
    told = []
    if args.learning_rate == 0:
        told.append("--learning-rate 0: nothing is learnt")
    if args.lora_alpha == 0:
        told.append("--lora-alpha 0: LoRA's output is multiplied by 0, so nothing is learnt")
    if isinstance(args.warmup_steps, int) and args.warmup_steps >= total_steps:
        end = f"the run has {total_steps:,} updates, so the learning rate never reaches its peak"
        told.append(f"--warmup-steps {args.warmup_steps}: {end}")
    return told


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
    elif peak := peak_of_process():
        print(f"         peak memory {peak / 2**20:,.0f} MiB of this process")
    saved = output_dir
    if run.eval_set:
        took = f"evaluations took {progress.evaluating:.1f} s"
        after = f"after update {progress.evaluated_step:,}"
        print(f"eval     {loss_in_words(progress.eval_loss)} {after}; {took}")
    if progress.best_loss is not None:
        saved = f"{output_dir}/{BEST}"
        lowest = f"{loss_in_words(progress.best_loss)} after update {progress.best_step:,}"
        print(f"         the lowest: {lowest}, saved in {saved}")
    if progress.is_out_of_patience(run.args.patience) and progress.step < run.total_steps:
        since = f"no lower loss in {progress.evaluations_since_best} evaluations"
        print(f"stopped  early, {since}: {progress.step:,} of {run.total_steps:,} updates")
    is_last = progress.best_loss is None or progress.best_step == progress.step
    last, which = ("", "it") if is_last else (", of the last update", "the best one")
    print(f"saved    {output_dir}/adapter_model.safetensors{last}; try {which}:")
    infer = Path(__file__).parents[1] / "infer.py"
    with suppress(ValueError):  # Windows: on another drive
        infer = os.path.relpath(infer)
    adapter = "" if saved == ADAPTER_DIR else f" --adapter {shlex.quote(saved)}"
    load_in = f" --load-in {run.args.load_in}" if run.args.load_in else ""
    print(f'         python {infer}{adapter}{load_in} --prompt "你是谁？"')


def report_evaluation(dataset, loss, seconds):
    """Prints the result of --eval-only."""
    lengths = f"{len(dataset):,} samples, {sum(dataset.lengths):,} tokens"
    supervised = f"{sum(dataset.supervised):,} of them supervised"
    print(f"eval     {lengths}, {supervised}: {dataset.cut} cut, {dataset.dropped} dropped")
    print(f"         {loss_in_words(loss)}, in {seconds:.1f} s")


def loss_in_words(loss):
    if loss is None:
        return "loss not finite"
    return f"loss {loss:.4f} per supervised token, perplexity {perplexity_of(loss):,.4g}"
