"""model.py: the network, its loss, loading checkpoints, and LoRA.

python -m pytest -q tests/test_model.py
"""

import importlib.util
import json
import pickle
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import Marker, random_samples, trained_parameters, with_random_lora
from safetensors.torch import load_file, save_file

import data
import model as chatglm
from support.bases import resolve_base


def close(a, b):
    """Within 1e-5. The official fp32 logits are themselves up to 1.3e-5 from those in fp64."""
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def gradients(peft_model):
    return {name: param.grad.clone() for name, param in trained_parameters(peft_model).items()}


# --- against the official implementation ------------------------------------------------------


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
    model = chatglm.load_model(directory, "cpu")
    model = chatglm.load_adapter(model, directory / "adapter", is_trainable=True)
    out = model(input_ids=expected["input_ids"], labels=expected["labels"])
    close(out.logits, expected["adapter_logits"])
    out.loss.backward()
    found = gradients(model)
    wanted = {name[5:]: tensor for name, tensor in expected.items() if name.startswith("grad.")}
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-5)


# --- the network ------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 3])
def test_checkpointed_gradients_equal_plain_ones_with_dropout(base, layers):
    peft_model = with_random_lora(base, dropout=0.3).train()
    model = peft_model.get_base_model()
    ids = torch.randint(0, 512, (2, 24))

    calls = []
    for layer in model.transformer.encoder.layers:
        layer.input_layernorm.register_forward_pre_hook(lambda *_: calls.append(1))

    def run(recomputed_layers, seed=5):
        model.transformer.encoder.recomputed_layers = recomputed_layers
        peft_model.zero_grad()
        calls.clear()
        torch.manual_seed(seed)
        model(ids, labels=ids).loss.backward()
        assert len(calls) == 3 + recomputed_layers  # each of these once more, in backward
        return gradients(peft_model)

    plain, recomputed = run(0), run(layers)
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
    other = run(layers, seed=6)  # dropout was on: another seed gives other gradients
    assert not all(torch.equal(plain[name], other[name]) for name in plain)


def test_padding_on_the_right_changes_nothing(base):
    ((ids, _),) = random_samples([21], 512)
    padded = F.pad(ids, (0, 11))
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


# --- the loss ---------------------------------------------------------------------------------


def test_the_loss_in_chunks_is_the_loss(base, monkeypatch):
    peft_model = chatglm.add_lora(base, 4, 8, 0.0, ["query_key_value"], ["output_layer"])
    batch = data.collate(random_samples([200, 260, 300], 512))
    results = []
    for chunk in (10**6, 128, 100):
        monkeypatch.setattr(chatglm, "LOSS_CHUNK", chunk)
        peft_model.zero_grad()
        loss = base.summed_loss(batch)
        loss.backward()
        results.append([loss.detach(), *gradients(peft_model).values()])
    for other in results[1:]:
        for mine, wanted in zip(other, results[0], strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-4)
    assert results[0][0] > 1000


@pytest.mark.parametrize("checkpointed, most", [(0, 64), (2, 8)])
def test_few_logits_are_held(base, monkeypatch, checkpointed, most):
    monkeypatch.setattr(chatglm, "LOSS_CHUNK", 64)
    base.train().transformer.encoder.recomputed_layers = checkpointed
    sizes, plain = [], base.chunk_loss

    def chunk_loss(hidden, targets):
        sizes.append(len(hidden))
        return plain(hidden, targets)

    monkeypatch.setattr(base, "chunk_loss", chunk_loss)
    base.summed_loss(data.collate(random_samples([90, 110], 512)))
    assert sum(sizes) == 256 and set(sizes) == {most}


@pytest.mark.parametrize("compiled", [False, True])
def test_a_recomputed_chunk_drops_the_same(base, monkeypatch, compiled):
    """With dropout on the output layer, the gradient along a direction is the loss's slope."""
    monkeypatch.setattr(chatglm, "LOSS_CHUNK", 128)
    peft_model = chatglm.add_lora(base, 4, 8, 0.5, ["output_layer"])
    if compiled:
        base.chunk_loss = torch.compile(base.chunk_loss, dynamic=True)
    params = list(trained_parameters(peft_model).values())
    batch = data.collate(random_samples([200, 260], 512))

    def loss():
        torch.manual_seed(0)
        return base.summed_loss(batch)

    for param in params:
        param.data = torch.randn(param.shape) * 0.1
    directions, step = [torch.randn_like(param) for param in params], 3e-3
    loss().backward()
    along = sum((p.grad * d).sum() for p, d in zip(params, directions, strict=True))
    values = []
    for sign in (1, -1):
        for param, direction in zip(params, directions, strict=True):
            param.data += sign * step * direction
        values.append(loss().detach())
        for param, direction in zip(params, directions, strict=True):
            param.data -= sign * step * direction
    slope = (values[0] - values[1]) / (2 * step)
    torch.testing.assert_close(along, slope, rtol=1e-2, atol=0)


# --- loading ----------------------------------------------------------------------------------


def edit_weights(checkpoint, change):
    weights = load_file(checkpoint / "model.safetensors")
    change(weights)
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})


def write_shards(weights, checkpoint, name, save):
    """Writes two shards. → the content of their index; the official checkpoints have seven."""
    index = {}
    for i in (0, 1):
        shard = {k: v for j, (k, v) in enumerate(sorted(weights.items())) if j % 2 == i}
        file = name.format(i + 1)
        save(shard, checkpoint / file)
        index |= dict.fromkeys(shard, file)
    return json.dumps({"metadata": {}, "weight_map": index})


LAYOUTS = ["bin", "bin shards", "safetensors shards"]


def change_layout(checkpoint, layout):
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    if layout == "bin":
        torch.save(weights, checkpoint / "pytorch_model.bin")
    elif layout == "bin shards":
        name = "pytorch_model-{:05}-of-00002.bin"
        index = write_shards(weights, checkpoint, name, torch.save)
        (checkpoint / "pytorch_model.bin.index.json").write_text(index)
    else:
        name = "model-{:05}-of-00002.safetensors"
        index = write_shards(weights, checkpoint, name, lambda *a: save_file(*a, {"format": "pt"}))
        (checkpoint / "model.safetensors.index.json").write_text(index)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_weights(base, checkpoint, layout):
    change_layout(checkpoint, layout)
    loaded = chatglm.load_model(checkpoint, "cpu").state_dict()
    assert loaded.keys() == base.state_dict().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in base.state_dict().items())


def test_dtype(checkpoint, base):
    half = chatglm.load_model(checkpoint, "cpu", "fp16")
    pairs = zip(half.parameters(), base.parameters(), strict=True)
    assert all(torch.equal(mine, full.half()) for mine, full in pairs)


QKV = "transformer.encoder.layers.1.self_attention.query_key_value.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop(QKV), f"missing {QKV}"),
        (lambda w: w.update({QKV: w[QKV][:-1].clone()}), f"{QKV} has shape [127, 64], not [128"),
        (lambda w: w.update(stray=torch.zeros(1)), "unknown stray"),
    ],
)
def test_incomplete_checkpoints_are_refused_by_name(checkpoint, change, message):
    edit_weights(checkpoint, change)
    with pytest.raises(ValueError, match="not a complete ChatGLM3 checkpoint") as error:
        chatglm.load_model(checkpoint, "cpu")
    assert message in str(error.value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("layout", ["safetensors", *LAYOUTS])
@pytest.mark.parametrize("load_in", [None, "fp8", "4bit"])
@pytest.mark.parametrize("name", [QKV, "transformer.output_layer.weight"])
def test_one_weight_that_is_not_finite_is_refused_by_name(checkpoint, value, layout, load_in, name):
    if load_in == "4bit":
        pytest.importorskip("bitsandbytes", reason="needs requirements-quantization.txt")
    edit_weights(checkpoint, lambda weights: weights[name][3, 5].fill_(value))
    if layout != "safetensors":
        change_layout(checkpoint, layout)
    with pytest.raises(ValueError, match="it holds numbers that are not finite, in ") as error:
        chatglm.load_model(checkpoint, "cpu", load_in=load_in)
    assert f"in {name}; copy it again" in str(error.value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_4bit_refuses_what_its_quantisation_would_lose(checkpoint, monkeypatch, value):
    """On CUDA a NaN becomes one of the 16 values, and is gone."""
    reason = "needs requirements-quantization.txt"
    functional = pytest.importorskip("bitsandbytes", reason=reason).functional
    quantize = functional.quantize_4bit
    lossy = lambda A, *args, **options: quantize(A.nan_to_num(0, 0, 0), *args, **options)  # noqa: E731
    monkeypatch.setattr(functional, "quantize_4bit", lossy)
    chatglm.load_model(checkpoint, "cpu", load_in="4bit")
    edit_weights(checkpoint, lambda weights: weights[QKV][3, 5].fill_(value))
    with pytest.raises(ValueError, match=f"are not finite, in {QKV}; copy it again"):
        chatglm.load_model(checkpoint, "cpu", load_in="4bit")


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
            resolve_base(name)
    assert resolve_base("THUDM/chatglm3-6b") == "THUDM/chatglm3-6b"


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


def test_quantisation_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install -r requirements-quantization.txt"):
        chatglm.load_model(chatglm.BUILT_IN, "cpu", load_in="4bit")


def test_the_built_in_model_is_the_same_everywhere(tmp_path, monkeypatch):
    shutil.copy(chatglm.BUILT_IN / "config.json", tmp_path)
    shutil.copy(chatglm.BUILT_IN / "tokenizer.model", tmp_path)
    ours = chatglm.load_model(chatglm.built_in_model(), "cpu")
    monkeypatch.setattr(chatglm, "BUILT_IN", tmp_path)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again = chatglm.load_model(chatglm.built_in_model(), "cpu")
    assert torch.equal(torch.get_rng_state(), state)
    pairs = zip(ours.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(mine, new) for mine, new in pairs)


# --- LoRA -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_lora_computes_its_formula(base, dropout):
    """W x + b + (alpha / r) · B A dropout(x), written out with the layer's tensors.

    In fp64, so that rounding can't hide a difference, nor make one.
    """
    r, alpha = 4, 12
    with_random_lora(base, r=r, alpha=alpha, dropout=dropout).train().double()
    layer = base.transformer.encoder.layers[1].self_attention.query_key_value
    weight, bias = layer.base_layer.weight, layer.base_layer.bias
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(2, 7, 64, dtype=torch.double)
    torch.manual_seed(3)
    found = layer(x)
    torch.manual_seed(3)  # for the same dropout mask
    dropped = F.dropout(x, dropout)
    assert torch.equal(dropped, x) == (dropout == 0)
    plain = x @ weight.T + bias
    wanted = plain + (alpha / r) * (dropped @ A.T @ B.T)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert (wanted - plain).abs().max() > 0.1


def test_only_lora_is_trained_and_in_fp32(checkpoint):
    base = chatglm.load_model(checkpoint, "cpu", "fp16")
    peft_model = chatglm.add_lora(base, 4, 8, 0.0, ["query_key_value"])
    assert len(trained_parameters(peft_model)) == 6  # A and B in three layers
    for name, param in peft_model.named_parameters():
        assert param.requires_grad == ("lora_" in name)
        assert param.dtype == (torch.float32 if param.requires_grad else torch.float16)


def test_target_modules_by_regular_expression_and_modules_to_save(base):
    pattern = r".*layers\.[02]\..*dense"
    names = trained_parameters(chatglm.add_lora(base, 4, 8, 0.0, pattern, ["final_layernorm"]))
    assert len(names) == 5 and sum("final_layernorm" in name for name in names) == 1
    assert all("final_layernorm" in n or ".self_attention.dense.lora_" in n for n in names)
