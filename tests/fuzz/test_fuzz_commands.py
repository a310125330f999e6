"""train.py and infer.py, on hostile files: they end well, or with lines that begin "error".

python -m pytest -q tests/fuzz/test_fuzz_commands.py
"""

import json
import re
import shutil

import pytest
import safetensors.torch
from hostile import fresh, hostile, runs_or_refuses
from hostile_inputs import (
    LORA,
    adapter_weights,
    corrupted,
    damaged,
    damaged_json,
    deep,
    mostly,
    odd_files,
    safetensors_files,
    texts,
    texts_of_json,
    valid_files,
)
from hypothesis import strategies as st

import infer
import model as chatglm
import train
from support.checkpoints import CONTENTS
from support.files import sha256
from support.records import RecordReader


@pytest.fixture(scope="module")
def little(tmp_path_factory):
    """The directory of a new adapter of the built-in model."""
    directory = tmp_path_factory.mktemp("little")
    base = chatglm.load_model(chatglm.built_in_model(), "cpu")
    chatglm.save_adapter(chatglm.add_lora(base, 8, 32, 0.0, ["query_key_value"]), directory)
    return directory


# --- train.py ---------------------------------------------------------------------------------


@hostile(20, raw=odd_files | valid_files, system=st.none() | texts)
def test_train_py_on_a_data_file(tmp_path, little, capsys, raw, system):
    """It trains, or says what is wrong with the file. It writes to its output directory only."""
    file, output = tmp_path / "x", tmp_path / "out"
    file.write_bytes(raw)
    arguments = ["--data", file, "--max-steps", 1, "--device", "cpu"]
    arguments += ["--overwrite", "--output-dir", output]
    arguments += [] if system is None else [f"--system={system}"]
    if lines := runs_or_refuses(train.main, arguments, capsys, output):
        assert len(lines) <= 21


ONE_MORE = "--max-steps 2 --save-steps 1 --device cpu --batch-size 1 --lora-r 1".split()
ONE_MORE += "--target-modules query_key_value".split()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The output directory of a run that was killed after the first of its two updates."""
    directory = tmp_path_factory.mktemp("stopped") / "out"
    train.main([*ONE_MORE, "--output-dir", str(directory)])
    shutil.rmtree(directory / "checkpoint-2")
    return directory


@hostile(
    40,
    draw=st.data(),
    name=st.sampled_from(CONTENTS),
    sums=mostly(st.just(True), st.just(False)),
)
def test_train_py_on_a_checkpoint(tmp_path, stopped, capsys, draw, name, sums):
    """One file of it is changed, and mostly its sum too. It continues, or says in one line why it
    doesn't."""
    directory = tmp_path / "out"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(stopped, directory)
    file = directory / "checkpoint-1" / name
    raw = file.read_bytes()
    if file.suffix == ".safetensors":
        raw = draw.draw(safetensors_files(safetensors.torch.load(raw)))
    elif file.suffix == ".json":
        raw = draw.draw(damaged_json(json.loads(raw)) | texts_of_json | deep).encode()
    else:
        raw = draw.draw(corrupted(st.just(raw)))
    file.write_bytes(raw)
    if sums:
        digests = {name: sha256((file.parent / name).read_bytes()) for name in CONTENTS}
        lines = [f"{digest}  {name}\n" for name, digest in digests.items()]
        (file.parent / "SHA256SUMS").write_text("".join(lines))
    arguments = [*ONE_MORE, "--output-dir", directory, "--resume"]
    lines = runs_or_refuses(train.main, arguments, capsys, directory)
    assert lines is None or len(lines) == 1


# --- infer.py ---------------------------------------------------------------------------------

TWO_TOKENS = "--greedy --max-new-tokens 2 --device cpu".split()
OWN = LORA | {"base_model_name_or_path": str(chatglm.BUILT_IN)}


def names_no_hub_id(config):
    """Nothing is to be fetched."""
    base = str(config.get("base_model_name_or_path"))
    return not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", base)


no_hub = damaged(st.just(OWN)).filter(names_no_hub_id).map(json.dumps)
configs = st.one_of(st.just(json.dumps(OWN)), no_hub, texts_of_json)
TRAINING_ARGS = {"system": "s", "base": {"shape": {}, "vocabulary": None}}
training_args = damaged_json(TRAINING_ARGS) | texts_of_json


@hostile(
    150,
    config=configs,
    weights=mostly(st.none(), adapter_weights),
    notes=mostly(st.none(), training_args),
    base=st.booleans(),
)
def test_infer_py_on_an_adapter(tmp_path, little, capsys, config, weights, notes, base):
    """It answers, or says in one line what is wrong with the adapter. It writes nothing."""
    directory = fresh(tmp_path / "adapter")
    shutil.copy(little / "adapter_model.safetensors", directory)
    (directory / "adapter_config.json").write_text(config)
    if weights:
        suffix, raw = weights
        (directory / "adapter_model.safetensors").unlink()
        (directory / f"adapter_model.{suffix}").write_bytes(raw)
    if notes:
        (directory / "training_args.json").write_text(notes)
    arguments = ["--adapter", directory, "--prompt", "q", *TWO_TOKENS]
    arguments += ["--model", chatglm.BUILT_IN] if base else []
    lines = runs_or_refuses(infer.main, arguments, capsys)
    assert lines is None or len(lines) == 1


@hostile(20, raw=odd_files | valid_files, output=st.binary(max_size=20))
def test_infer_py_on_a_batch_file(tmp_path, little, capsys, raw, output):
    """Each record has its answer, or the command says what is wrong with the file. The lock file
    beside --output is gone in the end."""
    directory = fresh(tmp_path / "answers")
    questions, answers = tmp_path / "x", directory / "y"
    questions.write_bytes(raw)
    answers.write_bytes(output)
    arguments = ["--adapter", little, "--model", chatglm.BUILT_IN, *TWO_TOKENS]
    arguments += ["--input", questions, "--output", answers]
    if not runs_or_refuses(infer.main, arguments, capsys, directory):
        found = [json.loads(line) for line in answers.read_bytes().split(b"\n")[:-1]]
        assert len(found) == len([*RecordReader([questions], is_prompt=True)])
        assert all(isinstance(line["prediction"], str) for line in found)
    assert list(directory.iterdir()) == [answers]
