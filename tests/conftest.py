"""Shared fixtures. Files that are not this project's to copy (the official vocabulary, the tutorial's data set, the real
checkpoint) are read from where the user has them; without them their tests skip, saying so."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import data
import model as chatglm

ROOT = Path(__file__).parent.parent
FIXTURES = Path(__file__).parent / "fixtures"
REFERENCE = Path(os.environ.get("CHATGLM3_REFERENCE", ROOT.parent / "shared"))
PERSONA = "现在你要扮演皇帝身边的女人--甄嬛"


def reference(name):
    """A file of the reference data, or a skip."""
    if not (REFERENCE / name).exists():
        pytest.skip(f"needs {name}, in the directory that CHATGLM3_REFERENCE names")
    return REFERENCE / name


@pytest.fixture(params=["tiny", "tiny-32k"])
def golden(request):
    """(checkpoint directory, what the official implementation computed with it)"""
    return FIXTURES / request.param, load_file(FIXTURES / request.param / "expected.safetensors")


@pytest.fixture
def base():
    """The smallest checkpoint, fresh."""
    return chatglm.load_model(FIXTURES / "tiny", "cpu")


@pytest.fixture(scope="session")
def tokenizer():
    """The built-in model's vocabulary."""
    return data.ChatGLMTokenizer(chatglm.TINY)


@pytest.fixture(scope="session")
def official_tokenizer():
    return data.ChatGLMTokenizer(reference("golden/tokenizer.model").parent)


def run(script, *args, **kwargs):
    """`python script args`, as a user would."""
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=600, **kwargs)


def random_samples(lengths, vocab_size, seed=0):
    """Samples of data.ConversationDataset's form, the first third of each not learnt."""
    torch.manual_seed(seed)
    samples = []
    for n in lengths:
        ids = torch.randint(3, vocab_size, (n,))
        labels = ids.clone()
        labels[: n // 3 + 1] = data.IGNORE
        samples.append((ids, labels))
    return samples


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    return path
