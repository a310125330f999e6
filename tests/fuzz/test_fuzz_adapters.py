"""support/adapters.py and model.load_adapter: hostile adapters give logits, or one line.

python -m pytest -q tests/fuzz/test_fuzz_adapters.py
"""

import copy
import json
import shutil

import hypothesis
import peft
import pytest
import torch
from hostile import IDS, fresh, hostile, loads_or_refuses
from hostile_inputs import LORA, TINY, adapter_weights, damaged_json, deep, mostly, texts_of_json
from hypothesis import strategies as st

import model as chatglm
from support.commands import quiet_libraries


@pytest.fixture(scope="module")
def pristine():
    """A base that no test changes."""
    quiet_libraries()
    return chatglm.load_model(TINY, "cpu")


@hostile(125, weights=adapter_weights)
def test_an_adapter_s_weights(tmp_path, pristine, weights):
    """Tensors have other names, shapes and dtypes. Files are damaged, or pickles that act."""
    suffix, raw = weights
    directory = fresh(tmp_path / "adapter")
    (directory / f"adapter_model.{suffix}").write_bytes(raw)
    (directory / "adapter_config.json").write_text(json.dumps(LORA))
    loads_or_refuses(lambda: chatglm.load_adapter(copy.deepcopy(pristine), directory))


@hostile(175, config=mostly(damaged_json(LORA), texts_of_json | deep))
def test_an_adapter_s_configuration(tmp_path, pristine, config):
    """Any key that peft knows has any value."""
    directory = fresh(tmp_path / "adapter")
    shutil.copy(TINY / "adapter" / "adapter_model.safetensors", directory)
    (directory / "adapter_config.json").write_text(config)
    loads_or_refuses(lambda: chatglm.load_adapter(copy.deepcopy(pristine), directory))


LINEAR = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "word_embeddings"]
LINEAR += ["1.mlp.dense_4h_to_h"]
names = st.lists(st.sampled_from(LINEAR), min_size=1, unique=True)
arguments = st.fixed_dictionaries(
    dict(
        r=st.integers(1, 9),
        alpha=st.floats(0, 99),
        target_modules=names | st.just(r".*\.[02]\..*(dense|value)"),
        modules_to_save=st.none() | st.just(["output_layer"]),
    )
)


@hostile(30, arguments=arguments, salt=st.integers(0, 2**32))
def test_an_adapter_that_was_saved_loads_as_it_was(tmp_path, pristine, arguments, salt):
    """Whatever it adapts, it gives the same logits bit for bit. Saved again, it gives the same
    files."""
    torch.manual_seed(salt)
    trained = chatglm.add_lora(copy.deepcopy(pristine), dropout=0.0, **arguments).eval()
    with torch.no_grad():
        for param in trained.parameters():
            param += 0.01 * param.requires_grad
        chatglm.save_adapter(trained, fresh(tmp_path / "a"))
        loaded = chatglm.load_adapter(copy.deepcopy(pristine), tmp_path / "a")
        assert torch.equal(loaded(input_ids=IDS).logits, trained(input_ids=IDS).logits)
        chatglm.save_adapter(loaded, fresh(tmp_path / "b"))
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


# Plain LoRA of peft that add_lora does not offer.
BLOCK_0 = "^transformer.encoder.layers.0.mlp.dense_4h_to_h"
patterns = st.sampled_from([{}, {"dense": 3}, {BLOCK_0: 3}])
options = st.fixed_dictionaries(
    dict(
        r=st.sampled_from([2, 4]),
        lora_alpha=st.sampled_from([8, 3.5]),
        target_modules=names | st.just("all-linear"),
    ),
    optional=dict(
        bias=st.sampled_from(["all", "lora_only"]),
        use_rslora=st.just(True),
        use_dora=st.just(True),
        modules_to_save=st.sampled_from([["output_layer"], ["mlp"], ["layernorm"], ["embedding"]]),
        layers_to_transform=st.sampled_from([[0], 1]),
        exclude_modules=st.just(["transformer.encoder.layers.1.self_attention.dense"]),
        rank_pattern=patterns,
        alpha_pattern=patterns,
    ),
)


@hostile(20, options=options, salt=st.integers(0, 2**32))
def test_an_adapter_that_peft_saved_loads_as_it_was(tmp_path, pristine, options, salt):
    """Whatever plain LoRA it is, it gives the same logits bit for bit."""
    torch.manual_seed(salt)
    try:
        config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
        trained = peft.get_peft_model(copy.deepcopy(pristine), config).eval()
    except (ValueError, TypeError):  # peft refuses a few combinations, or finds no layer
        hypothesis.reject()
    with torch.no_grad():
        for param in trained.parameters():
            param += 0.01 * param.requires_grad
        trained.save_pretrained(fresh(tmp_path / "a"), save_embedding_layers=False)
        loaded = chatglm.load_adapter(copy.deepcopy(pristine), tmp_path / "a")
        assert torch.equal(loaded(input_ids=IDS).logits, trained(input_ids=IDS).logits)
