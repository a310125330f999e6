"""An export is opened by the other program's own reader, and compared with this project's model.

Three things are compared: the ids of some conversations, the log-probabilities of the likeliest
tokens at each step of the reader's greedy answers, and the greedy tokens. The last are only told,
because near ties fall either way. This project's side is the base with the adapter beside it:
nothing of what was merged and written is used.
"""

import json
import subprocess
import sys
import threading
import urllib.request
import weakref
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
CONVERSATIONS = (
    [{"role": "user", "content": "你好！你是谁？"}],
    [
        {"role": "system", "content": "Answer in one sentence."},
        {"role": "user", "content": "What is a low-rank adapter?"},
    ],
    [
        {"role": "user", "content": "  two spaces,\n\nan empty line, a\ttab and 😀 "},
        {"role": "assistant", "content": "好的。"},
        {"role": "user", "content": "3.14 × 2 = ?"},
    ],
    [
        {"role": "user", "content": "北京今天天气怎么样？"},
        {"role": "assistant", "content": "tool_call(city='北京')"},
        {"role": "observation", "content": '{"celsius": 21}'},
    ],
)
NEW_TOKENS = 16  # of each greedy answer
TOP = 20  # log-probabilities of so many tokens are compared at each step
PATIENCE = 600  # seconds that llama.cpp may take to start, and for one answer
UNLIKELY = -10  # what both sides find less likely than exp(-10) is not compared
# How much a log-probability may differ: what rounding to the type gives, with room. In fp32 only
# the order of sums differs. Rounding moves random weights' answers most: those of the 6B shape
# differed by 0.02 in fp16 and 0.7 in q8_0.
LIMITS = {"fp32": 1e-3, "fp16": 0.1, "bf16": 1}
LIMITS |= {"f32": 1e-3, "f16": 0.1, "q8_0": 2, "q4_0": 8}


class Step(NamedTuple):
    """One token of a greedy answer."""

    id: int
    log_probs: dict  # {id: log-probability} of the TOP likeliest; {} if the reader gave none


class Differs(ValueError):
    """The export computes something else than the model."""


def compare(reader, model, prompts, limit):
    """Prints three lines: ids, log-probabilities, greedy tokens. Raises Differs.

    reader: TransformersReader or LlamaCppReader; model: a MergedModel; prompts: [(messages, ids)],
    the conversations and what encode_prompt makes of them; limit: see LIMITS
    """
    for messages, ids in prompts:
        if (found := reader.encode(messages)) != ids:
            what = f"the prompt {messages[-1]['content']!r} gets the ids {found}, not {ids}"
            hint = "a special name in the system message does that; else give --no-check"
            raise Differs(f"{reader.name}: {what} ({hint})")
    count = sum(len(ids) for _, ids in prompts)
    print(f"checked  with {reader.name}: {count} ids of {len(prompts)} prompts are equal")
    answers = [reader.answer(ids) for _, ids in prompts]
    pairs = zip(prompts, answers, strict=True)
    rows = [ids + [step.id for step in answer] for (_, ids), answer in pairs]
    longest = max(map(len, rows))
    logits = model.logits(torch.tensor([row + [0] * (longest - len(row)) for row in rows]))
    differences, are_equal = [], []
    for (_, ids), answer, row in zip(prompts, answers, logits, strict=True):
        ours = row[len(ids) - 1 :][: len(answer)].log_softmax(-1)
        for step, mine in zip(answer, ours, strict=True):
            pairs = [(mine[id].item(), found) for id, found in step.log_probs.items()]
            differences += [abs(a - b) for a, b in pairs if not (a < UNLIKELY and b < UNLIKELY)]
            are_equal.append(step.id == mine.argmax().item())
    if not differences:
        raise Differs(f"{reader.name}: it has answered nothing that could be compared")
    # torch's max is NaN if one value is; Python's may not be.
    largest, steps = torch.tensor(differences).max().item(), len(are_equal)
    told = f"log-probabilities differ by at most {largest:.1e} (top {TOP} of {steps} steps"
    print(f"         {told}; limit {limit:g})")
    print(f"         {sum(are_equal)} of {steps} greedy tokens are equal")
    if not largest <= limit:
        raise Differs(f"{reader.name}: {told}); rounding to this type gives at most {limit:g}")


class TransformersReader:
    """transformers' own tokenizer and network. It computes in fp32, module by module."""

    def __init__(self, directory, network=None):
        """network: that of `directory`, if from_pretrained can't read it without remote code"""
        self.name = f"transformers {version('transformers')}"
        options = dict(trust_remote_code=False)  # without it, transformers offers to run code
        self.tokenizer = AutoTokenizer.from_pretrained(directory, **options)
        options["dtype"] = "auto"
        self.network = network or AutoModelForCausalLM.from_pretrained(directory, **options)
        self.network.eval()
        for module in self.network.modules():
            if [*module.parameters(recurse=False)]:
                module.register_forward_pre_hook(_to_fp32)
                module.register_forward_hook(_to_stored)

    def encode(self, messages):
        """→ the ids of the prompt, with the chat template"""
        options = dict(add_generation_prompt=True, return_dict=False)
        return self.tokenizer.apply_chat_template(messages, **options)

    @torch.no_grad()
    def answer(self, ids):
        """→ [Step] of the greedy answer to a prompt"""
        options = dict(do_sample=False, max_new_tokens=NEW_TOKENS, output_logits=True)
        found = self.network.generate(
            torch.tensor([ids]), return_dict_in_generate=True, eos_token_id=None, **options
        )
        new = found.sequences[0, len(ids) :].tolist()
        tops = [logits[0].float().log_softmax(-1).topk(TOP) for logits in found.logits]
        pairs = (dict(zip(t.indices.tolist(), t.values.tolist(), strict=True)) for t in tops)
        return [Step(*each) for each in zip(new, pairs, strict=True)]


def _to_fp32(module, inputs):
    for param in module.parameters(recurse=False):
        param.stored, param.data = param.data, param.data.float()
    return tuple(x.float() if x.is_floating_point() else x for x in inputs)


def _to_stored(module, inputs, output):
    for param in module.parameters(recurse=False):
        param.data = param.stored


def _kill(process):
    process.kill()
    process.communicate()


class LlamaCppReader:
    """llama.cpp's server on the CPU: see support/llama_server.py."""

    def __init__(self, file, adapter=None, context=1024):
        """adapter: None, or a GGUF file of an adapter; context: tokens of prompt and answer"""
        self.name = f"llama.cpp (xllamacpp {version('xllamacpp')})"
        arguments = [Path(file).absolute(), context, torch.get_num_threads()]
        arguments += [Path(adapter).absolute()] if adapter else []
        command = [sys.executable, "-m", "support.llama_server", *map(str, arguments)]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.server = subprocess.Popen(command, cwd=ROOT, encoding="utf-8", **pipes)
        self.kill = weakref.finalize(self, _kill, self.server)
        alarm = threading.Timer(PATIENCE, self.server.kill)
        alarm.start()
        self.address = self.server.stdout.readline().strip()
        alarm.cancel()
        if not self.address.startswith("http"):
            raise Differs(f"{self.name}: {self.address or 'it has ended without a word'}")

    def close(self):
        """Ends the server, which lets go of the file."""
        self.kill()

    def post(self, path, **body):
        """A request to the server → its answer, from JSON"""
        url, data = self.address + path, json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        no_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with no_proxy.open(request, timeout=PATIENCE) as answer:
                return json.loads(answer.read())
        except OSError as error:
            raise Differs(f"{self.name}: {error}") from error

    def encode(self, messages):
        """→ the ids of the prompt, with the chat template"""
        text = self.post("/apply-template", messages=messages)["prompt"]
        return self.post("/tokenize", content=text, parse_special=True)["tokens"]

    def answer(self, ids):
        """→ [Step] of the greedy answer to a prompt"""
        steps = []
        options = dict(n_predict=1, n_probs=TOP, temperature=0, return_tokens=True)
        while len(steps) < NEW_TOKENS:
            found = self.post("/completion", prompt=ids + [step.id for step in steps], **options)
            if found["stop_type"] == "eos":
                break
            told = found.get("completion_probabilities")  # None if a character is not complete
            tops = told[0]["top_logprobs"] if told else []
            log_probs = {top["id"]: top["logprob"] for top in tops}
            steps.append(Step(found["tokens"][0], log_probs))
        return steps
