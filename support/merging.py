"""Base and adapter, merged one tensor at a time.

No model is in memory: a tensor is read from its file when it is needed, merged, and forgotten. So a
base of any size can be written, and its logits computed, on a machine with a few GiB.
"""

import zipfile

import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import nn
from transformers.utils import cached_file

from support.adapters import adapter_tensors, key_faults
from support.bases import base_file, check_files
from support.errors import first_few, one_line
from support.files import read_json

INV_FREQ = "transformer.rotary_pos_emb.inv_freq"  # rope_table computes it


class CheckpointTensors:
    """The tensors of a checkpoint in safetensors or .bin files: [name] reads one of them.

    path: a directory or a hub id. Raises ValueError if a file is missing or damaged.
    """

    def __init__(self, path):
        check_files(path)
        self.file = self.read = None  # the open file, and a function: name → tensor
        self.file_of = {name: file for file in _weight_files(path) for name in self._open(file)}

    def _open(self, file):
        """→ the names of the tensors in `file`, which is open from now on, and no other."""
        self.file, self.read = file, None  # closes the file before
        if str(file).endswith(".safetensors"):
            opened = safe_open(file, "pt")
            self.read = opened.get_tensor
        else:
            is_zip = zipfile.is_zipfile(file)  # older files are not, and can't be mapped
            opened = torch.load(file, "cpu", weights_only=True, mmap=is_zip)
            self.read = opened.__getitem__
        return opened.keys()

    def __getitem__(self, name):
        if self.file_of[name] != self.file:
            self._open(self.file_of[name])
        return self.read(name)

    def shapes(self):
        """→ {name: shape}"""
        return {name: self[name].shape for name in self.file_of}


def _weight_files(path):
    """→ the files that hold a checkpoint's tensors, in order"""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if file := base_file(path, name):
            return [file]
        if index := base_file(path, f"{name}.index.json"):
            shards = sorted({*read_json(index)["weight_map"].values()})
            return [cached_file(path, shard) for shard in shards]
    raise ValueError("it has no model.safetensors, nor shards of it")


class MergedModel:
    """A base with an adapter in its weights, read from their files tensor by tensor.

    model_class: model.ChatGLMForCausalLM; load_adapter: model.load_adapter; adapter: a directory,
    or None. Raises ValueError for files that are missing, damaged, or don't belong together.
    """

    def __init__(self, path, model_class, load_adapter=None, adapter=None):
        self.name_or_path = path
        try:
            self.config = model_class.config_class.from_pretrained(path)
            self.files = CheckpointTensors(path)
            with torch.device("meta"):
                self.model = model_class(self.config)
            self.shapes = {name: p.shape for name, p in self.model.named_parameters()}
            found = self.files.shapes()
            found.pop(INV_FREQ, None)
            wrong = [(n, found[n], s) for n, s in self.shapes.items() if n in found]
            wrong = [each for each in wrong if each[1] != each[2]]
            faults = key_faults(
                self.shapes.keys() - found.keys(), wrong, found.keys() - self.shapes.keys()
            )
        except Exception as error:  # whatever a damaged file makes the readers raise
            raise ValueError(f"{path}: cannot load this model: {one_line(error)}") from error
        if faults:
            raise ValueError(f"{path}: not a complete ChatGLM3 checkpoint: {first_few(faults)}")
        for module in self.model.modules():
            for name, param in module.named_parameters(recurse=False):
                setattr(module, name, placeholder(param.shape))
        self.model.name_or_path = path
        self.replaced, self.lora = {}, {}
        if adapter is not None:
            self._add(load_adapter(self.model, adapter))
        self.model.eval()
        self.cached = None, None  # the last tensor: glm_tensors reads query_key_value three times

    def _add(self, peft_model):
        """Notes which tensors the adapter replaces, and which of its layers change a tensor."""
        prefix = "base_model.model."
        for name, tensor in adapter_tensors(peft_model).items():
            if ".lora_" not in name:
                self.replaced[name.removeprefix(prefix).replace(".base_layer.", ".")] = tensor
        for name, module in self.model.named_modules():
            if isinstance(module, LoraLayer):
                self.lora[f"{name}.weight"] = module

    def named_parameters(self):
        """Yields the name and the tensor of each of the base's weights, as stored."""
        for name in self.shapes:
            yield name, self.files[name]

    def __getitem__(self, name):
        """→ a tensor with the adapter in it, in fp32"""
        if self.cached[0] != name:
            self.cached = name, self._merge(name)
        return self.cached[1]

    def _merge(self, name):
        if name in self.replaced:
            return self.replaced[name].float()
        value = self.files[name].to(torch.float32, copy=True)
        if name not in self.lora:
            return value
        layer = self.lora[name]
        if "default" in layer.lora_A and not layer.use_dora["default"]:
            b, a = layer.lora_B["default"].weight, layer.lora_A["default"].weight
            return value.addmm_(b.detach(), a.detach(), alpha=layer.scaling["default"])
        # peft merges in place. So its layer gets the real weight for that time, and then forgets.
        weight = layer.get_base_layer().weight
        kept, weight.data = weight.data, value
        layer.merge(adapter_names=["default"])
        layer.merged_adapters.clear()
        value, weight.data = weight.data, kept
        return value

    @torch.no_grad()
    def logits(self, input_ids):
        """input_ids [B, T] → logits [B, T, V] of the base with the adapter beside it, not merged.

        It computes in fp32 on the CPU. Each block's weights are read when it runs, and forgotten.
        """
        network = self.model.transformer
        parts = [network.embedding.word_embeddings, *network.encoder.layers]
        parts += [network.encoder.final_layernorm, network.output_layer]
        base_names = {}
        for name, param in self.model.named_parameters():
            base_name = name.replace(".base_layer.", ".")
            if base_name in self.shapes and base_name not in self.replaced:
                base_names[param] = base_name
        hooks = []
        for part in parts:
            own = {p: base_names[p] for p in part.parameters() if p in base_names}
            hooks.append(part.register_forward_pre_hook(lambda *_, own=own: self._read(own)))
            hooks.append(part.register_forward_hook(lambda *_, own=own: _forget(own)))
        try:
            return self.model(input_ids).logits
        finally:
            for hook in hooks:
                hook.remove()

    def _read(self, params):
        for param, name in params.items():
            param.data = self.files[name].float()


def _forget(params):
    for param in params:
        param.data = placeholder(param.shape).data


def placeholder(shape):
    """→ a parameter of that shape. A matrix takes no memory, since all its numbers are one zero."""
    if len(shape) == 1:  # peft writes biases into it
        return nn.Parameter(torch.zeros(shape), requires_grad=False)
    return nn.Parameter(torch.zeros(()).expand(shape), requires_grad=False)
