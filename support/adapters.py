"""The files of an adapter in peft's layout, and what is wrong with them.

Source of the format: peft's `PeftModel.save_pretrained`. Tensors are named "base_model.model.", the
path of the module, then "lora_A.weight" or "lora_B.weight" (of an embedding "lora_embedding_A" and
"lora_embedding_B"), and with DoRA also "lora_magnitude_vector". A module that was trained whole has
its own tensors' names.
"""

import contextlib
import dataclasses
import difflib
import json
import re

import torch
from peft import LoraConfig, PeftConfig, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from support.config import warn_of_chatglm2
from support.errors import first_few, one_line
from support.files import check_no_lfs_pointer
from support.fp8 import float8_layers

# The keys of adapter_config.json that are plain LoRA, and the types of their values. Whatever else
# peft knows changes the network, the base's weights or the input, and is refused.
PLAIN_LORA = {
    "r": int,
    "lora_alpha": int | float,
    "lora_dropout": int | float,
    "bias": str,
    "fan_in_fan_out": bool,
    "use_rslora": bool,
    "use_dora": bool,
    "init_lora_weights": bool | str,
    "target_modules": list | str,
    "exclude_modules": list | str,
    "modules_to_save": list,
    "layers_to_transform": list | int,
    "layers_pattern": list | str,
    "rank_pattern": dict,
    "alpha_pattern": dict,
}


# --- new adapters -----------------------------------------------------------------------------


def check_dora(model):
    """Raises ValueError if DoRA can't work on the model. peft takes the norms of the weights."""
    if float8_layers(model):
        raise CannotUse("DoRA does not work with --load-in fp8; use 4bit, or leave --load-in out")


def check_whole(modules, names):
    """Raises ValueError if one of these modules can't be trained whole: --load-in quantised it."""
    for name in names:
        if any(param.dtype.itemsize == 1 for param in modules[name].parameters()):
            what = f"{name} is quantised by --load-in, and can't be trained whole"
            raise CannotUse(f"{what}; leave --load-in out")


def check_targets(model, target_modules, modules_to_save, dora=False):
    """Raises ValueError for a name that no module has, for a target that is no linear layer, for
    what --load-in has quantised and can't be trained, and if all targets are trained whole."""
    if dora:
        check_dora(model)
    modules = {name: module for name, module in model.named_modules() if name}
    is_pattern = isinstance(target_modules, str)
    targets, whole, adapted = [target_modules] if is_pattern else target_modules, [], []
    for wanted in [*modules_to_save, *targets]:
        try:
            if is_pattern and wanted is target_modules:
                found = [name for name in modules if re.fullmatch(wanted, name)]
            else:
                found = [name for name in modules if f".{name}".endswith(f".{wanted}")]
        except re.error as error:
            raise ValueError(f"{wanted!r} is not a regular expression: {error}") from error
        if not found:
            names = {name.rpartition(".")[2] for name in modules if not name[-1].isdigit()}
            close = difflib.get_close_matches(wanted, names, n=1)
            hint = f"there are: {', '.join(sorted(names))}"
            hint = f"did you mean {close[0]!r}?" if close else hint
            raise ValueError(f"no module of the model is named {wanted!r}; {hint}")
        if wanted in modules_to_save:
            check_whole(modules, found)
            whole += [f"{name}." for name in found]
        for name in found if wanted in targets else ():
            if not isinstance(modules[name], nn.Linear | nn.Embedding):
                raise ValueError(f"target modules {wanted!r}: {name} is no linear layer")
            adapted += [] if f"{name}.".startswith(tuple(whole)) else [name]
    if not adapted:
        raise ValueError("no layer gets LoRA: --modules-to-save trains all targets whole")


def adapter_tensors(peft_model):
    """→ {name: tensor}, the trained tensors under peft's names"""
    # save_embedding_layers=False: peft would otherwise ask the hub whether the vocabulary grew.
    return get_peft_model_state_dict(peft_model, save_embedding_layers=False)


def adapter_files(peft_model):
    """→ {file name: content} in peft's layout: tensors, copied to the CPU, and JSON as bytes."""
    state = adapter_tensors(peft_model)
    state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}
    config = peft_model.peft_config["default"].to_dict() | {"inference_mode": True}
    # peft keeps some lists as sets, whose order changes between runs.
    config = {n: sorted(v) if isinstance(v, set) else v for n, v in config.items()}
    return {
        "adapter_model.safetensors": state,
        "adapter_config.json": json.dumps(config, indent=2, sort_keys=True).encode() + b"\n",
    }


# --- adapters from files ----------------------------------------------------------------------


class Mismatch(ValueError):
    """Tensors that the model or the configuration has no place for."""


class CannotUse(ValueError):
    """What the files hold can be read, and can't be used."""


@contextlib.contextmanager
def told_of(directory):
    """Raises every error in it as a ValueError that names the adapter's directory."""
    try:
        yield
    except Mismatch as error:
        what = "this adapter was not trained on this model"
        raise ValueError(f"{directory}: {what}: {error}") from error
    except CannotUse as error:
        raise ValueError(f"{directory}: {error}") from error
    except Exception as error:  # whatever a damaged file makes the readers raise
        raise ValueError(f"{directory}: cannot read this adapter: {one_line(error)}") from error


def weights_file(directory):
    """→ the file with the tensors of the adapter in `directory`. Raises ValueError without one."""
    file = directory / "adapter_model.safetensors"
    if not file.exists():
        file = directory / "adapter_model.bin"  # from a peft before safetensors
    if not file.is_file() or not (directory / "adapter_config.json").is_file():
        needed = "adapter_config.json and adapter_model.safetensors"
        raise ValueError(f"{directory}: no adapter here ({needed})")
    check_no_lfs_pointer(file)
    return file


def read_adapter(file):
    """→ (tensors, LoraConfig) of the adapter whose tensors are in `file`. Raises ValueError.

    Nothing is unpickled but tensors. What the configuration holds is checked, and not used yet.
    """
    if file.suffix == ".safetensors":
        tensors = load_file(file)
    else:
        tensors = torch.load(file, "cpu", weights_only=True)
    values = tensors.values() if isinstance(tensors, dict) else [None]
    if not all(torch.is_tensor(value) and value.is_floating_point() for value in values):
        what = "holds other things than tensors of floating-point numbers"
        raise ValueError(f"{file.name} {what}")
    config = json.loads(file.with_name("adapter_config.json").read_text("utf-8"))
    found = plain_config(config)
    warn_of_chatglm2(config.get("base_model_name_or_path"))
    return tensors, found


def plain_config(given):
    """adapter_config.json's content → LoraConfig. Raises ValueError for what isn't plain LoRA."""
    if not isinstance(given, dict) or given.get("peft_type") != "LORA":
        raise ValueError("it is not LoRA")
    defaults, general = LoraConfig().to_dict(), PeftConfig().to_dict()
    for name in defaults.keys() - general.keys() - PLAIN_LORA.keys():
        if given.get(name) and given[name] != defaults[name]:
            raise ValueError(f"it is not plain LoRA: {name} is {given[name]!r}")
    kept = {name: given[name] for name in PLAIN_LORA if given.get(name) is not None}
    for name, value in kept.items():
        if not isinstance(value, PLAIN_LORA[name]):
            raise ValueError(f"{name} is {value!r}")
    if kept.get("init_lora_weights") not in (None, True, False, "gaussian", "orthogonal"):
        raise ValueError(f"it changes the base: init_lora_weights is {kept['init_lora_weights']!r}")
    for name in ("rank_pattern", "alpha_pattern"):
        for key, value in kept.get(name, {}).items():
            if not re.fullmatch(r"\^?[\w.]+", key) or not isinstance(value, int | float):
                raise ValueError(f"{name} has {key!r}: {value!r}; it must be a module's name")
    return LoraConfig(task_type="CAUSAL_LM", **kept)


def exact_config(config, tensors, model):
    """`config` with the full paths of exactly those modules of `model` that `tensors` belong to.

    peft takes most names in a configuration for regular expressions. A full path matches only
    itself. Raises Mismatch for tensors that are missing, belong to no module, or have another rank
    than `config` says. A layer that only a pattern in `config` names is not missed.
    """
    if config.use_dora:
        check_dora(model)
    names = {str(name).removeprefix("base_model.model.") for name in tensors}
    adapted = {name.partition(".lora_")[0] for name in names if ".lora_" in name}
    targets = [name for name, _ in model.named_modules() if name in adapted]
    # With a bias setting, peft also saves biases of modules that are not trained whole.
    biases = () if config.bias == "none" else (".bias",)
    whole = {
        name.rpartition(".")[0]
        for name, _ in model.named_parameters()
        if name in names and not name.endswith(biases)
    }
    check_whole(dict(model.named_modules()), whole - adapted)
    ranks = _ranks(tensors)
    faults = [f"unknown base_model.model.{path}" for path in sorted(adapted - {*targets})]
    faults += _missing_whole(config, model, names)
    for path in [*targets, *_forgotten(config, model, adapted | whole)]:
        wanted = _of_module(config.rank_pattern, path, config.r)
        if path not in ranks:
            faults.append(f"missing base_model.model.{path}.lora_A")
        elif ranks[path] != wanted:
            faults.append(f"{path} has LoRA tensors of rank {ranks[path]}, not {wanted}")
    if faults:
        raise Mismatch(first_few(faults))
    alphas = {path: _of_module(config.alpha_pattern, path, config.lora_alpha) for path in targets}
    return dataclasses.replace(
        config,
        init_lora_weights=True,  # the loaded tensors replace the initial values
        target_modules=targets,
        modules_to_save=sorted(whole - adapted) or None,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern={path: ranks[path] for path in targets if ranks[path] != config.r},
        alpha_pattern={path: a for path, a in alphas.items() if a != config.lora_alpha},
    )


def _missing_whole(config, model, names):
    """→ a fault for each parameter of a module to save that is not among `names`"""
    return [
        f"missing base_model.model.{parameter}"
        for parameter, _ in model.named_parameters()
        if parameter not in names
        if any(f".{module}." in f".{parameter}" for module in config.modules_to_save or ())
    ]


def _forgotten(config, model, known):
    """→ paths of layers that the configuration names plainly, and that are not `known`"""
    plain = not (config.exclude_modules or config.layers_to_transform)
    names = config.target_modules if plain and not isinstance(config.target_modules, str) else ()
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) and path not in known
        if any(f".{path}".endswith(f".{name}") for name in names or ())
    ]


def _ranks(tensors):
    """→ {the path of each module with LoRA: the rank of its matrix A}"""
    pattern = r"base_model\.model\.(.+)\.lora_(embedding_)?A(\.weight)?"
    matches = {name: re.fullmatch(pattern, str(name)) for name in tensors}
    return {match[1]: tensors[name].shape[0] for name, match in matches.items() if match}


def _of_module(by_name, path, default):
    """The value in `by_name` under the module's path or the end of it."""
    # "^" before a name is peft's way to say that it is the whole path.
    return next(
        (v for n, v in by_name.items() if f"^.{path}".endswith(f".{n}".replace(".^", "^."))),
        default,
    )


def check_tensors(tensors, wanted):
    """Raises Mismatch if the names or shapes in {name: tensor} are not the wanted ones, and
    CannotUse if a number is not finite."""
    different = [
        (name, tensors[name].shape, wanted[name].shape)
        for name in tensors.keys() & wanted.keys()
        if tensors[name].shape != wanted[name].shape
    ]
    missing, unknown = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
    if faults := key_faults(missing, different, unknown):
        raise Mismatch(first_few(faults))
    if bad := [name for name, value in tensors.items() if not value.float().isfinite().all()]:
        what = f"it holds numbers that are not finite, in {first_few(bad)}"
        raise CannotUse(f"{what}; copy it again, or train it again")


def key_faults(missing_keys, mismatched_keys, unexpected_keys, **rest):
    """One sentence for each tensor. The arguments are what transformers tells of a checkpoint; of
    these only the keys are read.

    mismatched_keys: [(name, its shape, the wanted shape)]
    """
    faults = [f"missing {name}" for name in sorted(missing_keys)]
    for name, shape, wanted in sorted(mismatched_keys):
        faults.append(f"{name} has shape {list(shape)}, not {list(wanted)}")
    return faults + [f"unknown {name}" for name in sorted(unexpected_keys, key=str)]
