"""Checkpoints: what is in them, what makes them whole, and how a run continues from one.

checkpoint-N/ is the run after update N:

    adapter_model.safetensors, adapter_config.json      the adapter, in peft's layout
    training_args.json                                  the arguments it is trained with
    training_state.safetensors                          AdamW's moments
    training_state.json                                 progress, the loss scale, the run's identity
    metrics.jsonl                                       the metrics so far
    best_model.safetensors                              the best adapter so far, with evaluations
    SHA256SUMS                                          digests of all of these

There is no random state in it, because dropout is seeded anew for each update.

A checkpoint is whole or absent. It is written as checkpoint-N.part, flushed to the disk, and then
renamed. Before it is deleted, it is renamed too. SHA256SUMS tells if it was damaged later.
"""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load

from support.adapters import adapter_files
from support.errors import one_line
from support.files import (
    LOCK,
    as_bytes,
    as_json,
    delete,
    flush_to_disk,
    sha256,
    write_new_directory,
)
from support.identity import check_same_run
from support.processes import check_shared, rank_and_count
from support.run_args import RUN_ARGS
from support.train_flags import NOT_OF_THE_RUN

ADAPTER = ("adapter_model.safetensors", "adapter_config.json", "training_args.json")
STATE = ("training_state.safetensors", "training_state.json", "metrics.jsonl")
CONTENTS = ADAPTER + STATE  # what SHA256SUMS lists, and BEST_MODEL if it is there
BEST_MODEL = "best_model.safetensors"
BEST = "best"  # the directory of the adapter with the lowest evaluation loss
TENSORBOARD = "tensorboard"


# --- writing ----------------------------------------------------------------------------------


def result_files(run):
    """→ {file name: content} of the adapter, and of the arguments that it was trained with.

    infer.py reads the system message and the base's fingerprint from the arguments.
    """
    left_out = ("output_dir", *NOT_OF_THE_RUN)
    kept = {name: value for name, value in vars(run.args).items() if name not in left_out}
    return adapter_files(run.peft_model) | {"training_args.json": as_json(kept)}


def checkpoint_files(run, metrics, best_model=None):
    """→ {file name: content} of a checkpoint, without SHA256SUMS. Tensors are copies on the CPU.

    run: a train.Run; metrics: the bytes of metrics.jsonl so far; best_model: the bytes of best/'s
    adapter_model.safetensors, or None
    """
    moments = {
        f"{i}.{name}": tensor.to("cpu", copy=True)
        for i, state in run.optimizer.state_dict()["state"].items()
        for name, tensor in state.items()
    }
    state = {
        "progress": run.progress.as_dict(),
        "scaler": run.scaler.state_dict(),
        "run": run.identity,
    }
    return result_files(run) | {
        "training_state.safetensors": moments,
        "training_state.json": as_json(state),
        "metrics.jsonl": metrics,
        **({BEST_MODEL: best_model} if best_model else {}),
    }


def write_checkpoint(directory, files, keep=None):
    """Writes a whole checkpoint. Then keeps it and the keep - 1 before it, if `keep` is given."""
    files = {name: as_bytes(content) for name, content in files.items()}
    sums = "".join(f"{sha256(files[name])}  {name}\n" for name in ordered(files))
    replace_directory(directory, files | {"SHA256SUMS": sums.encode()})
    # Later checkpoints, of a run that was resumed from an earlier one, stay until it gets there.
    found = list_checkpoints(directory.parent)
    this_and_older = found[found.index(directory) :]
    for old in this_and_older[keep:] if keep else ():
        discard(old)


def ordered(names):
    """→ those names of files that SHA256SUMS lists, in its order"""
    return [name for name in (*CONTENTS, BEST_MODEL) if name in names or name in CONTENTS]


def replace_directory(directory, files):
    """Writes {name: content} into `directory`, in place of what is there: whole, or not at all."""
    part = write_new_directory(directory.with_name(f"{directory.name}.part"), files)
    old = put_away(directory) if directory.exists() else None
    os.replace(part, directory)
    flush_to_disk(directory.parent)
    if old:
        delete(old)


def put_away(directory):
    """Renames a directory that is to be deleted: a part of it never has its name. → the new path"""
    gone = directory.with_name(f"{directory.name}.old.part")
    shutil.rmtree(gone, ignore_errors=True)
    return directory.rename(gone)


def discard(directory):
    """Deletes a directory at once, for whoever looks at its name."""
    delete(put_away(directory))


# --- finding ----------------------------------------------------------------------------------


def list_checkpoints(output_dir):
    """→ the checkpoints that train.py wrote there, the newest first"""
    found = [
        p for p in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{1,9}", p.name)
    ]
    ours = ("training_state.json", "SHA256SUMS")
    found = [path for path in found if any((path / name).exists() for name in ours)]
    return sorted(found, key=lambda path: -int(path.name.partition("-")[2]))


def list_unfinished(output_dir):
    """→ what was being written or discarded when a run was killed"""
    names = ("checkpoint-*.part", "adapter.part", f"{BEST}.part", f"{BEST}.old.part")
    names += (f"{TENSORBOARD}.old.part", "metrics.jsonl.part", f"{RUN_ARGS}.part")
    return [path for name in names for path in output_dir.glob(name)]


def is_intact(checkpoint):
    """Whether its files are those that SHA256SUMS lists."""
    try:
        lines = (checkpoint / "SHA256SUMS").read_text("ascii").splitlines()
        names = ordered([line.partition("  ")[2] for line in lines])
        contents = {name: (checkpoint / name).read_bytes() for name in names}
    except (OSError, ValueError):
        return False
    return lines == [f"{sha256(content)}  {name}" for name, content in contents.items()]


def newest_intact(output_dir):
    """→ the newest intact checkpoint, or None"""
    return next(filter(is_intact, list_checkpoints(output_dir)), None)


def find_checkpoint(output_dir, wanted):
    """→ the checkpoint that --resume means: "newest", or the one named.

    None without --resume, and where a run ended before its first checkpoint. Raises ValueError if
    none is intact, or not all processes find the same.
    """
    found = _find_checkpoint(Path(output_dir), wanted) if wanted else None
    check_shared(output_dir, found.name if found else "no checkpoint")
    return found


def _find_checkpoint(output_dir, wanted):
    if wanted != "newest":
        return _named_checkpoint(output_dir, wanted)
    checkpoint = newest_intact(output_dir)
    for damaged in list_checkpoints(output_dir):
        if damaged == checkpoint:
            break
        if rank_and_count()[0] == 0:
            print(f"{damaged} is damaged (see its SHA256SUMS): skipped", file=sys.stderr)
    if checkpoint:
        return checkpoint
    names = ("metrics.jsonl", LOCK, RUN_ARGS, BEST, TENSORBOARD)
    started = {output_dir / name for name in names}
    if set(output_dir.glob("*")) - started - {*list_unfinished(output_dir)}:
        what = "has no intact checkpoint to resume from"
        raise ValueError(f"{output_dir} {what}; --overwrite starts over")
    print(f"{output_dir} has no checkpoint yet: from the start")
    return None


def _named_checkpoint(output_dir, name):
    checkpoint = output_dir / Path(name).name
    is_here = Path(name).parent == Path() or Path(name).resolve() == checkpoint.resolve()
    if is_here and is_intact(checkpoint):
        return checkpoint
    intact = [path.name for path in list_checkpoints(output_dir) if is_intact(path)]
    what = f"no intact checkpoint of {output_dir}; these are: {', '.join(intact) or 'none'}"
    raise ValueError(f"--resume {name}: {what}")


# --- continuing -------------------------------------------------------------------------------


def restore(run):
    """Sets optimizer, scaler and progress of `run` as they were when run.checkpoint was written.

    (model.load_adapter reads the adapter, RunDirectory.opened the metrics.) Raises ValueError if
    the checkpoint is of another run, or was not written by train.py: see check_same_run.
    """
    checkpoint, optimizer = run.checkpoint, run.optimizer
    check_same_run(checkpoint, run.identity)
    try:
        state = json.loads((checkpoint / "training_state.json").read_text("utf-8"))
        moments = _read_moments(
            checkpoint / "training_state.safetensors", optimizer.param_groups[0]["params"]
        )
        run.progress.set(state["progress"])
        if run.progress.step > run.total_steps:
            raise ValueError("it has done more updates than this run has")
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
        run.scaler.load_state_dict(state["scaler"])
    except Exception as error:
        what = f"not a checkpoint of train.py: {one_line(error)}"
        raise ValueError(f"{checkpoint}: {what}") from error
    print(f"resumed  {checkpoint}, {run.progress.step:,} of {run.total_steps:,} updates done")


def _read_moments(file, params):
    """→ {index of a parameter: AdamW's state for it}; empty before the first step."""
    tensors = load(file.read_bytes())  # load_file maps the file, and Windows then can't delete it
    moments = {}
    for i, param in enumerate(params if tensors else ()):
        shapes = {"step": (), "exp_avg": param.shape, "exp_avg_sq": param.shape}
        moments[i] = {name: tensors[f"{i}.{name}"] for name in shapes}
        for name, tensor in moments[i].items():
            if tensor.shape != shapes[name] or tensor.dtype != torch.float32:
                raise ValueError(f"training_state doesn't fit the adapter: {i}.{name}")
    return moments
