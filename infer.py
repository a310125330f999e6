"""Answers with ChatGLM3 and the adapter that train.py saved: a chat, one prompt, or files of prompts; and merges the two.

python infer.py                                                              # a chat in the terminal
python infer.py --prompt "你是谁？" --compare                                # the base's answer, then the adapter's
python infer.py --input dataset/sample.jsonl --output answers.jsonl --greedy # a batch; run again, it goes on
python infer.py --merge-to merged                                            # base and adapter as one checkpoint
"""

import argparse
import collections
import contextlib
import itertools
import json
import os
import shlex
import shutil
import signal
import sys
import threading
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers.utils import cached_file

import data
import model as chatglm

PREFILL_TOKENS = 16384  # of prompts that are computed at a time
SHARD = "2GB"  # of a merged model, about the official size
# Small files that stand beside the official weights; they are copied with a merged model, and never run.
OFFICIAL_FILES = """tokenizer.model tokenizer_config.json special_tokens_map.json configuration_chatglm.py
    modeling_chatglm.py tokenization_chatglm.py quantization.py MODEL_LICENSE""".split()


def parse_args(argv=None):
    number = chatglm.number
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Without --prompt, --input and --merge-to: a chat.",
        usage="%(prog)s [--prompt TEXT | --input FILE … --output FILE | --merge-to DIR] [options]",
        formatter_class=chatglm.HelpFormatter,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("what to do")
    add = group.add_mutually_exclusive_group().add_argument
    add("--prompt", metavar="TEXT", help="answer this user's message")
    add("--input", nargs="+", metavar="FILE", help="answer these records, of train.py's kinds")
    add("--merge-to", metavar="DIR", help="save base and adapter as one checkpoint")
    add = group.add_argument
    add("--compare", action="store_true", help="with --prompt: the base's answer first")
    add("--output", metavar="FILE", help="with --input: JSONL, each record with its prediction as soon as it is there")
    add = parser.add_argument_group("model").add_argument
    add("--adapter", default=chatglm.ADAPTER_DIR, metavar="DIR", help="what train.py wrote")
    add("--model", help="directory or hub id of the base; without it, the one the adapter was trained on")
    add("--no-adapter", action="store_true", help="answer with the base alone")
    add("--force", action="store_true", help="accept another base than the adapter was trained on")
    add("--system", metavar="TEXT", help="system message; without it, the one trained with")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA if there is one")
    dtypes = ("auto", *chatglm.DTYPES)
    add("--dtype", choices=dtypes, default="auto", help="auto: fp16 on CUDA, else fp32; with --merge-to, the base's")
    add("--load-in", choices=("4bit", "8bit"), help="quantise the base, with bitsandbytes")
    add("--compile", action="store_true", help="compile the blocks: faster, after some seconds")
    add = parser.add_argument_group("decoding").add_argument
    add("--batch-size", type=number(1, 2**16), default=16, help="records of --input that are answered at a time")
    add("--max-new-tokens", type=number(1, 2**20), default=128, help="length of the answer at most")
    add(
        "--greedy",
        action="store_true",
        help="always the most likely token; temperature, top-k, top-p and seed are not used",
    )
    add("--temperature", type=number(0.01, 100), default=0.8, help="below 1 sharpens, above 1 flattens")
    add("--top-k", type=number(1, 2**20), help="draw from this many likeliest tokens; without it, from any number")
    add("--top-p", type=number(1e-6, 1), default=0.8, help="draw from the likeliest tokens that add up to this")
    add(
        "--repetition-penalty", type=number(0.01, 100), default=1.0, help="above 1: fewer tokens that are there already"
    )
    add("--seed", type=number(0, 2**63 - 1), help="makes what is drawn repeatable")
    args = parser.parse_args(argv)
    for given, message in (
        (args.prompt is not None and not args.prompt.strip(), "argument --prompt: it is empty"),
        (args.merge_to == "", "argument --merge-to: it is empty"),
        (bool(args.input) != (args.output is not None), "--input and --output go together"),
        (args.compare and (args.prompt is None or args.no_adapter), "--compare needs --prompt, and an adapter"),
        (args.merge_to is not None and args.no_adapter, "--merge-to needs an adapter"),
        (args.merge_to is not None and args.load_in, "--merge-to: a quantised base can't be merged; no --load-in"),
        (args.compile and args.load_in, "--compile: quantised blocks are not compiled; no --load-in"),
    ):
        if given:
            parser.error(message)
    return args


# --- sampling: logits [B, V] in fp32; nothing here waits for the device, so all of it can be captured -----------------


def penalise(logits, seen, penalty):
    """Less of the tokens that were there: seen [B, V], bool."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits, k):
    return logits.masked_fill(logits < logits.topk(min(k, logits.shape[-1])).values[:, -1:], -torch.inf)


def keep_top_p(logits, p):
    """The smallest set of likeliest tokens whose probabilities reach p."""
    probs, ids = logits.softmax(-1).sort(descending=True)
    dropped = probs.cumsum(-1) - probs >= p
    return logits.masked_fill(torch.zeros_like(dropped).scatter(1, ids, dropped), -torch.inf)


def sample(logits, temperature=1.0, top_k=None, top_p=1.0):
    """→ one id a row, [B]"""
    logits = logits / temperature
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p < 1:
        logits = keep_top_p(logits, top_p)
    # Exponential clocks, each at the rate of its probability: the first to ring is a draw, and no device is waited for.
    return (logits.softmax(-1) / torch.empty_like(logits).exponential_()).argmax(-1)


def greedy(logits):
    return logits.argmax(-1)


# --- decoding ---------------------------------------------------------------------------------------------------------


class Decoder:
    """Prefill, then steps of one token for every row of a batch, over tensors that stay where they are: the cache, the
    rows' last ids and their positions. So the step can be captured in a CUDA graph, and replayed as one launch. All of
    it is kept for the next prompts, until they need more rows or more length.

    choose: logits [B, V] → ids [B]; penalty: see penalise; graph: whether to capture, on CUDA; compile: the step's blocks.
    """

    def __init__(self, model, choose=greedy, penalty=1.0, graph=True, compile=False):
        self.model, self.choose, self.penalty, self.compile = model, choose, penalty, compile
        self.cuda = model.device.type == "cuda"
        self.capture = graph and self.cuda
        self.rows = self.length = 0
        if compile:
            network = model.transformer
            for module in (*network.encoder.layers, network.encoder.final_layernorm, network.output_layer):
                module.compile(options={"coordinate_descent_tuning": True})  # products with one row become reductions
            for layer in network.encoder.layers:  # but only where a bias is not part of the product
                linear = layer.self_attention.query_key_value
                if linear.bias is not None:
                    linear.forward = lambda x, it=linear: F.linear(x, it.weight) + it.bias

    def reserve(self, rows, length):
        """Tensors, and the captured step, for so many sequences of up to `length` tokens."""
        if rows <= self.rows and length <= self.length:
            return
        model = self.model
        self.cache = self.graph = None  # frees the old ones first
        self.rows, self.length = rows, min(max(256, 1 << (length - 1).bit_length()), model.config.seq_length)
        self.cache = model.new_cache(rows, self.length)
        self.ids, self.positions = torch.zeros(2, rows, dtype=torch.long, device=model.device)
        self.seen = torch.zeros(rows, model.config.padded_vocab_size, dtype=torch.bool, device=model.device)
        if self.capture or self.compile:  # a first step compiles and loads kernels; the random state is restored
            with torch.random.fork_rng([torch.cuda.current_device()] if self.cuda else []):
                self.step()
        if self.capture:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.step()
            self.rope = model.transformer.rope  # the graph reads this one; the model may make a longer one

    def prefill(self, prompts, length):
        """Computes the prompts' keys and values, and chooses each row's first token."""
        self.reserve(len(prompts), length)
        prompts = prompts + prompts[:1] * (self.rows - len(prompts))
        device, longest = self.model.device, max(map(len, prompts))
        # Padded on the right, with a token of their own: it is not attended to, and `seen` holds no other.
        ids = torch.tensor([prompt + prompt[:1] * (longest - len(prompt)) for prompt in prompts], device=device)
        ends = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
        self.seen.zero_().scatter_(1, ids, True)
        self.positions.copy_(ends)
        last = []
        with torch.compiler.set_stance("force_eager") if self.compile else contextlib.nullcontext():
            at_a_time = max(1, PREFILL_TOKENS // longest)
            for start in range(0, self.rows, at_a_time):
                part = slice(start, start + at_a_time)
                cache = [[kv[part] for kv in layer] for layer in self.cache]
                hidden = self.model.transformer(ids[part], cache=cache)
                last.append(hidden[torch.arange(len(hidden), device=device), ends[part]])
        self.take(torch.cat(last))

    def step(self):
        self.take(self.model.transformer(self.ids[:, None], cache=self.cache, positions=self.positions)[:, 0])

    def take(self, hidden):
        """hidden [B, C] of each row's last token → its next token, in self.ids, and that token's position"""
        logits = self.model.transformer.output_layer(hidden).float()
        if self.penalty != 1:
            logits = penalise(logits, self.seen, self.penalty)
        self.ids.copy_(self.choose(logits))
        self.seen.scatter_(1, self.ids[:, None], True)
        self.positions.add_(1).clamp_(max=self.length - 1)  # a row that has ended goes idle at the cache's end

    def tokens(self):
        """Yields the ids chosen by prefill and then by each step, [B] on the host. On CUDA the next step is launched before
        the ids of the last are waited for, so that the device never waits for the host."""
        while True:
            ids = self.ids.to("cpu", non_blocking=True)  # on CUDA into pinned memory, without waiting
            if self.cuda:
                chosen = torch.cuda.Event()
                chosen.record()
                self.graph.replay() if self.graph else self.step()
                chosen.synchronize()
                yield ids.tolist()
            else:
                yield ids.tolist()
                self.step()

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, stop_ids=()):
        """prompts: lists of ids → yields (row, id) for every new token, step by step, and (row, None) where a row ends:
        before one of stop_ids, after max_new_tokens, or where the context is full."""
        room = [min(max_new_tokens, self.model.config.seq_length - len(prompt)) for prompt in prompts]
        self.prefill(prompts, max(len(prompt) + more for prompt, more in zip(prompts, room, strict=True)))
        going = list(range(len(prompts)))
        for count, ids in enumerate(self.tokens(), 1):
            for row in going:
                if ids[row] not in stop_ids:
                    yield row, ids[row]
                if ids[row] in stop_ids or count >= room[row]:
                    going = [other for other in going if other != row]
                    yield row, None
            if not going:
                return


def encode_prompt(decoder, tokenizer, messages, system):
    """→ ids; ValueError if they leave no room for an answer."""
    most = decoder.model.config.seq_length
    prompt_ids = data.encode_prompt(tokenizer, data.with_system(messages, system))
    if len(prompt_ids) >= most:
        raise ValueError(f"the prompt has {len(prompt_ids)} tokens; this model takes {most}")
    return prompt_ids


def answer(decoder, tokenizer, prompt_ids, max_new_tokens):
    """Yields the ids of one answer."""
    return (id for _, id in decoder.generate([prompt_ids], max_new_tokens, tokenizer.stop_ids) if id is not None)


def cut(decoder, prompt_ids, ids, max_new_tokens):
    """Why an answer stopped before its end, in words; None if it didn't."""
    if len(ids) == max_new_tokens:
        return f"cut at --max-new-tokens {max_new_tokens}"
    if len(prompt_ids) + len(ids) == decoder.model.config.seq_length:
        return f"cut at {len(ids)} tokens: the context is full"
    return None


def stream(tokenizer, ids, seen=None, with_metadata=False):
    """Yields the pieces of text that `ids`, an iterable, add to the answer; never half a character. seen: a list that gets
    the ids; with_metadata: the metadata's line first, where there is one."""
    seen, shown = [] if seen is None else seen, 0
    for id in ids:
        seen.append(id)
        if tokenizer.newline_id in seen:  # the line of metadata is over
            metadata, text = data.split_answer(tokenizer, seen)
            text = f"{metadata}\n{text}" if metadata and with_metadata else text
            yield text[shown:]
            shown = max(shown, len(text))
    if tokenizer.newline_id not in seen:
        yield data.split_answer(tokenizer, seen)[1]


# --- the model --------------------------------------------------------------------------------------------------------


def read_json(file):
    """A JSON object; ValueError if it's anything else."""
    try:
        value = json.loads(Path(file).read_text("utf-8"))
        if not isinstance(value, dict):
            raise ValueError("not an object")
        return value
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: damaged ({error}); copy it again, or train the adapter again") from error


def find_base(adapter_dir):
    """The base that an adapter names: a directory, if need be relative to the adapter's own, or a hub id."""
    file = Path(adapter_dir, "adapter_config.json")
    if not file.exists():
        if saved := sorted(Path(adapter_dir).glob("checkpoint-*[0-9]"), key=lambda path: (len(path.name), path.name)):
            raise ValueError(
                f"{adapter_dir}: no adapter here yet; finish the run with train.py --resume, or give a checkpoint of it, for "
                f"example --adapter {saved[-1]}"
            )
        raise ValueError(f"{adapter_dir}: no adapter here; run train.py first, or give --adapter DIR")
    name = read_json(file).get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        raise ValueError(f"{file}: it names no base; give --model DIR_OR_HUB_ID")
    beside = Path(adapter_dir, name)
    return str(beside.resolve()) if beside.is_dir() and not Path(name, "config.json").exists() else name


def base_file(path, name):
    """A small file of a checkpoint, from its directory or the hub; None if it isn't there."""
    quiet = dict(_raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False)
    return cached_file(path, name, **quiet)


def check_base(base, trained_on, path, adapter):
    """Raises ValueError if the base (see train.py's set_up) isn't the one that the adapter says it was trained on."""
    whats = {"shape": "shape", "vocabulary": "vocabulary", "fixed": "weights", "matrices": "weights"}
    for key, what in whats.items():
        if base[key] and trained_on.get(key) and base[key] != trained_on[key]:
            raise ValueError(
                f"{path}: {adapter} was trained on a base with other {what}; give that one with --model, use this one alone with --no-adapter, or accept it with --force"
            )


def set_up(args):
    """→ (the base, tokenizer, system message). Raises ValueError or OSError with a message for the user."""
    untrained = args.no_adapter and args.adapter == chatglm.ADAPTER_DIR and not Path(args.adapter).exists()
    path = args.model or (None if untrained else find_base(args.adapter))
    try:
        path = chatglm.find_model(path)
    except ValueError as error:
        if args.model:
            raise
        raise ValueError(f"{args.adapter}: its base {path!r} is not there; give --model DIR_OR_HUB_ID") from error
    if path == str(chatglm.TINY):
        print(
            "The built-in tiny model, random weights. For the real job: train.py --model DIR_OR_HUB_ID", file=sys.stderr
        )
    tokenizer = data.ChatGLMTokenizer(path)
    file = Path(args.adapter, "training_args.json")
    trained_with = read_json(file) if file.exists() else {}
    system, trained_on = trained_with.get("system"), trained_with.get("base") or {}
    if not isinstance(system, str | None) or not isinstance(trained_on, dict):
        raise ValueError(f"{file}: damaged; copy it again, or train the adapter again")
    system = args.system if args.system is not None else system
    tokenizer.encode(system or "")  # ValueError for what is not UTF-8
    dtype = args.dtype
    if args.merge_to is not None and dtype == "auto":
        config = read_json(base_file(path, "config.json"))
        own = f"torch.{config.get('torch_dtype', config.get('dtype'))}"
        dtype = next((name for name, value in chatglm.DTYPES.items() if str(value) == own), "auto")
    model = chatglm.load_model(path, args.device, dtype, args.load_in)
    tokenizer.check_fits(model.config.padded_vocab_size)
    if trained_on and not args.no_adapter and not args.force:
        check_base({"vocabulary": tokenizer.digest, **chatglm.fingerprint(model)}, trained_on, path, args.adapter)
    return model, tokenizer, system


def with_adapter(model, args):
    """Merges the adapter into the base, unless that is quantised. The product of A and B is rounded once, when added."""
    peft_model = chatglm.load_adapter(model, args.adapter)
    if not args.load_in:
        return peft_model.merge_and_unload().to(model.dtype)
    for param in peft_model.parameters():
        if param.dtype == torch.float32:
            param.data = param.data.to(model.dtype)  # the adapter's; there is no autocast here
    return model


def merge_to(model, path, directory):
    """Saves `model` in the official layout, with the files that stand beside the base's weights in `path`. It is written
    beside `directory` and then renamed: whole, or not there."""
    target = Path(directory).absolute()
    part = target.with_name(f"{target.name}.part")
    if part.exists():
        raise ValueError(f"{part}: it is where {target.name} would be written first; remove it")
    config = read_json(base_file(path, "config.json"))
    config = {name: value for name, value in config.items() if name not in ("dtype", "quantization_config")}
    config |= {"model_type": "chatglm", "architectures": ["ChatGLMModel"], "torch_dtype": str(model.dtype)[6:]}
    dim = model.config.kv_channels // 2
    frequencies = 1 / 10000 ** (torch.arange(0, dim, 2) / dim)  # the official code takes their dtype, not their values
    weights = {**model.state_dict(), "transformer.rotary_pos_emb.inv_freq": frequencies.to(model.dtype)}
    try:
        model.save_pretrained(part, state_dict=weights, max_shard_size=SHARD)
        (part / "config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", "utf-8")
        for name in OFFICIAL_FILES:
            if file := base_file(path, name):
                shutil.copyfile(file, part / name)
        for file in part.iterdir():
            shutil.copymode(part / "config.json", file)  # safetensors makes its files the owner's alone
        os.replace(part, target)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, Exception):  # of the disk, in words of whichever library wrote
            raise ValueError(f"{directory}: cannot write: {chatglm.brief(error)}") from error
        raise


# --- batch ------------------------------------------------------------------------------------------------------------


def without_prediction(record):
    return {name: value for name, value in record.items() if name not in ("prediction", "prediction_metadata")}


def as_line(record):
    """In bytes; half a surrogate pair is written as JSON does, \\udxxx."""
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def unanswered(args):
    """→ (the records of --input that have no line in --output yet [(place, record, messages)], how many have, the length
    of its complete lines in bytes). Equal records have a line each. Raises ValueError for an --output that isn't of these."""
    records = data.read_records(args.input, prompts=True)
    output = Path(args.output)
    directory, is_there = output.absolute().parent, output.exists()
    if not directory.is_dir():
        raise ValueError(f"{args.output}: there is no such directory; make it first")
    if (is_there and not output.is_file()) or not os.access(output if is_there else directory, os.W_OK):
        raise ValueError(f"{args.output}: cannot write there; choose another --output")

    def key(record):
        return json.dumps(without_prediction(record), sort_keys=True)

    remaining = collections.Counter(key(record) for _, record, _ in records)
    lines = [b""]
    if is_there:
        if any(output.samefile(file) for file in args.input):
            raise ValueError(f"{args.output}: it is an --input; choose another --output")
        lines = output.read_bytes().split(b"\n")
    tail = lines.pop()  # what follows the last newline was being written when the run ended
    starts = [as_line(without_prediction(record))[:-2] for _, record, _ in records]  # without the brace and newline
    if tail and not any(tail.startswith(start) or start.startswith(tail) for start in starts):
        raise ValueError(f"{args.output}: its last line is not one that infer.py wrote; choose another --output")
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record["prediction"], str):
                raise ValueError("prediction")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{args.output}:{number}: not a line that infer.py wrote; mend or remove it") from error
        remaining[key(record)] -= 1
        if remaining[key(record)] < 0:
            raise ValueError(f"{args.output}:{number}: this record is not in --input; choose another --output")
    left = []
    for place, record, messages in records:
        if remaining[key(record)]:
            remaining[key(record)] -= 1
            left.append((place, record, messages))
    return left, len(lines), sum(len(line) + 1 for line in lines)


def batch(args, decoder, tokenizer, system, left, done, end):
    """Answers the records, of similar length together, and adds each to --output as soon as its answer is complete."""
    jobs, faults, short = [], [], 0
    for place, record, messages in left:
        try:
            jobs.append((encode_prompt(decoder, tokenizer, messages, system), record))
        except ValueError as error:
            faults.append(f"{place}: {error}")
    if faults:
        raise ValueError(data.told(faults))
    jobs.sort(key=lambda job: len(job[0]))
    interval = 0.1 if sys.stderr.isatty() else 10
    bar = tqdm(total=done + len(left), initial=done, unit="answer", dynamic_ncols=True, mininterval=interval)
    with open(args.output, "ab") as file, bar:
        chatglm.lock(file, args.output)
        file.truncate(end)
        for start in range(0, len(jobs), args.batch_size):
            prompts, records = zip(*jobs[start : start + args.batch_size], strict=True)
            answers = [[] for _ in prompts]
            for row, id in decoder.generate(list(prompts), args.max_new_tokens, tokenizer.stop_ids):
                if id is not None:
                    answers[row].append(id)
                    continue
                short += cut(decoder, prompts[row], answers[row], args.max_new_tokens) is not None
                metadata, prediction = data.split_answer(tokenizer, answers[row])
                line = without_prediction(records[row]) | {"prediction": prediction}
                line |= {"prediction_metadata": metadata} if metadata else {}
                file.write(as_line(line))
                file.flush()
                bar.update()
    if short:
        print(
            f"({short} of {len(jobs)} answers are cut at --max-new-tokens, or where the context is full)",
            file=sys.stderr,
        )


# --- chat -------------------------------------------------------------------------------------------------------------

COMMANDS = "/reset forgets the conversation, /system TEXT sets the system message, /observation TEXT gives a tool's result, /exit"


def chat(args, decoder, tokenizer, system):
    """Turns of the terminal's lines and the model's answers, until /exit, the end of input, or Ctrl-C twice."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # input() then edits lines; a bare terminal would cut them at 4,095 bytes
    sys.stdin.reconfigure(errors="surrogateescape")  # what is not UTF-8 comes through, and the tokenizer refuses it
    asking, stopped = False, threading.Event()

    def interrupt(*_):
        stopped.set()
        if asking:
            raise KeyboardInterrupt

    def length(asked, system):
        return len(data.encode_prompt(tokenizer, data.with_system(sum(asked, []), system)))

    signal.signal(signal.SIGINT, interrupt)
    say = partial(print, file=sys.stderr, flush=True)
    say(f"{COMMANDS}. Ctrl-C stops an answer.")
    seq_length = decoder.model.config.seq_length
    room = seq_length - min(args.max_new_tokens, seq_length // 2)  # for the conversation; the rest is the answer's
    turns = []  # each a list of messages: the user's, and what followed it
    while True:
        leaving = asking and stopped.is_set()  # asking still: the last line was not read but interrupted
        stopped.clear()
        try:
            asking = True
            line = input("> ")
            asking = False
        except EOFError:
            return print()
        except KeyboardInterrupt:
            if leaving:
                return print()
            say("\n(Ctrl-C again, Ctrl-D or /exit leaves)")
            continue
        command, _, text = line.partition(" ")
        try:
            if not line.strip():
                continue
            elif command == "/exit":
                return
            elif command == "/reset":
                turns = []
                say("(a new conversation)")
                continue
            elif command == "/system":
                tokenizer.encode(text)  # ValueError for what is not UTF-8
                turns, system = ([], text) if text.strip() else (turns, system)
                say(f"(system message: {system or 'none'}{'; a new conversation' if text.strip() else ''})")
                continue
            elif command == "/observation" and text.strip() and turns:
                asked = [*turns[:-1], [*turns[-1], {"role": "observation", "content": text}]]
            elif command == "/observation":
                raise ValueError("/observation TEXT gives the result of the tool that an answer called")
            elif line.startswith("/"):
                raise ValueError(f"not a command here; {COMMANDS}; a message may start with a space")
            else:
                asked = [*turns, [{"role": "user", "content": line}]]
            whole = len(asked)
            while len(asked) > 1 and length(asked, system) > room:
                asked = asked[1:]
            prompt_ids = encode_prompt(decoder, tokenizer, sum(asked, []), system)
        except ValueError as error:
            say(f"({error})")
            continue
        if len(asked) < whole:
            say(f"(the context is full: forgot the oldest {whole - len(asked)} turns)")
        ids = []
        new_ids = answer(decoder, tokenizer, prompt_ids, args.max_new_tokens)
        new_ids = itertools.takewhile(lambda _: not stopped.is_set(), new_ids)
        for piece in stream(tokenizer, new_ids, ids, with_metadata=True):
            print(piece, end="", flush=True)
        print()
        metadata, content = data.split_answer(tokenizer, ids)
        if stopped.is_set():
            say("(stopped; what was said stays in the conversation)" if content else "(stopped; the turn is dropped)")
        elif reason := cut(decoder, prompt_ids, ids, args.max_new_tokens):
            say(f"({reason})")
        if content or not stopped.is_set():
            turns = [*asked[:-1], [*asked[-1], {"role": "assistant", "metadata": metadata, "content": content}]]


# --- main -------------------------------------------------------------------------------------------------------------


def reply(args, decoder, tokenizer, system):
    """Prints the answer to --prompt."""
    prompt_ids, ids = encode_prompt(decoder, tokenizer, [{"role": "user", "content": args.prompt}], system), []
    for text in stream(tokenizer, answer(decoder, tokenizer, prompt_ids, args.max_new_tokens), ids):
        print(text, end="", flush=True)
    print()
    if reason := cut(decoder, prompt_ids, ids, args.max_new_tokens):
        print(f"({reason})", file=sys.stderr)


def new_decoder(model, args):
    if args.seed is not None:
        torch.manual_seed(args.seed)
    choose = (
        greedy if args.greedy else partial(sample, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    )
    # 8-bit products wait for the device, which can't be captured.
    return Decoder(model, choose, args.repetition_penalty, graph=not args.load_in, compile=args.compile)


def run(args):
    """Raises ValueError or OSError with a message for the user."""
    todo = unanswered(args) if args.input else ()
    if args.merge_to is not None and Path(args.merge_to).exists():
        if not Path(args.merge_to).is_dir() or any(Path(args.merge_to).iterdir()):
            raise ValueError(f"{args.merge_to} exists already; choose another --merge-to")
    (args.model or "").encode()  # UnicodeEncodeError, a ValueError, for bytes that are not UTF-8
    model, tokenizer, system = set_up(args)
    path = model.name_or_path
    if args.compare:
        print("--- base")
        reply(args, new_decoder(model, args), tokenizer, system)
        print("--- adapter")
    if not args.no_adapter:
        model = with_adapter(model, args)
    if args.merge_to is not None:
        merge_to(model, path, args.merge_to)
        print(f"saved    {args.merge_to}; try it:")
        hint = "" if not system else f" --system {shlex.quote(system) if system.isprintable() else '…'}"
        print(f"         python infer.py --no-adapter --model {shlex.quote(args.merge_to)}{hint}")
        return
    decoder = new_decoder(model, args)
    if args.prompt is not None:
        reply(args, decoder, tokenizer, system)
    elif args.input:
        batch(args, decoder, tokenizer, system, *todo)
    else:
        chat(args, decoder, tokenizer, system)


def main(argv=None):
    args = parse_args(argv)
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to stop
    chatglm.quiet_libraries()
    try:
        run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the answer has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        chatglm.end(error, "infer.py", "out of memory; try --load-in 4bit, or with --input a smaller --batch-size")


if __name__ == "__main__":
    main()
