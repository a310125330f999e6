"""train.py and infer.py, on hostile bases: they end well, or with one line that begins "error".

test_fuzz_checkpoints.py gives such files to model.load_model alone. Here the base is in shards.

python -m pytest -q tests/fuzz/test_fuzz_bases.py
"""

import json
import math

import hypothesis
import pytest
from conftest import metrics_of, write_jsonl
from hostile import fresh, hostile, runs_or_refuses
from hostile_inputs import (
    SMALL_CONFIG,
    SMALL_STATE,
    VOCABULARY,
    as_safetensors,
    bin_files,
    corrupted,
    damaged,
    damaged_json,
    deep,
    mostly,
    safetensors_files,
    saved,
    texts_of_json,
    vocabularies,
    write_small_base,
)
from hypothesis import strategies as st

import data
import infer
import model as chatglm
import train
from support.bases import SIZES

NAMES = sorted(SMALL_STATE)
PARTS = [{name: SMALL_STATE[name] for name in NAMES[i::2]} for i in (0, 1)]


def sharded(suffix, save):
    """→ {file name: bytes} of the weights in two shards, with their index"""
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    shards = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    names = {name: shards[i % 2] for i, name in enumerate(NAMES)}
    index = {"metadata": {"total_size": 210_752}, "weight_map": names}
    files = dict(zip(shards, map(save, PARTS), strict=True))
    return files | {f"{stem}.{suffix}.index.json": json.dumps(index).encode()}


KINDS = [
    {"model.safetensors": as_safetensors(SMALL_STATE)},
    {"pytorch_model.bin": saved(SMALL_STATE)},
    sharded("safetensors", as_safetensors),
    sharded("safetensors", as_safetensors),
    sharded("bin", saved),
    sharded("bin", saved),
]


def is_small(config):
    """Otherwise a network of any size would be built, before its weights are compared with it."""
    sizes = [config.get(name) for name in SIZES]
    return not any(isinstance(size, int) and size > 2000 for size in sizes)


configs = damaged(st.just(SMALL_CONFIG)).filter(is_small).map(json.dumps)
odd_configs = mostly(configs, texts_of_json | deep).map(str.encode)
odd_files = st.binary(max_size=40) | texts_of_json.map(str.encode)
BESIDE = ["generation_config.json", "tokenizer_config.json", "x.bin", "model.safetensors", "x.json"]
BESIDE += ["pytorch_model.bin.index.json", "training_args.json", "modeling_chatglm.py", "evil.py"]
BESIDE += ["configuration_chatglm.py", "x.index.json", "chat_template.jinja", "adapter_config.json"]


@st.composite
def odd_file(draw, name, raw, state):
    """→ what a file of the base holds instead of `raw`; None if it is not there"""
    if draw(mostly(st.just(False), st.just(True))):
        return None
    if name == "config.json":
        return draw(odd_configs)
    if name == "tokenizer.model":
        return draw(mostly(vocabularies(), corrupted(st.just(VOCABULARY))))
    if name.endswith(".json"):
        index = json.loads(raw)
        return draw(damaged_json(index, most=1) | texts_of_json | deep).encode()
    return draw(safetensors_files(state) if name.endswith("safetensors") else bin_files(state))


@st.composite
def odd_bases(draw):
    """→ {file name: bytes}, of which one or two are damaged, and another may be beside them"""
    weights = draw(st.sampled_from(KINDS))
    whole = {"config.json": json.dumps(SMALL_CONFIG).encode(), "tokenizer.model": VOCABULARY}
    whole |= weights
    base = dict(whole)
    of_weights = st.sampled_from(sorted(weights))
    others = mostly(st.just("config.json"), st.just("tokenizer.model"))
    for name in draw(st.sets(of_weights | of_weights | others, max_size=2)):
        state = PARTS["00002-of" in name] if len(weights) > 1 else SMALL_STATE
        base[name] = draw(odd_file(name, whole[name], state))
        hypothesis.note(f"{name}: {(base[name] or b'none')[:300]}")
    if draw(mostly(st.just(False), st.just(True))):
        base[draw(st.sampled_from(BESIDE))] = draw(odd_files)
    return {name: raw for name, raw in base.items() if raw is not None}


# --- the commands -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    """A directory with a file of data, x, and an adapter of the small base."""
    directory = tmp_path_factory.mktemp("beside")
    write_jsonl(directory / "x", [{"instruction": "q", "output": "a"}])
    (directory / "base").mkdir()
    base = chatglm.load_model(write_small_base(directory / "base"), "cpu")
    lora = chatglm.add_lora(base, 1, 1, 0.0, ["query_key_value"])
    chatglm.save_adapter(lora, directory / "adapter")
    return directory


TRAIN = "--max-steps 1 --device cpu --batch-size 1 --max-length 64 --overwrite --lora-r 1".split()
ANSWER = "--no-adapter --prompt q --greedy --max-new-tokens 2 --device cpu".split()


@hostile(45, files=odd_bases(), what=st.sampled_from(["train", "answer", "merge"]))
def test_a_base(tmp_path, beside, monkeypatch, capsys, files, what):
    """Weights, index, configuration and vocabulary are damaged. Other files are beside them."""
    monkeypatch.chdir(tmp_path)  # no adapter is here
    base, output = fresh(tmp_path / "base"), fresh(tmp_path / "out")
    for name, raw in files.items():
        (base / name).write_bytes(raw)
    if what == "train":
        arguments = ["--data", beside / "x", *TRAIN, "--output-dir", output]
        lines = runs_or_refuses(train.main, ["--model", base, *arguments], capsys, output)
    elif what == "answer":
        lines = runs_or_refuses(infer.main, ["--model", base, *ANSWER], capsys)
    else:
        arguments = ["--adapter", beside / "adapter", "--device", "cpu"]
        arguments += ["--merge-to", output / "merged"]
        lines = runs_or_refuses(infer.main, ["--model", base, *arguments], capsys, output)
    if lines is not None:
        assert len(lines) == 1 and len(lines[0]) < 2000, lines
        assert what == "train" or not [*output.iterdir()]
    elif what == "train":
        values = [value for line in metrics_of(output) for value in line.values()]
        assert all(math.isfinite(value) for value in values if isinstance(value, float))
        assert (output / "adapter_model.safetensors").exists()
    elif what == "merge":
        chatglm.load_model(output / "merged", "cpu")
        data.ChatGLMTokenizer(output / "merged")
