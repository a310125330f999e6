import contextlib
import json
import os
import pty
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial

import pytest
import torch
from conftest import FIXTURES, ROOT, run, write_jsonl
from safetensors.torch import load_file, save_file

import data
import infer
import model as chatglm

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def generate(decoder, prompts, count, stop_ids=()):
    """→ a list of ids for each prompt"""
    answers = [[] for _ in prompts]
    ended = []
    for row, id in decoder.generate(prompts, count, stop_ids):
        assert row not in ended
        ended += [row] if id is None else []
        answers[row] += [] if id is None else [id]
    assert sorted(ended) == list(range(len(prompts)))
    return answers


def greedy(model, prompt_ids, count, stop_ids=()):
    return generate(infer.Decoder(model), [prompt_ids], count, stop_ids)[0]


def random_prompts(lengths, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 512, (n,), generator=generator).tolist() for n in lengths]


# --- decoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, compile", [(1, False), (3, False), (1, True)])
def test_golden_greedy(golden, rows, compile):
    directory, expected = golden
    model = chatglm.load_model(directory, "cpu")

    def choose(logits):  # the official run was kept from ending: token 2 was not allowed
        return logits.index_fill(1, torch.tensor([2]), -torch.inf).argmax(-1)

    prompt, wanted = expected["prompt"][0].tolist(), expected["greedy"][0].tolist()
    prompts = [prompt, *random_prompts([3, 70])][:rows]
    decoder = infer.Decoder(model, choose, compile=compile)
    assert prompt + generate(decoder, prompts, len(wanted) - len(prompt))[0] == wanted


def test_cached_decoding_equals_full_recomputation(base):
    """Over a cache that is used again, then too small; alone and in a batch of any order."""
    prompts, wanted = random_prompts([9, 1, 40, 23, 250]), []
    with torch.no_grad():
        for prompt in prompts:
            ids = prompt
            for _ in range(40):
                ids = [*ids, base(torch.tensor([ids])).logits[0, -1].argmax().item()]
            wanted.append(ids[len(prompt) :])
    assert all(len(set(answer)) > 5 for answer in wanted)
    decoder = infer.Decoder(base)
    assert [generate(decoder, [prompt], 40)[0] for prompt in prompts] == wanted
    assert decoder.length == 512 and len(decoder.cache[0][0]) == 1
    assert generate(decoder, prompts, 40) == wanted
    assert generate(decoder, prompts[::-1], 40) == wanted[::-1]
    assert generate(decoder, prompts[:2], 40) == wanted[:2] and decoder.rows == 5


def test_decoding_writes_the_keys_that_the_prompt_would(base):
    (ids,) = random_prompts([20])
    decoder = infer.Decoder(base)
    with torch.no_grad():
        decoder.prefill([ids[:1]], 256)
        for i in range(1, 20):
            decoder.ids.fill_(ids[i])
            decoder.step()
        stepped = [kv[:, :, :20].clone() for layer in decoder.cache for kv in layer]
        decoder.prefill([ids], 256)
        whole = [kv[:, :, :20] for layer in decoder.cache for kv in layer]
        for mine, wanted in zip(stepped, whole, strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)


def test_long_prompts_are_computed_in_parts(base, monkeypatch):
    prompts = random_prompts([30, 31, 5, 17, 22])
    whole = generate(infer.Decoder(base), prompts, 10)
    monkeypatch.setattr(infer, "PREFILL_TOKENS", 62)
    assert generate(infer.Decoder(base), prompts, 10) == whole


def test_rows_end_each_at_its_own_time(base):
    """At a stop id, at the most new tokens, or where the context is full: 1024 tokens."""
    free = greedy(base, [5, 6, 7], 20)
    stop = free[11]
    (long,) = random_prompts([1020])
    assert generate(infer.Decoder(base), [[5, 6, 7], long], 20, (stop,))[0] == free[: free.index(stop)]
    events = list(infer.Decoder(base).generate([[5, 6, 7], long], 20))
    assert [len([1 for r, id in events if r == row and id is not None]) for row in (0, 1)] == [20, 4]
    assert events.index((1, None)) == 8  # a row that is ready is told at once: 4 steps of two, and that


def shares(logits, draws=4000, **how):
    """How often each token is drawn, from the same logits [V] in every row."""
    torch.manual_seed(0)
    return torch.bincount(infer.sample(logits.expand(draws, -1), **how), minlength=len(logits)) / draws


def test_sampling_follows_temperature_top_k_and_top_p():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0])
    for temperature in (1.0, 0.5, 2.0):
        for top_k in (None, 1, 3, 9):
            for top_p in (1.0, 0.8, 0.5, 1e-6):
                probs = {i: 2.718281828459045 ** (x / temperature) for i, x in enumerate(logits.tolist())}
                likeliest = sorted(probs, key=lambda i: -probs[i])[:top_k]
                total, kept = sum(probs[i] for i in likeliest), {}
                for i in likeliest:
                    if sum(kept.values()) < top_p:
                        kept[i] = probs[i] / total
                drawn = shares(logits, temperature=temperature, top_k=top_k, top_p=top_p)
                for i in range(5):  # four standard deviations of a share of 4000 draws are at most 0.032
                    assert abs(drawn[i] - kept.get(i, 0) / sum(kept.values())) < 0.032
                    assert i in kept or drawn[i] == 0


def test_the_repetition_penalty():
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.5], [2.0, -2.0, 1.0, 0.5]])
    seen = torch.tensor([[True, True, False, False], [False, False, False, True]])
    assert infer.penalise(logits, seen, 2.0).tolist() == [[1, -4, 1, 0.5], [2, -2, 1, 0.25]]


def test_the_penalty_counts_prompt_and_answer_of_each_row(base):
    prompts, wanted = random_prompts([9, 4, 30]), []
    with torch.no_grad():
        for prompt in prompts:
            ids = prompt
            for _ in range(30):
                logits = base(torch.tensor([ids])).logits[0, -1]
                there = torch.tensor(sorted(set(ids)))
                logits[there] = torch.where(logits[there] > 0, logits[there] / 1.3, logits[there] * 1.3)
                ids = [*ids, logits.argmax().item()]
            wanted.append(ids[len(prompt) :])
    decoder = infer.Decoder(base, penalty=1.3)
    assert generate(decoder, prompts, 30) == wanted
    assert generate(decoder, prompts, 30) == wanted  # what the last answers held is forgotten
    assert greedy(base, prompts[0], 30) != wanted[0]


@pytest.mark.parametrize("compile", [False, True])
def test_a_seed_gives_the_same_text_again(base, compile):
    def drawn(seed):
        torch.manual_seed(seed)
        return generate(infer.Decoder(base, partial(infer.sample, top_k=50), compile=compile), [[5, 6, 7]] * 2, 20)

    first = drawn(1)
    assert first == drawn(1) != drawn(2) and first[0] != first[1]


def test_compiled_decoding_on_a_cpu(base):
    prompts = random_prompts([9, 40, 23, 300])
    wanted = generate(infer.Decoder(base), prompts, 40)
    decoder = infer.Decoder(base, compile=True)
    assert [generate(decoder, [prompt], 40)[0] for prompt in prompts] == wanted  # over 256 tokens, then over 512
    assert generate(decoder, prompts, 40) == wanted


# --- on CUDA: graph, compiled, batch and plain decoding say the same --------------------------------------------------


@cuda
@pytest.mark.parametrize("compile", [False, True])
def test_graph_compiled_and_plain_decoding_say_the_same(trained, tokenizer, compile):
    """fp16, on the model that was trained: its logits are far from tied."""
    adapter, device = trained
    if device == "cpu":
        pytest.skip("see test_compiled_decoding_on_a_cpu")
    model = chatglm.load_adapter(chatglm.load_model(chatglm.TINY, "cuda"), adapter).merge_and_unload().half()
    questions = [messages[:1] for _, messages in data.read_conversations([data.SAMPLE])][:20]
    prompts = [data.encode_prompt(tokenizer, messages) for messages in questions]
    plain = infer.Decoder(model, graph=False)
    wanted = [generate(plain, [prompt], 60, tokenizer.stop_ids)[0] for prompt in prompts]
    assert plain.graph is None and len({tuple(ids) for ids in wanted}) > 10
    fast = infer.Decoder(model, compile=compile)
    assert [generate(fast, [prompt], 60, tokenizer.stop_ids)[0] for prompt in prompts] == wanted
    assert fast.graph is not None
    assert generate(infer.Decoder(model, compile=compile), prompts, 60, tokenizer.stop_ids) == wanted


@cuda
@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_a_seed_draws_the_same_with_and_without_a_graph(penalty):
    model, texts = chatglm.load_model(chatglm.tiny_model(), "cuda"), []
    for graph in (False, True, True):
        torch.manual_seed(1)
        decoder = infer.Decoder(model, partial(infer.sample, top_k=100, top_p=0.9), penalty, graph=graph)
        texts.append([generate(decoder, [[5, 6, 7], [8, 9]], 40) for _ in range(2)])
    assert texts[0] == texts[1] == texts[2] and texts[0][0] != texts[0][1]


@cuda
def test_a_step_never_waits_for_the_device():
    model = chatglm.load_model(chatglm.tiny_model(), "cuda")
    decoder = infer.Decoder(model, partial(infer.sample, top_k=100, top_p=0.9), 1.2, graph=False)
    with torch.no_grad():
        decoder.prefill([[5, 6, 7]], 256)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            decoder.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


# --- text -------------------------------------------------------------------------------------------------------------


def test_the_stream_adds_up_and_never_shows_half_a_character(tokenizer):
    answer = "ok 👋🏳️‍🌈 甄嬛 \n\n end"
    ids = tokenizer.encode("\n") + tokenizer.encode(answer)
    assert len(tokenizer.encode("👋")) > 3  # its bytes, one by one
    parts = list(infer.stream(tokenizer, ids))
    assert "".join(parts) == answer and not any("\ufffd" in part for part in parts)
    assert sum(bool(part) for part in parts) > 8
    cut_short = ids[: ids.index(tokenizer.encode("👋")[1]) + 1]
    assert "".join(infer.stream(tokenizer, cut_short)) == "ok "


def test_metadata_is_shown_where_it_is_asked_for(tokenizer):
    ids, seen = tokenizer.encode("get_weather\n") + tokenizer.encode("call(city='北京')"), []
    assert "".join(infer.stream(tokenizer, ids)) == "call(city='北京')"
    assert "".join(infer.stream(tokenizer, ids, seen, with_metadata=True)) == "get_weather\ncall(city='北京')"
    assert seen == ids


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
    right, prompts, wanted, decoder = [], [], [], infer.Decoder(model)
    for _, messages in data.read_conversations([data.SAMPLE]):
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                prompts.append(data.encode_prompt(tokenizer, messages[:i]))
                wanted.append(message["content"])
    for start in range(0, len(prompts), 32):
        answers = generate(decoder, prompts[start : start + 32], 128, tokenizer.stop_ids)
        right += [data.split_answer(tokenizer, ids)[1] for ids in answers]
    right = [said == answer for said, answer in zip(right, wanted, strict=True)]
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
        model, tokenizer, system = infer.set_up(arguments)
        prompt_ids = infer.encode_prompt(infer.Decoder(model), tokenizer, [{"role": "user", "content": "q"}], system)
        assert wanted in tokenizer.decode(prompt_ids) and arguments.max_new_tokens == 128
    done = run("infer.py", "--adapter", tmp_path / "out", "--merge-to", tmp_path / "m")
    assert done.stdout.endswith(f"--no-adapter --model {tmp_path}/m --system '甲'\n"), done.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--adapter", "nowhere"], "nowhere: no adapter here"),
        (["--adapter", "moved"], "its base '/gone' is not there; give --model DIR_OR_HUB_ID"),
        (
            ["--adapter", "unfinished"],
            "finish the run with train.py --resume, or give a checkpoint of it, for example --adapter",
        ),
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
def test_a_user_s_mistake_is_one_clear_line(tmp_path, monkeypatch, capsys, arguments, message):
    for name, base in (("moved", "/gone"), *((n, str(chatglm.TINY)) for n in ("damaged", "other", "noted"))):
        shutil.copytree(FIXTURES / "tiny" / "adapter", tmp_path / name)
        file = tmp_path / name / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))
    (tmp_path / "noted" / "training_args.json").write_text("[1]")
    (tmp_path / "unfinished" / "checkpoint-100").mkdir(parents=True)
    weights = tmp_path / "damaged" / "adapter_model.safetensors"
    os.truncate(weights, 5000)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        infer.main(["--prompt", "q", *arguments])
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if "error: " in line]
    assert stop.value.code == 2 and len(errors) == 1 and message in errors[0] and out == "", err


# --- the base is the one that was trained on --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "tiny-32k"])
def test_a_fingerprint_is_the_same_in_every_dtype_and_only_that_base_s(name):
    found = [chatglm.fingerprint(chatglm.load_model(FIXTURES / name, "cpu", dtype)) for dtype in chatglm.DTYPES]
    assert found[0] == found[1] == found[2] and len(found[0]["fixed"]) == len(found[0]["matrices"]) == 64
    model = chatglm.load_model(FIXTURES / name, "cpu")
    with torch.no_grad():
        model.transformer.encoder.layers[1].mlp.dense_4h_to_h.weight.neg_()
    other = chatglm.fingerprint(model)
    assert other["fixed"] == found[0]["fixed"] and other["matrices"] != found[0]["matrices"]
    with torch.no_grad():
        model.transformer.output_layer.weight.neg_()
    assert chatglm.fingerprint(model)["fixed"] != found[0]["fixed"]


def adapter_of(directory, **base):
    """An adapter of the built-in model that has learnt nothing, with what it says of its base."""
    model, tokenizer = chatglm.load_model(chatglm.tiny_model(), "cpu"), data.ChatGLMTokenizer(chatglm.TINY)
    base = {"vocabulary": tokenizer.digest, **chatglm.fingerprint(model)} | base
    chatglm.save_adapter(chatglm.add_lora(model, 4, 8, 0.0, ["query_key_value"]), directory)
    (directory / "training_args.json").write_text(json.dumps({"system": None, "base": base}))
    return directory


@pytest.mark.parametrize(
    "base, what",
    [
        ({}, None),
        ({"matrices": None}, None),  # trained on a quantised base
        ({"shape": {"num_layers": 3}}, "other shape"),
        ({"vocabulary": "0"}, "other vocabulary"),
        ({"fixed": "0"}, "other weights"),
        ({"matrices": "0"}, "other weights"),
    ],
)
def test_another_base_is_refused_unless_forced(tmp_path, capsys, base, what):
    adapter = adapter_of(tmp_path / "a", **base)
    common = ["--adapter", str(adapter), "--device", "cpu", "--prompt", "q", "--max-new-tokens", "3"]
    if what:
        with pytest.raises(SystemExit) as stop:
            infer.main(common)
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and out == ""
        assert f"{adapter} was trained on a base with {what}; give that one with --model" in err
        infer.main([*common, "--no-adapter"])
        common.append("--force")
    infer.main(common)


def test_training_stores_what_its_base_is(trained):
    adapter, _ = trained
    base = json.loads((adapter / "training_args.json").read_text())["base"]
    model = chatglm.load_model(chatglm.TINY, "cpu")
    assert base == {"vocabulary": data.ChatGLMTokenizer(chatglm.TINY).digest, **chatglm.fingerprint(model)}


# --- merging ----------------------------------------------------------------------------------------------------------


def merged(name, dtype, directory):
    model = chatglm.load_model(FIXTURES / name, "cpu", dtype)
    model = chatglm.load_adapter(model, FIXTURES / name / "adapter").merge_and_unload().to(model.dtype)
    infer.merge_to(model, str(FIXTURES / name), directory)
    return model


def test_a_merged_model_gives_the_adapter_s_logits(golden, tmp_path, monkeypatch):
    """To 1e-5 of their norm in fp32; in fp16, whose rounding of the weights is the difference, to 1e-3: there, both are
    computed in fp32 from a base in fp16."""
    directory, expected = golden
    monkeypatch.setattr(infer, "SHARD", "100KB")
    merged(directory.name, "fp32", tmp_path / "fp32")
    ids = expected["input_ids"]
    with torch.no_grad():
        logits = chatglm.load_model(tmp_path / "fp32", "cpu")(ids).logits
        assert (logits - expected["adapter_logits"]).norm() < 1e-5 * logits.norm()
        in_memory = merged(directory.name, "fp16", tmp_path / "fp16")
        loaded = chatglm.load_model(tmp_path / "fp16", "cpu", "fp16")
        assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), in_memory.parameters(), strict=True))
        base = chatglm.load_model(directory, "cpu", "fp16").float()
        wanted = chatglm.load_adapter(base, directory / "adapter")(input_ids=ids).logits
        assert (loaded.float()(ids).logits - wanted).norm() < 1e-3 * wanted.norm()


def test_a_merged_model_has_the_official_layout(tmp_path, monkeypatch):
    monkeypatch.setattr(infer, "SHARD", "100KB")
    merged("tiny", "fp16", tmp_path / "out" / ".." / "m")
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())["weight_map"]
    official = load_file(FIXTURES / "tiny" / "model.safetensors")
    assert index.keys() == official.keys() and len(set(index.values())) > 2
    for name, file in index.items():
        assert re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", file)
        weight = load_file(tmp_path / "m" / file)[name]
        assert weight.shape == official[name].shape and weight.dtype == torch.float16
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    wanted = json.loads((FIXTURES / "tiny" / "config.json").read_text())
    assert config == wanted | {"torch_dtype": "float16"} and config["architectures"] == ["ChatGLMModel"]
    assert {oct(file.stat().st_mode) for file in (tmp_path / "m").iterdir()} == {
        oct((tmp_path / "m" / "config.json").stat().st_mode)
    }


def test_merge_command(trained, tmp_path, capsys):
    """The merged model says what the adapter does; the files beside the base come along, and none of them is run."""
    adapter, device = trained
    base = tmp_path / "base"
    shutil.copytree(chatglm.TINY, base)
    (base / "tokenization_chatglm.py").write_text("raise SystemExit('this file was run')")
    (base / "secret").write_text("not of the official files")
    common = ["--adapter", str(adapter), "--device", device]
    infer.main([*common, "--model", str(base), "--merge-to", str(tmp_path / "m")])
    told = capsys.readouterr().out
    assert "saved" in told and "--system" not in told
    there = {file.name for file in (tmp_path / "m").iterdir()}
    assert there == {"config.json", "model.safetensors", "tokenizer.model", "tokenization_chatglm.py"}
    assert load_file(tmp_path / "m" / "model.safetensors").popitem()[1].dtype == torch.float32  # as config.json says
    infer.main(["--device", device, "--no-adapter", "--model", str(tmp_path / "m"), "--greedy", "--prompt", "你是谁？"])
    assert capsys.readouterr().out == "我是小砚，一个在随机权重上练出来的小模型。\n"


def small_disk():
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def test_a_disk_that_is_full_leaves_nothing(tmp_path):
    arguments = ["--adapter", adapter_of(tmp_path / "a"), "--device", "cpu", "--merge-to", tmp_path / "m"]
    done = run("infer.py", *arguments, preexec_fn=small_disk)
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert done.returncode == 2 and len(errors) == 1 and "m: cannot write" in errors[0], done.stderr
    assert "Traceback" not in done.stderr and [p.name for p in tmp_path.iterdir()] == ["a"]


# --- batch ------------------------------------------------------------------------------------------------------------


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def as_text(records):
    return Counter(json.dumps(record, sort_keys=True) for record in records)


def test_batch_command_killed_and_run_again(trained, tmp_path):
    adapter, device = trained
    out = tmp_path / "out.jsonl"
    common = ["--adapter", adapter, "--device", device, "--greedy", "--input", data.SAMPLE, "--output"]
    whole = run("infer.py", *common, tmp_path / "whole.jsonl")
    assert whole.returncode == 0, whole.stderr
    wanted = read_jsonl(tmp_path / "whole.jsonl")
    records = [record for _, record, _ in data.read_records([data.SAMPLE])]
    assert as_text(infer.without_prediction(line) for line in wanted) == as_text(records)
    right = [line["prediction"] == line["output"] for line in wanted if "output" in line]
    assert sum(right) >= 0.9 * len(right) > 50

    command = [sys.executable, ROOT / "infer.py", *common, out, "--batch-size", 1]
    process = subprocess.Popen([str(part) for part in command], stderr=subprocess.DEVNULL)
    while not out.exists() or len(out.read_bytes()) < 2000:
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    before = out.read_bytes()
    assert 0 < before.count(b"\n") < len(records)
    with open(out, "ab") as file:
        file.write('{"instruction": "你'.encode()[:-1])  # as if it had been killed while it wrote
    again = run("infer.py", *common, out)
    assert again.returncode == 0, again.stderr
    assert out.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert as_text(read_jsonl(out)) == as_text(wanted)  # nothing lost, nothing twice, and the batch makes no difference


@pytest.fixture
def answer_files(tmp_path, capsys):
    """infer.main on files of records, with the built-in model → (the lines of --output, stderr, exit code)"""

    def answer(*records, out="out.jsonl", flags=(), **more):
        files = [tmp_path / "in0.jsonl", *(tmp_path / name for name in more)]
        for file, content in zip(files, [records, *more.values()], strict=True):
            file.write_text("".join(json.dumps(record) + "\n" for record in content))
        arguments = ["--no-adapter", "--device", "cpu", "--greedy", "--max-new-tokens", "4", "--input", *files, *flags]
        code = 0
        try:
            infer.main([str(a) for a in [*arguments, "--output", tmp_path / out]])
        except SystemExit as stop:
            code = stop.code
        return (None if code else read_jsonl(tmp_path / out)), capsys.readouterr().err, code

    return answer


Q = {"instruction": "q"}


def test_batch_records_of_every_kind(answer_files, tokenizer):
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "call()", "metadata": "tool"}]
    seen = [{"role": "observation", "content": "22"}]
    records = [
        Q | {"output": "", "id": 7, "nested": {"b": [1.5, None]}},
        Q | {"input": "t", "output": "the reference", "half": "\ud800"},
        {"conversations": talk},
        {"conversations": talk + seen},
        {"conversations": [*talk, *seen, {"role": "assistant", "content": "Warm."}], "prediction": "an older one"},
    ]
    lines, err, code = answer_files(*records)
    assert code == 0, err
    assert as_text(map(infer.without_prediction, lines)) == as_text(map(infer.without_prediction, records))
    by = {json.dumps(infer.without_prediction(line)): line["prediction"] for line in lines}
    said = [by[json.dumps(infer.without_prediction(record))] for record in records]
    assert said[3] == said[4] != said[2]  # the prompt is what comes before the last answer
    model = chatglm.load_model(chatglm.TINY, "cpu")
    for messages, text in ((talk[:1], said[0]), (talk[:1], said[2]), (talk + seen, said[3])):
        ids = greedy(model, data.encode_prompt(tokenizer, messages), 4, tokenizer.stop_ids)
        assert data.split_answer(tokenizer, ids)[1] == text
    assert answer_files(*records)[0] == lines  # there is nothing left to do


def test_equal_records_have_a_line_each(answer_files, tmp_path):
    lines, _, code = answer_files(Q, Q, {"instruction": "r"}, Q, other=[Q])
    assert code == 0 and sum(line["instruction"] == "q" for line in lines) == 4 and len(lines) == 5
    write_jsonl(tmp_path / "out.jsonl", [line for line in lines if line["instruction"] == "q"][:2])
    lines, _, code = answer_files(Q, Q, {"instruction": "r"}, Q, other=[Q])
    assert code == 0 and sum(line["instruction"] == "q" for line in lines) == 4 and len(lines) == 5


def test_metadata_of_a_prediction_is_kept(answer_files, monkeypatch, tokenizer):
    ids = tokenizer.encode("get_weather\ncall()")
    monkeypatch.setattr(infer.Decoder, "generate", lambda *a: [*((0, id) for id in ids), (0, None)])
    lines, _, _ = answer_files(Q | {"prediction_metadata": "older"})
    assert lines == [Q | {"prediction": "call()", "prediction_metadata": "get_weather"}]


@pytest.mark.parametrize(
    "records, there, message",
    [
        ([Q, {"instrution": "q"}], None, "in0.jsonl:2: unknown key 'instrution'; did you mean 'instruction'?"),
        ([{"conversations": [{"role": "system", "content": "s"}]}], None, "nothing to answer"),
        ([Q, {"instruction": "long " * 2000}], None, "in0.jsonl:2: the prompt has"),
        ([Q], '{"instruction": "other", "prediction": "p"}\n', "out.jsonl:1: this record is not in --input"),
        ([Q], '{"instruction": "q", "prediction": "p"}\n' * 2, "out.jsonl:2: this record is not in --input"),
        ([Q], '{"instruction": "q", "pred\n{"instruction": "q"', "out.jsonl:1: not a line that infer.py wrote"),
        ([Q], '{"instruction": "q"}\n', "out.jsonl:1: not a line that infer.py wrote"),
        ([Q], "[]\n", "out.jsonl:1: not a line that infer.py wrote"),
        ([Q], '{"important": "notes"}', "out.jsonl: its last line is not one that infer.py wrote"),
        ([Q], None, "nowhere/out.jsonl: there is no such directory"),
        ([Q], None, "/: cannot write there; choose another --output"),
        ([Q], None, "/dev/zero: cannot write there; choose another --output"),
    ],
)
def test_a_mistake_in_batch_files_changes_nothing(answer_files, tmp_path, records, there, message):
    out = "nowhere/out.jsonl" if "nowhere" in message else message.split(":")[0] if message[0] == "/" else "out.jsonl"
    if there:
        (tmp_path / out).write_text(there)
    _, err, code = answer_files(*records, out=out)
    assert code == 2 and message in err and err.count("error: ") == 1
    assert (tmp_path / out).exists() == bool(there or message[0] == "/") and (
        not there or (tmp_path / out).read_text() == there
    )


def test_two_batches_never_write_to_one_file(answer_files, tmp_path):
    with open(tmp_path / "out.jsonl", "ab") as file:
        chatglm.lock(file, "out.jsonl")
        _, err, code = answer_files(Q)
    assert code == 2 and "out.jsonl: another process is writing there" in err
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_the_answers_do_not_replace_the_questions(answer_files, tmp_path):
    _, err, code = answer_files(Q, out="in0.jsonl")
    assert code == 2 and "in0.jsonl: it is an --input; choose another --output" in err
    assert read_jsonl(tmp_path / "in0.jsonl") == [Q]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--input", "f"], "--input and --output go together"),
        (["--output", "f"], "--input and --output go together"),
        (["--compare"], "--compare needs --prompt"),
        (["--prompt", "q", "--compare", "--no-adapter"], "--compare needs --prompt, and an adapter"),
        (["--prompt", "q", "--merge-to", "d"], "argument --merge-to: not allowed with argument --prompt"),
        (["--merge-to", "d", "--load-in", "4bit"], "a quantised base can't be merged"),
        (["--merge-to", "d", "--no-adapter"], "--merge-to needs an adapter"),
        (["--merge-to", "tests"], "tests exists already"),
        (["--top-k", "0"], "argument --top-k: must be between"),
    ],
)
def test_flags_that_do_not_go_together(capsys, monkeypatch, flags, message):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        infer.main(flags)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and err.count("error: ") == 1


def test_compare_prints_both_answers(trained, capsys):
    adapter, device = trained
    common = ["--adapter", str(adapter), "--device", device, "--prompt", "你是谁？", "--seed", "1"]
    infer.main([*common, "--no-adapter"])
    base = capsys.readouterr().out
    infer.main([*common, "--compare"])
    out = capsys.readouterr().out
    assert out == f"--- base\n{base}--- adapter\n我是小砚，一个在随机权重上练出来的小模型。\n"


# --- chat -------------------------------------------------------------------------------------------------------------


class Terminal:
    """infer.py in a terminal of its own, as a user has it."""

    def __init__(self, *arguments):
        self.screen, self.master = "", None
        self.pid, self.master = pty.fork()
        if not self.pid:
            os.environ.update(TERM="xterm", LANG="C.UTF-8")
            os.execv(sys.executable, [sys.executable, str(ROOT / "infer.py"), *map(str, arguments)])

    def type(self, text):
        if text == "\x03":
            time.sleep(0.3)  # between its prompt and its wait for keys, readline would leave it for the next key
        data = text.encode() if isinstance(text, str) else text
        while data:
            data = data[os.write(self.master, data[:500]) :]
            self.read(0.02)

    def read(self, seconds):
        if select.select([self.master], [], [], seconds)[0]:
            with contextlib.suppress(OSError):  # the other side has ended
                self.raw = getattr(self, "raw", b"") + os.read(self.master, 65536)
                self.screen = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]|\r", "", self.raw.decode("utf-8", "replace"))

    def expect(self, text, seconds=60):
        """Waits for `text` after what was waited for last → what came before it."""
        end, seen = time.monotonic() + seconds, getattr(self, "seen", 0)
        while text not in self.screen[seen:]:
            assert time.monotonic() < end, f"{text!r} did not come: {self.screen[seen:]!r}"
            self.read(0.1)
        at = self.screen.index(text, seen)
        self.seen = at + len(text)
        return self.screen[seen:at]

    def exit_code(self):
        for _ in range(600):
            self.read(0.05)
            time.sleep(0.05)  # at the end of the output, reading does not wait
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self.master)
                return os.waitstatus_to_exitcode(status)
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError(f"it did not end: {self.screen!r}")


def test_chat_in_a_terminal(trained, tokenizer):
    adapter, device = trained
    chat = Terminal("--adapter", adapter, "--device", device, "--greedy")
    chat.expect("Ctrl-C stops an answer.\n> ")
    chat.type("你是谁？\n")
    chat.expect("\n我是小砚，一个在随机权重上练出来的小模型。\n> ")
    chat.type("\n")
    chat.expect("> ")
    chat.type("/what\n")
    chat.expect("(not a command here")
    chat.expect("> ")
    long = "甄" * 2000  # 6,000 bytes: more than a line that the terminal itself would edit
    chat.type(long + "\n")
    count = len(data.encode_prompt(tokenizer, [{"role": "user", "content": long}]))
    chat.expect(f"(the prompt has {count} tokens; this model takes 1024)")
    chat.expect("> ")
    chat.type("\x03")
    chat.expect("(Ctrl-C again, Ctrl-D or /exit leaves)")
    chat.expect("> ")
    chat.type("/reset\n")
    chat.expect("(a new conversation)")
    chat.expect("> ")
    chat.type("你好👋🏳️‍🌈\n")
    chat.expect("\n> ")
    chat.type("\x03")
    chat.expect("leaves)")
    chat.expect("> ")
    chat.type("\x03")
    assert chat.exit_code() == 0
    assert "Traceback" not in chat.screen and "\ufffd" not in chat.screen


def test_ctrl_c_stops_the_answer_and_not_the_chat(tmp_path, tokenizer):
    shutil.copytree(chatglm.TINY, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    weights = load_file(chatglm.tiny_model() + "/model.safetensors")
    weights["transformer.output_layer.weight"][list(tokenizer.stop_ids)] = 0  # never the most likely: it talks for long
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    config = tmp_path / "m" / "config.json"
    config.write_text(config.read_text().replace('"seq_length": 1024', '"seq_length": 65536'))
    chat = Terminal("--no-adapter", "--model", tmp_path / "m", "--device", "cpu", "--greedy", "--max-new-tokens", 60000)
    chat.expect("Ctrl-C stops an answer.\n> ")
    for _ in range(2):
        chat.type("hello\n")
        chat.expect("hello\n")
        time.sleep(0.5)
        chat.type("\x03")
        chat.expect("(stopped", seconds=20)
        chat.expect("\n> ")
    chat.type("\x04")
    assert chat.exit_code() == 0 and "Traceback" not in chat.screen


def test_chat_over_a_pipe(trained):
    adapter, device = trained
    lines = ["你是谁？".encode(), b"", b"\xff\xfe", b"x" * 2000, "你是谁？👋".encode(), b"/reset", "你是谁？".encode()]
    command = [sys.executable, ROOT / "infer.py", "--adapter", adapter, "--device", device, "--greedy"]
    done = subprocess.run([str(c) for c in command], input=b"\n".join(lines), capture_output=True, timeout=300)
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 0 and "Traceback" not in err and err.count("is not valid UTF-8") == 1
    assert out.count("> ") == len(lines) + 1
    assert out.startswith("> 我是小砚，一个在随机权重上练出来的小模型。\n> > > ")
    assert out.endswith("> 我是小砚，一个在随机权重上练出来的小模型。\n> \n")  # the last line has no newline


class Scripted:
    """A decoder that says what it's told to, and keeps the prompts that it gets."""

    def __init__(self, tokenizer, answers, seq_length):
        self.model = type("Model", (), {"config": chatglm.ChatGLMConfig(seq_length=seq_length)})
        self.tokenizer, self.answers, self.prompts = tokenizer, iter(answers), []

    def generate(self, prompts, max_new_tokens, stop_ids):
        self.prompts.append(self.tokenizer.decode(prompts[0]))
        room = min(max_new_tokens, self.model.config.seq_length - len(prompts[0]))
        for id in self.tokenizer.encode(next(self.answers))[:room]:
            if id == self.tokenizer.encode("§")[-1]:
                signal.raise_signal(signal.SIGINT)
            yield 0, id
        yield 0, None


@pytest.fixture
def talk(tokenizer, monkeypatch, capsys):
    """Drives infer.chat with lines and scripted answers → (prompts, stdout, stderr)"""
    before = signal.getsignal(signal.SIGINT)

    def talk(lines, answers, *flags, seq_length=1024, system=None):
        decoder = Scripted(tokenizer, ["\n" + text if "\n" not in text else text for text in answers], seq_length)
        read = iter(lines)

        def typed(prompt):
            line = next(read, EOFError)
            if line is KeyboardInterrupt:
                signal.raise_signal(signal.SIGINT)
            if line is EOFError:
                raise line
            return line

        monkeypatch.setattr("builtins.input", typed)
        monkeypatch.setattr(sys, "stdin", open(os.devnull))
        infer.chat(infer.parse_args(flags), decoder, tokenizer, system)
        return decoder.prompts, *capsys.readouterr()

    yield talk
    signal.signal(signal.SIGINT, before)


def test_turns_are_kept_in_the_official_format(talk):
    lines = ["q1", " ", "q2", "/system be brief", "q3", "/system", "/reset", "/system ", "/exit", "q4"]
    prompts, out, err = talk(lines, ["a1", "a2", "a3"], system="s")
    first = "[gMASK]sop<|system|>\n s<|user|>\n q1<|assistant|>"
    assert prompts == [
        first,
        f"{first}\n a1<|user|>\n q2<|assistant|>",
        "[gMASK]sop<|system|>\n be brief<|user|>\n q3<|assistant|>",
    ]
    assert (
        out == "a1\na2\na3\n"
        and err.count("(system message: be brief; a new conversation)") == 1
        and err.count("(system message: be brief)") == 2
    )


def test_a_tool_is_called_and_its_result_observed(talk):
    answers = ["get_weather\ncall(city='北京')", "Warm."]
    prompts, out, err = talk(["/observation 1", "weather?", "/observation 22", "/exit"], answers)
    assert prompts[1] == (
        "[gMASK]sop<|user|>\n weather?<|assistant|>get_weather\n call(city='北京')<|observation|>\n 22<|assistant|>"
    )
    assert (
        out == "get_weather\ncall(city='北京')\nWarm.\n"
        and err.count("(/observation TEXT gives the result of the tool") == 1
    )


def test_what_was_said_before_ctrl_c_stays(talk):
    prompts, out, err = talk(["q1", "q2", "q3"], ["so far § and on", "§", "a3"])
    assert prompts[1].endswith("<|assistant|>\n so far <|user|>\n q2<|assistant|>")
    assert prompts[2].endswith("<|assistant|>\n so far <|user|>\n q3<|assistant|>")  # q2 had no answer at all
    assert "what was said stays" in err and "the turn is dropped" in err


def test_ctrl_c_at_the_prompt_leaves_the_second_time(talk):
    _, _, err = talk([KeyboardInterrupt, "q", KeyboardInterrupt, "q", EOFError], ["a", "a"])
    assert err.count("(Ctrl-C again") == 2
    prompts, _, err = talk(["q", KeyboardInterrupt, KeyboardInterrupt, "q"], ["a", "a"])
    assert err.count("(Ctrl-C again") == 1 and len(prompts) == 1


def test_the_oldest_turns_are_forgotten_when_the_context_is_full(talk, tokenizer):
    lines = [f"question {i} " + "x " * 20 for i in range(6)]
    flags, most = ["--max-new-tokens", "20"], 160
    prompts, out, err = talk([*lines, "y " * 300, "z"], ["answer"] * 7, *flags, seq_length=most, system="s")
    for i, prompt in enumerate(prompts[:6]):
        kept = [f"question {j} " in prompt for j in range(6)]
        assert prompt.startswith("[gMASK]sop<|system|>\n s<|user|>\n question")
        assert kept == [first <= j <= i for first in [kept.index(True)] for j in range(6)]  # the newest, whole
    assert "question 0" in prompts[1] and "question 0" not in prompts[5] and "question 4" in prompts[5]
    assert len(prompts) == 7 and "question 5" in prompts[6]  # nothing was lost by the message that was too long
    assert err.count("(the context is full: forgot the oldest") >= 2 and err.count("(the prompt has") == 1


def test_an_answer_that_is_cut_is_said_to_be(talk, answer_files, capsys):
    _, _, err = talk(["q"], ["a long answer"], "--max-new-tokens", "3")
    assert "(cut at --max-new-tokens 3)" in err
    _, _, err = talk(["q"], ["a long answer " * 200], "--max-new-tokens", "5000", seq_length=64)
    assert "tokens: the context is full)" in err
    _, err, code = answer_files(Q, {"instruction": "r"})
    assert code == 0 and "(2 of 2 answers are cut at --max-new-tokens" in err


def test_a_short_context_is_not_all_kept_for_the_answer(talk):
    prompts, _, err = talk(["q1", "q2"], ["a1", "a2"], "--max-new-tokens", "5000", seq_length=160)
    assert "q1" in prompts[1] and "forgot the" not in err.split("Ctrl-C")[1]
