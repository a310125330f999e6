import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import FIXTURES, ROOT, run, write_jsonl

import data
import infer
import model as chatglm


def greedy(model, prompt_ids, count, choose=torch.argmax):
    return list(infer.generate(model, prompt_ids, count, (), choose))


def test_golden_greedy(golden):
    directory, expected = golden
    model = chatglm.load_model(directory, "cpu")

    def choose(logits):  # the official run was kept from ending: token 2 was not allowed
        return logits.index_fill(0, torch.tensor([2]), -torch.inf).argmax()

    prompt, wanted = expected["prompt"][0].tolist(), expected["greedy"][0].tolist()
    assert prompt + greedy(model, prompt, len(wanted) - len(prompt), choose) == wanted


def test_cached_decoding_equals_full_recomputation(base):
    prompt = torch.randint(3, 512, (9,), generator=torch.Generator().manual_seed(3)).tolist()
    ids = prompt
    with torch.no_grad():
        for _ in range(40):
            ids = [*ids, base(torch.tensor([ids])).logits[0, -1].argmax().item()]
    assert greedy(base, prompt, 40) == ids[9:]
    assert len(set(ids[9:])) > 5


def test_a_prompt_in_two_parts_fills_the_cache_as_one_does(base):
    ids = torch.randint(3, 512, (2, 20))
    with torch.no_grad():
        cache = base.new_cache(2, 20)
        parts = [base.transformer(ids[:, a:b], cache, a) for a, b in ((0, 7), (7, 16), (16, 17), (17, 20))]
        torch.testing.assert_close(torch.cat(parts, 1), base.transformer(ids), rtol=1e-5, atol=1e-5)


def test_generation_ends_before_a_stop_id(base):
    free = greedy(base, [5, 6, 7], 20)
    stop = free[11]
    assert list(infer.generate(base, [5, 6, 7], 20, (stop,))) == free[: free.index(stop)]


def test_sampling_follows_temperature_and_top_p():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0])
    torch.manual_seed(0)
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.8), (2.0, 0.5), (1.0, 1e-6)):
        probs = [p.item() for p in torch.softmax(logits / temperature, -1)]
        kept, total = {}, 0.0
        for i in sorted(range(5), key=lambda i: -probs[i]):
            if total < top_p:
                kept[i], total = probs[i], total + probs[i]
        drawn = torch.cat([infer.sample(logits, temperature, top_p) for _ in range(4000)])
        for i in range(5):  # four standard deviations of a share of 4000 draws are at most 0.032
            assert abs((drawn == i).float().mean() - kept.get(i, 0) / total) < 0.032
            assert i in kept or not (drawn == i).any()


def test_the_stream_adds_up_and_never_shows_half_a_character(tokenizer):
    answer = "ok 👋🏳️‍🌈 甄嬛 \n\n end"
    ids = tokenizer.encode("\n") + tokenizer.encode(answer)
    assert len(tokenizer.encode("👋")) > 3  # its bytes, one by one
    parts = list(infer.stream(tokenizer, ids))
    assert "".join(parts) == answer and not any("\ufffd" in part for part in parts)
    assert sum(bool(part) for part in parts) > 8
    cut_short = ids[: ids.index(tokenizer.encode("👋")[1]) + 1]
    assert "".join(infer.stream(tokenizer, cut_short)).startswith("ok \ufffd")


def test_the_base_is_found_beside_the_adapter(tmp_path):
    assert infer.find_base(FIXTURES / "tiny" / "adapter") == str(FIXTURES / "tiny")  # it says ".."
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "THUDM/chatglm3-6b"}')
    assert infer.find_base(tmp_path) == "THUDM/chatglm3-6b"
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="names no base"):
        infer.find_base(tmp_path)


# --- the main job: train.py, then infer.py ----------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def trained(request, tmp_path_factory):
    """(adapter directory, device) after `python train.py`: fp32 on the CPU, fp16 on CUDA."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    directory = tmp_path_factory.mktemp("trained")
    done = run("train.py", "--output-dir", directory, "--device", request.param)
    assert done.returncode == 0, done.stderr
    return directory, request.param


def share_of_right_answers(model, tokenizer):
    right = []
    for _, messages in data.read_conversations(data.SAMPLE):
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt_ids = data.encode_prompt(tokenizer, messages[:i])
                ids = infer.generate(model, prompt_ids, 128, tokenizer.stop_ids)
                right.append("".join(infer.stream(tokenizer, ids)) == message["content"])
    assert len(right) > 100
    return sum(right) / len(right)


def test_the_built_in_model_learns_the_sample(trained, tokenizer):
    adapter, device = trained
    base = chatglm.load_model(chatglm.TINY, device)
    assert share_of_right_answers(base, tokenizer) == 0
    tuned = chatglm.load_adapter(base, adapter).merge_and_unload()
    assert share_of_right_answers(tuned, tokenizer) >= 0.9


def test_infer_command(trained):
    adapter, device = trained
    common = ["--adapter", adapter, "--device", device, "--prompt", "你是谁？"]
    answer = run("infer.py", *common, "--greedy")
    assert (answer.returncode, answer.stdout) == (0, "我是小砚，一个在随机权重上练出来的小模型。\n"), answer.stderr
    assert "The built-in tiny model, random weights." in answer.stderr
    assert run("infer.py", *common, "--greedy", "--no-adapter").stdout != answer.stdout
    drawn = [run("infer.py", *common, "--temperature", 5, "--top-p", 1, "--seed", seed).stdout for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_reader_that_leaves_early_is_no_error(trained):
    adapter, device = trained
    command = f"{sys.executable} {ROOT / 'infer.py'} --adapter {adapter} --device {device} --prompt hello | head -c 1 >/dev/null"
    done = subprocess.run(["bash", "-c", command], capture_output=True, encoding="utf-8", timeout=300)
    assert "Traceback" not in done.stderr


def test_a_hub_id_is_read_from_the_hub_s_cache(trained, tmp_path):
    adapter, device = trained
    cached = tmp_path / "hub" / "models--someone--glm"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(chatglm.TINY, cached / "snapshots" / ("0" * 40))
    arguments = ["--adapter", adapter, "--device", device, "--prompt", "你是谁？", "--greedy", "--model", "someone/glm"]
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = run("infer.py", *arguments, env=environment)
    assert done.stdout == "我是小砚，一个在随机权重上练出来的小模型。\n", done.stderr
    arguments[-1] = "someone/else"
    done = run("infer.py", *arguments, env=environment)
    assert done.returncode == 2 and "someone/else: cannot read the vocabulary" in done.stderr
    assert len(done.stderr.splitlines()) <= 2 and "Traceback" not in done.stderr


def test_the_system_message_of_training_is_used(tmp_path):
    file = write_jsonl(tmp_path / "d.jsonl", [{"instruction": "q", "output": "a"}])
    done = run("train.py", "--data", file, "--system", "甲", "--max-steps", 1, "--output-dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    for given, wanted in (
        ([], "<|system|>\n 甲<|user|>"),
        (["--system", "乙"], "<|system|>\n 乙<|user|>"),
        (["--system", ""], "sop<|user|>"),
    ):
        arguments = infer.parse_args(["--prompt", "q", "--adapter", str(tmp_path / "out"), "--device", "cpu", *given])
        _, tokenizer, prompt_ids, room = infer.set_up(arguments)
        assert wanted in tokenizer.decode(prompt_ids) and room == 128


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--adapter", "nowhere"], "nowhere: no adapter here"),
        (["--adapter", "moved"], "'/gone' is neither a directory nor a hub id"),
        (["--adapter", "damaged"], "damaged: cannot read this adapter"),
        (["--adapter", "other"], "this adapter was not trained on this model"),
        (["--adapter", "nowhere", "--no-adapter"], "nowhere: no adapter here"),
        (["--adapter", "noted"], "training_args.json: damaged"),
        (["--no-adapter", "--system", "\udcff"], "is not valid UTF-8"),
        (["--no-adapter", "--system", "long " * 2000], "this model takes 1024"),
        (["--top-p", "0"], "argument --top-p: must be between"),
        (["--temperature", "nan"], "argument --temperature: must be between"),
        (["--max-new-tokens", "0"], "argument --max-new-tokens: must be between"),
        (["--seed", "9" * 30], "argument --seed: must be between"),
        (["--prompt", " "], "argument --prompt: it is empty"),
    ],
)
def test_a_user_s_mistake_is_one_clear_line(tmp_path, arguments, message):
    for name, base in (("moved", "/gone"), *((n, str(chatglm.TINY)) for n in ("damaged", "other", "noted"))):
        shutil.copytree(FIXTURES / "tiny" / "adapter", tmp_path / name)
        file = tmp_path / name / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))
    (tmp_path / "noted" / "training_args.json").write_text("[1]")
    weights = tmp_path / "damaged" / "adapter_model.safetensors"
    os.truncate(weights, 5000)
    done = run("infer.py", "--prompt", "q", *arguments, cwd=tmp_path)
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert done.returncode == 2 and len(errors) == 1 and message in errors[0], done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
