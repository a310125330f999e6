"""The layouts of an exported directory: the official one, and that of transformers' own GLM.

A layout says which tensors there are, how each is made of a MergedModel's, and what config.json
holds. Both networks compute the same: GLM's only splits query_key_value in three, and calls the
matrices by other names.
"""

from functools import partial
from typing import NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import GlmConfig, GlmForCausalLM

from support.bases import zero_if_finite
from support.config import FIXED, dtype_name
from support.errors import first_few
from support.files import as_json
from support.merging import INV_FREQ, CheckpointTensors

SHARD = "2GB"  # about the official size


class Target(NamedTuple):
    """A tensor of an export."""

    shape: tuple
    read: callable  # () → the tensor, in fp32


def official_tensors(model):
    """A MergedModel → {name: Target} in the layout of THUDM/chatglm3-6b."""
    targets = {
        name: Target(shape, partial(model.__getitem__, name))
        for name, shape in model.shapes.items()
    }
    dim = model.config.kv_channels // 2
    # The official code uses this tensor's dtype only.
    frequencies = 1 / 10000 ** (torch.arange(0, dim, 2) / dim)
    return {**targets, INV_FREQ: Target(frequencies.shape, lambda: frequencies)}


def official_config(config, given, dtype, with_code=False):
    """→ the content of config.json, as the official code, vLLM and SGLang read it.

    config: a ChatGLMConfig; given: the base's config.json; with_code: whether the base's code
    stands beside it
    """
    dropped = {"dtype", "quantization_config", *(() if with_code else ("auto_map",))}
    kept = {name: value for name, value in given.items() if name not in dropped}
    sizes = {name: getattr(config, name) for name in type(config).__annotations__}
    return {
        **FIXED,
        **sizes,
        "original_rope": True,  # vLLM and SGLang: neighbouring numbers are rotated, not halves
        **kept,
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "torch_dtype": dtype_name(dtype),
    }


GLM_PARTS = {  # of a block; query_key_value is split in three
    "input_layernorm": "input_layernorm",
    "self_attention.dense": "self_attn.o_proj",
    "post_attention_layernorm": "post_attention_layernorm",
    "mlp.dense_h_to_4h": "mlp.gate_up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
}
GLM_OTHERS = {
    "transformer.embedding.word_embeddings": "model.embed_tokens",
    "transformer.encoder.final_layernorm": "model.norm",
    "transformer.output_layer": "lm_head",
}


def glm_tensors(model):
    """A MergedModel → {name: Target} of transformers' GlmForCausalLM."""
    c = model.config
    qkv_rows = [n * c.kv_channels for n in (c.num_attention_heads, *[c.multi_query_group_num] * 2)]
    targets = {}
    for source, shape in model.shapes.items():
        path, _, kind = source.rpartition(".")
        number, _, part = path.removeprefix("transformer.encoder.layers.").partition(".")
        if part == "self_attention.query_key_value":
            for i, letter in enumerate("qkv"):
                name = f"model.layers.{number}.self_attn.{letter}_proj.{kind}"
                read = partial(_part_of, model, source, qkv_rows, i)
                targets[name] = Target((qkv_rows[i], *shape[1:]), read)
        else:
            name = GLM_OTHERS.get(path) or f"model.layers.{number}.{GLM_PARTS[part]}"
            targets[f"{name}.{kind}"] = Target(shape, partial(model.__getitem__, source))
    return targets


def _part_of(model, name, rows, i):
    return model[name].split(rows)[i]


def glm_config(config, dtype, stop_ids):
    """→ the content of config.json for GlmForCausalLM, as transformers 4.46 and later read it."""
    c = config
    return {
        "model_type": "glm",
        "architectures": ["GlmForCausalLM"],
        "vocab_size": c.padded_vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.ffn_hidden_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.multi_query_group_num,
        "head_dim": c.kv_channels,
        "max_position_embeddings": c.seq_length,
        "rms_norm_eps": c.layernorm_epsilon,
        "rope_theta": 10000.0 * c.rope_ratio,
        "partial_rotary_factor": 0.5,
        "attention_bias": c.add_qkv_bias,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_cache": True,
        "eos_token_id": [*stop_ids],
        "pad_token_id": 0,
        "torch_dtype": dtype_name(dtype),
    }


def as_glm(model, dtype, device="cpu"):
    """A MergedModel → transformers' GlmForCausalLM with its weights. It stops at no id."""
    settings = glm_config(model.config, dtype, stop_ids=()) | {"eos_token_id": None}
    config = GlmConfig.from_dict(settings)
    with torch.device("meta"):
        network = GlmForCausalLM(config)
    weights = {name: target.read().to(dtype) for name, target in glm_tensors(model).items()}
    network.load_state_dict(weights, strict=True, assign=True)
    with torch.device(device):  # its buffers are in no file
        network.model.rotary_emb = type(network.model.rotary_emb)(config)
    return network.eval()


def write_shards(directory, targets, dtype, progress):
    """Writes {name: Target} as safetensors files of at most SHARD, with an index if it has several.

    progress(n) is called after n more bytes. Raises ValueError for a number too large for `dtype`.
    """
    empty = {n: torch.empty(t.shape, dtype=dtype, device="meta") for n, t in targets.items()}
    pattern = "model{suffix}.safetensors"
    split = split_torch_state_dict_into_shards(
        empty, max_shard_size=SHARD, filename_pattern=pattern
    )
    for file, names in split.filename_to_tensors.items():
        shard = {}
        for name in names:
            shard[name] = targets[name].read().to(dtype, copy=True).contiguous()
            if zero_if_finite(shard[name]) != 0:
                what = f"{name} has numbers too large for {dtype_name(dtype)}"
                raise ValueError(f"{what}; give --dtype fp32")
            progress(shard[name].nbytes)
        save_file(shard, directory / file, {"format": "pt"})
    if split.is_sharded:
        index = dict(metadata=split.metadata, weight_map=split.tensor_to_filename)
        (directory / "model.safetensors.index.json").write_bytes(as_json(index))


def compare_tensors(directory, targets, dtype, progress):
    """Raises ValueError if the files don't hold exactly these tensors, {name: Target}.

    progress(n) is called after n more bytes.
    """
    found = CheckpointTensors(directory)
    if wrong := sorted(found.file_of.keys() ^ targets.keys()):
        raise ValueError(f"{directory}: tensors are missing or unknown: {first_few(wrong)}")
    for name, target in targets.items():
        wanted = target.read().to(dtype)
        if not torch.equal(found[name].to(dtype), wanted):
            raise ValueError(f"{directory}: {name} is not what base and adapter give")
        progress(wanted.nbytes)
