"""The ChatGLM3 network in plain PyTorch, its checkpoint loader, and its LoRA adapters.

    model = ChatGLMForCausalLM.from_pretrained("THUDM/chatglm3-6b", dtype=torch.float16, device_map="cuda")

Module names are those of the official checkpoint, so weights and adapters interchange with the official code.
Shapes: B batch, T tokens, C hidden size, H query heads, G key/value groups, D channels a head, V vocabulary.
"""

import logging

# Before peft imports it: it would ask for a package that nobody needs.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import argparse
import difflib
import fcntl
import hashlib
import importlib.util
import json
import os
import pickle
import re
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import find_adapter_config_file

ADAPTER_DIR = "output/ChatGLM"  # where train.py writes and infer.py looks
LOSS_CHUNK = 2048  # positions whose logits are held at a time; an eighth of them where blocks are checkpointed
SHAPE = "num_layers hidden_size ffn_hidden_size num_attention_heads multi_query_group_num kv_channels padded_vocab_size"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


# What the official code has a switch for, and every ChatGLM3 checkpoint sets so.
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


class ChatGLMConfig(PretrainedConfig):
    """The keys of the official config.json that this network reads; the defaults are chatglm3-6b's. From a file, the
    shape must be given whole, and other keys (auto_map, names of kernels to fetch, …) are dropped: none is acted on."""

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

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Raises ValueError for a key of the shape that is missing, a value of the wrong kind, another architecture."""
        names = [name for name in cls.__annotations__ if isinstance(getattr(cls, name), int | float)]
        for name, wanted in ({name: getattr(cls, name) for name in names} | FIXED).items():
            if type(wanted) is int and name not in config_dict:
                raise ValueError(f"config.json is not there, or has no {name}")
            value = config_dict.get(name, wanted)
            kinds = {bool: bool, int: int, float: (int, float)}[type(wanted)]
            if not isinstance(value, kinds) or (type(wanted) is not bool and isinstance(value, bool)):
                raise ValueError(f"config.json: {name} is {value!r}, not a {type(wanted).__name__}")
            most = 1000 if name == "num_layers" else 2**24  # nothing true is near; a network of that size is not built
            if (type(wanted) is int or name in ("layernorm_epsilon", "rope_ratio")) and not 0 < value < most:
                raise ValueError(f"config.json: {name} is {value!r}; it must be more than 0 and less than {most}")
            if name in FIXED and value != wanted:
                raise ValueError(f"config.json: {name} is {value!r}; ChatGLM3 needs {wanted!r}")
        for name, divisor in (("num_attention_heads", config_dict["multi_query_group_num"]), ("kv_channels", 4)):
            if config_dict[name] % divisor:
                raise ValueError(f"config.json: {name} is {config_dict[name]}; it must be a multiple of {divisor}")
        kept = [*names, "architectures", "torch_dtype", "dtype"]
        return super().from_dict({name: config_dict[name] for name in kept if name in config_dict}, **kwargs)


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        x32 = x.float()  # the variance of fp16 activations overflows fp16
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight * x32).to(x.dtype)


def rope_table(length, dim, head_dim, base, device):
    """[length, 2, head_dim] in fp32: the cosine and the signed sine of position × frequency, for the pairs (0,1), (2,3), …
    of the first `dim` channels of a head; 1 and 0 for the rest, which are not rotated."""
    freq = 1.0 / base ** (torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), freq)
    cos, sin = angle.cos(), angle.sin()
    cos, sin = torch.stack((cos, cos), -1).flatten(1), torch.stack((-sin, sin), -1).flatten(1)
    rest = head_dim - dim
    return torch.stack((F.pad(cos, (0, rest), value=1.0), F.pad(sin, (0, rest))), dim=1)


def apply_rope(x, rope):
    """Rotates each pair (a, b) to (a cos - b sin, b cos + a sin). x [B, T, heads, D], rope [(B,) T, 2, D]."""
    cos, sin = rope.unsqueeze(-3).unbind(-2)
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return x * cos + swapped * sin


def whole_rows(x, P, B):
    """[1, P + B × (T - P), heads, D], P tokens that all rows begin with and then the rest of each → [B, T, heads, D]."""
    return torch.cat((x[:, :P].expand(B, -1, -1, -1), x[0, P:].unflatten(0, (B, -1))), dim=1)


class SelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.groups = config.num_attention_heads, config.multi_query_group_num
        self.head_dim = config.kv_channels
        out = (self.heads + 2 * self.groups) * self.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, out, bias=config.add_qkv_bias)
        self.dense = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, x, rope, shared=None, cache=None, at=None):
        """x [B, T, C]; with shared = (P, B), [1, P + B × (T - P), C]: P tokens that all rows begin with, then what follows them
        in each row. cache: this layer's keys and values, [B, G, L, D] each, written in place. at: None where x starts the
        sequences; where it is one more token of each row, T = 1, see Transformer.forward."""
        B, T, _ = x.shape
        qkv = self.query_key_value(x).view(B, T, self.heads + 2 * self.groups, self.head_dim)
        qk, v = qkv.split((self.heads + self.groups, self.groups), dim=2)
        q, k = apply_rope(qk, rope).split((self.heads, self.groups), dim=2)
        if at is not None:
            rows, positions, mask = at
            keys, values = cache
            keys[rows, :, positions] = k.squeeze(1)
            values[rows, :, positions] = v.squeeze(1)
            # The heads of a group stand where the one token was, so that no key is repeated for them. Written out, because
            # attention kernels that take a mask give a whole group to one multiprocessor, however long the cache.
            q = q.reshape(B, self.groups, -1, self.head_dim) * self.head_dim**-0.5  # [B, G, H/G, D]
            y = (q @ keys.mT + mask).softmax(-1) @ values
            return self.dense(y.view(B, 1, -1))
        if shared:  # attention alone sees whole rows
            q, k, v = whole_rows(q, *shared), whole_rows(k, *shared), whole_rows(v, *shared)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, H or G, T, D]
        if cache is not None:
            for kept, new in zip(cache, (k, v), strict=True):
                kept[:, :, :T] = new
        # Without a mask argument, causal attention alone is right for right-padded batches: no real token sees padding.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)  # [B, T, H, D]
        if shared:
            y = torch.cat((y[:1, : shared[0]], y[:, shared[0] :].flatten(0, 1)[None]), dim=1)
        return self.dense(y.flatten(2))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=False)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, x):
        gate, up = self.dense_h_to_4h(x).chunk(2, dim=-1)
        return self.dense_4h_to_h(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.self_attention = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x, rope, shared=None, cache=None, at=None):
        x = x + self.self_attention(self.input_layernorm(x), rope, shared, cache, at)
        return x + self.mlp(self.post_attention_layernorm(x))


class Embedding(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.checkpointed_layers = 0  # how many of the layers recompute their activations in backward

    def forward(self, x, rope, shared=None, cache=None, at=None):
        for i, layer in enumerate(self.layers):
            if self.training and torch.is_grad_enabled() and i < self.checkpointed_layers:
                x = checkpoint(layer, x, rope, shared, use_reentrant=False)
            else:
                x = layer(x, rope, shared, None if cache is None else cache[i], at)
        return self.final_layernorm(x)


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embedding = Embedding(config)
        self.encoder = Encoder(config)
        self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.head_dim = config.kv_channels
        self.rope_base = 10000.0 * config.rope_ratio
        self.rope = torch.empty(0)

    def forward(self, input_ids, prefix=None, cache=None, positions=None):
        """input_ids [B, T] → hidden states [B, T, C], after the final norm.

        With prefix [P], tokens that stand before each row, they are computed once: → [1, P + B × T, C].

        With a cache (new_cache), keys and values are kept there: first those of prompts, padded on the right; then, with
        T = 1 and `positions` [B], those of one more token of each row, at that row's own position. Positions are read on the
        device only, so a CUDA graph can hold the step; keys past a row's position, of padding or of an earlier use, are
        masked."""
        rows, end = input_ids.shape
        shared = None
        if prefix is not None and len(prefix):
            shared, end = (len(prefix), rows), len(prefix) + end
            input_ids = torch.cat((prefix, input_ids.flatten()))[None]
        if positions is not None:
            end = cache[0][0].shape[2]
        x = self.embedding.word_embeddings(input_ids)
        if self.training and torch.is_grad_enabled() and not x.requires_grad:
            x.requires_grad_()  # it needs no gradient, but this makes all blocks alike: one compilation
        if len(self.rope) < end or self.rope.device != x.device:
            with torch.inference_mode(False):  # made while decoding, it must still serve a training step
                self.rope = rope_table(max(2 * end, 2048), self.head_dim // 2, self.head_dim, self.rope_base, x.device)
        if positions is None:
            rope = self.rope[:end].to(x.dtype)
            if shared:
                rope = torch.cat((rope[: len(prefix)], rope[len(prefix) :].repeat(rows, 1, 1)))
            return self.encoder(x, rope, shared, cache)
        unseen = torch.arange(end, device=x.device) > positions[:, None]  # [B, L]
        mask = torch.zeros_like(unseen, dtype=x.dtype).masked_fill(unseen, -torch.inf)[:, None, None]
        at = (torch.arange(rows, device=x.device), positions, mask)
        return self.encoder(x, self.rope[positions, None].to(x.dtype), None, cache, at)


class ChatGLMForCausalLM(PreTrainedModel):
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["Block"]
    _supports_sdpa = True
    _keys_to_ignore_on_load_unexpected = [r"rotary_pos_emb\.inv_freq"]  # in the official files; recomputed in fp32

    def __init__(self, config):
        super().__init__(config)
        self.transformer = Transformer(config)
        self.prepare_inputs_for_generation = None  # peft looks it up on every causal language model
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer.embedding.word_embeddings

    def get_output_embeddings(self):
        return self.transformer.output_layer

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Loads the official layout from a directory or a hub id: safetensors or .bin, one file or shards, straight to
        `device_map` in `dtype`. No code of the checkpoint is run (.bin files are read with weights_only).

        Raises ValueError naming every tensor that is missing, misshapen or not part of the network, and every file
        that can't be read: nothing is left at a random value.
        """
        want_info = kwargs.pop("output_loading_info", False)
        kwargs["ignore_mismatched_sizes"] = True  # reported below, by name
        path = str(pretrained_model_name_or_path)
        try:
            if find_adapter_config_file(path):  # transformers would load the base that this names
                raise ValueError("it is an adapter (adapter_config.json), not a base")
            for index in Path(path).glob("*.index.json"):
                for name in json.loads(index.read_text("utf-8"))["weight_map"].values():
                    if not isinstance(name, str) or Path(name).name != name:
                        raise ValueError(f"{index.name} names a file that is not beside it: {name!r}")
            model, info = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        except Exception as error:  # whatever a damaged file makes the readers raise
            raise ValueError(f"{path}: cannot load this model: {brief(error)}") from error
        faults = [f"missing {name}" for name in sorted(info["missing_keys"])]
        faults += [f"{name} has shape {list(a)}, not {list(b)}" for name, a, b in sorted(info["mismatched_keys"])]
        faults += [f"unknown {name}" for name in sorted(info["unexpected_keys"], key=str)]
        if faults:
            raise ValueError(f"{path}: not a complete ChatGLM3 checkpoint: {_first(faults)}")
        return (model, info) if want_info else model

    def _initialize_missing_keys(self, *args):
        """Transformers' random values for what a checkpoint lacks: from_pretrained refuses it, of whatever size it is."""

    def forward(self, input_ids, labels=None, attention_mask=None, **unused):
        """input_ids [B, T] → .logits [B, T, V]; with labels [B, T], .loss: the mean cross-entropy, in fp32, over labels
        that are not -100. Labels align with input_ids; the shift is made here. Batches are padded on the right and need
        no mask: an `attention_mask` [B, T] is only checked to be that of a right-padded batch (ValueError if not)."""
        if passed := [name for name, value in unused.items() if value is not None and not isinstance(value, bool)]:
            raise ValueError(f"ChatGLMForCausalLM.forward does not take {', '.join(passed)}")
        if attention_mask is not None and (attention_mask[:, 1:] > attention_mask[:, :-1]).any():
            raise ValueError("attention_mask must be that of a right-padded batch: ones, then zeros")
        logits = self.transformer.output_layer(self.transformer(input_ids))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutput(loss=loss, logits=logits)

    def summed_loss(self, prefix, input_ids, positions, targets):
        """The training loss: cross-entropy, in fp32, summed over the supervised tokens.

        prefix [P], tokens that stand before each row of input_ids [B, T]; positions [N]: where among these P + B × T tokens a
        supervised one is predicted; targets [N]: that token, or -100 for none. The output layer runs at those positions
        only, and at no more than LOSS_CHUNK of them at a time: the logits of a long text (65,024 numbers a token, several
        times over) would take more memory than the network.
        """
        hidden = self.transformer(input_ids, prefix).flatten(0, 1).index_select(0, positions)  # [N, C]
        size = LOSS_CHUNK // 8 if self.transformer.encoder.checkpointed_layers else LOSS_CHUNK
        chunks = list(zip(hidden.split(size), targets.split(size), strict=True))
        if len(chunks) == 1:
            return self._loss(*chunks[0])
        how = dict(use_reentrant=False, preserve_rng_state=self.output_layer_drops())
        return sum(checkpoint(self._loss, *chunk, **how) for chunk in chunks)

    def output_layer_drops(self):
        """Whether the output layer has a LoRA dropout, which must be the same when a chunk is recomputed."""
        return any(isinstance(module, nn.Dropout) and module.p for module in self.transformer.output_layer.modules())

    def _loss(self, hidden, targets):
        log_probs = F.log_softmax(self.transformer.output_layer(hidden), dim=-1, dtype=torch.float32)
        return F.nll_loss(log_probs, targets, reduction="sum")

    def new_cache(self, batch_size, length):
        """An empty key/value cache for `length` tokens: a layer's keys and values, [B, G, length, D] each."""
        c = self.config
        shape = (batch_size, c.multi_query_group_num, length, c.kv_channels)
        return [[torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in "kv"] for _ in range(c.num_layers)]


TINY = Path(__file__).parent / "dataset" / "tiny"


def tiny_model():
    """The directory of the built-in model: ChatGLM3's architecture with 3.7 million random weights, made at first use."""
    file = TINY / "model.safetensors"
    if not file.exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = ChatGLMForCausalLM(ChatGLMConfig.from_pretrained(str(TINY)))
        part = file.with_name(f"{file.name}.{os.getpid()}")
        part.write_bytes(safetensors_bytes(model.state_dict(), metadata={"format": "pt"}))
        os.replace(part, file)
    return str(TINY)


def find_model(path):
    """What a user names, a directory or a hub id, or None for the built-in model → an absolute directory or the hub id:
    the name by which an adapter remembers its base. Raises ValueError if it is neither."""
    if path is None:
        return tiny_model()
    if path and Path(path).is_dir():
        return str(Path(path).resolve())
    if Path(path).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path):
        raise ValueError(f"{path!r} is neither a directory nor a hub id; --model takes the directory of a checkpoint")
    return path


def load_model(path, device="auto", dtype="auto", load_in=None):
    """A checkpoint directory or hub id → ChatGLMForCausalLM in evaluation mode. device: auto, cpu or cuda; dtype: auto
    (fp16 on CUDA, fp32 on a CPU), fp16, bf16 or fp32; load_in: 4bit (NF4) or 8bit, for the blocks' matrices. Raises
    ValueError if the device or bitsandbytes isn't there or loading fails."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
    if dtype == "auto":
        dtype = "fp16" if device == "cuda" else "fp32"
    if device == "cpu" and str(path) == str(TINY):
        torch.set_num_threads(1)  # its matrices are too small to share; waiting for a busy core costs more
    quantization = {}
    if load_in:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError(f"--load-in {load_in} needs bitsandbytes: pip install -r requirements-quantization.txt")
        four = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPES[dtype])
        settings = four if load_in == "4bit" else dict(load_in_8bit=True)
        quantization = dict(quantization_config=BitsAndBytesConfig(**settings))
    return ChatGLMForCausalLM.from_pretrained(path, dtype=DTYPES[dtype], device_map=device, **quantization)


def number(low, high=10**9):
    """→ a parser for argparse of numbers from `low` to `high`, whole ones if `low` is."""

    def parse(text):
        value = type(low)(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be between {low} and {high}, not {text}")
        return value

    parse.__name__ = "whole number" if isinstance(low, int) else "number"  # in argparse's message
    return parse


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that are values."""

    def _get_help_string(self, action):
        shown = action.default is not None and action.default is not False
        return super()._get_help_string(action) if shown else action.help


def lock(file, path):
    """Locks an open file or directory until it is closed. Raises ValueError if another process has."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{path}: another process is writing there; wait until it ends") from None
    except OSError:  # this file system has no locks
        pass


def _first(faults, most=3):
    more = f"; and {len(faults) - most} more" if len(faults) > most else ""
    return "; ".join(printable(fault) for fault in faults[:most]) + more


def printable(text, most=300):
    """A name out of a file may hold line breaks and terminal codes, and be of any length."""
    return text[:most] if text.isprintable() else repr(text[:most])


def brief(error):
    """The first line of a library's message; with its type, where the message alone could be a bare word or number."""
    if isinstance(error, pickle.UnpicklingError):  # its message tells how to run what is in the file
        return "it is damaged, or holds more than tensors"
    line = printable((str(error).strip().splitlines() or ["no message"])[0])
    return line if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {line}"


def end(error, program, out_of_memory):
    """Ends the program with exit code 2 and the lines on stderr that tell a user of `error`. Raises what is a bug of ours."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        text = out_of_memory
    elif type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
        text = f"--compile: {brief(error)}; leave it out, or mend what it needs"
    elif isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    elif not isinstance(error, ValueError | OSError):
        raise error
    sys.stderr.writelines(f"{program}: error: {line}\n" for line in text.splitlines())
    sys.exit(2)


def quiet_libraries():
    """For the commands: transformers, peft and the hub keep their progress bars, retries and hints to themselves."""
    warnings.filterwarnings(
        "ignore", module="transformers|peft|bitsandbytes|torch._weights_only_unpickler|torch._utils"
    )
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def fingerprint(model, samples=1024):
    """What tells one base from another, whatever dtype either was loaded in: {"shape": the config's sizes, "fixed":
    a digest of what is never quantised, "matrices": one of the blocks' matrices, None if they are}. The digests are of the
    signs, which rounding keeps, of some weights of every tensor. To be taken before LoRA wraps the model."""
    groups = {"fixed": [], "matrices": []}
    for name, param in sorted(model.named_parameters()):
        groups["matrices" if ".layers." in name and param.ndim > 1 else "fixed"].append(param.detach())
    result = {"shape": {name: getattr(model.config, name) for name in SHAPE.split()}}
    for group, params in groups.items():
        if all(param.is_floating_point() for param in params):
            some = [p.flatten()[:: max(1, p.numel() // samples)].signbit() for p in params]
            result[group] = hashlib.sha256(bytes(torch.cat(some).tolist())).hexdigest()  # one transfer from the device
        else:
            result[group] = None
    return result


# --- LoRA -------------------------------------------------------------------------------------------------------------


def add_lora(model, r, alpha, dropout, target_modules, modules_to_save=None):
    """Freezes `model` and wraps it with new LoRA layers → peft.PeftModel.

    target_modules: a list of module names, or one regular expression (a str) that whole module paths match;
    modules_to_save: names of modules to train whole. Raises ValueError for a name that matches no module, and for what
    load_adapter would not take.
    """
    if isinstance(target_modules, str):
        _check_pattern(target_modules)
    modules = dict(model.named_modules())
    targets = [target_modules] if isinstance(target_modules, str) else target_modules
    for wanted in [*targets, *(modules_to_save or [])]:
        try:
            if wanted is target_modules:
                found = [name for name in modules if re.fullmatch(wanted, name)]
            else:
                found = [name for name in modules if f".{name}".endswith(f".{wanted}")]
        except re.error as error:
            raise ValueError(f"target modules {wanted!r} is not a regular expression: {error}") from error
        if not found:
            leaves = sorted({name.rpartition(".")[2] for name in modules if name and not name[-1].isdigit()})
            close = difflib.get_close_matches(wanted, leaves, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(leaves)}"
            raise ValueError(f"no module of the model is named {wanted!r}; {hint}")
        if wanted in targets:
            for name in found:
                if not isinstance(modules[name], nn.Linear | nn.Embedding):
                    raise ValueError(f"target modules {wanted!r}: {name} is no linear layer, which LoRA needs")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules,
        modules_to_save=modules_to_save,
    )
    peft_model = _trainable_in_fp32(get_peft_model(model, config))
    largest = _largest_rank(get_peft_model_state_dict(peft_model, save_embedding_layers=False))
    if r > largest:
        raise ValueError(f"LoRA's rank {r} is more than its layers have, {largest}")
    return peft_model


def _trainable_in_fp32(peft_model):
    """The base stays frozen in its dtype; what is trained is fp32, because GradScaler refuses fp16 gradients and small
    updates vanish in fp16 weights."""
    for param in peft_model.parameters():
        if param.requires_grad:
            param.data = param.data.float()
    return peft_model


def adapter_files(peft_model):
    """→ {name: content} of peft's own layout: adapter_model.safetensors as tensors, copied to the CPU, and
    adapter_config.json as bytes. See as_bytes."""
    # save_embedding_layers=False: peft would otherwise ask the hub whether the vocabulary was resized.
    state = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}
    config = peft_model.peft_config["default"].to_dict() | {"inference_mode": True}
    # peft keeps some lists as sets, whose order changes between runs.
    config = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    return {
        "adapter_model.safetensors": state,
        "adapter_config.json": json.dumps(config, indent=2, sort_keys=True).encode() + b"\n",
    }


def as_bytes(content):
    """A file's bytes as they are, or of a dict of tensors those of its safetensors file."""
    return content if isinstance(content, bytes) else safetensors_bytes(content, metadata={"format": "pt"})


def save_adapter(peft_model, directory):
    """Writes adapter_files into `directory`."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    for name, content in adapter_files(peft_model).items():
        Path(directory, name).write_bytes(as_bytes(content))


# What is read of adapter_config.json. The rest of what peft knows changes the network, the base's weights or the input.
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
    "exclude_modules": list,
    "modules_to_save": list,
    "layers_to_transform": list | int,
    "layers_pattern": list | str,
    "rank_pattern": dict,
    "alpha_pattern": dict,
}


def _lora_config(given, largest_rank):
    """adapter_config.json's content → LoraConfig. Raises ValueError for what is not plain LoRA, for a rank that no tensor has
    (it could take all memory), and for regular expressions that could take forever: peft takes most names for such."""
    if not isinstance(given, dict) or given.get("peft_type") != "LORA":
        raise ValueError("it is not LoRA")
    known, general = LoraConfig().to_dict(), PeftConfig().to_dict()
    kept = {name: given[name] for name in PLAIN_LORA if given.get(name) is not None}
    for name in known.keys() - general.keys() - PLAIN_LORA.keys():
        if given.get(name) and given[name] != known[name]:
            raise ValueError(f"it is not plain LoRA: {name} is {given[name]!r}")
    if kept.get("init_lora_weights") not in (None, True, False, "gaussian", "orthogonal"):
        raise ValueError(f"it changes the base: init_lora_weights is {kept['init_lora_weights']!r}")
    for name, value in kept.items():
        if not isinstance(value, PLAIN_LORA[name]):
            raise ValueError(f"{name} is {value!r}")
        if name == "target_modules" and isinstance(value, str):  # a regular expression for whole paths
            _check_pattern(value)
        elif isinstance(value, list | dict | str):
            for part in value if isinstance(value, list | dict) else [value]:
                if not isinstance(part, str | int) or not re.fullmatch(r"[-\w.^$\\]+", str(part)):
                    raise ValueError(f"{name} has {part!r}, which is not a module's name")
    if max([kept.get("r", known["r"]), *kept.get("rank_pattern", {}).values()]) > largest_rank:
        raise ValueError(f"its rank is not that of its tensors, {largest_rank}")
    return LoraConfig(task_type="CAUSAL_LM", **kept)


def _check_pattern(pattern):
    """Raises ValueError for a regular expression that could take forever."""
    if len(re.findall(r"[*+?{]", pattern)) > 3 or re.search(r"\)[*+?{]", pattern):
        raise ValueError(f"target modules {pattern!r}: at most three of * + ? {{, and none of them after a bracket")


def _largest_rank(state):
    return max(min(tensor.shape, default=0) for tensor in [torch.zeros(0), *state.values()])


def load_adapter(model, adapter_dir, is_trainable=False):
    """Wraps `model` with the LoRA adapter in `adapter_dir` (peft's layout, from here or elsewhere) → peft.PeftModel.

    Raises ValueError for a directory without an adapter, an adapter that is not plain LoRA, and any tensor that is missing,
    misshapen or has no place in the model.
    """
    directory = Path(adapter_dir)
    file = directory / "adapter_model.safetensors"
    if not file.exists():
        file = directory / "adapter_model.bin"  # written by peft before safetensors
    if not file.is_file() or not (directory / "adapter_config.json").is_file():
        raise ValueError(f"{directory}: no adapter here (adapter_config.json and adapter_model.safetensors)")
    try:
        state = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
        if not isinstance(state, dict) or not all(torch.is_tensor(t) and t.is_floating_point() for t in state.values()):
            raise ValueError(f"{file.name} holds other things than tensors of floating-point numbers")
        given = json.loads((directory / "adapter_config.json").read_text("utf-8"))
        config = _lora_config(given, _largest_rank(state))
        config.inference_mode = not is_trainable
        config.base_model_name_or_path = model.name_or_path
        peft_model = _trainable_in_fp32(get_peft_model(model, config))  # first: what was fp32 must not be rounded
        expected = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
        faults = [f"missing {name}" for name in sorted(expected.keys() - state.keys())]
        faults += [f"unknown {name}" for name in sorted(state.keys() - expected.keys(), key=str)]
        faults += [
            f"{name} has shape {list(state[name].shape)}, not {list(expected[name].shape)}"
            for name in sorted(state.keys() & expected.keys())
            if state[name].shape != expected[name].shape
        ]
        if not faults:
            set_peft_model_state_dict(peft_model, {name: tensor.float() for name, tensor in state.items()})
    except Exception as error:  # whatever a damaged file makes the readers raise
        raise ValueError(f"{directory}: cannot read this adapter: {brief(error)}") from error
    if faults:
        raise ValueError(f"{directory}: this adapter was not trained on this model: {_first(faults)}")
    return peft_model.train(is_trainable)
