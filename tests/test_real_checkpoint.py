"""The real chatglm3-6b, whose directory CHATGLM3_DIR names: it answers, and it learns.

CHATGLM3_DIR=chatglm3-6b python -m pytest -q tests/test_real_checkpoint.py
"""

import json
import os

import pytest
import torch
from conftest import reference, run

import data
import infer
import model as chatglm

DIRECTORY = os.environ.get("CHATGLM3_DIR")
pytestmark = pytest.mark.skipif(
    not DIRECTORY, reason="needs the real checkpoint: set CHATGLM3_DIR to its directory"
)


def test_it_loads_and_says_who_it_is():
    model, tokenizer = chatglm.load_model(DIRECTORY), data.ChatGLMTokenizer(DIRECTORY)
    assert sum(p.numel() for p in model.parameters()) == 6_243_584_000
    assistant = infer.Assistant(infer.Decoder(model), tokenizer, max_new_tokens=64)
    prompt_ids = assistant.encode([{"role": "user", "content": "你好"}])
    assert "ChatGLM3-6B" in "".join(assistant.stream(assistant.answer(prompt_ids), []))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_twenty_updates_lower_the_loss(tmp_path):
    flags = ["--max-steps", 20, "--logging-steps", 1, "--learning-rate", 1e-3]
    flags += ["--data", reference("data/huanhuan.json")]
    done = run("train.py", "--model", DIRECTORY, *flags, "--output-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert len(losses) == 20 and sum(losses[-5:]) < 0.9 * sum(losses[:5])
