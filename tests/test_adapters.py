"""support/adapters.py: LoRA's targets, and adapters that are written, read and refused.

python -m pytest -q tests/test_adapters.py
"""

import contextlib
import json
import shutil
import signal

import peft
import pytest
import torch
from conftest import FIXTURES, Marker, with_random_lora
from safetensors.torch import load_file, save_file

import model as chatglm

CATASTROPHIC = r"(\w|\w|\.)*!"  # it takes longer than the universe lasts on a module's name
IDS = torch.arange(3, 40)[None]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def plain_base():
    return chatglm.load_model(FIXTURES / "tiny", "cpu")


@pytest.fixture
def adapter(tmp_path):
    """A copy of the adapter of the smallest checkpoint, to be damaged."""
    return shutil.copytree(FIXTURES / "tiny" / "adapter", tmp_path / "adapter")


def edit_config(adapter, **changes):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(adapter, change):
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@contextlib.contextmanager
def at_most(seconds):
    def stop(*_):
        raise TimeoutError(f"it takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# --- new adapters -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "targets, whole, message",
    [
        (["query_key_vale", "dense"], [], "'query_key_vale'; did you mean 'query_key_value'"),
        ("*(", [], "regular expression"),
        ("nothing.*", [], r"no module of the model is named 'nothing.\*'"),
        (".*query_key_value", ["outputlayer"], "'outputlayer'; did you mean 'output_layer'"),
        (["query_key_value", "input_layernorm"], [], "input_layernorm is no linear layer"),
        (["query_key_value"], [""], "no module of the model is named ''; there are: dense"),
        ("", [], "no module of the model is named ''; there are: dense"),
        (["dense", "query_key_value"], ["self_attention"], "no layer gets LoRA: --modules-to-save"),
    ],
)
def test_a_misspelt_target_is_refused(base, targets, whole, message):
    with pytest.raises(ValueError, match=message):
        chatglm.add_lora(base, 4, 8, 0.0, targets, whole)


def test_a_saved_adapter_loads_as_it_was_here_and_in_plain_peft(base, tmp_path):
    peft_model = with_random_lora(base, modules_to_save=["output_layer"]).eval()
    with torch.no_grad():
        base.get_output_embeddings().modules_to_save["default"].weight.mul_(1.5)
    wanted = logits(peft_model)
    chatglm.save_adapter(peft_model, tmp_path / "adapter")
    mine = chatglm.load_adapter(plain_base(), tmp_path / "adapter")
    assert torch.equal(logits(mine), wanted)
    plain = peft.PeftModel.from_pretrained(plain_base(), tmp_path / "adapter")
    assert torch.equal(logits(plain), wanted)
    merged = logits(mine.merge_and_unload())
    torch.testing.assert_close(merged, wanted, rtol=0, atol=1e-4)
    assert not torch.allclose(merged, logits(plain_base()), atol=1e-2)
    names = sorted(path.name for path in (tmp_path / "adapter").iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]


# --- adapters that plain peft wrote -----------------------------------------------------------

BOTH, ENDS = ["query_key_value", "dense"], ["word_embeddings", "dense", "output_layer"]
PATTERNS = dict(
    rank_pattern={"dense": 2, "layers.2.self_attention.query_key_value": 6},
    alpha_pattern={"layers.1.self_attention.query_key_value": 40, "dense": 1.5},
)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(dict(target_modules=BOTH), id="plain LoRA"),
        pytest.param(dict(target_modules=BOTH, **PATTERNS), id="ranks and alphas by name"),
        pytest.param(dict(target_modules=BOTH, use_rslora=True, r=6), id="rsLoRA"),
        pytest.param(dict(target_modules=BOTH, use_dora=True), id="DoRA"),
        pytest.param(dict(target_modules=BOTH, use_dora=True, use_rslora=True), id="DoRA, rsLoRA"),
        pytest.param(dict(target_modules=BOTH, bias="all"), id="biases"),
        pytest.param(dict(target_modules=["dense"], bias="all"), id="biases of other layers"),
        pytest.param(dict(target_modules=BOTH, bias="lora_only"), id="biases of its layers"),
        pytest.param(dict(target_modules=BOTH, layers_to_transform=[1]), id="one layer"),
        pytest.param(dict(target_modules=BOTH, modules_to_save=["mlp"]), id="whole modules"),
        pytest.param(dict(target_modules=ENDS), id="the embedding"),
        pytest.param(dict(target_modules=ENDS, use_dora=True), id="the embedding with DoRA"),
    ],
)
def test_an_adapter_of_peft_gives_peft_s_logits(base, tmp_path, options):
    config = peft.LoraConfig(**dict(task_type="CAUSAL_LM", r=4, lora_alpha=8) | options)
    written = peft.get_peft_model(base, config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for param in written.parameters():
            if param.requires_grad:
                param += 0.05 * torch.randn_like(param)
    written.save_pretrained(tmp_path, save_embedding_layers=False)
    plain = logits(peft.PeftModel.from_pretrained(plain_base(), tmp_path))
    assert torch.equal(plain, logits(written))
    assert not torch.allclose(plain, logits(plain_base()), atol=1e-2)
    assert torch.equal(logits(chatglm.load_adapter(plain_base(), tmp_path)), plain)


def test_adapters_in_peft_s_older_file(base, adapter, tmp_path):
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(tensors, adapter / "adapter_model.bin")
    state = peft.get_peft_model_state_dict(chatglm.load_adapter(base, adapter))
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())
    ran = tmp_path / "ran"
    torch.save({"w": Marker(ran)}, adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match="cannot read this adapter"):
        chatglm.load_adapter(base, adapter)
    assert not ran.exists()


# --- what is not run --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": CATASTROPHIC},
        {"target_modules": "("},
        {"target_modules": [CATASTROPHIC]},
        {"exclude_modules": [CATASTROPHIC]},
        {"exclude_modules": CATASTROPHIC},
        {"modules_to_save": [CATASTROPHIC]},
        {"layers_to_transform": [1], "layers_pattern": CATASTROPHIC},
    ],
)
def test_patterns_are_never_run(base, adapter, changes):
    """Which layers an adapter adapts is read off its tensors. So any pattern does no harm."""
    wanted = logits(chatglm.load_adapter(plain_base(), adapter))
    edit_config(adapter, **changes)
    with at_most(seconds=10):
        model = chatglm.load_adapter(base, adapter)
        assert torch.equal(logits(model), wanted)
        chatglm.save_adapter(model, adapter)
        assert torch.equal(logits(chatglm.load_adapter(plain_base(), adapter)), wanted)


def test_a_pattern_for_a_rank_or_alpha_is_refused(base, adapter):
    for name in ("rank_pattern", "alpha_pattern"):
        edit_config(adapter, rank_pattern={}, alpha_pattern={})
        edit_config(adapter, **{name: {CATASTROPHIC: 8}})
        with at_most(seconds=10), pytest.raises(ValueError, match="must be a module's name"):
            chatglm.load_adapter(base, adapter)


# --- adapters that are refused ----------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop(min(w)), "missing base_model.model.transformer.encoder.layers.0"),
        (lambda w: w.update(stray=torch.zeros(1)), "unknown stray"),
        (lambda w: w.update({"transformer.stray": torch.zeros(1)}), "unknown transformer.stray"),
        (lambda w: w.update({min(w): torch.zeros(3, 64)}), "LoRA tensors of rank 3, not 8"),
        (lambda w: w.update({min(w): torch.zeros(8, 9)}), "has shape [8, 9], not [8, 64]"),
        (lambda w: w.update({max(w): torch.zeros(9, 8)}), "has shape [9, 8], not [128, 8]"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(base, adapter, change, message):
    edit_tensors(adapter, change)
    with pytest.raises(ValueError, match="this adapter was not trained on this model") as error:
        chatglm.load_adapter(base, adapter)
    assert message in str(error.value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", [min, max])
def test_one_number_that_is_not_finite_is_refused_by_name(base, adapter, which, value):
    names = []

    def change(weights):
        names.append(which(weights))
        weights[names[0]].view(-1)[-1] = value

    edit_tensors(adapter, change)
    with pytest.raises(ValueError, match="holds numbers that are not finite, in ") as error:
        chatglm.load_adapter(base, adapter)
    assert names[0] in str(error.value) and str(adapter) in str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"r": 4}, "0.self_attention.query_key_value has LoRA tensors of rank 8, not 4"),
        ({"r": 0}, "0.self_attention.query_key_value has LoRA tensors of rank 8, not 0"),
        (
            {"rank_pattern": {"layers.1.self_attention.query_key_value": 16}},
            "1.self_attention.query_key_value has LoRA tensors of rank 8, not 16",
        ),
    ],
)
def test_another_rank_than_the_tensors_is_refused(base, adapter, changes, message):
    edit_config(adapter, **changes)
    with pytest.raises(ValueError) as error:
        chatglm.load_adapter(base, adapter)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"r": "x"},
        {"target_modules": {}},
        {"peft_type": "WAT"},
        {"peft_type": "IA3"},
        {"megatron_config": {"a": 1}, "megatron_core": "evil"},  # peft would import it
        {"init_lora_weights": "pissa"},  # which changes the base
    ],
)
def test_what_is_not_plain_lora_is_refused(base, adapter, changes):
    edit_config(adapter, **changes)
    with pytest.raises(ValueError, match="cannot read this adapter"):
        chatglm.load_adapter(base, adapter)


def test_unreadable_adapters_are_refused(base, adapter, tmp_path):
    with pytest.raises(ValueError, match="no adapter here"):
        chatglm.load_adapter(base, tmp_path)
    (adapter / "adapter_model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="cannot read this adapter"):
        chatglm.load_adapter(base, adapter)


def test_a_missing_module_that_was_trained_whole_is_refused(base, tmp_path):
    peft_model = chatglm.add_lora(base, 4, 8, 0.0, ["query_key_value"], ["output_layer"])
    chatglm.save_adapter(peft_model, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.transformer.output_layer.weight"]
    save_file(tensors, file)
    message = "missing base_model.model.transformer.output_layer.weight"
    with pytest.raises(ValueError, match=message):
        chatglm.load_adapter(chatglm.load_model(FIXTURES / "tiny", "cpu"), tmp_path / "adapter")


def test_an_adapter_that_lacks_a_layer_or_is_of_another_network_is_refused(base, adapter):
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    for change, message in (
        (lambda name: name.replace("layers.1.", "layers.0."), "missing base_model.model"),
        (lambda name: name.replace("query_key_value", "q_proj"), "unknown base_model.model"),
    ):
        save_file({change(name): tensor for name, tensor in tensors.items()}, file)
        with pytest.raises(ValueError, match="this adapter was not trained on this model") as error:
            chatglm.load_adapter(base, adapter)
        assert message in str(error.value)
