"""Measures infer.py's decoding against transformers' generate on the same network, in one run.

    python tests/benchmarks/decoding.py

The network has chatglm3-6b's shape in fp16 on CUDA, and the built-in model's in fp32 on a CPU. Its
weights are random. Every row decodes greedily, from a prompt of 64 tokens, and never stops early.

- "of bandwidth": the bytes that a step must read (all weights but the embedding) times steps a
  second, divided by the measured rate of a copy on the device (bytes read and written).
- "first token": the time from the weights in memory to the first token. It holds loading kernels,
  the cache, compiling, capturing and prefill. Then the same decoder answers again, and tokens a
  second are measured from the second token on.

transformers' network is its GLM-4, which has the same architecture, with views of the same weights.
Its first logits are checked to be ours.
"""

import argparse
import datetime
import gc
import itertools
import platform
import sys
import time
from pathlib import Path

import torch
import transformers
from random_checkpoint import random_base, random_model

sys.path.insert(0, str(Path(__file__).parents[2]))
import infer
import model as chatglm
from support import layouts
from support.memory import wait_for

PROMPT = 64
RUNS = {  # name: (rows, how Decoder is made, how the base is loaded); None: transformers
    "graph, batch 1": (1, {}, None),
    "compiled, graph, batch 1": (1, dict(compiled=True), None),
    "graph, batch 16": (16, {}, None),
    "compiled, graph, batch 16": (16, dict(compiled=True), None),
    "eager, batch 1": (1, dict(use_graph=False), None),
    "transformers' generate, batch 1": (1, None, None),
    "transformers' generate, batch 16": (16, None, None),
    "fp8, graph, batch 1": (1, {}, "fp8"),
    "fp8, compiled, graph, batch 1": (1, dict(compiled=True), "fp8"),
    "fp8, compiled, graph, batch 16": (16, dict(compiled=True), "fp8"),
    "4bit, graph, batch 1": (1, {}, "4bit"),
    "4bit, compiled, graph, batch 1": (1, dict(compiled=True), "4bit"),
    "4bit, graph, batch 16": (16, {}, "4bit"),
    "4bit, compiled, graph, batch 16": (16, dict(compiled=True), "4bit"),
}
ON_A_CPU = {"eager, batch 1", "compiled, batch 1", "eager, batch 16", *list(RUNS)[5:7]}


def copy_rate(device):
    """Bytes a second, read and written, of the best of some copies."""
    source = torch.empty(
        2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device
    )
    target, best = torch.empty_like(source), float("inf")
    for _ in range(20):
        wait_for(device)
        start = time.perf_counter()
        target.copy_(source)
        wait_for(device)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


class InMemory:
    """A model in memory, as layouts.as_glm reads it"""

    def __init__(self, model):
        self.config, self.weights = model.config, dict(model.named_parameters())
        self.shapes = {name: weight.shape for name, weight in self.weights.items()}

    def __getitem__(self, name):
        return self.weights[name].detach()


def as_glm(model):
    """→ transformers' GlmForCausalLM with views of `model`'s weights; query_key_value is split"""
    return layouts.as_glm(InMemory(model), model.dtype, model.device)


def times_of_tokens(model, rows, how, count, again):
    """→ (the start, the times of the first answer's tokens, the times of a later answer's)"""
    prompts = torch.randint(3, model.config.padded_vocab_size, (rows, PROMPT)).tolist()
    start, runs = time.perf_counter(), []
    if how is None:
        glm = as_glm(model)
        ids = torch.tensor(prompts, device=model.device)
        start = time.perf_counter()
        for _ in range(1 + again):
            times = []

            def stamp(
                _, logits, times=times
            ):  # every token's logits pass here; a reader of the text would wait too
                wait_for(model.device)
                times.append(time.perf_counter())
                return logits

            generate = dict(max_new_tokens=count, do_sample=False, logits_processor=[stamp])
            glm.generate(ids, attention_mask=torch.ones_like(ids), **generate)
            runs.append(times)
        return start, runs[0], runs[-1]
    if how.get("compiled"):
        infer.compile_decoding(model, rows)
    decoder = infer.Decoder(model, **how)
    for _ in range(1 + again):
        events = decoder.generate(prompts, count)
        runs.append(
            [time.perf_counter() for row, id in events if row == rows - 1 and id is not None]
        )
    for module in model.modules():  # what compile_decoding did
        module._compiled_call_impl = None
        for name in ("forward_one", "forward"):
            vars(module).pop(name, None)
    return start, runs[0], runs[-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=256, help="decoded by every row")
    parser.add_argument(
        "--only", default="", help="measure the rows of the table whose name contains this"
    )
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    torch.manual_seed(0)
    if cuda:
        model = random_model(chatglm.ChatGLMConfig(), device, torch.float16)
        name = torch.cuda.get_device_name()
    else:
        model = random_model(
            chatglm.ChatGLMConfig.from_pretrained(str(chatglm.BUILT_IN)), device, torch.float32
        )
        name = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    model.eval()
    weights = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    rate = copy_rate(device)
    with torch.no_grad():
        ids = torch.randint(3, model.config.padded_vocab_size, (1, PROMPT), device=device)
        ours, theirs = (
            model(ids).logits.float(),
            as_glm(model)(ids).logits.float(),
        )
        difference = float((ours - theirs).norm() / ours.norm())
        assert difference < (1e-2 if cuda else 1e-5), difference
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{datetime.date.today()}, {name}, {versions}")
    print(f"{weights / 2**30:.2f} GiB read a step; copy {rate / 1e12:.3f} TB/s, ", end="")
    print(f"so at most {rate / weights:.0f} steps/s; ", end="")
    print(f"logits differ from transformers' by {difference:.0e} of their norm\n")
    print("| | tok/s | of bandwidth | first token, s |\n|---|---|---|---|")
    runs = (
        RUNS
        if cuda
        else {
            n.replace("compiled, graph", "compiled").replace("graph", "eager"): r
            for n, r in RUNS.items()
        }
    )
    loaded = None
    for name, (rows, how, load_in) in runs.items():
        if args.only not in name or (not cuda and name not in ON_A_CPU):
            continue
        if load_in != loaded:
            config = model.config
            del model
            model, loaded = random_base(config, device, torch.float16, load_in).eval(), load_in
            weights = sum(p.nbytes for p in model.parameters())
            weights -= model.get_input_embeddings().weight.nbytes
        wait_for(device)
        start, first, later = times_of_tokens(model, rows, how, args.tokens, again=2)
        gaps = [b - a for a, b in itertools.pairwise(later)]
        steps = len(gaps) / sum(gaps)
        share, wait = steps * weights / rate, first[0] - start
        print(f"| {name} | {rows * steps:,.0f} | {share:.0%} | {wait:.1f} |", flush=True)
        gc.collect()
        torch._dynamo.reset()
        if cuda:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
