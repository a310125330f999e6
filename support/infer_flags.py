"""The flags of infer.py: what they are called, their defaults, and which of them go together."""

from support import commands
from support.defaults import ADAPTER_DIR, SAMPLING


def parse_args(argv=None):
    """The command line → its arguments"""
    number = commands.number
    usage = "%(prog)s [--prompt TEXT | --input FILE … --output FILE | --merge-to DIR | --gguf FILE]"
    usage += " [options]"
    parser = commands.new_parser("Answers with ChatGLM3 and an adapter.", usage=usage)
    group = parser.add_argument_group("what to do (without any of these: a chat)")
    add = group.add_mutually_exclusive_group().add_argument
    add("--prompt", metavar="TEXT", help="answer this user's message")
    add("--input", nargs="+", metavar="FILE", help="answer these records, of train.py's formats")
    add("--merge-to", metavar="DIR", help="save base and adapter as one checkpoint")
    add("--gguf", metavar="FILE", help="save them as one file, for llama.cpp and Ollama")
    add("--gguf-adapter", metavar="FILE", help="save the adapter alone, for llama.cpp")
    add("--check", metavar="DIR_OR_FILE", help="compare an export with base and adapter")
    add = group.add_argument
    add("--compare", action="store_true", help="with --prompt: the base's answer first")
    add("--output", metavar="FILE", help="with --input: JSONL, each record with its prediction")
    commands.add_keys_flag(add)
    add = parser.add_argument_group("model").add_argument
    add("--adapter", default=ADAPTER_DIR, metavar="DIR", help="an adapter of train.py or peft")
    add("--model", metavar="DIR_OR_HUB_ID", help="the base; without it, the adapter's")
    add("--no-adapter", action="store_true", help="answer with the base alone")
    add("--force", action="store_true", help="accept a base that the adapter was not trained on")
    add("--system", metavar="TEXT", help="system message; without it, the one trained with")
    add("--tools", metavar="FILE", help="tools that an answer may call, as JSON or a text")
    dtype = "auto: fp16 on CUDA, else fp32; with --merge-to, the base's"
    commands.add_device_flags(add, dtype)
    commands.add_load_in_flag(add)
    add("--compile", action="store_true", help="compile the blocks: faster, after up to a minute")
    add = parser.add_argument_group("exports").add_argument
    layout = "what --merge-to writes: the official layout, or transformers' own GLM model"
    add("--layout", choices=("official", "glm"), default="official", help=layout)
    code = "--merge-to also copies the base's code files"
    add("--with-official-code", action="store_true", help=code)
    kinds = ("f16", "q8_0", "q4_0", "f32")
    add("--gguf-type", choices=kinds, default="f16", help="type of the matrices in --gguf")
    no_check = "do not compare the export with base and adapter"
    add("--no-check", action="store_true", help=no_check)
    add = parser.add_argument_group("decoding").add_argument
    add("--batch-size", type=number(1, 2**16), default=16, help="records answered together")
    add("--max-new-tokens", type=number(1, 2**20), default=128, help="limit of an answer")
    add("--greedy", action="store_true", help="always the likeliest token, nothing random")
    temperature = "the higher, the more varied; 0: --greedy"
    add("--temperature", type=number(0.0, 100.0), help=temperature)
    add("--top-k", type=number(1, 2**20), help="draw from this many likeliest tokens only")
    add("--top-p", type=number(1e-6, 1), help="draw from the likeliest up to this sum")
    add("--repetition-penalty", type=number(0.01, 100), default=1.0, help="above 1: repeats less")
    add("--seed", type=number(0, 2**63 - 1), help="makes what is drawn repeatable")
    parser.set_defaults(**SAMPLING)
    args = parser.parse_args(argv)
    commands.check_utf8(parser, args.prompt, args.system, args.model, args.tools)
    args.greedy |= args.temperature == 0
    exports = ("merge_to", "gguf", "gguf_adapter", "check")
    args.export = next((name for name in exports if getattr(args, name) is not None), None)
    flag = f"--{args.export}".replace("_", "-")
    compare_fails = args.compare and (args.prompt is None or args.no_adapter)
    for is_wrong, message in (
        (args.prompt is not None and not args.prompt.strip(), "argument --prompt: it is empty"),
        (args.export and not getattr(args, args.export), f"argument {flag}: it is empty"),
        (bool(args.input) != (args.output is not None), "--input and --output go together"),
        (compare_fails, "--compare needs --prompt, and an adapter"),
        (args.gguf_adapter and args.no_adapter, "--gguf-adapter needs an adapter"),
        (args.export and args.load_in, f"{flag}: a quantised base can't be merged; no --load-in"),
        (args.layout == "glm" and not args.merge_to, "--layout needs --merge-to"),
        (args.with_official_code and not args.merge_to, "--with-official-code needs --merge-to"),
        (args.with_official_code and args.layout == "glm", "--layout glm has no official code"),
        (args.gguf_type != "f16" and not args.gguf, "--gguf-type needs --gguf"),
        (args.no_check and not args.export, "--no-check needs an export"),
        (args.no_check and args.check, "--check and --no-check: give one of them"),
        (args.check and args.dtype != "auto", "--check: the export has a type; no --dtype"),
        (args.gguf and args.dtype != "auto", "--gguf: its type is that of --gguf-type; no --dtype"),
        (args.keys and not args.input, "--keys needs --input"),
    ):
        if is_wrong:
            parser.error(message)
    return args
