"""With the real chatglm3-6b, whose directory CHATGLM3_DIR names."""

import json
import os

import pytest
import torch
from conftest import reference, run

import data
import infer
import model as chatglm

DIRECTORY = os.environ.get("CHATGLM3_DIR")
pytestmark = pytest.mark.skipif(not DIRECTORY, reason="needs the real checkpoint: set CHATGLM3_DIR to its directory")


def test_it_loads_and_says_who_it_is():
    model, tokenizer = chatglm.load_model(DIRECTORY), data.ChatGLMTokenizer(DIRECTORY)
    assert sum(p.numel() for p in model.parameters()) == 6_243_584_000
    prompt_ids = data.encode_prompt(tokenizer, [{"role": "user", "content": "你好"}])
    answer = "".join(infer.stream(tokenizer, infer.answer(infer.Decoder(model), tokenizer, prompt_ids, 64)))
    assert "ChatGLM3-6B" in answer


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_twenty_updates_lower_the_loss(tmp_path):
    arguments = [
        "--data",
        reference("data/huanhuan.json"),
        "--max-steps",
        20,
        "--logging-steps",
        1,
        "--learning-rate",
        1e-3,
    ]
    done = run("train.py", "--model", DIRECTORY, *arguments, "--output-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 20 and sum(losses[-5:]) < 0.9 * sum(losses[:5])
