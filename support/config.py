"""The configuration of the network, the check of a config.json, and two constants."""

import functools
import os
import sys
from pathlib import Path

import torch
from transformers import PretrainedConfig

from support.defaults import DTYPE_NAMES

IGNORE = -100  # the label of a token that is not supervised
DTYPES = dict(zip(DTYPE_NAMES, (torch.float16, torch.bfloat16, torch.float32), strict=True))
# What the official code has a switch for, and every ChatGLM3 checkpoint sets in the same way.
FIXED = dict(
    multi_query_attention=True,
    rmsnorm=True,
    post_layer_norm=True,
    add_bias_linear=False,
    apply_residual_connection_post_layernorm=False,
    fp32_residual_connection=False,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    tie_word_embeddings=False,
)


@functools.cache
def _warn_once(line):
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes, the first
        print(line, file=sys.stderr)


def warn_of_chatglm2(name):
    """Warns the user, once, if this is the name or path of a ChatGLM2."""
    if isinstance(name, str) and "chatglm2" in Path(name).name.lower():
        what = "it has ChatGLM3's network, but another prompt format"
        _warn_once(f"(this model seems to be ChatGLM2: {what})")


def dtype_name(dtype):
    """→ "float16" for torch.float16"""
    return str(dtype).removeprefix("torch.")


class ChatGLMConfig(PretrainedConfig):
    """The keys of the official config.json that this network reads. Defaults are chatglm3-6b's."""

    model_type = "chatglm"
    attribute_map = {"num_hidden_layers": "num_layers", "vocab_size": "padded_vocab_size"}

    num_layers: int = 28
    hidden_size: int = 4096
    ffn_hidden_size: int = 13696
    num_attention_heads: int = 32
    multi_query_group_num: int = 2
    kv_channels: int = 128
    padded_vocab_size: int = 65024
    seq_length: int = 8192
    layernorm_epsilon: float = 1e-5
    rope_ratio: float = 1.0
    add_qkv_bias: bool = True
    initializer_range: float = 0.02  # of the built-in model only
    tie_word_embeddings: bool = False

    def check_length(self, max_length):
        """Raises ValueError if a text of so many tokens is too long for the model."""
        if max_length > self.seq_length:
            most = f"this model takes at most {self.seq_length} tokens"
            raise ValueError(f"--max-length {max_length}: {most}")

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Keeps the keys above and drops all others, so that none of them is acted on.

        Raises ValueError for a size that is missing, a value of the wrong kind, or another network.
        """
        names = [n for n in cls.__annotations__ if isinstance(getattr(cls, n), int | float)]
        check_config(config_dict, {name: getattr(cls, name) for name in names})
        kept = [*names, "architectures", "torch_dtype", "dtype"]
        return super().from_dict({n: config_dict[n] for n in kept if n in config_dict}, **kwargs)


def check_config(given, defaults):
    """Checks the content of a config.json. defaults: {name: value} of what the network reads.

    Raises ValueError for a size that is missing, a value of the wrong kind, or another network.
    """
    for name, default in (defaults | FIXED).items():
        if type(default) is int and name not in given:
            raise ValueError(f"config.json is not there, or has no {name}")
        value = given.get(name, default)
        kinds = {bool: bool, int: int, float: (int, float)}[type(default)]
        is_flag = isinstance(value, bool)  # which Python takes for a whole number
        if not isinstance(value, kinds) or is_flag != isinstance(default, bool):
            raise ValueError(f"config.json: {name} is {value!r}, not a {type(default).__name__}")
        must_be_positive = type(default) is int or name in ("layernorm_epsilon", "rope_ratio")
        if must_be_positive and not value > 0:
            raise ValueError(f"config.json: {name} is {value!r}; it must be more than 0")
        if name in FIXED and value != default:
            raise ValueError(f"config.json: {name} is {value!r}; ChatGLM3 needs {default!r}")
    divisors = {"num_attention_heads": given["multi_query_group_num"], "kv_channels": 4}
    for name, divisor in divisors.items():
        if given[name] % divisor:
            what = f"it must be a multiple of {divisor}"
            raise ValueError(f"config.json: {name} is {given[name]}; {what}")
