"""support/config.py, support/bases.py and model.load_model: hostile bases give logits, or one line.

python -m pytest -q tests/fuzz/test_fuzz_checkpoints.py
"""

import json
import shutil

import safetensors.torch
from hostile import fresh, hostile, loads_or_refuses
from hostile_inputs import (
    TINY,
    bin_files,
    damaged,
    damaged_json,
    deep,
    mostly,
    safetensors_files,
    texts_of_json,
)
from hypothesis import strategies as st

import model as chatglm
from support.bases import SIZES

WEIGHTS = safetensors.torch.load_file(TINY / "model.safetensors")
CONFIG = json.loads((TINY / "config.json").read_text())


def copy_of_checkpoint(directory):
    fresh(directory)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    safetensors.torch.save_file(WEIGHTS, directory / "model.safetensors", {"format": "pt"})
    return directory


def is_small(config):
    """Sizes have no upper bound, so a huge one is left out: a network of that size would be built
    before its weights are compared with it."""
    sizes = [config.get(name) for name in SIZES]
    return not any(isinstance(size, int) and size > 1000 for size in sizes)


configs = damaged(st.just(CONFIG)).filter(is_small).map(json.dumps)


@hostile(75, config=mostly(configs, texts_of_json | deep))
def test_a_checkpoint_s_configuration(tmp_path, config):
    """Any key has any value."""
    directory = copy_of_checkpoint(tmp_path / "base")
    (directory / "config.json").write_text(config)
    loads_or_refuses(lambda: chatglm.load_model(directory, "cpu"))
    loads_or_refuses(lambda: chatglm.ChatGLMForCausalLM.from_pretrained(directory))


# (the file's name, its bytes)
weight_files = st.tuples(st.just("model.safetensors"), safetensors_files(WEIGHTS))
weight_files |= st.tuples(st.just("pytorch_model.bin"), bin_files(WEIGHTS))


@hostile(100, weights=weight_files)
def test_a_checkpoint_s_weights(tmp_path, weights):
    """Tensors have other names, shapes and dtypes. Files are damaged, or pickles that act."""
    name, raw = weights
    directory = copy_of_checkpoint(tmp_path / "base")
    (directory / "model.safetensors").unlink()
    (directory / name).write_bytes(raw)
    loads_or_refuses(lambda: chatglm.load_model(directory, "cpu"))


INDEX = {"metadata": {}, "weight_map": dict.fromkeys(WEIGHTS, "model-1.safetensors")}


@hostile(50, index=damaged_json(INDEX, most=1))
def test_a_checkpoint_s_index(tmp_path, index):
    """Any entry has any value. A file that is not beside the index is not read, even if it would
    do."""
    directory = copy_of_checkpoint(tmp_path / "base")
    shutil.copy(directory / "model.safetensors", tmp_path / "x")
    (directory / "model.safetensors").rename(directory / "model-1.safetensors")
    (directory / "model.safetensors.index.json").write_text(index)
    loads_or_refuses(lambda: chatglm.load_model(directory, "cpu"))
