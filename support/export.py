"""Saves base and adapter as one checkpoint, in the official layout.

The layout is that of THUDM/chatglm3-6b: shards of safetensors with an index, config.json,
tokenizer.model, and the small files that stand beside them.
"""

import json
import os
import shlex
import shutil
from pathlib import Path

import torch

from support.bases import base_file
from support.config import dtype_name
from support.errors import one_line
from support.files import read_json

SHARD = "2GB"  # about the official size
# The files that stand beside the official weights. They are copied, and never run.
OFFICIAL_FILES = (
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "configuration_chatglm.py",
    "modeling_chatglm.py",
    "tokenization_chatglm.py",
    "quantization.py",
    "MODEL_LICENSE",
)


def check_free(directory):
    """Raises ValueError if something is where a merged model would be written."""
    path = Path(directory)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{directory} exists already; choose another --merge-to")


def merge_to(model, directory, system=None):
    """Saves `model`, which has the adapter in its weights, into `directory`: whole, or not at all.

    config.json and the small files are those of the base that was loaded, model.name_or_path.
    `system` is the system message, for the command that is printed. Raises ValueError.
    """
    base = model.name_or_path
    target = Path(directory).absolute()
    part = target.with_name(f"{target.name}.part")  # it is written here, then renamed
    if part.exists():
        advice = f"it is where {target.name} would be written first; remove it"
        raise ValueError(f"{part}: {advice}")
    config = json.dumps(_official_config(model, base), ensure_ascii=False, indent=2)
    weights = _official_weights(model)
    try:
        model.save_pretrained(part, state_dict=weights, max_shard_size=SHARD)
        (part / "config.json").write_text(config + "\n", "utf-8")
        for name in OFFICIAL_FILES:
            if file := base_file(base, name):
                shutil.copyfile(file, part / name)
        for file in part.iterdir():
            shutil.copymode(part / "config.json", file)  # safetensors' files are the owner's alone
        if target.exists():  # it is empty; Windows replaces no directory
            target.rmdir()
        os.replace(part, target)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, Exception):  # errors of the disk, in the library's words
            raise ValueError(f"{directory}: cannot write: {one_line(error)}") from error
        raise
    print(f"saved    {directory}; try it:")
    shown = shlex.quote(system) if system and system.isprintable() else "…"
    hint = f" --system {shown}" if system else ""
    print(f"         python infer.py --no-adapter --model {shlex.quote(str(directory))}{hint}")


def _official_weights(model):
    """The network's weights, and the rotary table of the official files.

    The official code takes the table's dtype, not its values.
    """
    dim = model.config.kv_channels // 2
    frequencies = 1 / 10000 ** (torch.arange(0, dim, 2) / dim)
    name = "transformer.rotary_pos_emb.inv_freq"
    return {**model.state_dict(), name: frequencies.to(model.dtype)}


def _official_config(model, base):
    """The base's config.json, with the dtype of the merged weights."""
    config = read_json(base_file(base, "config.json"))
    for name in ("dtype", "quantization_config"):
        config.pop(name, None)
    dtype = dtype_name(model.dtype)
    return config | dict(model_type="chatglm", architectures=["ChatGLMModel"], torch_dtype=dtype)
