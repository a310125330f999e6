"""Exports: the layouts, files that are whole or absent, the check, and reading tensor by tensor.

python -m pytest -q tests/test_export.py
"""

import json
import math
import os
import re
import resource
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    ANSWER,
    FIXTURES,
    LINEAR,
    QUESTION,
    ROOT,
    adapter_of,
    finish,
    merged_model,
    refused_by_infer,
    with_random_lora,
    write_layout,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import data
import infer
import model as chatglm
from support import bases, export, layouts, self_check
from support.merging import MergedModel

NORM = "transformer.encoder.final_layernorm.weight"


def exported(directory, name, layout="official", dtype=torch.float32):
    """Writes a test checkpoint with its adapter. → its MergedModel"""
    base = FIXTURES / name
    return write_layout(directory, base, base / "adapter", layout, dtype)


def test_an_official_export_gives_the_adapter_s_logits(golden, tmp_path, monkeypatch):
    """In fp32 to 1e-5 of their norm. In fp16, the merged weights are rounded: to 1e-3."""
    directory, expected = golden
    monkeypatch.setattr(layouts, "SHARD", "100KB")
    ids, wanted = expected["input_ids"], expected["adapter_logits"]
    exported(tmp_path / "fp32", directory.name)
    write_layout(tmp_path / "base", directory, dtype=torch.float16)
    write_layout(tmp_path / "fp16", tmp_path / "base", directory / "adapter", dtype=torch.float16)
    with torch.no_grad():
        logits = chatglm.load_model(tmp_path / "fp32", "cpu")(ids).logits
        assert (logits - wanted).norm() < 1e-5 * wanted.norm()
        base = chatglm.load_model(tmp_path / "base", "cpu", "fp32")
        wanted = chatglm.load_adapter(base, directory / "adapter")(input_ids=ids).logits
        logits = chatglm.load_model(tmp_path / "fp16", "cpu", "fp32")(ids).logits
        assert (logits - wanted).norm() < 1e-3 * wanted.norm()


def test_merged_weights_are_rounded_once(tmp_path):
    """Each is the nearest fp16 number to W + s · B A."""
    exported(tmp_path / "m", "tiny", dtype=torch.float16)
    adapter = load_file(FIXTURES / "tiny" / "adapter" / "adapter_model.safetensors")
    name = "transformer.encoder.layers.1.self_attention.query_key_value"
    a, b = (adapter[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
    config = json.loads((FIXTURES / "tiny" / "adapter" / "adapter_config.json").read_text())
    base = load_file(FIXTURES / "tiny" / "model.safetensors")[f"{name}.weight"].double()
    wanted = base + config["lora_alpha"] / config["r"] * b @ a
    found = load_file(tmp_path / "m" / "model.safetensors")[f"{name}.weight"]
    spacing = torch.finfo(torch.float16).eps * wanted.abs().clamp(min=2**-14)
    assert ((found.double() - wanted).abs() <= 0.5001 * spacing).all()


def test_the_official_layout(tmp_path, monkeypatch):
    monkeypatch.setattr(layouts, "SHARD", "100KB")
    exported(tmp_path / "m", "tiny", dtype=torch.float16)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())["weight_map"]
    official = load_file(FIXTURES / "tiny" / "model.safetensors")
    assert index.keys() == official.keys() and len(set(index.values())) > 2
    for name, file in index.items():
        assert re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", file)
        weight = load_file(tmp_path / "m" / file)[name]
        assert weight.shape == official[name].shape and weight.dtype == torch.float16


def test_the_config_is_complete_for_vllm_and_sglang(tmp_path):
    """They read these keys, and need them to be there; auto_map would ask for remote code."""
    given = {"auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"}}
    given |= json.loads((chatglm.BUILT_IN / "config.json").read_text())
    config = chatglm.ChatGLMConfig.from_pretrained(chatglm.BUILT_IN)
    found = layouts.official_config(config, given, torch.float16)
    needed = """add_bias_linear add_qkv_bias apply_residual_connection_post_layernorm
    ffn_hidden_size fp32_residual_connection hidden_size kv_channels layernorm_epsilon
    multi_query_attention multi_query_group_num num_attention_heads num_layers original_rope
    padded_vocab_size post_layer_norm rmsnorm rope_ratio seq_length torch_dtype""".split()
    assert found.keys() >= {*needed} and "auto_map" not in found
    assert found["torch_dtype"] == "float16" and found["architectures"] == ["ChatGLMModel"]
    assert found["original_rope"] is True and found["rope_ratio"] == 1.0
    with_code = layouts.official_config(config, given, torch.float16, with_code=True)
    assert with_code["auto_map"] == given["auto_map"]


def test_transformers_reads_the_glm_layout(golden, tmp_path):
    """The official implementation's logits in fp32, and ours within 1e-6, without remote code."""
    directory, expected = golden
    model = exported(tmp_path / "glm", directory.name, "glm")
    glm = AutoModelForCausalLM.from_pretrained(tmp_path / "glm", attn_implementation="sdpa")
    exported(tmp_path / "ours", directory.name)
    ours = chatglm.load_model(tmp_path / "ours", "cpu")
    ids = expected["input_ids"]
    with torch.no_grad():
        found, wanted = glm(ids).logits, ours(ids).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(found, model.logits(ids), rtol=0, atol=2e-5)
    assert (found - expected["adapter_logits"]).norm() < 1e-5 * found.norm()
    decoder = infer.Decoder(ours)
    for row in ids[:, :9].tolist():
        options = dict(max_new_tokens=40, do_sample=False, eos_token_id=None)
        answer = glm.generate(torch.tensor([row]), **options)[0, len(row) :].tolist()
        assert answer == [id for _, id in decoder.generate([row], 40) if id is not None]


def test_transformers_reads_the_built_in_model(trained, tmp_path, tokenizer):
    """Logits within 1e-6 of ours, greedy answers equal, with the trained adapter merged."""
    adapter, _ = trained
    for layout in ("glm", "official"):
        write_layout(tmp_path / layout, chatglm.BUILT_IN, adapter, layout)
    glm = AutoModelForCausalLM.from_pretrained(tmp_path / "glm", attn_implementation="sdpa")
    ours = chatglm.load_model(tmp_path / "official", "cpu")
    decoder = infer.Decoder(ours)
    for messages in self_check.CONVERSATIONS:
        ids = data.encode_prompt(tokenizer, messages)
        with torch.no_grad():
            found, wanted = glm(torch.tensor([ids])).logits, ours(torch.tensor([ids])).logits
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
        options = dict(max_new_tokens=40, do_sample=False, eos_token_id=None)
        answer = glm.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()
        assert answer == [id for _, id in decoder.generate([ids], 40) if id is not None]


KINDS = [
    dict(target_modules=LINEAR),
    dict(target_modules=LINEAR, rslora=True),
    dict(target_modules=LINEAR, dora=True),
    dict(target_modules=["query_key_value"], modules_to_save=["output_layer"]),
    dict(target_modules=["word_embeddings", "output_layer"]),
    dict(target_modules=LINEAR, bias="all"),
    dict(target_modules=["dense"], bias="all"),
]


@pytest.mark.parametrize("layout", ["official", "glm"])
@pytest.mark.parametrize("kind", KINDS)
def test_both_layouts_hold_every_kind_of_adapter(base, tmp_path, kind, layout):
    bias = kind.get("bias")
    kind = {name: value for name, value in kind.items() if name != "bias"}
    peft_model = with_random_lora(base, **kind)
    if bias:
        peft_model.peft_config["default"].bias = bias
        with torch.no_grad():
            for layer in base.transformer.encoder.layers:
                linear = layer.self_attention.query_key_value
                getattr(linear, "base_layer", linear).bias.add_(0.5)
    if "modules_to_save" in kind:
        with torch.no_grad():
            base.transformer.output_layer.modules_to_save["default"].weight.normal_(0, 0.1)
    ids = torch.arange(3, 33).reshape(2, 15)
    with torch.no_grad():
        wanted = peft_model.eval()(input_ids=ids).logits
    chatglm.save_adapter(peft_model, tmp_path / "a")
    model = write_layout(tmp_path / "m", FIXTURES / "tiny", tmp_path / "a", layout)
    reader = AutoModelForCausalLM if layout == "glm" else chatglm.ChatGLMForCausalLM
    with torch.no_grad():
        found = reader.from_pretrained(tmp_path / "m")(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    torch.testing.assert_close(model.logits(ids), wanted, rtol=0, atol=1e-4)
    plain = chatglm.load_model(FIXTURES / "tiny", "cpu")
    with torch.no_grad():
        assert (plain(ids).logits - wanted).abs().max() > 0.1  # the adapter does something


def test_an_export_says_what_the_adapter_does(trained, tmp_path, capsys):
    """Code beside the base is not copied, and is never run."""
    adapter, device = trained
    base, target = tmp_path / "base", str(tmp_path / "m")
    shutil.copytree(chatglm.BUILT_IN, base)
    (base / "tokenization_chatglm.py").write_text("raise SystemExit('this file was run')")
    (base / "secret").write_text("not of the official files")
    common = ["--adapter", str(adapter), "--model", str(base)]
    infer.main([*common, "--merge-to", target])
    told = capsys.readouterr().out
    assert "saved" in told and "--system" not in told
    files = ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    files += ["config.json", "model.safetensors", "tokenizer.model"]
    assert {file.name for file in (tmp_path / "m").iterdir()} == {*files}
    modes = {file.stat().st_mode for file in (tmp_path / "m").iterdir()}
    assert len(modes) == 1
    weights = load_file(tmp_path / "m" / "model.safetensors")
    assert weights.popitem()[1].dtype == torch.float32  # as config.json says
    config = json.loads((base / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_chatglm.ChatGLMConfig"}
    (base / "config.json").write_text(json.dumps(config))
    (base / "modeling_chatglm.py").write_text("raise SystemExit('this file was run')")
    theirs = {"tokenizer_class": "ChatGLMTokenizer", "auto_map": {"AutoTokenizer": ["x.y", None]}}
    (base / "tokenizer_config.json").write_text(json.dumps(theirs))
    infer.main([*common, "--merge-to", str(tmp_path / "with code"), "--with-official-code"])
    assert (tmp_path / "with code" / "tokenization_chatglm.py").exists()
    config = json.loads((tmp_path / "with code" / "config.json").read_text())
    assert config["auto_map"] == {"AutoConfig": "configuration_chatglm.ChatGLMConfig"}
    infer.main([*common, "--check", str(tmp_path / "with code")])
    capsys.readouterr()
    common = ["--device", device, "--no-adapter", "--model", target]
    infer.main([*common, "--greedy", "--prompt", QUESTION])
    assert capsys.readouterr().out == f"{ANSWER}\n"


@pytest.mark.parametrize("system, shown", [("甲", "'甲'"), ("two\nlines", "…")])
def test_the_printed_command_gives_the_system_message(tmp_path, capsys, system, shown):
    adapter = adapter_of(tmp_path / "a", system)
    infer.main(["--adapter", str(adapter), "--device", "cpu", "--merge-to", str(tmp_path / "m")])
    command = f"python infer.py --no-adapter --model {tmp_path}/m --system {shown}\n"
    assert capsys.readouterr().out.endswith(command)


def built_in_export(tmp_path, *flags, system=None):
    """The arguments of infer.py for an export of the built-in model with an adapter of it."""
    adapter = adapter_of(tmp_path / "a", system)
    return ["--adapter", str(adapter), *map(str, flags)]


@pytest.mark.parametrize(
    "there, flags, message",
    [
        ("m/notes", "--merge-to m", "m exists already; choose another name"),
        ("m/notes", "--gguf m", "m exists already; choose another name"),
        ("m/notes", "--gguf-adapter m", "m exists already; choose another name"),
        ("m.part/notes", "--merge-to m", "m.part: it is left of an export that was stopped"),
        ("m.part/notes", "--gguf m", "m.part: it is left of an export that was stopped"),
        ("m.Modelfile/notes", "--gguf m.gguf", "m.Modelfile exists already; choose another name"),
    ],
)
def test_nothing_is_overwritten(tmp_path, capsys, monkeypatch, there, flags, message):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / there
    arguments = built_in_export(tmp_path, *flags.split())
    file.parent.mkdir()
    file.write_text("keep me")
    assert message in refused_by_infer(capsys, *arguments)
    assert {path.name for path in tmp_path.iterdir()} == {"a", file.parent.name}
    assert [path.name for path in file.parent.iterdir()] == ["notes"]


def export_to_a_full_disk(arguments):
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    infer.main(arguments)


def killed_export(arguments):
    """The process dies while it reads the twelfth tensor to write it."""
    read, names = MergedModel.__getitem__, []

    def read_or_die(self, name):
        names.append(name)
        if len(names) == 12:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, name)

    MergedModel.__getitem__ = read_or_die
    infer.main(arguments)


EXPORTS = [["--merge-to"], ["--layout", "glm", "--merge-to"], ["--gguf"]]


@pytest.mark.parametrize("flags", EXPORTS)
def test_a_disk_that_is_full_leaves_nothing(tmp_path, fork, flags):
    arguments = built_in_export(tmp_path, *flags, tmp_path / "m")
    told = finish(fork(export_to_a_full_disk, arguments), 2)
    errors = [line for line in told.splitlines() if "error: " in line]
    assert len(errors) == 1 and "m: cannot write" in errors[0] and "Traceback" not in told
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("flags", EXPORTS)
def test_a_disk_with_too_little_room_is_not_begun(tmp_path, monkeypatch, capsys, flags):
    monkeypatch.setattr(export.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    told = refused_by_infer(capsys, *built_in_export(tmp_path, *flags, tmp_path / "m"))
    assert "m: cannot write: it needs 0.0 GiB, and 0.0 are free" in told
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("flags", EXPORTS)
def test_a_killed_export_leaves_nothing_under_its_name(tmp_path, fork, flags):
    """It is killed while weights are written. What is left is named .part."""
    arguments = built_in_export(tmp_path, *flags, tmp_path / "m")
    finish(fork(killed_export, arguments), -signal.SIGKILL)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "m.part"}


# --- the export proves itself -----------------------------------------------------------------


@pytest.mark.parametrize("layout", ["official", "glm"])
@pytest.mark.parametrize("name", ["query_key_value.weight", "final_layernorm.weight", "bias"])
def test_a_wrong_tensor_is_found(tmp_path, monkeypatch, capsys, layout, name):
    """One tensor of the export is changed. The error says so, and nothing is left."""
    tensors_of = getattr(layouts, f"{layout}_tensors")
    names = {"query_key_value.weight": "k_proj.weight", "final_layernorm.weight": "model.norm"}
    wanted = names.get(name, "v_proj.bias") if layout == "glm" else name

    def with_a_fault(model):
        targets = tensors_of(model)
        changed = next(each for each in targets if wanted in each)
        read = targets[changed].read
        targets[changed] = targets[changed]._replace(read=lambda: read() + 0.2)
        monkeypatch.undo()  # the check reads the export in the right way
        return targets

    monkeypatch.setattr(layouts, f"{layout}_tensors", with_a_fault)
    flags = ["--merge-to", tmp_path / "m", "--layout", layout]
    with pytest.raises(SystemExit) as stop:
        infer.main(built_in_export(tmp_path, *flags))
    told = capsys.readouterr().err
    assert stop.value.code == 2 and "log-probabilities differ by at most" in told
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_wrong_prompt_is_found(tmp_path, monkeypatch, capsys):
    template = export.CHAT_TEMPLATE.replace("[gMASK]<sop>", "[gMASK]")
    monkeypatch.setattr("support.tokenizer_files.CHAT_TEMPLATE", template)
    with pytest.raises(SystemExit) as stop:
        infer.main(built_in_export(tmp_path, "--merge-to", tmp_path / "m"))
    told = capsys.readouterr().err
    assert stop.value.code == 2 and "gets the ids" in told
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_check_can_be_made_later(tmp_path, capsys):
    """With --check. It finds a file that was changed since."""
    arguments = built_in_export(tmp_path)
    infer.main([*arguments, "--merge-to", str(tmp_path / "m"), "--no-check"])
    assert "checked" not in capsys.readouterr().out
    infer.main([*arguments, "--check", str(tmp_path / "m")])
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 4 and told[0].startswith("checked  with transformers")
    assert re.fullmatch(r" +(\d+) of \1 greedy tokens are equal", told[2]), told
    assert told[3] == "checked  32 tensors, the vocabulary and the settings"
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"] *= 1.1
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit):
        infer.main([*arguments, "--check", str(tmp_path / "m")])
    assert "log-probabilities differ" in capsys.readouterr().err
    tensors["transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"] /= 1.1
    tensors["transformer.embedding.word_embeddings.weight"][1400] += 1  # of no prompt
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit):
        infer.main([*arguments, "--check", str(tmp_path / "m")])
    wanted = "m: transformer.embedding.word_embeddings.weight is not what base and adapter give"
    assert wanted in capsys.readouterr().err
    for name, message in (
        ("none", "there is nothing to check"),
        ("a", "a: no model here: it has no config.json"),
        ("m", "m: transformers can't open it: "),
    ):
        (tmp_path / "m" / "tokenizer.json").write_text("{")
        told = refused_by_infer(capsys, *arguments, "--check", tmp_path / name)
        assert message in told


def test_a_number_that_is_not_finite_is_found(base, tokenizer):
    """A difference of NaN is a difference."""

    class Reader:
        name = "a reader"

        def encode(self, messages):
            return [5, 6, 7]

        def answer(self, ids):
            return [self_check.Step(8, {8: -1.0}), self_check.Step(9, {9: self.number})]

    model = merged_model(FIXTURES / "tiny")
    prompts = [(self_check.CONVERSATIONS[0], [5, 6, 7])]
    for Reader.number in (math.nan, -math.inf):
        with pytest.raises(self_check.Differs, match="a reader: log-probabilities differ"):
            self_check.compare(Reader(), model, prompts, 100)
    Reader.number = -2.0
    self_check.compare(Reader(), model, prompts, 100)
    Reader.answer = lambda self, ids: []
    with pytest.raises(self_check.Differs, match="nothing that could be compared"):
        self_check.compare(Reader(), model, prompts, 100)


def test_code_in_a_checked_directory_is_not_run(tmp_path, capsys):
    """Nor is the user asked whether to run it."""
    arguments = built_in_export(tmp_path)
    infer.main([*arguments, "--merge-to", str(tmp_path / "m"), "--layout", "glm", "--no-check"])
    (tmp_path / "m" / "code.py").write_text("raise SystemExit('this file was run')")
    for name, key in (("config.json", "AutoModelForCausalLM"), ("tokenizer_config.json", "x")):
        content = json.loads((tmp_path / "m" / name).read_text())
        content |= {"auto_map": {key: "code.Model", "AutoConfig": "code.Config"}}
        content |= {"model_type": "unknown"} if name == "config.json" else {}
        (tmp_path / "m" / name).write_text(json.dumps(content))
    capsys.readouterr()
    told = refused_by_infer(capsys, *arguments, "--check", tmp_path / "m")
    assert "transformers can't open it" in told and "was run" not in told


@pytest.mark.parametrize("flags", [["--merge-to"], ["--layout", "glm", "--merge-to"], ["--gguf"]])
def test_a_context_that_is_too_short_for_the_check(tmp_path, monkeypatch, capsys, flags):
    """A long system message is taken, one that fills the context is told."""
    arguments = built_in_export(tmp_path, *flags, tmp_path / "m")
    infer.main([*arguments, "--system", "long " * 150])
    assert "ids of 4 prompts are equal" in capsys.readouterr().out
    arguments = [*arguments[:-1], str(tmp_path / "other")]
    monkeypatch.setattr(self_check, "CONVERSATIONS", self_check.CONVERSATIONS[:1])
    with pytest.raises(SystemExit):
        infer.main([*arguments, "--system", "long " * 1000])
    told = capsys.readouterr().err
    assert "no prompt of the check fits into the context" in told and "--no-check" in told
    assert not list(tmp_path.glob("other*"))


def test_numbers_too_large_for_fp16_are_refused(checkpoint, tmp_path):
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    name = "transformer.encoder.layers.2.mlp.dense_4h_to_h.weight"
    tensors[name][3, 4] = 1e5
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} has numbers too large for float16"):
        write_layout(tmp_path / "m", checkpoint, dtype=torch.float16)
    tensors[name][3, 4] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    model = merged_model(checkpoint)
    with pytest.raises(ValueError, match=f"not finite, in {name}"):
        bases.check_finite(model)


# --- a model that is read tensor by tensor ----------------------------------------------------


@pytest.mark.parametrize("kind", ["bin", "old bin", "shards"])
def test_a_base_is_read_from_every_kind_of_file(golden, tmp_path, kind):
    directory, expected = golden
    base = tmp_path / "base"
    base.mkdir()
    shutil.copy(directory / "config.json", base)
    tensors = load_file(directory / "model.safetensors")
    if "bin" in kind:
        is_new = kind == "bin"
        torch.save(tensors, base / "pytorch_model.bin", _use_new_zipfile_serialization=is_new)
    else:
        names = [*tensors]
        parts = {f"{i}.safetensors": names[i::3] for i in range(3)}
        for file, of_file in parts.items():
            save_file({name: tensors[name] for name in of_file}, base / file)
        index = {
            "metadata": {},
            "weight_map": {name: file for file in parts for name in parts[file]},
        }
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
    model = merged_model(base, directory / "adapter")
    found = model.logits(expected["input_ids"])
    wanted = expected["adapter_logits"]
    assert (found - wanted).norm() < 1e-5 * wanted.norm()
    in_memory = chatglm.load_model(base, "cpu")
    assert bases.fingerprint(model, "v") == bases.fingerprint(in_memory, "v")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(NORM), f"not a complete ChatGLM3 checkpoint: missing {NORM}"),
        (lambda t: t.update(other=torch.ones(2)), "unknown other"),
        (lambda t: t.update({NORM: torch.ones(3)}), f"{NORM} has shape [3], not [64]"),
    ],
)
def test_a_base_that_is_not_whole_is_refused(checkpoint, change, message):
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=re.escape(message)):
        merged_model(checkpoint)


def test_a_damaged_base_is_refused(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="base: cannot load this model: "):
        merged_model(checkpoint)
    file.unlink()
    with pytest.raises(ValueError, match="it has no model.safetensors, nor shards of it"):
        merged_model(checkpoint)


def test_the_example_for_transformers_answers(trained, tmp_path, monkeypatch, capsys):
    """The Python of docs/serving.md, as it stands there"""
    monkeypatch.chdir(tmp_path)
    adapter, _ = trained
    infer.main(["--adapter", str(adapter), "--merge-to", "merged-glm", "--layout", "glm"])
    capsys.readouterr()
    text = (ROOT / "docs" / "serving.md").read_text("utf-8")
    exec(re.search(r"```python\n(.*?)```", text, re.S)[1], {})
    assert capsys.readouterr().out == f"{ANSWER}\n"
