"""Answers with ChatGLM3 and the adapter that train.py saved.

    python infer.py                                                    # a chat in the terminal
    python infer.py --prompt "你是谁？" --compare                      # base, then adapter
    python infer.py --input questions.jsonl --output answers.jsonl     # a batch
    python infer.py --merge-to merged                                  # both as one checkpoint

In this order: decoding, first naively and then over a cache; text; the command.
Letters in shapes: B rows of a batch, V vocabulary, C hidden size.
"""

import signal
import sys
from contextlib import nullcontext
from functools import partial

# Until errors_for_user, Ctrl-C ends the program without a word, if it is not ignored (nohup, &).
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from support.infer_flags import parse_args

ARGS = parse_args() if __name__ == "__main__" else None  # a wrong flag is told before slow imports

import torch
import torch.nn.functional as F

import data
import model as chatglm
from support import answers, bases, commands
from support.chat import chat, reply
from support.export import Export, check_target
from support.merging import MergedModel
from support.preamble import Preamble, read_tools
from support.streaming import stream_text

PREFILL_TOKENS = 16384  # prefill computes so many at a time, with padding; at least one row


@torch.no_grad()
def generate_naively(model, prompt_ids, max_new_tokens, stop_ids=()):
    """The specification of greedy decoding: append the likeliest token, again and again. → new ids

    Each token is computed from the whole text so far. Decoder gives the same, many times faster.
    """
    ids = list(prompt_ids)
    for _ in range(max_new_tokens):
        logits = model(torch.tensor([ids], device=model.device)).logits[0, -1]
        if (next_id := int(logits.argmax())) in stop_ids:
            break
        ids.append(next_id)
    return ids[len(prompt_ids) :]


# --- choosing a token; nothing here waits for the device, so that CUDA graphs can capture it ---


def greedy(logits):
    """logits [B, V] → the likeliest id of each row, [B]"""
    return logits.argmax(-1)


def sample(logits, temperature=1.0, top_k=None, top_p=1.0):
    """logits [B, V], in fp32 → one drawn id for each row, [B]"""
    logits = logits / temperature
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p < 1:
        logits = keep_top_p(logits, top_p)
    # An exponential race: argmax(p / Exp(1)) draws like multinomial, but without synchronisation.
    return (logits.softmax(-1) / torch.empty_like(logits).exponential_()).argmax(-1)


def keep_top_k(logits, k):
    """Sets all but the k largest logits to minus infinity."""
    smallest = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < smallest, -torch.inf)


def keep_top_p(logits, p):
    """Keeps the likeliest tokens until their probabilities reach p; others get minus infinity."""
    probs, ids = logits.softmax(-1).sort(descending=True)
    sum_before = probs.cumsum(-1) - probs  # of the likelier tokens
    dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, sum_before >= p)
    return logits.masked_fill(dropped, -torch.inf)


def penalise(logits, seen, penalty):
    """Lowers the logits of tokens that already occurred, which seen [B, V], bool, marks."""
    lowered = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, lowered, logits)


# --- decoding over a cache --------------------------------------------------------------------


def compile_decoding(model, rows=1):
    """Compiles what a step of Decoder(compiled=True) runs. A second call compiles anew.

    rows: how many sequences are decoded together
    """
    # With one row, inductor makes a matrix product a reduction, which is faster, and more so if it
    # tries more ways. With more rows that only takes time.
    options = dict(coordinate_descent_tuning=True)
    options["coordinate_descent_check_all_directions"] = rows == 1
    network = model.transformer
    for layer in network.encoder.layers:
        plain = chatglm.Block.forward_one.__get__(layer)
        layer.forward_one = torch.compile(plain, options=options)
        linear = layer.self_attention.query_key_value
        # Its bias must not be a part of the product for that.
        if type(linear) is torch.nn.Linear and linear.bias is not None:
            linear.forward = lambda x, linear=linear: F.linear(x, linear.weight) + linear.bias
    network.encoder.final_layernorm.compile(options=options)
    network.output_layer.compile(options=options)


class Decoder:
    """Decodes a batch: prefill computes the prompts, then each step adds one token to every row.

    All state is in tensors with fixed addresses: the cache; each row's last id, which is not in the
    cache yet, and its position; and which ids were seen. So one CUDA graph holds the step, and
    replays it as one launch, whatever the rows' lengths. The tensors are kept for the next prompts,
    as long as these need no more rows or length.

    choose: a function, logits [B, V] → ids [B]; penalty: see penalise; use_graph: capture the step
    on CUDA; compiled: compile_decoding was called.
    """

    def __init__(self, model, choose=greedy, penalty=1.0, use_graph=True, compiled=False):
        self.model, self.network = model, model.transformer
        self.choose, self.penalty, self.compiled = choose, penalty, compiled
        self.is_cuda, self.graph = model.device.type == "cuda", None
        self.use_graph = use_graph and self.is_cuda
        self.rows = self.length = 0  # how much is allocated

    def reserve(self, rows, length):
        """Allocates `rows` sequences of `length` tokens or more, and captures the step."""
        if rows <= self.rows and length <= self.length:
            return
        model, device = self.model, self.model.device
        self.cache = self.graph = None  # frees the old ones first
        self.rows = rows
        # A power of two, so that a growing chat allocates rarely.
        self.length = min(max(256, 1 << (length - 1).bit_length()), model.config.seq_length)
        self.cache = model.new_cache(rows, self.length)
        self.ids, self.positions = torch.zeros(2, rows, dtype=torch.long, device=device)
        shape = (rows, model.config.padded_vocab_size)
        self.seen = torch.zeros(shape, dtype=torch.bool, device=device)
        if self.use_graph or self.compiled:
            # A first step compiles and loads kernels. It must not change the random state.
            with torch.random.fork_rng([torch.cuda.current_device()] if self.is_cuda else []):
                self.step()
        if self.use_graph:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.step()
            self.rope = self.network.rope  # kept alive: the graph reads this table

    def prefill(self, prompts, length):
        """Fills the cache with the prompts' keys and values, and chooses each row's first token.

        length: how many tokens prompt and answer have together, at most.
        """
        self.reserve(len(prompts), length)
        prompts = prompts + prompts[:1] * (self.rows - len(prompts))  # copies fill spare rows
        device, longest = self.model.device, max(map(len, prompts))
        # Padded on the right with a token of the prompt itself, so that `seen` marks no other.
        padded = [prompt + prompt[:1] * (longest - len(prompt)) for prompt in prompts]
        ids = torch.tensor(padded, device=device)
        last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
        self.seen.zero_().scatter_(1, ids, True)
        self.positions.copy_(last)  # choose_next adds 1
        rows_at_once = max(1, PREFILL_TOKENS // longest)
        hidden = []
        # The final norm is compiled for steps. Here it would be compiled again for each length.
        eager = torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()
        with eager:
            for start in range(0, self.rows, rows_at_once):
                part = slice(start, start + rows_at_once)
                cache = [(keys[part], values[part]) for keys, values in self.cache]  # views
                states = self.network(ids[part], cache=cache)
                hidden.append(states[torch.arange(len(states), device=device), last[part]])
        self.choose_next(torch.cat(hidden))

    def step(self):
        """Runs the network on the last chosen id, which enters the cache, and chooses the next."""
        self.choose_next(self.network.forward_one(self.ids, self.cache, self.positions))

    def choose_next(self, hidden):
        """Chooses each row's next token from hidden [B, C], and notes its id and position."""
        logits = self.network.output_layer(hidden).float()
        if self.penalty != 1:
            logits = penalise(logits, self.seen, self.penalty)
        self.ids.copy_(self.choose(logits))
        self.seen.scatter_(1, self.ids[:, None], True)
        # Rows that have ended are still computed, unread. clamp_ keeps them inside the cache.
        self.positions.add_(1).clamp_(max=self.length - 1)

    def chosen_ids(self):
        """Yields the ids that prefill chose, then those of each step, as lists of B numbers.

        On CUDA the next step is launched before these ids are read, so that the device never waits
        for the host.
        """
        while True:
            if not self.is_cuda:
                yield self.ids.tolist()
                self.step()
                continue
            ids = self.ids.to("cpu", non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
            next_step = self.graph.replay if self.graph else self.step
            next_step()
            copied.synchronize()
            yield ids.tolist()

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, stop_ids=()):
        """prompts: lists of ids. Yields (row, id) for every new token, step by step.

        (row, None) marks a row's end: at one of stop_ids, which is not yielded, after
        max_new_tokens, or where the context is full.
        """
        context = self.model.config.seq_length
        ends = [min(len(prompt) + max_new_tokens, context) for prompt in prompts]
        self.prefill(prompts, max(ends))
        unfinished = list(range(len(prompts)))
        for count, ids in enumerate(self.chosen_ids(), 1):
            for row in list(unfinished):
                is_stop = ids[row] in stop_ids
                if not is_stop:
                    yield row, ids[row]
                if is_stop or len(prompts[row]) + count >= ends[row]:
                    unfinished.remove(row)
                    yield row, None
            if not unfinished:
                return


# --- from messages to text --------------------------------------------------------------------


class Assistant:
    """Turns messages into prompts, and the ids that a Decoder generates into text.

    It is what support/chat.py and support/answers.py work with.
    """

    def __init__(self, decoder, tokenizer, preamble=None, max_new_tokens=128):
        self.decoder, self.tokenizer = decoder, tokenizer
        self.preamble = preamble or Preamble()
        self.max_new_tokens = max_new_tokens
        self.context = decoder.model.config.seq_length  # tokens of prompt and answer together

    def encode(self, messages, check_room=True):
        """→ the ids of the prompt. Raises ValueError if they leave no room for an answer."""
        prompt_ids = data.encode_prompt(self.tokenizer, self.preamble.added_to(messages))
        if check_room and len(prompt_ids) >= self.context:
            has = f"the prompt has {len(prompt_ids)} tokens"
            raise ValueError(f"{has}; this model takes {self.context}")
        return prompt_ids

    def generate(self, prompts):
        """Yields (row, id) and (row, None) for several prompts: see Decoder.generate."""
        return self.decoder.generate(prompts, self.max_new_tokens, self.tokenizer.stop_ids)

    def answer(self, prompt_ids):
        """Yields the ids of the answer to one prompt."""
        return (id for _, id in self.generate([prompt_ids]) if id is not None)

    def split(self, ids, messages=()):
        """The ids of the answer to `messages` → (metadata, content): see data.split_answer."""
        return data.split_answer(self.tokenizer, ids, self.preamble.callable_tools(messages))

    def text_of(self, ids):
        """The ids of an answer → its text, with the line of metadata first, if there is one."""
        return "\n".join(filter(None, self.split(ids)))

    def stream(self, new_ids, ids):
        """Yields the answer part by part, while `new_ids` generates its ids: see stream_text."""
        return stream_text(self, new_ids, ids)

    def why_cut(self, prompt_ids, ids):
        """→ which limit ended the answer, in words; None if it ended by itself"""
        if len(ids) == self.max_new_tokens:
            return f"cut at --max-new-tokens {self.max_new_tokens}"
        if len(prompt_ids) + len(ids) == self.context:
            return f"cut at {len(ids)} tokens: the context is full"
        return None


# --- the command ------------------------------------------------------------------------------


def run(args):
    """Does what the flags say. Raises ValueError or OSError with a message for the user."""
    todo = answers.unanswered(args.input, args.output, args.keys) if args.input else None
    if args.export:
        check_target(args)
    model, tokenizer, preamble = load(args)
    if args.export:
        return Export(args, model, tokenizer, preamble, data.encode_prompt).run()
    if args.compare:  # before the adapter changes the model
        print("--- base")
        reply(new_assistant(args, model, tokenizer, preamble), args.prompt)
        print("--- adapter")
    if not args.no_adapter:
        model = add_adapter(model, args.adapter, merge=not args.load_in)
    preamble.warn_if_tools_are_not_listed(todo.records if todo else ())
    assistant = new_assistant(args, model, tokenizer, preamble)
    if args.prompt is not None:
        reply(assistant, args.prompt)
    elif args.input:
        answers.answer_all(assistant, todo, args.output, args.batch_size)
    else:
        chat(assistant)


def load(args):
    """→ (the base, its tokenizer, a Preamble). Raises ValueError or OSError: see run.

    For an export, the base is a MergedModel, with the adapter.
    """
    path = bases.find_base(args.model, args.adapter, args.no_adapter) or chatglm.built_in_model()
    if path == str(chatglm.BUILT_IN):
        commands.announce_built_in_model(sys.stderr)
    tokenizer = data.ChatGLMTokenizer(path)
    trained = bases.trained_with(args.adapter)
    system = args.system if args.system is not None else trained.system
    tokenizer.encode(system or "")  # raises ValueError for what is not UTF-8
    tools = read_tools(args.tools) if args.tools else None
    if args.export:
        adapter = None if args.no_adapter else args.adapter
        model = MergedModel(path, chatglm.ChatGLMForCausalLM, chatglm.load_adapter, adapter)
    else:
        model = chatglm.load_model(path, args.device, args.dtype, args.load_in)
    tokenizer.check_fits(model.config.padded_vocab_size)
    if trained.base and not args.no_adapter and not args.force:
        found = bases.fingerprint(model, tokenizer.digest)
        ways = ", use this one alone with --no-adapter, or accept it with --force"
        bases.check_same_base(found, trained.base, path, args.adapter, ways)
    return model, tokenizer, Preamble(system, tools, {} if args.no_adapter else trained.tools)


def add_adapter(model, directory, merge=True):
    """→ the model with the adapter, merged into its weights; beside them if these are quantised"""
    peft_model = chatglm.load_adapter(model, directory)  # which changes `model` itself
    if merge:  # the product of B and A is computed in fp32, and rounded once
        return peft_model.merge_and_unload().to(model.dtype)
    for param in peft_model.parameters():
        if param.dtype == torch.float32:  # LoRA's: there is no autocast in decoding
            param.data = param.data.to(model.dtype)
    return model


def new_assistant(args, model, tokenizer, preamble):
    """Seeds, and compiles if asked to. → an Assistant that decodes as the flags say"""
    if args.seed is not None:
        torch.manual_seed(args.seed)
    options = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    choose = greedy if args.greedy else partial(sample, **options)
    if args.compile:
        compile_decoding(model, args.batch_size if args.input else 1)
    decoder = Decoder(model, choose, args.repetition_penalty, compiled=args.compile)
    return Assistant(decoder, tokenizer, preamble, args.max_new_tokens)


def main(argv=None):
    args = ARGS or parse_args(argv)
    advice = "try --load-in 4bit, or with --input a smaller --batch-size"
    with commands.errors_for_user("infer.py", f"out of memory; {advice}"):
        run(args)


if __name__ == "__main__":
    main()
