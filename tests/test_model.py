import json
import pickle
import shutil

import peft
import pytest
import torch
from conftest import FIXTURES, random_samples
from safetensors.torch import load_file, save_file

import model as chatglm


def close(a, b, tolerance=1e-5):
    """Within 1e-5, absolute and relative. The official fp32 logits themselves are up to 1.3e-5 from fp64's."""
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def gradients(module):
    return {n.replace(".default", ""): p.grad.clone() for n, p in module.named_parameters() if p.requires_grad}


# --- against the official implementation ------------------------------------------------------------------------------


def test_golden_logits_and_loss(golden):
    directory, expected = golden
    model = chatglm.load_model(directory, "cpu")
    with torch.no_grad():
        out = model(expected["input_ids"], labels=expected["labels"])
        close(out.logits, expected["logits"])
        close(out.loss, expected["loss"])
        close(model(expected["long_input_ids"]).logits[:, -1], expected["long_last_logits"])


def test_golden_adapter_and_gradients(golden):
    directory, expected = golden
    model = chatglm.load_adapter(chatglm.load_model(directory, "cpu"), directory / "adapter", is_trainable=True)
    out = model(input_ids=expected["input_ids"], labels=expected["labels"])
    close(out.logits, expected["adapter_logits"])
    out.loss.backward()
    found = gradients(model)
    wanted = {name[5:]: tensor for name, tensor in expected.items() if name.startswith("grad.")}
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-5)


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the smallest checkpoint, to be damaged."""
    shutil.copytree(FIXTURES / "tiny", tmp_path / "base", ignore=shutil.ignore_patterns("adapter", "expected*"))
    return tmp_path / "base"


def edit_weights(checkpoint, change):
    weights = load_file(checkpoint / "model.safetensors")
    change(weights)
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})


def split(weights, checkpoint, name, write):
    """Two shards and their index, as the official checkpoints have seven."""
    index = {}
    for i in (0, 1):
        shard = {k: v for j, (k, v) in enumerate(sorted(weights.items())) if j % 2 == i}
        file = name.format(i + 1)
        write(shard, checkpoint / file)
        index |= dict.fromkeys(shard, file)
    return json.dumps({"metadata": {}, "weight_map": index})


@pytest.mark.parametrize("layout", ["bin", "bin shards", "safetensors shards"])
def test_every_layout_gives_the_same_weights(base, checkpoint, layout):
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    if layout == "bin":
        torch.save(weights, checkpoint / "pytorch_model.bin")
    elif layout == "bin shards":
        index = split(weights, checkpoint, "pytorch_model-{:05}-of-00002.bin", torch.save)
        (checkpoint / "pytorch_model.bin.index.json").write_text(index)
    else:
        index = split(
            weights, checkpoint, "model-{:05}-of-00002.safetensors", lambda s, f: save_file(s, f, {"format": "pt"})
        )
        (checkpoint / "model.safetensors.index.json").write_text(index)
    loaded = chatglm.load_model(checkpoint, "cpu").state_dict()
    assert loaded.keys() == base.state_dict().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in base.state_dict().items())


def test_dtype(checkpoint, base):
    half = chatglm.load_model(checkpoint, "cpu", "fp16")
    assert all(torch.equal(p, q.half()) for p, q in zip(half.parameters(), base.parameters(), strict=True))


QKV = "transformer.encoder.layers.1.self_attention.query_key_value.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop(QKV), f"missing {QKV}"),
        (lambda w: w.update({QKV: w[QKV][:-1].clone()}), f"{QKV} has shape [127, 64], not [128, 64]"),
        (lambda w: w.update(stray=torch.zeros(1)), "unknown stray"),
    ],
)
def test_incomplete_checkpoints_are_refused_by_name(checkpoint, change, message):
    edit_weights(checkpoint, change)
    with pytest.raises(ValueError, match="not a complete ChatGLM3 checkpoint") as error:
        chatglm.load_model(checkpoint, "cpu")
    assert message in str(error.value)


def test_damaged_and_absent_files_are_refused(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot load this model"):
        chatglm.load_model(checkpoint, "cpu")
    file.unlink()
    with pytest.raises(ValueError, match="cannot load this model"):
        chatglm.load_model(checkpoint, "cpu")
    for name in ("./nowhere", "nowhere", "", str(checkpoint / "config.json")):
        with pytest.raises(ValueError, match="neither a directory nor a hub id"):
            chatglm.find_model(name)
    assert chatglm.find_model("THUDM/chatglm3-6b") == "THUDM/chatglm3-6b"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rmsnorm": False}, "rmsnorm is False; ChatGLM3 needs True"),
        ({"hidden_size": None}, "hidden_size is None, not a int"),
        ({"rmsnorm": 1}, "rmsnorm is 1, not a bool"),
        ({"num_layers": "3"}, "num_layers is '3', not a int"),
        ({"kv_channels": 0}, "kv_channels is 0; it must be more than 0"),
        ({"rope_ratio": "50"}, "rope_ratio is '50', not a float"),
    ],
)
def test_damaged_and_foreign_configurations_are_refused(checkpoint, change, message):
    """Before a network is built: one of the wrong size could take all memory."""
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError) as error:
        chatglm.load_model(checkpoint, "cpu")
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["{}", "[]", "", "{"])
def test_empty_configurations_are_refused(checkpoint, text):
    (checkpoint / "config.json").write_text(text)
    with pytest.raises(ValueError, match="cannot load this model"):
        chatglm.load_model(checkpoint, "cpu")
    (checkpoint / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json is not there, or has no num_layers"):
        chatglm.load_model(checkpoint, "cpu")


class Marker:
    """Unpickling this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_no_code_of_a_checkpoint_is_run(checkpoint, tmp_path):
    config = json.loads((checkpoint / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    config["attn_implementation"] = "evil/attention"  # transformers would fetch and import it
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (checkpoint / "config.json").write_text(json.dumps(config))
    ran = tmp_path / "ran"
    for name in ("evil", "modeling_chatglm", "configuration_chatglm"):
        (checkpoint / f"{name}.py").write_text(f"open({str(ran)!r}, 'w')")
    chatglm.load_model(checkpoint, "cpu")
    assert not ran.exists()
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps({"w": Marker(ran)}))
    with pytest.raises(ValueError):
        chatglm.load_model(checkpoint, "cpu")
    assert not ran.exists()
    torch.save({"w": Marker(ran)}, checkpoint / "pytorch_model.bin")
    with pytest.raises(ValueError):
        chatglm.load_model(checkpoint, "cpu")
    assert not ran.exists()


# --- LoRA -------------------------------------------------------------------------------------------------------------


def with_random_lora(model, **kwargs):
    arguments = dict(r=4, alpha=8, dropout=0.0, target_modules=["query_key_value", "dense_4h_to_h"]) | kwargs
    torch.manual_seed(1)
    peft_model = chatglm.add_lora(model, **arguments)
    with torch.no_grad():
        for name, param in peft_model.named_parameters():
            if "lora_B" in name:  # zero at first, which would make every test of it pass
                param.normal_(std=0.1)
    return peft_model


def trained_names(peft_model):
    return {name for name, p in peft_model.named_parameters() if p.requires_grad}


def test_only_lora_is_trained_and_in_fp32(checkpoint):
    peft_model = chatglm.add_lora(chatglm.load_model(checkpoint, "cpu", "fp16"), 4, 8, 0.0, ["query_key_value"])
    assert len(trained_names(peft_model)) == 6  # A and B in three layers
    for name, param in peft_model.named_parameters():
        assert param.requires_grad == ("lora_" in name)
        assert param.dtype == (torch.float32 if param.requires_grad else torch.float16)


def test_target_modules_by_regular_expression_and_modules_to_save(base):
    peft_model = chatglm.add_lora(base, 4, 8, 0.0, r".*layers\.[02]\..*dense", ["final_layernorm"])
    names = trained_names(peft_model)
    assert len(names) == 5 and sum("final_layernorm" in name for name in names) == 1
    assert all("final_layernorm" in n or ".self_attention.dense.lora_" in n for n in names)


def test_a_misspelt_target_is_refused(base):
    with pytest.raises(ValueError, match="'query_key_vale'; did you mean 'query_key_value'"):
        chatglm.add_lora(base, 4, 8, 0.0, ["query_key_vale", "dense"])
    with pytest.raises(ValueError, match="regular expression"):
        chatglm.add_lora(base, 4, 8, 0.0, "*(")
    with pytest.raises(ValueError, match="no module of the model is named 'nothing.*'"):
        chatglm.add_lora(base, 4, 8, 0.0, "nothing.*")
    with pytest.raises(ValueError, match="'outputlayer'; did you mean 'output_layer'"):
        chatglm.add_lora(base, 4, 8, 0.0, ".*query_key_value", ["outputlayer"])
    with pytest.raises(ValueError, match="input_layernorm is no linear layer"):
        chatglm.add_lora(base, 4, 8, 0.0, ["query_key_value", "input_layernorm"])


def test_adapter_round_trip_and_plain_peft(base, checkpoint, tmp_path):
    peft_model = with_random_lora(base, modules_to_save=["output_layer"]).eval()
    with torch.no_grad():
        peft_model.get_base_model().get_output_embeddings().modules_to_save["default"].weight.mul_(1.5)
        ids = torch.randint(0, 512, (2, 24))
        wanted = peft_model(input_ids=ids).logits
        chatglm.save_adapter(peft_model, tmp_path / "adapter")
        mine = chatglm.load_adapter(chatglm.load_model(checkpoint, "cpu"), tmp_path / "adapter")
        assert torch.equal(mine(input_ids=ids).logits, wanted)
        plain = peft.PeftModel.from_pretrained(chatglm.load_model(checkpoint, "cpu"), tmp_path / "adapter")
        assert torch.equal(plain(input_ids=ids).logits, wanted)
        merged = mine.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, wanted, rtol=0, atol=1e-4)
        assert not torch.allclose(merged(ids).logits, chatglm.load_model(checkpoint, "cpu")(ids).logits, atol=1e-2)
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop(sorted(w)[0]), "missing base_model.model.transformer.encoder.layers.0"),
        (lambda w: w.update(stray=torch.zeros(1)), "unknown stray"),
        (lambda w: w.update({sorted(w)[0]: torch.zeros(3, 64)}), "has shape [3, 64], not [8, 64]"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(base, tmp_path, change, message):
    shutil.copytree(FIXTURES / "tiny" / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file)
    with pytest.raises(ValueError, match="this adapter was not trained on this model") as error:
        chatglm.load_adapter(base, tmp_path / "adapter")
    assert message in str(error.value)


def test_unreadable_adapters_are_refused(base, tmp_path):
    with pytest.raises(ValueError, match="no adapter here"):
        chatglm.load_adapter(base, tmp_path)
    shutil.copytree(FIXTURES / "tiny" / "adapter", tmp_path / "adapter")
    weights, config = (tmp_path / "adapter" / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    good = json.loads(config.read_text())
    imports = {"megatron_config": {"a": 1}, "megatron_core": "evil"}
    for change in ({"r": "x"}, {"r": 0}, {"target_modules": "("}, {"peft_type": "WAT"}, {"peft_type": "IA3"}, imports):
        config.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match="cannot read this adapter"):
            chatglm.load_adapter(base, tmp_path / "adapter")
    config.write_text(json.dumps(good))
    weights.write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="cannot read this adapter"):
        chatglm.load_adapter(base, tmp_path / "adapter")


def test_adapters_in_peft_s_older_file(base, tmp_path):
    shutil.copytree(FIXTURES / "tiny" / "adapter", tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    torch.save(weights, tmp_path / "adapter" / "adapter_model.bin")
    state = peft.get_peft_model_state_dict(chatglm.load_adapter(base, tmp_path / "adapter"))
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())
    ran = tmp_path / "ran"
    torch.save({"w": Marker(ran)}, tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(ValueError, match="cannot read this adapter"):
        chatglm.load_adapter(base, tmp_path / "adapter")
    assert not ran.exists()


# --- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 3])
def test_checkpointed_gradients_equal_plain_ones_with_dropout(base, layers):
    peft_model = with_random_lora(base, dropout=0.3).train()
    model = peft_model.get_base_model()
    ids = torch.randint(0, 512, (2, 24))

    calls = []
    for layer in model.transformer.encoder.layers:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))

    def run(checkpointed_layers):
        model.transformer.encoder.checkpointed_layers = checkpointed_layers
        peft_model.zero_grad()
        calls.clear()
        torch.manual_seed(5)
        model(ids, labels=ids).loss.backward()
        assert len(calls) == 3 + checkpointed_layers  # each of these once more, in backward
        return gradients(peft_model)

    plain, recomputed = run(0), run(layers)
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
    torch.manual_seed(6)  # dropout was on: another seed gives other gradients
    peft_model.zero_grad()
    model(ids, labels=ids).loss.backward()
    assert not all(torch.equal(plain[name], other) for name, other in gradients(peft_model).items())


def test_padding_on_the_right_changes_nothing(base):
    ((ids, _),) = random_samples([21], 512)
    padded = torch.nn.functional.pad(ids, (0, 11))
    mask = (torch.arange(32) < 21).long()[None]
    close(base(padded[None], attention_mask=mask).logits[:, :21], base(ids[None]).logits)
    with pytest.raises(ValueError, match="right-padded"):
        base(padded[None], attention_mask=mask.flip(1))
    with pytest.raises(ValueError, match="does not take position_ids"):
        base(padded[None], position_ids=torch.arange(32))


def test_positions_past_the_first_table_and_training_after_decoding(golden):
    directory, expected = golden
    model = chatglm.load_model(directory, "cpu")
    with torch.inference_mode():
        model(torch.ones(1, 8, dtype=torch.long))
        assert len(model.transformer.rope) == 2048
        model(torch.ones(1, 2100, dtype=torch.long))
        assert len(model.transformer.rope) == 4200
    model(expected["input_ids"], labels=expected["labels"]).loss.backward()


def test_the_built_in_model_is_the_same_everywhere(tmp_path, monkeypatch):
    shutil.copy(chatglm.TINY / "config.json", tmp_path)
    shutil.copy(chatglm.TINY / "tokenizer.model", tmp_path)
    ours = chatglm.load_model(chatglm.tiny_model(), "cpu")
    monkeypatch.setattr(chatglm, "TINY", tmp_path)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again = chatglm.load_model(chatglm.tiny_model(), "cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), again.parameters(), strict=True))
