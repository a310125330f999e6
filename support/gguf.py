"""GGUF files, which llama.cpp and Ollama read: a merged model, or an adapter alone.

Source of the format: ggml's docs/gguf.md; the keys are those that llama.cpp reads for its
architecture "chatglm" and for LoRA. The package `gguf` writes and reads the files. Matrices get the
type that is asked for. Norms and biases are fp32, as llama.cpp wants them.
"""

import functools
import math

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType, TokenType

from support.bases import zero_if_finite
from support.errors import one_line
from support.tokenizer_files import NOT_IN_PROMPTS, special_tokens

ARCH = gguf.MODEL_ARCH.CHATGLM
FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
}
# How far rounding moves a tensor, as a share of its norm, with room.
ROUNDING = {"F32": 0.0, "F16": 1e-3, "Q8_0": 0.02, "Q4_0": 0.2}
CHUNK = 2**24  # numbers that are quantised at a time


name_map = functools.cache(gguf.get_tensor_name_map)  # it takes 10 ms to make


def tensor_name(name, layers):
    """The official name of a tensor → llama.cpp's"""
    names = name_map(ARCH, layers)
    return names.get_name(name.removeprefix("transformer."), (".weight", ".bias"))


def type_of(name, shape, file_type):
    """→ the type of a tensor in a file of that type.

    With q4_0, the embedding and the output layer get q8_0, because rounding harms these most. A
    matrix whose rows are no multiple of the type's block is stored in fp16.
    """
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    if file_type == "q4_0" and not name.startswith("blk."):
        file_type = "q8_0"
    found = GGMLQuantizationType[file_type.upper()]
    return GGMLQuantizationType.F16 if shape[-1] % GGML_QUANT_SIZES[found][0] else found


def stored_bytes(shape, kind):
    """→ the bytes of a tensor of this type"""
    numbers, size = GGML_QUANT_SIZES[kind]
    return math.prod(shape) // numbers * size


def file_type_of(file):
    """→ the key of FILE_TYPES of a model's file; None for an adapter's. Raises ValueError."""
    try:
        fields = gguf.GGUFReader(file).fields
    except Exception as error:  # whatever a damaged file makes the reader raise
        raise ValueError(f"it is not a GGUF file: {one_line(error)}") from error
    if "adapter.type" in fields:
        return None
    number = fields["general.file_type"].contents() if "general.file_type" in fields else None
    for name, value in FILE_TYPES.items():
        if value == number:
            return name
    raise ValueError(f"it is not an export of infer.py: its type is {number}")


class ModelFile:
    """A GGUF file of a MergedModel: what will be in it, and writing and reading it.

    tokenizer: a data.ChatGLMTokenizer; template: the chat template; file_type: see FILE_TYPES
    """

    def __init__(self, model, tokenizer, template, file_type):
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.file_type = file_type
        layers = model.config.num_layers
        self.sources = {tensor_name(name, layers): name for name in model.shapes}
        self.shapes = {name: model.shapes[source] for name, source in self.sources.items()}
        self.types = {name: type_of(name, s, file_type) for name, s in self.shapes.items()}
        self.sizes = {
            name: stored_bytes(self.shapes[name], kind) for name, kind in self.types.items()
        }

    def write(self, file, progress):
        """Writes it tensor by tensor. progress(n) is called after n more bytes.

        Raises ValueError if a number is too large for fp16.
        """
        writer = self._writer(file)
        try:
            for name, kind in self.types.items():
                float32 = np.dtype(np.float32)
                writer.add_tensor_info(name, self.shapes[name], float32, self.sizes[name], kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, source in self.sources.items():
                array = as_type(self.model[source], self.types[name], source)
                writer.write_tensor_data(array)
                progress(array.nbytes)
        finally:
            writer.close()

    def _writer(self, file):
        """→ a GGUFWriter with all that is no tensor"""
        writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[ARCH])
        c = self.model.config
        writer.add_file_type(FILE_TYPES[self.file_type])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_context_length(c.seq_length)
        writer.add_embedding_length(c.hidden_size)
        writer.add_feed_forward_length(c.ffn_hidden_size)
        writer.add_block_count(c.num_layers)
        writer.add_head_count(c.num_attention_heads)
        writer.add_head_count_kv(c.multi_query_group_num)
        writer.add_key_length(c.kv_channels)
        writer.add_value_length(c.kv_channels)
        writer.add_layer_norm_rms_eps(c.layernorm_epsilon)
        writer.add_rope_dimension_count(c.kv_channels // 2)
        writer.add_rope_freq_base(10000.0 * c.rope_ratio)
        self._add_vocabulary(writer)
        return writer

    def _add_vocabulary(self, writer):
        tokenizer, pieces = self.tokenizer, self.tokenizer.pieces
        names, types = vocabulary(tokenizer, self.model.config.padded_vocab_size)
        count = pieces.get_piece_size()
        scores = [*map(pieces.get_score, range(count))] + [-1000.0] * (len(names) - count)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("chatglm-spm")
        writer.add_token_list(names)
        writer.add_token_scores(scores)
        writer.add_token_types(types)
        writer.add_add_space_prefix(True)
        writer.add_add_bos_token(False)  # the chat template has all of it
        writer.add_add_eos_token(False)
        writer.add_bos_token_id(pieces.bos_id())
        writer.add_eos_token_id(tokenizer.eos_id)
        writer.add_unk_token_id(pieces.unk_id())
        writer.add_pad_token_id(0)
        writer.add_eot_token_id(tokenizer.special["<|user|>"])
        writer.add_eom_token_id(tokenizer.special["<|observation|>"])  # ends a tool call
        writer.add_chat_template(self.template)

    def check(self, file, progress):
        """Reads the file again, and compares the settings, the vocabulary, and each tensor.

        Raises ValueError if something differs, a tensor by more than its type's rounding.
        """
        reader = gguf.GGUFReader(file)
        settings = self._writer(None).kv_data[0]  # without a file, it only collects them
        for key, value in settings.items():
            if key not in reader.fields or not _is_same(reader.fields[key].contents(), value.value):
                raise ValueError(f"{key} is not the model's")
        found = {tensor.name: tensor for tensor in reader.tensors}
        for name, source in self.sources.items():
            if name not in found or found[name].tensor_type != self.types[name]:
                raise ValueError(f"it has no {name} of type {self.types[name].name}")
            wanted, tensor = self.model[source], found[name]
            wanted = wanted.reshape(-1, wanted.shape[-1]).numpy()
            data = tensor.data.reshape(len(wanted), -1)
            squared_error = squared_norm = 0.0
            rows = max(1, CHUNK // wanted.shape[-1])
            for first in range(0, len(wanted), rows):
                part = slice(first, first + rows)
                read = gguf.quants.dequantize(data[part], tensor.tensor_type)
                squared_error += np.square(read - wanted[part]).sum(dtype=np.float64)
                squared_norm += np.square(wanted[part]).sum(dtype=np.float64)
            limit = ROUNDING[self.types[name].name]
            if not squared_error <= limit**2 * squared_norm:
                raise ValueError(f"{name} is not the model's {source}")
            progress(self.sizes[name])


def _is_same(found, wanted):
    """Whether a value in a file is the wanted one; numbers are stored in fp32."""
    if isinstance(wanted, float):
        return found == np.float32(wanted)
    if isinstance(wanted, list) and isinstance(wanted[0], float):
        return np.array_equal(found, np.array(wanted, np.float32))
    return found == wanted


def as_type(tensor, kind, name):
    """A tensor in fp32 → an array of that type: float32, float16, or blocks as bytes.

    Raises ValueError, with the name, if a number is too large for fp16.
    """
    if kind == GGMLQuantizationType.F32:
        return tensor.numpy()
    if kind == GGMLQuantizationType.F16:
        if zero_if_finite(half := tensor.half()) != 0:
            raise ValueError(f"{name} has numbers too large for fp16; give --gguf-type f32")
        return half.numpy()
    rows, size = max(1, CHUNK // tensor.shape[-1]), stored_bytes(tensor.shape, kind)
    blocks = np.empty((len(tensor), size // len(tensor)), np.uint8)
    for first in range(0, len(tensor), rows):
        part = slice(first, first + rows)
        blocks[part] = gguf.quants.quantize(tensor[part].numpy(), kind)
    return blocks


def vocabulary(tokenizer, size):
    """→ (names, types) of the pieces, the special tokens, and the embedding's unused rows"""
    pieces = tokenizer.pieces
    names = [pieces.id_to_piece(id) for id in range(pieces.get_piece_size())]
    types = [TokenType.BYTE if pieces.is_byte(id) else TokenType.NORMAL for id in range(len(names))]
    types[pieces.unk_id()] = TokenType.UNKNOWN
    types[tokenizer.eos_id] = TokenType.CONTROL
    # llama.cpp turns every CONTROL name in a text into its id. So names that no prompt uses are
    # UNUSED: they stay text.
    if pieces.bos_id() >= 0:
        types[pieces.bos_id()] = TokenType.UNUSED
    for name in special_tokens(tokenizer):
        names.append(name)
        types.append(TokenType.UNUSED if name in NOT_IN_PROMPTS else TokenType.CONTROL)
    unused = range(len(names), size)
    return names + [f"[PAD{id}]" for id in unused], types + [TokenType.UNUSED] * len(unused)


# --- an adapter alone -------------------------------------------------------------------------


def lora_tensors(model):
    """A MergedModel → (alpha, {name: array}) of its adapter, for llama.cpp.

    llama.cpp adds alpha / rank · B A x, with one alpha for all layers. Where a layer has another
    scale (rsLoRA, patterns), B is multiplied by the ratio of the two. Raises ValueError for what a
    GGUF adapter can't hold.
    """
    merge = "a GGUF adapter can't hold that; give --gguf FILE, which merges it"
    if not model.lora and not model.replaced:
        raise ValueError("it can't be compared without an adapter; give --adapter")
    if model.replaced:
        raise ValueError(f"the adapter replaces {next(iter(model.replaced))}: {merge}")
    first = next(iter(model.lora.values()))
    alpha = first.lora_alpha["default"] or first.r["default"]  # with 0, llama.cpp would not scale
    result = {}
    for source, layer in model.lora.items():
        if layer.use_dora["default"]:
            raise ValueError(f"the adapter is DoRA: {merge}")
        if "default" not in layer.lora_A:
            raise ValueError(f"the adapter changes {source}, which is an embedding: {merge}")
        name = tensor_name(source, model.config.num_layers)
        ratio = layer.scaling["default"] / (alpha / layer.r["default"])
        result[f"{name}.lora_a"] = layer.lora_A["default"].weight.detach().numpy()
        result[f"{name}.lora_b"] = (ratio * layer.lora_B["default"].weight.detach()).numpy()
    return alpha, result


def write_adapter(file, model):
    """Writes the adapter of a MergedModel. Raises ValueError: see lora_tensors."""
    alpha, tensors = lora_tensors(model)
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[ARCH])
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for name, array in tensors.items():
            writer.add_tensor(name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def check_adapter(file, model):
    """Reads the file again. Raises ValueError if it does not add what the adapter adds."""
    lora_tensors(model)  # refuses an adapter that no GGUF file can hold
    reader = gguf.GGUFReader(file)
    alpha = reader.fields.get(gguf.Keys.Adapter.LORA_ALPHA)
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    names = {tensor_name(name, model.config.num_layers): name for name in model.lora}
    wanted_names = {f"{name}.lora_{letter}" for name in names for letter in "ab"}
    if alpha is None or found.keys() != wanted_names:
        raise ValueError("it has not the adapter's tensors, or no alpha")
    for name, source in names.items():
        a, b = found[f"{name}.lora_a"], found[f"{name}.lora_b"]
        wanted = model.lora[source].get_delta_weight("default")
        if b.shape[0] != wanted.shape[0] or a.shape[1] != wanted.shape[1]:
            raise ValueError(f"{name} has another shape than {source}")
        if not (alpha.contents() / len(a) * b @ a - wanted).norm() <= 1e-5 * wanted.norm():
            raise ValueError(f"{name} is not what the adapter adds to {source}")
