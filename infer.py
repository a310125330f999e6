"""Answers with ChatGLM3 and the adapter that train.py saved.

python infer.py --prompt "你是谁？"
python infer.py --adapter output/ChatGLM --prompt "你是谁？" --no-adapter     # what the base says
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch

import data
import model as chatglm


def parse_args(argv=None):
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], usage="%(prog)s --prompt TEXT [options]", formatter_class=formatter
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the user's message")
    group = parser.add_argument_group("model")
    group.add_argument("--adapter", default=chatglm.ADAPTER_DIR, metavar="DIR", help="what train.py wrote")
    group.add_argument(
        "--model", help="directory or hub id of the base; without it, the one the adapter was trained on"
    )
    group.add_argument("--no-adapter", action="store_true", help="answer with the base alone")
    group.add_argument("--system", metavar="TEXT", help="system message; without it, the one trained with")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA if there is one")
    group.add_argument(
        "--dtype", choices=("auto", *chatglm.DTYPES), default="auto", help="auto: fp16 on CUDA, else fp32"
    )
    group.add_argument("--load-in", choices=("4bit", "8bit"), help="quantise the base, with bitsandbytes")
    group = parser.add_argument_group("decoding")
    group.add_argument("--max-new-tokens", type=int, default=128, help="length of the answer at most")
    group.add_argument("--greedy", action="store_true", help="always the most likely token; nothing is drawn")
    group.add_argument("--temperature", type=float, default=0.8, help="below 1 sharpens, above 1 flattens")
    group.add_argument("--top-p", type=float, default=0.8, help="draw from the likeliest tokens that add up to this")
    group.add_argument("--seed", type=int, help="makes what is drawn repeatable")
    args = parser.parse_args(argv)
    for name, low, high in (
        ("max_new_tokens", 1, 2**20),
        ("temperature", 0.01, 100),
        ("top_p", 1e-6, 1),
        ("seed", 0, 2**63 - 1),
    ):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            parser.error(f"argument --{name.replace('_', '-')}: must be between {low} and {high}, not {value}")
    if not args.prompt.strip():
        parser.error("argument --prompt: it is empty")
    return args


def sample(logits, temperature, top_p):
    """logits [V] → one id, drawn from the smallest set of likeliest tokens whose probabilities reach top_p."""
    probs, ids = torch.softmax(logits / temperature, dim=-1).sort(descending=True)
    probs[probs.cumsum(-1) - probs >= top_p] = 0
    return ids[torch.multinomial(probs, 1)]


@torch.inference_mode()
def generate(model, prompt_ids, max_new_tokens, stop_ids, choose=torch.argmax):
    """Yields the ids that follow `prompt_ids` one by one, until one of `stop_ids` (not yielded). choose: logits [V] → id."""
    cache = model.new_cache(batch_size=1, length=len(prompt_ids) + max_new_tokens)
    ids, start = torch.tensor([prompt_ids], device=model.device), 0
    for _ in range(max_new_tokens):
        hidden = model.transformer(ids, cache, start)  # first the whole prompt, then one token at a time
        logits = model.transformer.output_layer(hidden[:, -1]).float()
        start += ids.shape[1]
        ids = choose(logits[0]).view(1, 1)
        if ids.item() in stop_ids:
            return
        yield ids.item()


def stream(tokenizer, ids):
    """Yields the pieces of text that `ids`, an iterable, add to the answer; never half a character."""
    seen, shown = [], 0
    for id in ids:
        seen.append(id)
        if tokenizer.newline_id in seen:  # the line of metadata is over
            text = data.split_answer(tokenizer, seen)[1].rstrip("\ufffd")
            yield text[shown:]
            shown = max(shown, len(text))
    yield data.split_answer(tokenizer, seen)[1][shown:]


def read_json(file, name):
    """The string or null that a JSON object gives for `name`."""
    try:
        value = json.loads(file.read_text("utf-8")).get(name)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{name} must be a string")
        return value
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{file}: damaged ({error}); copy the adapter again, or train it again") from error


def find_base(adapter_dir):
    """The base that an adapter names: a directory, if need be relative to the adapter's own, or a hub id."""
    file = Path(adapter_dir, "adapter_config.json")
    if not file.exists():
        raise ValueError(f"{adapter_dir}: no adapter here; run train.py first, or give --adapter DIR")
    name = read_json(file, "base_model_name_or_path")
    if not name:
        raise ValueError(f"{file}: it names no base; give --model DIR_OR_HUB_ID")
    beside = Path(adapter_dir, name)
    return str(beside.resolve()) if beside.is_dir() and not Path(name, "config.json").exists() else name


def set_up(args):
    """→ (model, tokenizer, the prompt's ids, how many tokens may follow). The adapter is merged into the base, unless that
    is quantised, in the base's dtype: fp16 rounds what was trained in fp32. Raises ValueError or OSError with a message
    for the user."""
    untrained = args.no_adapter and args.adapter == chatglm.ADAPTER_DIR and not Path(args.adapter).exists()
    path = chatglm.find_model(args.model or (None if untrained else find_base(args.adapter)))
    if path == str(chatglm.TINY):
        print(
            "The built-in tiny model, random weights. For the real job: train.py --model DIR_OR_HUB_ID", file=sys.stderr
        )
    tokenizer = data.ChatGLMTokenizer(path)
    trained_with = Path(args.adapter, "training_args.json")
    system = args.system
    if system is None and trained_with.exists():
        system = read_json(trained_with, "system")
    messages = data.with_system([{"role": "user", "content": args.prompt}], system)
    prompt_ids = data.encode_prompt(tokenizer, messages)
    model = chatglm.load_model(path, args.device, args.dtype, args.load_in)
    tokenizer.check_fits(model.config.padded_vocab_size)
    room = model.config.seq_length - len(prompt_ids)
    if room < 1:
        raise ValueError(f"the prompt has {len(prompt_ids)} tokens; this model takes {model.config.seq_length}")
    if not args.no_adapter:
        peft_model = chatglm.load_adapter(model, args.adapter)
        if args.load_in:
            for param in peft_model.parameters():
                if param.dtype == torch.float32:
                    param.data = param.data.to(model.dtype)  # the adapter's; there is no autocast here
        else:
            model = peft_model.merge_and_unload().to(model.dtype)  # the product of A and B is rounded once, when added
    return model, tokenizer, prompt_ids, min(room, args.max_new_tokens)


def main(argv=None):
    args = parse_args(argv)
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to stop
    chatglm.quiet_libraries()
    try:
        model, tokenizer, prompt_ids, room = set_up(args)
    except (ValueError, OSError) as error:
        sys.stderr.writelines(f"infer.py: error: {line}\n" for line in str(error).splitlines())
        sys.exit(2)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    choose = torch.argmax if args.greedy else lambda logits: sample(logits, args.temperature, args.top_p)
    for text in stream(tokenizer, generate(model, prompt_ids, room, tokenizer.stop_ids, choose)):
        print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # whoever read the answer has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
