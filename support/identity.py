"""Whether a run can continue bit for bit: what must be the same, and the message if it is not."""

import json
import shlex

from support.config import dtype_name
from support.devices import dtype_of, find_device
from support.errors import one_line, printable
from support.processes import rank_and_count
from support.run_args import flag_of
from support.train_flags import LORA, NOT_OF_THE_RUN, defaults

# Arguments that may change when a run is resumed: they do not affect the result, or run_identity
# holds what matters of them in another form.
MAY_CHANGE = (
    *NOT_OF_THE_RUN,
    "model",
    "base",
    "data",
    "keys",
    "tools",
    "device",
    "dtype",
    "batch_size",
    "gradient_accumulation_steps",
    "output_dir",
    "save_steps",
    "keep_checkpoints",
    "patience",
    "tensorboard",
    "eval_data",
)
DIGESTS = ("--model", "--data", "--eval-data")  # their values are digests, which no message shows


def run_identity(run):
    """→ {name: value} of all that must be the same; run: a train.Run"""
    return known_identity(run.args, run.dataset, run.eval_set) | {"--model": run.args.base}


def known_identity(args, dataset, eval_set):
    """→ what of run_identity is known before the base is loaded"""
    kept = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
    device = find_device(args.device)
    return {flag_of(name): value for name, value in kept.items()} | {
        "--device": device,
        "--dtype": dtype_name(dtype_of(device, args.dtype)),
        "--batch-size × --gradient-accumulation-steps × processes": samples_per_update(args),
        "--data": dataset.digest,
        "--eval-data": eval_set.digest if eval_set else None,
    }


def samples_per_update(args):
    """→ how many samples an update has, over all processes"""
    _, processes = rank_and_count()
    return args.batch_size * args.gradient_accumulation_steps * processes


def check_before_loading(args, dataset, eval_set, checkpoint):
    """Checks what can be checked before the base is loaded. Raises ValueError.

    checkpoint: the directory to continue from, or None
    """
    if args.cuda_graphs and find_device(args.device) != "cuda":
        raise ValueError("--cuda-graphs needs a CUDA device; leave it out")
    if checkpoint:
        identity = known_identity(args, dataset, eval_set)
        for name in LORA if args.init_adapter else ():  # they are read later: take_lora_flags
            del identity[flag_of(name)]
        check_same_run(checkpoint, identity)


def check_same_run(checkpoint, identity):
    """Raises ValueError if the checkpoint is of a run with another identity; see run_identity.

    Names that `identity` lacks are not compared.
    """
    try:
        state = json.loads((checkpoint / "training_state.json").read_text("utf-8"))
        # A flag that the checkpoint does not know is newer than it, and was at its default.
        old = {flag_of(name): value for name, value in defaults().items()} | state["run"]
        new = dict(identity)
        if "--model" in new:  # its fingerprint; of a quantised one, some digests are None
            known = {n: v for n, v in new["--model"].items() if v and old["--model"].get(n)}
            new["--model"] = old["--model"] | known
        changed = [name for name in new if old.get(name) != new[name]]
    except Exception as error:  # whatever the readers raise on a file that train.py didn't write
        what = f"not a checkpoint of train.py: {one_line(error)}"
        raise ValueError(f"{checkpoint}: {what}") from error
    if changed:
        told = []
        for name in changed:
            was, now = printable(str(old.get(name))), printable(str(new[name]))
            differs = "has other content" if name in DIGESTS else f"was {was}, is {now}"
            told.append(f"{name} {differs}")
        what = f"is of a run with other settings: {'; '.join(told)}"
        advice = f"a new run can start from it with --init-adapter {shlex.quote(str(checkpoint))}, "
        advice += "another --output-dir, and no flag of LoRA"
        raise ValueError(f"{checkpoint} {what}; give those, or --overwrite starts over; {advice}")
