"""The ChatGLM3 network in plain PyTorch, its loss, its checkpoints, and its LoRA adapters.

    model = ChatGLMForCausalLM.from_pretrained("THUDM/chatglm3-6b", dtype=torch.float16)
    peft_model = add_lora(model, r=8, alpha=32, dropout=0.1, target_modules=["query_key_value"])

Module names are the official checkpoint's, so that weights and adapters can be exchanged with the
official code. Letters in shapes: B rows, T tokens of a row, P of them a prefix that all rows begin
with, L tokens of a row that a cache has room for, N targets; and with chatglm3-6b's sizes: C hidden
size 4096, H query heads 32, G key/value groups 2, D channels of a head 128, V vocabulary 65,024.
"""

import logging

# This must come before peft is imported: bitsandbytes would warn about a package that is missing.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from support import adapters, fp8
from support.bases import check_files, check_finite, loading_options, make_random_weights
from support.config import IGNORE, ChatGLMConfig
from support.devices import has_grouped_attention
from support.errors import first_few, one_line
from support.files import write_files

BUILT_IN = Path(__file__).parent / "dataset" / "tiny"  # the built-in model's directory
LOSS_CHUNK = 2048  # tokens whose logits are held at a time; 256 where blocks are recomputed


# --- the network ------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) × weight"""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        x32 = x.float()  # the squares of fp16 activations overflow fp16
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight * x32).to(x.dtype)


def rope_table(length, rotated, head_dim, base, device):
    """→ [length, 2, head_dim] in fp32: cos and (-sin, +sin) of position × frequency.

    They rotate the pairs (0, 1), (2, 3), … of the first `rotated` channels of a head. The other
    channels get cosine 1 and sine 0: they are not rotated.
    """
    numbers = partial(torch.arange, device=device, dtype=torch.float32)
    angle = torch.outer(numbers(length), 1.0 / base ** (numbers(0, rotated, 2) / rotated))
    cos, sin = angle.cos(), angle.sin()
    cos = torch.stack((cos, cos), -1).flatten(1)
    sin = torch.stack((-sin, sin), -1).flatten(1)
    unrotated = (0, head_dim - rotated)
    return torch.stack((F.pad(cos, unrotated, value=1.0), F.pad(sin, unrotated)), dim=1)


def apply_rope(x, rope):
    """Rotates each pair (a, b) to (a cos - b sin, b cos + a sin).

    x [B, T, heads, D], rope [T, 2, D] or [B, T, 2, D] → like x
    """
    cos, sin = rope.unsqueeze(-3).unbind(-2)  # [(B,) T, 1, D] each
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return x * cos + swapped * sin


def repeat_prefix(x, P, B):
    """Copies the prefix, which is stored once, into each of B rows.

    [1, P + B × (T - P), heads, D] → [B, T, heads, D]
    """
    return torch.cat((x[:, :P].expand(B, -1, -1, -1), x[0, P:].unflatten(0, (B, -1))), dim=1)


def merge_prefix(x, P):
    """The reverse, which keeps one of the equal copies: [B, T, C] → [1, P + B × (T - P), C]"""
    return torch.cat((x[:1, :P], x[:, P:].flatten(0, 1)[None]), dim=1)


class SelfAttention(nn.Module):
    """H query heads share G groups of keys and values. Only query_key_value has a bias."""

    def __init__(self, config):
        super().__init__()
        self.heads, self.groups = config.num_attention_heads, config.multi_query_group_num
        self.head_dim = config.kv_channels
        size = (self.heads + 2 * self.groups) * self.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, size, bias=config.add_qkv_bias)
        self.dense = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def project(self, x, rope):
        """x [B, T, C] → rotated queries [B, T, H, D], rotated keys and plain values [B, T, G, D]"""
        B, T, _ = x.shape
        qkv = self.query_key_value(x).view(B, T, self.heads + 2 * self.groups, self.head_dim)
        qk, v = qkv.split((self.heads + self.groups, self.groups), dim=2)
        q, k = apply_rope(qk, rope).split((self.heads, self.groups), dim=2)
        return q, k, v

    def forward(self, x, rope, prefix_shape=None, cache=None):
        """Attention over whole sequences: x [B, T, C] → [B, T, C].

        prefix_shape: None, or (P, B) where x is [1, P + B × (T - P), C], with the prefix stored
            once. All other layers work token by token. Attention needs the prefix in every row.
        cache: None, or this layer's keys and values, [B, G, L, D] each, to be filled from x.
        """
        q, k, v = self.project(x, rope)
        if prefix_shape:
            q, k, v = (repeat_prefix(t, *prefix_shape) for t in (q, k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, H or G, T, D]
        if cache is not None:
            keys, values = cache
            keys[:, :, : k.shape[2]], values[:, :, : v.shape[2]] = k, v
        # Padding needs no mask. It is on the right, where causal attention of real tokens does not
        # look. What is computed at padding is not read, or masked in the cache (forward_one).
        is_grouped = has_grouped_attention(q.device, q.dtype)
        if not is_grouped:  # torch would need a [T, T] matrix: copies for each query head
            k, v = (t.repeat_interleave(self.heads // self.groups, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=is_grouped)
        y = y.transpose(1, 2).flatten(2)  # [B, T, H × D]
        return self.dense(merge_prefix(y, prefix_shape[0]) if prefix_shape else y)

    def forward_one(self, x, rope, cache, rows, positions, mask):
        """For each row, one new token attends to the cache: x [B, 1, C] → [B, 1, C].

        cache: this layer's keys and values, [B, G, L, D] each. The new token's own are written
            there first, at (rows, positions) [B].
        mask [B, 1, 1, L]: 0 up to the row's position, included; minus infinity after it.
        """
        q, k, v = self.project(x, rope)
        keys, values = cache
        keys[rows, :, positions] = k.squeeze(1)
        values[rows, :, positions] = v.squeeze(1)
        # Treat the H / G query heads of a group as if they were query positions: the group's keys
        # then need no copy. Attention kernels would be slower: with a mask, only one multiprocessor
        # works on a group.
        q = q.reshape(len(x), self.groups, -1, self.head_dim) * self.head_dim**-0.5
        y = (q @ keys.mT + mask).softmax(-1) @ values
        return self.dense(y.view(len(x), 1, -1))


class MLP(nn.Module):
    """SwiGLU: dense_4h_to_h(silu(gate) × up), where dense_h_to_4h gives gate and up."""

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

    def forward(self, x, rope, prefix_shape=None, cache=None):
        x = x + self.self_attention(self.input_layernorm(x), rope, prefix_shape, cache)
        return x + self.mlp(self.post_attention_layernorm(x))

    def forward_recomputed(self, x, rope, prefix_shape=None):
        """Like forward, but only x is stored. Backward runs it again, with the same dropout."""
        return checkpoint(self.forward, x, rope, prefix_shape, use_reentrant=False)

    def forward_one(self, x, *context):
        x = x + self.self_attention.forward_one(self.input_layernorm(x), *context)
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
        self.recomputed_layers = 0  # gradient checkpointing: of this many blocks, the first ones

    def forward(self, x, rope, prefix_shape=None, cache=None):
        for i, layer in enumerate(self.layers):
            if self.training and torch.is_grad_enabled() and i < self.recomputed_layers:
                x = layer.forward_recomputed(x, rope, prefix_shape)
            else:
                x = layer(x, rope, prefix_shape, None if cache is None else cache[i])
        return self.final_layernorm(x)


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embedding = Embedding(config)
        self.encoder = Encoder(config)
        self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.head_dim = config.kv_channels
        self.rope_base = 10000.0 * config.rope_ratio
        self.rope = torch.empty(0)  # the rotary table, which grows with the longest sequence

    def rope_for(self, length, device):
        """→ the rotary table, for `length` positions or more"""
        if len(self.rope) < length or self.rope.device != device:
            with torch.inference_mode(False):  # else training could not use it after inference
                size, rotated = max(2 * length, 2048), self.head_dim // 2
                self.rope = rope_table(size, rotated, self.head_dim, self.rope_base, device)
        return self.rope

    def forward(self, input_ids, prefix=None, cache=None):
        """Whole sequences: input_ids [B, T] → hidden states [B, T, C], after the final norm.

        prefix [P]: tokens that stand before each row; then input_ids is [B, T - P]. The prefix is
            computed once: the hidden states are [1, P + B × (T - P), C], the prefix's and then
            those of one row after another.
        cache: from new_cache; it is filled with the keys and values of all T tokens.
        """
        P = 0 if prefix is None else len(prefix)
        B, T = len(input_ids), P + input_ids.shape[1]
        if P:
            input_ids = torch.cat((prefix, input_ids.flatten()))[None]
        x = self.embedding.word_embeddings(input_ids)
        if self.training and torch.is_grad_enabled() and not x.requires_grad:
            # Like every other block's input: so one compilation serves all blocks.
            x.requires_grad_()
        rope = self.rope_for(T, x.device)[:T].to(x.dtype)
        if P:
            rope = torch.cat((rope[:P], rope[P:].repeat(B, 1, 1)))
        return self.encoder(x, rope, (P, B) if P else None, cache)

    def forward_one(self, ids, cache, positions):
        """One new token of each row: ids [B], at `positions` [B] → hidden states [B, C].

        The token's keys and values are written into the cache. What stands there after the row's
        position (padding, or an earlier answer) is masked. Positions are read on the device only,
        so that a CUDA graph can hold this step.
        """
        L = cache[0][0].shape[2]
        x = self.embedding.word_embeddings(ids[:, None])
        rope = self.rope_for(L, x.device)[positions, None].to(x.dtype)  # [B, 1, 2, D]
        rows = torch.arange(len(ids), device=x.device)
        unseen = torch.arange(L, device=x.device) > positions[:, None]
        mask = torch.zeros_like(unseen, dtype=x.dtype).masked_fill(unseen, -torch.inf)
        mask = mask[:, None, None]  # [B, 1, 1, L]
        for layer, layer_cache in zip(self.encoder.layers, cache, strict=True):
            x = layer.forward_one(x, rope, layer_cache, rows, positions, mask)
        return self.encoder.final_layernorm(x)[:, 0]


# --- the model with its loss ------------------------------------------------------------------


class ChatGLMForCausalLM(PreTrainedModel):
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["Block"]
    _supports_sdpa = True
    # The official files hold the rotary frequencies. rope_table computes them in fp32 instead.
    _keys_to_ignore_on_load_unexpected = [r"rotary_pos_emb\.inv_freq"]

    def __init__(self, config):
        super().__init__(config)
        self.transformer = Transformer(config)
        self.prepare_inputs_for_generation = None  # peft reads this attribute
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer.embedding.word_embeddings

    def get_output_embeddings(self):
        return self.transformer.output_layer

    def forward(self, input_ids, labels=None, attention_mask=None, **unused):
        """input_ids [B, T] → .logits [B, T, V], and with labels [B, T] also .loss.

        This is the interface of transformers and peft. train.py uses summed_loss instead. The loss
        is the mean cross-entropy, in fp32, over the labels that are not -100. Labels align with
        input_ids; they are shifted here. Rows are padded on the right and need no mask: an
        attention_mask [B, T] is only checked. Raises ValueError for another padding or argument.
        """
        passed = [n for n, v in unused.items() if v is not None and not isinstance(v, bool)]
        if passed:
            raise ValueError(f"ChatGLMForCausalLM.forward does not take {', '.join(passed)}")
        if attention_mask is not None and (attention_mask[:, 1:] > attention_mask[:, :-1]).any():
            raise ValueError("attention_mask must be of a right-padded batch: ones, then zeros")
        logits = self.transformer.output_layer(self.transformer(input_ids))
        if labels is None:
            return CausalLMOutput(logits=logits)
        predictions, targets = logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()
        loss = F.cross_entropy(predictions, targets, ignore_index=IGNORE)
        return CausalLMOutput(loss=loss, logits=logits)

    def summed_loss(self, batch):
        """The training loss of a data.MicroBatch: cross-entropy, summed over its targets, in fp32.

        The output layer runs only where a token predicts a target, and in chunks, because 65,024
        logits for each token of a long text take gigabytes. If there are several chunks, backward
        computes the logits of each again.
        """
        hidden = self.transformer(batch.input_ids, batch.prefix)
        hidden = hidden.flatten(0, 1).index_select(0, batch.predicting)  # [N, C]
        size = LOSS_CHUNK // 8 if self.transformer.encoder.recomputed_layers else LOSS_CHUNK
        chunks = list(zip(hidden.split(size), batch.targets.split(size), strict=True))
        if len(chunks) == 1:
            return self.chunk_loss(*chunks[0])
        options = dict(use_reentrant=False, preserve_rng_state=self.output_layer_has_dropout())
        return sum(checkpoint(self.chunk_loss, *chunk, **options) for chunk in chunks)

    def chunk_loss(self, hidden, targets):
        """hidden [N, C], targets [N], -100 for none → the summed cross-entropy"""
        logits = self.transformer.output_layer(hidden)
        log_probs = F.log_softmax(logits, dim=-1, dtype=torch.float32)
        return F.nll_loss(log_probs, targets, ignore_index=IGNORE, reduction="sum")

    def output_layer_has_dropout(self):
        """Whether LoRA's dropout is on the output layer. Recomputed chunks must then repeat it."""
        modules = self.transformer.output_layer.modules()
        return any(isinstance(module, nn.Dropout) and module.p for module in modules)

    def new_cache(self, batch_size, length):
        """→ an empty cache: for each layer (keys, values), [B, G, length, D] each"""
        c = self.config
        shape = (batch_size, c.multi_query_group_num, length, c.kv_channels)
        zeros = partial(torch.zeros, shape, dtype=self.dtype, device=self.device)
        return [(zeros(), zeros()) for _ in range(c.num_layers)]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Loads the official layout from a directory or a hub id, straight to `device_map`.

        It takes safetensors or .bin, one file or shards. No code of the checkpoint is run: .bin
        files are read with weights_only. Raises ValueError that names every tensor that is missing,
        misshapen or unknown, and every file that can't be read.
        """
        kwargs["ignore_mismatched_sizes"] = True  # wrong sizes are reported below, by name
        path = str(pretrained_model_name_or_path)
        try:
            check_files(path)
            model, info = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        except Exception as error:  # whatever a damaged file makes the readers raise
            raise ValueError(f"{path}: cannot load this model: {one_line(error)}") from error
        if faults := adapters.key_faults(**info):
            raise ValueError(f"{path}: not a complete ChatGLM3 checkpoint: {first_few(faults)}")
        return model

    def _initialize_missing_keys(self, *args):
        """Skips transformers' random values: from_pretrained refuses an incomplete checkpoint."""


def built_in_model():
    """→ the directory of the built-in model: 3.7 million random weights, made at first use."""
    make_random_weights(BUILT_IN, ChatGLMForCausalLM, ChatGLMConfig)
    return str(BUILT_IN)


def load_model(path, device="auto", dtype="auto", load_in=None):
    """A checkpoint's directory or hub id → ChatGLMForCausalLM, in evaluation mode.

    device: auto, cpu or cuda; dtype: auto (fp16 on CUDA, fp32 on a CPU), fp16, bf16 or fp32;
    load_in: None, or 4bit (NF4) or fp8 (e4m3), for the blocks' matrices. Raises ValueError if the
    device or bitsandbytes is missing, loading fails, or a weight is not finite.
    """
    options = loading_options(device, dtype, load_in)
    if options["device_map"] == "cpu" and str(path) == str(BUILT_IN):
        torch.set_num_threads(1)  # its matrices are too small for several threads to help
    if load_in == "fp8":  # on the CPU first: the device may have no room for the fp16 weights
        model = ChatGLMForCausalLM.from_pretrained(path, **options | {"device_map": "cpu"})
        return fp8.quantise_blocks(check_finite(model), options["device_map"])
    return check_finite(ChatGLMForCausalLM.from_pretrained(path, **options))


# --- LoRA -------------------------------------------------------------------------------------


def add_lora(
    model, r, alpha, dropout, target_modules, modules_to_save=None, rslora=False, dora=False
):
    """Freezes `model` and adds new LoRA layers → peft.PeftModel.

    A target layer W then computes, in peft's Linear.forward (peft/tuners/lora/layer.py),

        W x + b + s · B A dropout(x)        with s = alpha / r, or alpha / √r if rslora

    with new matrices A [r, in], called lora_A, and B [out, r], called lora_B. A starts random and B
    starts at zero, so that training starts from the base's own answers. With dora it computes

        m · (W + s · B A) x / |W + s · B A| + b

    with the norm of each row, and new magnitudes m [out], which start as the norms of W's rows.

    target_modules: a list of module names, or one regular expression (a str) for whole paths;
    modules_to_save: names of modules to train whole. Raises ValueError for a name without a module.
    """
    adapters.check_targets(model, target_modules, modules_to_save or [], dora)
    names = dict(target_modules=target_modules, modules_to_save=modules_to_save)
    lora = dict(r=r, lora_alpha=alpha, lora_dropout=dropout, use_rslora=rslora, use_dora=dora)
    config = LoraConfig(task_type="CAUSAL_LM", **names, **lora)
    return cast_trainable_to_fp32(get_peft_model(model, config))


def cast_trainable_to_fp32(peft_model):
    """GradScaler refuses fp16 gradients, and small updates would vanish in fp16 weights."""
    for param in peft_model.parameters():
        if param.requires_grad:
            param.data = param.data.float()
    return peft_model


def save_adapter(peft_model, directory):
    """Writes the adapter into `directory`, in peft's layout."""
    write_files(Path(directory), adapters.adapter_files(peft_model))


def load_adapter(model, adapter_dir, is_trainable=False):
    """Adds the LoRA adapter in `adapter_dir` (peft's layout) to `model` → peft.PeftModel.

    The names of its tensors say which layers it adapts. The patterns in its configuration are never
    run. Raises ValueError for a directory without an adapter, an adapter that is not plain LoRA,
    and any tensor that is missing, misshapen or has no place in the model.
    """
    file = adapters.weights_file(Path(adapter_dir))
    with adapters.told_of(adapter_dir):
        tensors, config = adapters.read_adapter(file)
        config.inference_mode = not is_trainable
        config.base_model_name_or_path = model.name_or_path
        peft_model = get_peft_model(model, adapters.exact_config(config, tensors, model))
        peft_model.peft_config["default"] = config  # so that saving writes what was read
        cast_trainable_to_fp32(peft_model)  # first, so that fp32 tensors are not rounded
        adapters.check_tensors(tensors, wanted=adapters.adapter_tensors(peft_model))
        set_peft_model_state_dict(peft_model, {n: t.float() for n, t in tensors.items()})
    return peft_model.train(is_trainable)
