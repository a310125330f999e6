"""Checkpoints: what is in them, what makes them whole, and how a run continues from one.

checkpoint-N/ is the run after update N:

    adapter_model.safetensors, adapter_config.json      the adapter, in peft's layout
    training_args.json                                  the arguments it is trained with
    training_state.safetensors                          AdamW's moments
    training_state.json                                 progress, the loss scale, the run's identity
    metrics.jsonl                                       the metrics so far
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
from safetensors.torch import load_file

from support.adapters import adapter_files
from support.config import dtype_name
from support.errors import one_line, printable
from support.files import (
    LOCK,
    as_bytes,
    as_json,
    delete,
    flush_to_disk,
    sha256,
    write_new_directory,
)
from support.processes import rank_and_count

ADAPTER = ("adapter_model.safetensors", "adapter_config.json", "training_args.json")
STATE = ("training_state.safetensors", "training_state.json", "metrics.jsonl")
CONTENTS = ADAPTER + STATE  # what SHA256SUMS lists


# --- writing ----------------------------------------------------------------------------------


def result_files(run):
    """→ {file name: content} of the adapter, and of the arguments that it was trained with.

    infer.py reads the system message and the base's fingerprint from the arguments.
    """
    left_out = ("output_dir", "resume", "overwrite")
    kept = {name: value for name, value in vars(run.args).items() if name not in left_out}
    return adapter_files(run.peft_model) | {"training_args.json": as_json(kept)}


def checkpoint_files(run, metrics):
    """→ {file name: content} of a checkpoint, without SHA256SUMS. Tensors are copies on the CPU.

    run: a train.Run; metrics: the bytes of metrics.jsonl so far.
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
    }


def write_checkpoint(directory, files, keep=None):
    """Writes a whole checkpoint. Then keeps it and the keep - 1 before it, if `keep` is given."""
    files = {name: as_bytes(content) for name, content in files.items()}
    sums = "".join(f"{sha256(files[name])}  {name}\n" for name in CONTENTS)
    part = write_new_directory(
        directory.with_suffix(".part"), files | {"SHA256SUMS": sums.encode()}
    )
    if directory.exists():  # damaged, or of a run that was resumed from an earlier one
        discard(directory)
    os.replace(part, directory)
    flush_to_disk(directory.parent)
    # Later checkpoints, of a run that was resumed from an earlier one, stay until it gets there.
    found = list_checkpoints(directory.parent)
    this_and_older = found[found.index(directory) :]
    for old in this_and_older[keep:] if keep else ():
        discard(old)


def discard(checkpoint):
    """Renames a checkpoint, then deletes it: a part of it never has its name."""
    gone = checkpoint.with_name(f"{checkpoint.name}.old.part")
    shutil.rmtree(gone, ignore_errors=True)
    checkpoint.rename(gone)
    delete(gone)


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
    return [*output_dir.glob("checkpoint-*.part"), *output_dir.glob("adapter.part")]


def is_intact(checkpoint):
    """Whether its files are those that SHA256SUMS lists."""
    try:
        lines = (checkpoint / "SHA256SUMS").read_text("ascii").splitlines()
        contents = {name: (checkpoint / name).read_bytes() for name in CONTENTS}
    except (OSError, ValueError):
        return False
    return lines == [f"{sha256(content)}  {name}" for name, content in contents.items()]


def newest_intact(output_dir):
    """→ the newest intact checkpoint, or None"""
    return next(filter(is_intact, list_checkpoints(output_dir)), None)


def find_checkpoint(output_dir, wanted):
    """→ the checkpoint that --resume means: "newest", or the one named.

    None without --resume, and where a run ended before its first checkpoint. Raises ValueError if
    none is intact.
    """
    output_dir = Path(output_dir)
    if wanted is None:
        return None
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
    started = {output_dir / "metrics.jsonl", output_dir / LOCK, *list_unfinished(output_dir)}
    if set(output_dir.glob("*")) - started:
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


# Arguments that may change when a run is resumed: they do not affect the result, or run_identity
# holds what matters of them in another form.
MAY_CHANGE = (
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
    "resume",
    "overwrite",
)


def run_identity(run):
    """→ {name: value} of all that must be the same for a run to continue bit for bit"""
    kept = {name: value for name, value in vars(run.args).items() if name not in MAY_CHANGE}
    identity = {f"--{name.replace('_', '-')}": value for name, value in kept.items()}
    return identity | {
        "--device": run.device.type,
        "--dtype": dtype_name(run.model.dtype),
        "--batch-size × --gradient-accumulation-steps × processes": run.samples_per_update,
        "--model": run.args.base,
        "--data": run.dataset.digest,
    }


def restore(run):
    """Sets optimizer, scaler and progress of `run` as they were when run.checkpoint was written.

    (model.load_adapter reads the adapter, RunDirectory.opened the metrics.) Raises ValueError if
    the checkpoint is of a run with another identity, or was not written by train.py.
    """
    checkpoint, optimizer = run.checkpoint, run.optimizer
    not_ours = f"{checkpoint}: not a checkpoint of train.py"
    try:
        state = json.loads((checkpoint / "training_state.json").read_text("utf-8"))
        old, new = state["run"], run.identity
        changed = [name for name in new if old.get(name) != new[name]]
    except Exception as error:  # whatever the readers raise on a file that train.py didn't write
        raise ValueError(f"{not_ours}: {one_line(error)}") from error
    if changed:
        told = []
        for name in changed:
            was, now = printable(str(old.get(name))), printable(str(new[name]))
            told.append(name if name in ("--model", "--data") else f"{name} was {was}, is {now}")
        what = f"is of a run with other settings: {'; '.join(told)}"
        raise ValueError(f"{checkpoint} {what}; give those, or --overwrite starts over")
    try:
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
        raise ValueError(f"{not_ours}: {one_line(error)}") from error
    print(f"resumed  {checkpoint}, {run.progress.step:,} of {run.total_steps:,} updates done")


def _read_moments(file, params):
    """→ {index of a parameter: AdamW's state for it}; empty before the first step."""
    tensors = load_file(file)
    moments = {}
    for i, param in enumerate(params if tensors else ()):
        shapes = {"step": (), "exp_avg": param.shape, "exp_avg_sq": param.shape}
        moments[i] = {name: tensors[f"{i}.{name}"] for name in shapes}
        for name, tensor in moments[i].items():
            if tensor.shape != shapes[name] or tensor.dtype != torch.float32:
                raise ValueError(f"training_state doesn't fit the adapter: {i}.{name}")
    return moments
