"""Answers with ChatGLM3 and the adapter that train.py saved.

python infer.py --prompt "你是谁？"
python infer.py --adapter output/ChatGLM --prompt "你是谁？" --no-adapter     # what the base says
"""

import argparse
import json
import sys
import warnings
from pathlib import Path

import torch
import transformers

import data
import model as chatglm


def parse_args(argv=None):
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the user's message")
    group = parser.add_argument_group("model")
    group.add_argument("--adapter", default="output/ChatGLM", metavar="DIR", help="what train.py wrote")
    group.add_argument(
        "--model", help="directory or hub id of the base; without it, the one the adapter was trained on"
    )
    group.add_argument("--no-adapter", action="store_true", help="answer with the base alone")
    group.add_argument("--system", metavar="TEXT", help="system message; without it, the one trained with")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA if there is one")
    group.add_argument(
        "--dtype", choices=("auto", *chatglm.DTYPES), default="auto", help="auto: fp16 on CUDA, else fp32"
    )
    group = parser.add_argument_group("decoding")
    group.add_argument("--max-new-tokens", type=int, default=128, help="length of the answer at most")
    group.add_argument("--greedy", action="store_true", help="always the most likely token; nothing is drawn")
    group.add_argument("--temperature", type=float, default=0.8, help="below 1 sharpens, above 1 flattens")
    group.add_argument("--top-p", type=float, default=0.8, help="draw from the likeliest tokens that add up to this")
    group.add_argument("--seed", type=int, help="makes what is drawn repeatable")
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1 or args.temperature <= 0 or not 0 < args.top_p <= 1:
        parser.error("--max-new-tokens and --temperature must be more than 0, --top-p in (0, 1]")
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


def read_json(file):
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot read it: {error}") from error


def find_base(adapter_dir):
    """The base that an adapter names: a directory, if need be relative to the adapter's own, or a hub id."""
    file = Path(adapter_dir, "adapter_config.json")
    if not file.exists():
        raise ValueError(f"{adapter_dir}: no adapter here; run train.py first, or give --adapter DIR")
    name = read_json(file).get("base_model_name_or_path")
    if not name:
        raise ValueError(f"{file}: it names no base; give --model DIR_OR_HUB_ID")
    beside = Path(adapter_dir, name)
    return str(beside.resolve()) if beside.is_dir() and not Path(name, "config.json").exists() else name


def set_up(args):
    """→ (model, tokenizer, system message). Raises ValueError or OSError with a message for the user."""
    untrained = args.no_adapter and not Path(args.adapter, "adapter_config.json").exists()
    path = chatglm.find_model(args.model or (None if untrained else find_base(args.adapter)))
    if path == str(chatglm.TINY):
        print("The built-in tiny model, random weights. For the real job: train.py --model …", file=sys.stderr)
    tokenizer = data.ChatGLMTokenizer(path)
    model = chatglm.load_model(path, args.device, args.dtype)
    if not args.no_adapter:
        model = chatglm.load_adapter(model, args.adapter).merge_and_unload().to(model.dtype).eval()
    system = args.system
    trained_with = Path(args.adapter, "training_args.json")
    if system is None and trained_with.exists():
        system = read_json(trained_with).get("system")
    return model, tokenizer, system


def main(argv=None):
    args = parse_args(argv)
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to stop
    warnings.filterwarnings("ignore", module="transformers|peft")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model, tokenizer, system = set_up(args)
        messages = data.with_system([{"role": "user", "content": args.prompt}], system)
        prompt_ids = data.encode_prompt(tokenizer, messages)
    except (ValueError, OSError) as error:
        sys.stderr.writelines(f"infer.py: error: {line}\n" for line in str(error).splitlines())
        sys.exit(2)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    choose = torch.argmax if args.greedy else lambda logits: sample(logits, args.temperature, args.top_p)
    for text in stream(tokenizer, generate(model, prompt_ids, args.max_new_tokens, tokenizer.stop_ids, choose)):
        print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
