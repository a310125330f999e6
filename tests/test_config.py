"""support/config.py: the configuration of the network, and the check of a config.json.

python -m pytest -q tests/test_config.py
"""

import json

import pytest
from conftest import FIXTURES

import model as chatglm
from support.config import FIXED, ChatGLMConfig

GIVEN = json.loads((FIXTURES / "tiny" / "config.json").read_text())


def test_only_the_keys_of_the_network_are_kept():
    foreign = {"auto_map": {"AutoModel": "evil.Model"}, "attn_implementation": "evil/attention"}
    config = ChatGLMConfig.from_dict(GIVEN | foreign)
    assert (config.num_layers, config.hidden_size, config.rope_ratio) == (3, 64, 1.0)
    assert (config.num_hidden_layers, config.vocab_size) == (3, 512)  # as libraries call them
    assert not hasattr(config, "auto_map") and not hasattr(config, "kv_cache")
    assert config._attn_implementation != "evil/attention"


def test_the_configuration_of_chatglm3_is_accepted():
    """The official file says more, and leaves out rope_ratio."""
    assert ChatGLMConfig.from_dict(GIVEN | FIXED).layernorm_epsilon == 1e-5


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rmsnorm": False}, "rmsnorm is False; ChatGLM3 needs True"),
        ({"hidden_size": None}, "hidden_size is None, not a int"),
        ({"rmsnorm": 1}, "rmsnorm is 1, not a bool"),
        ({"num_layers": "3"}, "num_layers is '3', not a int"),
        ({"num_layers": True}, "num_layers is True, not a int"),
        ({"kv_channels": 0}, "kv_channels is 0; it must be more than 0"),
        ({"kv_channels": 6}, "kv_channels is 6; it must be a multiple of 4"),
        ({"num_attention_heads": 3}, "num_attention_heads is 3; it must be a multiple of 2"),
        ({"rope_ratio": "50"}, "rope_ratio is '50', not a float"),
        ({"rope_ratio": float("nan")}, "rope_ratio is nan; it must be more than 0"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True; ChatGLM3 needs False"),
    ],
)
def test_damaged_and_foreign_configurations_are_refused(checkpoint, change, message):
    """They are refused before a network is built: a wrong size could take all memory."""
    (checkpoint / "config.json").write_text(json.dumps(GIVEN | change))
    with pytest.raises(ValueError) as error:
        chatglm.load_model(checkpoint, "cpu")
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["{}", "[]", "", "{"])
def test_empty_configurations_are_refused(checkpoint, text):
    (checkpoint / "config.json").write_text(text)
    with pytest.raises(ValueError, match="cannot load this model"):
        chatglm.load_model(checkpoint, "cpu")


def test_a_configuration_that_is_not_there_is_refused(checkpoint):
    (checkpoint / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json is not there, or has no num_layers"):
        chatglm.load_model(checkpoint, "cpu")
