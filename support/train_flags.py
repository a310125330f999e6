"""The flags of train.py: what they are called, their defaults, and which of them go together."""

import re
from argparse import BooleanOptionalAction

from support import commands
from support.data_files import split_times
from support.defaults import ADAPTER_DIR, SAMPLE
from support.errors import one_line
from support.run_args import expand, flag_of, flags_text

LINEAR_LAYERS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
DEFAULTS = {  # (with --model, without): the built-in model needs more, because it is random
    "learning_rate": (1e-4, 3e-3),
    "epochs": (3, 50),
    "lora_r": (8, 16),
    "lora_alpha": (32, 32),
    "lora_dropout": (0.1, 0.0),
    "target_modules": (["query_key_value"], LINEAR_LAYERS),
}
# What --init-adapter decides.
LORA = (
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "modules_to_save",
    "rslora",
    "dora",
)
NOT_OF_THE_RUN = ("resume", "overwrite", "dry_run", "eval_only", "adapter", "timeout")
number = commands.number


def parse_args(argv=None):
    """The command line → its arguments; "@FILE" stands for the flags in a file."""
    parser = new_train_parser()
    words = expand(argv, parser)
    commands.check_utf8(parser, *words)
    args = parser.parse_args(words)
    has_evaluation = args.eval_data or args.eval_split
    given = {name for name, value in vars(args).items() if value is not None and value is not False}
    lora = [flag_of(name) for name in LORA if name in given]
    others = [flag_of(n) for n in ("init_adapter", "resume", "overwrite") if n in given]
    try:
        shares = [each for each in args.eval_data or () if split_times(each)[1] != 1]
    except (OSError, ValueError) as error:
        parser.error(f"argument --eval-data: {one_line(error)}")
    for is_wrong, message in (
        (args.eval_data and args.eval_split, "--eval-data and --eval-split: give one of them"),
        (args.eval_steps and not has_evaluation, "--eval-steps needs --eval-data or --eval-split"),
        (args.patience and not has_evaluation, "--patience needs --eval-data or --eval-split"),
        (args.eval_only and not args.eval_data, "--eval-only needs --eval-data"),
        (args.eval_only and args.dry_run, "--eval-only and --dry-run: give one of them"),
        (args.eval_only and others, f"--eval-only does not train: leave {' '.join(others)} out"),
        (shares, f"--eval-data {' '.join(shares)}: each file is evaluated once; leave :N out"),
        (args.adapter and not args.eval_only, "--adapter needs --eval-only; to train an adapter "
         "further, give --init-adapter"),
        (args.init_adapter and lora, f"{', '.join(lora)}: the adapter of --init-adapter has its "
         "own; leave it out, also in @FILE"),
    ):  # fmt: skip
        if is_wrong:
            parser.error(message)
    args.data = args.data or [str(SAMPLE)]
    for name, (real, built_in) in DEFAULTS.items():
        if getattr(args, name) is None and not (args.init_adapter and name in LORA):
            setattr(args, name, real if args.model is not None else built_in)
    if args.target_modules == ["all"]:
        args.target_modules = LINEAR_LAYERS
    if args.lora_alpha is not None and args.lora_alpha == int(args.lora_alpha):
        args.lora_alpha = int(args.lora_alpha)  # 16 and 16.0 are the same in the adapter's files
    return args


def lora_options(args):
    """→ the arguments of model.add_lora"""
    targets = args.target_modules
    if len(targets) == 1 and not re.fullmatch(r"[\w.]+", targets[0]):
        targets = targets[0]  # it is a regular expression
    return dict(
        r=args.lora_r,
        alpha=args.lora_alpha,
        dropout=args.lora_dropout,
        target_modules=targets,
        modules_to_save=args.modules_to_save,
        rslora=args.rslora,
        dora=args.dora,
    )


def take_lora_flags(args, config):
    """Sets LoRA's flags to what a peft.LoraConfig says."""
    targets = config.target_modules
    args.lora_r, args.lora_alpha = config.r, config.lora_alpha
    args.lora_dropout = config.lora_dropout
    args.target_modules = [targets] if isinstance(targets, str) else sorted(targets or ())
    args.modules_to_save = config.modules_to_save
    args.rslora, args.dora = config.use_rslora, config.use_dora


def run_args_of(args):
    """→ the bytes of run.args: the flags that give this run again"""
    left_out = NOT_OF_THE_RUN + (LORA if args.init_adapter else ())
    return flags_text(args, {n: value for n, value in defaults().items() if n not in left_out})


def defaults():
    """→ {name of an argument: its default}"""
    return vars(new_train_parser().parse_args([]))


def new_train_parser():
    parser = commands.new_parser(
        "Fine-tunes ChatGLM3 with LoRA.",
        usage="%(prog)s [@FILE] [options]",
        epilog="@FILE stands for the flags in a file, for example in the run.args of another run",
    )
    for title, add_flags in (
        ("model and data", _add_data_flags),
        ("optimisation", _add_optimisation_flags),
        ("evaluation", _add_evaluation_flags),
        ("LoRA", _add_lora_flags),
        ("machine", _add_machine_flags),
        ("logs and checkpoints", _add_progress_flags),
        ("instead of training", _add_other_jobs),
    ):
        add_flags(parser.add_argument_group(title).add_argument)
    return parser


def _default(name):
    texts = [" ".join(v) if isinstance(v, list) else f"{v:g}" for v in DEFAULTS[name]]
    without = f"; without --model: {texts[1]}" if texts[0] != texts[1] else ""
    return f"(default: {texts[0]}{without})"


def _add_data_flags(add):
    times = "FILE:N: N times in an epoch, such as 0.5 or 2 (default: dataset/sample.jsonl)"
    base = "the base; without it, the built-in tiny model"
    add("--model", type=commands.not_empty, metavar="DIR_OR_HUB_ID", help=base)
    add(
        "--data",
        nargs="+",
        type=commands.not_empty,
        metavar="FILE",
        help=f"JSON, JSONL, CSV or TSV; {times}",
    )
    commands.add_keys_flag(add)
    add("--system", metavar="TEXT", help="system message for conversations without one")
    add("--output-dir", default=ADAPTER_DIR, help="where the adapter and checkpoints go")
    add("--max-length", type=number(8), default=512, help="cut longer samples to this many tokens")


def _add_optimisation_flags(add):
    from_0, beta = number(0.0, 1e6), number(0.0, 0.9999999)
    add("--batch-size", type=number(1), default=4, help="samples per micro-batch")
    add("--gradient-accumulation-steps", type=number(1), default=2, help="micro-batches per update")
    add("--epochs", type=number(1), help=f"passes over the data {_default('epochs')}")
    add("--max-steps", type=number(1), help="number of updates, instead of --epochs")
    peak = f"of AdamW, at its peak {_default('learning_rate')}"
    add("--learning-rate", type=number(0.0, 1e3), help=peak)
    schedules = dict(choices=("linear", "cosine", "constant"), default="linear")
    add("--lr-schedule", **schedules, help="how the learning rate falls after warm-up")
    warmup = "updates in which the rate rises: a number, or a share of all such as 0.03"
    add("--warmup-steps", type=commands.number_or_share, default=0, help=warmup)
    add("--weight-decay", type=from_0, default=0.0, help="weight decay of AdamW")
    add("--adam-beta1", type=beta, default=0.9, help="AdamW's decay of the mean gradient")
    add("--adam-beta2", type=beta, default=0.999, help="AdamW's decay of the mean square")
    add("--max-grad-norm", type=from_0, default=1.0, help="limit of the gradients' norm; 0: none")
    add(
        "--seed",
        type=number(0),
        default=42,
        help="of LoRA's start, dropout, sample order, --eval-split",
    )


def _add_evaluation_flags(add):
    add(
        "--eval-data",
        nargs="+",
        type=commands.not_empty,
        metavar="FILE",
        help="files to evaluate: their loss is measured",
    )
    split = "hold back this share of --data for evaluation, such as 0.05"
    add("--eval-split", type=number(1e-6, 0.999999), metavar="SHARE", help=split)
    add(
        "--eval-steps",
        type=number(1),
        metavar="N",
        help="updates between evaluations (default: an epoch)",
    )
    patience = "stop after N evaluations without a loss below the lowest so far"
    add("--patience", type=number(1), metavar="N", help=patience)


def _add_lora_flags(add):
    add("--lora-r", type=number(1, 4096), help=f"rank {_default('lora_r')}")
    alpha = f"LoRA's output is scaled by alpha / r {_default('lora_alpha')}"
    add("--lora-alpha", type=number(0.0, 1e6), help=alpha)
    dropout = f"on LoRA's input {_default('lora_dropout')}"
    add("--lora-dropout", type=number(0.0, 0.99), help=dropout)
    targets = f"names of layers, or a regular expression for paths {_default('target_modules')}"
    targets += "; all: every linear layer of the blocks"
    add("--target-modules", nargs="+", metavar="NAME", help=targets)
    add("--modules-to-save", nargs="+", metavar="NAME", help="modules to train and save whole")
    add("--rslora", action="store_true", help="rank-stabilised LoRA: scale by alpha / sqrt(r)")
    add(
        "--dora", action="store_true", help="DoRA: also train the length of each weight row; slower"
    )
    init = "start from this adapter, which has its own LoRA flags"
    add("--init-adapter", type=commands.directory, metavar="DIR", help=init)


def _add_machine_flags(add):
    commands.add_device_flags(add)
    commands.add_checkpointing_flag(add)
    commands.add_load_in_flag(add)
    add("--compile", action="store_true", help="compile: faster, after up to half a minute")
    graphs = "replay micro-steps as CUDA graphs (default: on CUDA, where that is possible)"
    add("--cuda-graphs", action=BooleanOptionalAction, help=graphs)
    timeout = "seconds that processes wait for one of them, before it is taken to hang"
    add("--timeout", type=number(1), default=600, metavar="SECONDS", help=timeout)


def _add_progress_flags(add):
    add("--logging-steps", type=number(1), default=10, help="updates between lines of metrics")
    add("--tensorboard", action="store_true", help="write the metrics for TensorBoard too")
    add("--save-steps", type=number(1), default=100, help="updates between checkpoints")
    add("--keep-checkpoints", type=number(1), metavar="N", help="keep only the newest N")
    resume = "continue from the newest checkpoint, or the one named; if none was saved yet, start"
    add("--resume", nargs="?", const="newest", metavar="CHECKPOINT", help=resume)
    add("--overwrite", action="store_true", help="delete the run in --output-dir, and start over")


def _add_other_jobs(add):
    dry_run = "try a few updates, print what the run will need (memory, time, disk), write nothing"
    add("--dry-run", action="store_true", help=dry_run)
    eval_only = "measure the loss of the base, or of --adapter, on --eval-data; write nothing"
    add("--eval-only", action="store_true", help=eval_only)
    add(
        "--adapter",
        type=commands.not_empty,
        metavar="DIR",
        help="with --eval-only: an adapter of train.py or peft",
    )
