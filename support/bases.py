"""Bases: finding the one that is meant, checking its files, and telling one from another.

A base is named by a directory or a hub id ("THUDM/chatglm3-6b"). An adapter remembers the name and
a fingerprint of the base that it was trained on.
"""

import hashlib
import importlib.util
import json
import os
import re
import threading
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import constants
from huggingface_hub.utils import get_session
from transformers import BitsAndBytesConfig
from transformers.utils import cached_file, find_adapter_config_file

from support.checkpoints import list_checkpoints
from support.config import DTYPES, warn_of_chatglm2
from support.defaults import ADAPTER_DIR
from support.devices import check_float8, dtype_of, find_device
from support.errors import first_few
from support.files import as_bytes, check_no_lfs_pointer, read_json

SIZES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "multi_query_group_num",
    "kv_channels",
    "padded_vocab_size",
)


# --- finding and placing a base -----------------------------------------------------------------


def resolve_base(name):
    """A directory or a hub id → the absolute directory, or the hub id.

    Raises ValueError if it is neither.
    """
    if name and Path(name).is_dir():
        if Path(name, "adapter_config.json").exists():
            give = (
                "infer.py takes it as --adapter, train.py as --init-adapter, and a base as --model"
            )
            raise ValueError(f"{name} is an adapter, not a base: {give}")
        return str(Path(name).resolve())
    if Path(name).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        what = "is neither a directory nor a hub id"
        raise ValueError(f"{name!r} {what}; --model takes the directory of a checkpoint")
    go_offline_without_hub()
    return name


def go_offline_without_hub():
    """If the hub does not answer within 8 seconds, switches its library to offline: files then come
    from its cache at once, instead of after half a minute of retries."""
    answers = []

    def ask():
        with suppress(Exception):  # whatever the session's library raises
            answers.append(get_session().head(constants.ENDPOINT, timeout=8))  # seconds

    if not constants.HF_HUB_OFFLINE:
        # A thread, because a name server that does not answer is waited for longer than that.
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(8)
        constants.HF_HUB_OFFLINE = not answers


def find_base(model, adapter_dir=None, no_adapter=False):
    """→ the base that the flags mean: a directory or a hub id; None for the built-in one.

    adapter_dir: None, or a directory; ADAPTER_DIR, infer.py's default, may be missing with
    no_adapter.

    Raises ValueError: see resolve_base and base_of_adapter.
    """
    if no_adapter and adapter_dir == ADAPTER_DIR and not Path(adapter_dir).exists():
        adapter_dir = None
    if not model and adapter_dir is None:
        return None
    path = resolve_base(model) if model else base_of_adapter(adapter_dir)
    warn_of_chatglm2(path)
    with suppress(OSError, ValueError, TypeError):  # what is wrong with the file is told later
        warn_of_chatglm2(read_json(base_file(path, "config.json")).get("_name_or_path"))
    return path


def base_of_adapter(adapter_dir):
    """→ the base that an adapter names: a hub id, or a directory, perhaps relative to its own.

    Raises ValueError if there is no adapter, or it names no base.
    """
    file = Path(adapter_dir, "adapter_config.json")
    if not file.exists():
        if saved := list_checkpoints(Path(adapter_dir)):
            raise ValueError(
                f"{adapter_dir}: no adapter here yet; finish the run with train.py --resume, or "
                f"give a checkpoint of it, for example --adapter {saved[0]}"
            )
        advice = "run train.py first, or give --adapter DIR"
        raise ValueError(f"{adapter_dir}: no adapter here; {advice}")
    name = read_json(file).get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        raise ValueError(f"{file}: it names no base; give --model DIR_OR_HUB_ID")
    beside = Path(adapter_dir, name)
    if beside.is_dir() and not Path(name, "config.json").exists():
        return str(beside.resolve())
    try:
        return resolve_base(name)
    except ValueError as error:
        what = f"its base {name!r} is not there; give --model DIR_OR_HUB_ID"
        raise ValueError(f"{adapter_dir}: {what}") from error


def base_file(path, name):
    """→ a small file of a checkpoint, from its directory or the hub; None if it isn't there."""
    quiet = dict(
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return cached_file(path, name, **quiet)


def own_dtype(path):
    """→ the name of the dtype that the base's config.json says, "auto" if it says none"""
    file = base_file(path, "config.json")
    if file is None:
        raise ValueError(f"{path}: no model here: it has no config.json")
    config = read_json(file)
    own = f"torch.{config.get('torch_dtype', config.get('dtype'))}"
    return next((name for name, dtype in DTYPES.items() if str(dtype) == own), "auto")


def loading_options(device, dtype, load_in):
    """What model.load_model takes → the arguments of from_pretrained. Raises ValueError."""
    device = find_device(device)
    dtype = dtype_of(device, dtype)
    options = dict(device_map=device, dtype=dtype)
    if load_in == "fp8":
        check_float8(device)
    if load_in != "4bit":
        return options
    if importlib.util.find_spec("bitsandbytes") is None:
        install = "pip install -r requirements-quantization.txt"
        raise ValueError(f"--load-in {load_in} needs bitsandbytes: {install}")
    keep_nan_in_4bit()
    settings = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    settings["bnb_4bit_use_double_quant"] = True  # the scales in 8 bits: 0.25 GiB less at 6B
    return options | dict(quantization_config=BitsAndBytesConfig(**settings))


def keep_nan_in_4bit():
    """Changes bitsandbytes' quantisation, so that check_finite finds a tensor that is not finite.

    On CUDA, a NaN would become one of the 16 values. Now the offset of its tensor's scales becomes
    NaN, or these, if they have none.
    """
    from bitsandbytes import functional

    quantize = functional.quantize_4bit
    if quantize.__name__ == "quantize_and_keep_nan":  # it was done before
        return

    def quantize_and_keep_nan(A, *args, **options):
        quantised, state = quantize(A, *args, **options)
        scales = state.absmax if state.offset is None else state.offset
        scales += 0 * torch.linalg.vector_norm(A, torch.inf).float()  # 0 × inf is NaN
        return quantised, state

    functional.quantize_4bit = quantize_and_keep_nan


def make_random_weights(directory, model_class, config_class):
    """Makes the weights that belong to directory/config.json, if they are not there yet.

    They are the same on every machine. The random state is left as it was.
    """
    file = Path(directory, "model.safetensors")
    if file.exists():
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config_class.from_pretrained(str(directory)))
    part = file.with_name(f"{file.name}.{os.getpid()}")  # other processes may make it too
    try:
        part.write_bytes(as_bytes(model.state_dict()))
        os.replace(part, file)
    except OSError as error:
        what = f"the built-in model can't be written to {directory}: {error.strerror}"
        raise ValueError(f"{what}; give --model, or use a copy of the project") from error


# --- checking its files -----------------------------------------------------------------------


def check_files(path):
    """Raises ValueError if `path` is an adapter, or an index names a file outside its directory."""
    if find_adapter_config_file(path):  # transformers would load the base that the adapter names
        raise ValueError("it is an adapter (adapter_config.json), not a base")
    for pattern in ("*.safetensors", "*.bin", "*.json"):
        for file in Path(path).glob(pattern):
            check_no_lfs_pointer(file)
    for index in Path(path).glob("*.index.json"):
        for name in json.loads(index.read_text("utf-8"))["weight_map"].values():
            if not isinstance(name, str) or Path(name).name != name:
                raise ValueError(f"{index.name} names a file that is not beside it: {name!r}")


def check_finite(model):
    """→ the model. Raises ValueError with the names of the weights that are not finite."""
    zeros = {}
    for name, param in model.named_parameters():
        in_4bit = getattr(param, "quant_state", None)  # see keep_nan_in_4bit
        zeros[name] = zero_if_finite(in_4bit.offset if in_4bit else param.detach())
    found = torch.stack([*zeros.values()]).tolist()  # one transfer from the device
    if bad := [name for name, zero in zip(zeros, found, strict=True) if zero != 0]:
        what = f"it holds numbers that are not finite, in {first_few(bad)}"
        raise ValueError(f"{model.name_or_path}: {what}; copy it again")
    return model


def zero_if_finite(tensor):
    """→ a tensor of one number in fp32: 0, or NaN if a number is not finite"""
    return 0 * tensor.amin().float() + 0 * tensor.amax().float()


# --- telling one base from another ------------------------------------------------------------


def fingerprint(model, vocabulary_digest, samples=1024):
    """What tells one base from another, whatever dtype either was loaded in.

    {"vocabulary": the digest of its tokenizer.model, "shape": its sizes, "matrices": a digest of
    the blocks' matrices, None if they are quantised, "fixed": a digest of all other weights}.

    The digests are of the signs of some weights of every tensor: rounding keeps signs, in float8
    too. Take it before LoRA is added.
    """
    groups = {"fixed": {}, "matrices": {}}  # {name: some signs; None of a quantised tensor}
    for name, param in model.named_parameters():
        is_matrix = ".layers." in name and param.ndim > 1
        some = param.detach().flatten()[:: max(1, param.numel() // samples)]
        signs = some.float().signbit() if param.is_floating_point() else None
        groups["matrices" if is_matrix else "fixed"][name] = signs
    shape = {name: getattr(model.config, name) for name in SIZES}
    result = {"vocabulary": vocabulary_digest, "shape": shape}
    for group, of_tensors in groups.items():
        result[group] = None
        in_order = [of_tensors[name] for name in sorted(of_tensors)]
        if not any(signs is None for signs in in_order):
            signs = torch.cat(in_order).tolist()  # one transfer from the device
            result[group] = hashlib.sha256(bytes(signs)).hexdigest()
    return result


def check_same_base(found, trained_on, path, adapter, other_ways=""):
    """Raises ValueError if two fingerprints differ. What one of them lacks is not compared.

    other_ways: the advice beside that of giving the right base
    """
    told = {"shape": "shape", "vocabulary": "vocabulary", "fixed": "weights", "matrices": "weights"}
    for key, what in told.items():
        if found[key] and trained_on.get(key) and found[key] != trained_on[key]:
            raise ValueError(
                f"{path}: {adapter} was trained on a base with other {what}; give that one with "
                f"--model{other_ways}"
            )


class TrainedWith(NamedTuple):
    """What an adapter was trained with. Of an adapter of another program, nothing is known."""

    system: str | None  # the system message
    base: dict  # the base's fingerprint; {} if it is not known
    tools: dict  # records.RecordReader.about_tools; {} if it is not known


def trained_with(adapter_dir):
    """→ TrainedWith, of None for no adapter. Raises ValueError if the file is damaged."""
    file = Path(adapter_dir or "", "training_args.json")
    arguments = read_json(file) if adapter_dir and file.exists() else {}
    system, base, tools = (arguments.get(name) for name in TrainedWith._fields)
    base, tools = base or {}, tools or {}
    are_right = isinstance(system, str | None) and isinstance(base, dict)
    names = tools.get("names") if isinstance(tools, dict) else "damaged"
    are_names = isinstance(names, list | None) and all(isinstance(n, str) for n in names or ())
    if not (are_right and are_names):
        raise ValueError(f"{file}: damaged; copy it again, or train the adapter again")
    return TrainedWith(system, base, tools)
