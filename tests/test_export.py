"""support/export.py: base and adapter are saved as one checkpoint.

python -m pytest -q tests/test_export.py
"""

import json
import re
import resource
import shutil
import signal

import pytest
import torch
from conftest import ANSWER, FIXTURES, QUESTION, adapter_of, refused_by_infer, run
from safetensors.torch import load_file

import infer
import model as chatglm
from support import export


def merged(name, dtype, directory):
    """Saves a test checkpoint with its adapter. → the model in memory"""
    model = chatglm.load_model(FIXTURES / name, "cpu", dtype)
    model = infer.add_adapter(model, FIXTURES / name / "adapter")
    export.merge_to(model, str(directory))
    return model


def test_a_merged_model_gives_the_adapter_s_logits(golden, tmp_path, monkeypatch):
    """In fp32 to 1e-5 of their norm, and in fp16 to 1e-3.

    The fp16 weights are rounded. So both are computed in fp32, from a base in fp16.
    """
    directory, expected = golden
    monkeypatch.setattr(export, "SHARD", "100KB")
    merged(directory.name, "fp32", tmp_path / "fp32")
    ids = expected["input_ids"]
    with torch.no_grad():
        logits = chatglm.load_model(tmp_path / "fp32", "cpu")(ids).logits
        assert (logits - expected["adapter_logits"]).norm() < 1e-5 * logits.norm()
        in_memory = merged(directory.name, "fp16", tmp_path / "fp16")
        loaded = chatglm.load_model(tmp_path / "fp16", "cpu", "fp16")
        pairs = zip(loaded.parameters(), in_memory.parameters(), strict=True)
        assert all(torch.equal(mine, wanted) for mine, wanted in pairs)
        base = chatglm.load_model(directory, "cpu", "fp16").float()
        wanted = chatglm.load_adapter(base, directory / "adapter")(input_ids=ids).logits
        assert (loaded.float()(ids).logits - wanted).norm() < 1e-3 * wanted.norm()


def test_a_merged_model_has_the_official_layout(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SHARD", "100KB")
    merged("tiny", "fp16", tmp_path / "out" / ".." / "m")
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())["weight_map"]
    official = load_file(FIXTURES / "tiny" / "model.safetensors")
    assert index.keys() == official.keys() and len(set(index.values())) > 2
    for name, file in index.items():
        assert re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", file)
        weight = load_file(tmp_path / "m" / file)[name]
        assert weight.shape == official[name].shape and weight.dtype == torch.float16
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    wanted = json.loads((FIXTURES / "tiny" / "config.json").read_text())
    assert config == wanted | {"torch_dtype": "float16"}
    assert config["architectures"] == ["ChatGLMModel"]
    modes = {file.name: file.stat().st_mode for file in (tmp_path / "m").iterdir()}
    assert set(modes.values()) == {modes["config.json"]}


def test_a_merged_model_says_what_the_adapter_does(trained, tmp_path, capsys):
    """The official files beside the base come along, and none of them is run."""
    adapter, device = trained
    base, target = tmp_path / "base", str(tmp_path / "m")
    shutil.copytree(chatglm.BUILT_IN, base)
    (base / "tokenization_chatglm.py").write_text("raise SystemExit('this file was run')")
    (base / "secret").write_text("not of the official files")
    common = ["--device", device, "--adapter", str(adapter), "--model", str(base)]
    infer.main([*common, "--merge-to", target])
    told = capsys.readouterr().out
    assert "saved" in told and "--system" not in told
    there = {file.name for file in (tmp_path / "m").iterdir()}
    official = {"config.json", "tokenizer.model", "tokenization_chatglm.py"}
    assert there == official | {"model.safetensors"}
    weights = load_file(tmp_path / "m" / "model.safetensors")
    assert weights.popitem()[1].dtype == torch.float32  # as config.json says
    common = ["--device", device, "--no-adapter", "--model", target]
    infer.main([*common, "--greedy", "--prompt", QUESTION])
    assert capsys.readouterr().out == f"{ANSWER}\n"


@pytest.mark.parametrize("system, shown", [("甲", "'甲'"), ("two\nlines", "…")])
def test_the_printed_command_gives_the_system_message(tmp_path, capsys, system, shown):
    adapter = adapter_of(tmp_path / "a", system)
    infer.main(["--adapter", str(adapter), "--device", "cpu", "--merge-to", str(tmp_path / "m")])
    command = f"python infer.py --no-adapter --model {tmp_path}/m --system {shown}\n"
    assert capsys.readouterr().out.endswith(command)


@pytest.mark.parametrize(
    "there, message",
    [
        ("m/notes", "m exists already; choose another --merge-to"),
        ("m.part/notes", "m.part: it is where m would be written first; remove it"),
    ],
)
def test_nothing_is_overwritten(tmp_path, capsys, there, message):
    adapter, file = adapter_of(tmp_path / "a"), tmp_path / there
    file.parent.mkdir()
    file.write_text("keep me")
    flags = ["--adapter", adapter, "--device", "cpu", "--merge-to", tmp_path / "m"]
    assert message in refused_by_infer(capsys, *flags)
    assert {path.name for path in tmp_path.iterdir()} == {"a", file.parent.name}
    assert [path.name for path in file.parent.iterdir()] == ["notes"]


def small_disk():
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def test_a_disk_that_is_full_leaves_nothing(tmp_path):
    adapter = adapter_of(tmp_path / "a")
    flags = ["--adapter", adapter, "--device", "cpu", "--merge-to", tmp_path / "m"]
    done = run("infer.py", *flags, preexec_fn=small_disk)
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert done.returncode == 2 and len(errors) == 1, done.stderr
    assert "m: cannot write" in errors[0] and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
