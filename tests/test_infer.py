"""infer.py: decoding, sampling, the text of an answer, and the command.

python -m pytest -q tests/test_infer.py
"""

import io
import json
import math
import os
import shutil
import sys
from functools import partial

import pytest
import torch
from conftest import (
    ANSWER,
    FIXTURES,
    QUESTION,
    ROOT,
    read_conversations,
    reference,
    refused_by_infer,
    run,
    train_main,
    write_jsonl,
)

import data
import infer
import model as chatglm
import train
from support.defaults import SAMPLE
from support.preamble import Preamble
from support.tools import tools_message

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


def alone(decoder, prompts, count, stop_ids=()):
    """The same, one prompt after another."""
    return [generate(decoder, [prompt], count, stop_ids)[0] for prompt in prompts]


def random_prompts(lengths, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 512, (n,), generator=generator).tolist() for n in lengths]


# --- decoding ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, compiled", [(1, False), (3, False), (1, True)])
def test_greedy_decoding_gives_what_the_official_code_gives(golden, rows, compiled):
    directory, expected = golden
    model = chatglm.load_model(directory, "cpu")

    def choose(logits):  # the official run was kept from ending: token 2 was not allowed
        return logits.index_fill(1, torch.tensor([2]), -torch.inf).argmax(-1)

    prompt, wanted = expected["prompt"][0].tolist(), expected["greedy"][0].tolist()
    prompts = [prompt, *random_prompts([3, 70])][:rows]
    if compiled:
        infer.compile_decoding(model)
    decoder = infer.Decoder(model, choose, compiled=compiled)
    assert prompt + generate(decoder, prompts, len(wanted) - len(prompt))[0] == wanted


def test_cached_decoding_equals_full_recomputation(base):
    """The cache is used again, and then it is too small. Rows come alone and in any order."""
    prompts = random_prompts([9, 1, 40, 23, 250])
    wanted = [infer.generate_naively(base, prompt, 40) for prompt in prompts]
    assert all(len(answer) == 40 and len(set(answer)) > 5 for answer in wanted)
    decoder = infer.Decoder(base)
    assert alone(decoder, prompts, 40) == wanted
    assert decoder.length == 512 and len(decoder.cache[0][0]) == 1
    assert generate(decoder, prompts, 40) == wanted
    assert generate(decoder, prompts[::-1], 40) == wanted[::-1]
    assert generate(decoder, prompts[:2], 40) == wanted[:2] and decoder.rows == 5


def test_an_answer_ends_before_a_stop_id(base):
    """The specification and both ways of decoding agree on where. One row has no stop id."""
    prompts = random_prompts([9, 1, 40, 23])
    free = [infer.generate_naively(base, prompt, 30) for prompt in prompts]
    stop_ids = (free[0][20], free[1][11], free[2][0])
    wanted = [infer.generate_naively(base, prompt, 30, stop_ids) for prompt in prompts]
    for answer, whole in zip(wanted, free, strict=True):
        stops = [i for i, id in enumerate(whole) if id in stop_ids]
        assert answer == whole[: stops[0] if stops else 30]
    assert len({len(answer) for answer in wanted}) > 2
    assert alone(infer.Decoder(base), prompts, 30, stop_ids) == wanted
    assert generate(infer.Decoder(base), prompts, 30, stop_ids) == wanted


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
    prompts = [[5, 6, 7], *random_prompts([1020])]
    free = generate(infer.Decoder(base), prompts[:1], 20)[0]
    stop = free[11]
    answer = generate(infer.Decoder(base), prompts, 20, (stop,))[0]
    assert answer == free[: free.index(stop)]
    events = list(infer.Decoder(base).generate(prompts, 20))
    lengths = [sum(1 for r, id in events if r == row and id is not None) for row in (0, 1)]
    assert lengths == [20, 4]
    # A row that is ready is told at once: after 4 steps of two rows.
    assert events.index((1, None)) == 8


@pytest.mark.parametrize("compiled", [False, True])
def test_a_seed_gives_the_same_text_again(base, compiled):
    if compiled:
        infer.compile_decoding(base)

    def drawn(seed):
        torch.manual_seed(seed)
        decoder = infer.Decoder(base, partial(infer.sample, top_k=50), compiled=compiled)
        return generate(decoder, [[5, 6, 7]] * 2, 20)

    first = drawn(1)
    assert first == drawn(1) != drawn(2) and first[0] != first[1]


def test_compiled_decoding_on_a_cpu(base):
    prompts = random_prompts([9, 40, 23, 300])
    wanted = generate(infer.Decoder(base), prompts, 40)
    infer.compile_decoding(base)
    decoder = infer.Decoder(base, compiled=True)
    assert alone(decoder, prompts, 40) == wanted  # over a cache of 256 tokens, then of 512
    assert generate(decoder, prompts, 40) == wanted


# --- choosing a token -------------------------------------------------------------------------


def shares(logits, draws=4000, **how):
    """How often each token is drawn, from the same logits [V] in every row."""
    torch.manual_seed(0)
    drawn = infer.sample(logits.expand(draws, -1), **how)
    return torch.bincount(drawn, minlength=len(logits)) / draws


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("top_k", [None, 1, 3, 9])
@pytest.mark.parametrize("top_p", [1.0, 0.8, 0.5, 1e-6])
def test_sampling_follows_temperature_top_k_and_top_p(temperature, top_k, top_p):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0])
    weights = [math.exp(x / temperature) for x in logits.tolist()]
    likeliest = sorted(range(5), key=lambda i: -weights[i])[:top_k]
    total, kept = sum(weights[i] for i in likeliest), {}
    for i in likeliest:
        if sum(kept.values()) < top_p:
            kept[i] = weights[i] / total
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
                seen = logits[there]
                logits[there] = torch.where(seen > 0, seen / 1.3, seen * 1.3)
                ids = [*ids, logits.argmax().item()]
            wanted.append(ids[len(prompt) :])
    decoder = infer.Decoder(base, penalty=1.3)
    assert generate(decoder, prompts, 30) == wanted
    assert generate(decoder, prompts, 30) == wanted  # what the last answers held is forgotten
    assert generate(infer.Decoder(base), prompts[:1], 30)[0] != wanted[0]


def test_the_penalty_does_not_count_padding(base):
    prompts = random_prompts([9, 40])
    decoder = infer.Decoder(base, penalty=1.3)
    with torch.no_grad():
        decoder.prefill(prompts, 64)
    for prompt, seen, id in zip(prompts, decoder.seen, decoder.ids.tolist(), strict=True):
        assert set(seen.nonzero().flatten().tolist()) == {*prompt, id}


# --- on CUDA: graph, compiled, batch and plain decoding say the same --------------------------


@cuda
@pytest.mark.parametrize("compiled", [False, True])
def test_graph_compiled_and_plain_decoding_say_the_same(trained, tokenizer, compiled):
    """fp16, on the model that was trained: its logits are far from tied."""
    adapter, device = trained
    if device == "cpu":
        pytest.skip("see test_compiled_decoding_on_a_cpu")
    model = infer.add_adapter(chatglm.load_model(chatglm.BUILT_IN, "cuda"), adapter).half()
    questions = [messages[:1] for _, messages in read_conversations([SAMPLE])][:20]
    prompts = [data.encode_prompt(tokenizer, messages) for messages in questions]
    plain = infer.Decoder(model, use_graph=False)
    wanted = alone(plain, prompts, 60, tokenizer.stop_ids)
    assert plain.graph is None and len({tuple(ids) for ids in wanted}) > 10
    if compiled:
        infer.compile_decoding(model)
    fast = infer.Decoder(model, compiled=compiled)
    assert alone(fast, prompts, 60, tokenizer.stop_ids) == wanted
    assert fast.graph is not None
    fast = infer.Decoder(model, compiled=compiled)
    assert generate(fast, prompts, 60, tokenizer.stop_ids) == wanted


@cuda
@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_a_seed_draws_the_same_with_and_without_a_graph(penalty):
    model, texts = chatglm.load_model(chatglm.built_in_model(), "cuda"), []
    choose = partial(infer.sample, top_k=100, top_p=0.9)
    for graph in (False, True, True):
        torch.manual_seed(1)
        decoder = infer.Decoder(model, choose, penalty, use_graph=graph)
        texts.append([generate(decoder, [[5, 6, 7], [8, 9]], 40) for _ in range(2)])
    assert texts[0] == texts[1] == texts[2] and texts[0][0] != texts[0][1]


@cuda
def test_a_step_never_waits_for_the_device():
    model = chatglm.load_model(chatglm.built_in_model(), "cuda")
    choose = partial(infer.sample, top_k=100, top_p=0.9)
    decoder = infer.Decoder(model, choose, 1.2, use_graph=False)
    with torch.no_grad():
        decoder.prefill([[5, 6, 7]], 256)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            decoder.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


# --- text -------------------------------------------------------------------------------------


NOTHING_TRAINED, WEATHER = {"names": [], "are_listed": False}, {"names": ["get_weather"]}
FIRST_LINES = [  # (the first line, what is known of an adapter's tools, whether it is metadata)
    ("get_weather", {}, True),
    ("get_weather", WEATHER, True),
    ("interpreter", WEATHER, True),
    ("interpreter", NOTHING_TRAINED, True),
    ("get_weather", NOTHING_TRAINED, False),
    ("get_whether", WEATHER, False),
    ("先看书，再练习。", {}, False),
    ("你好", {}, False),
    ("Hello there", {}, False),
    ("a.b-c_1", {}, True),
    ("two words", {"names": ["two words"]}, False),
    ("查天气", {"names": ["查天气"]}, True),
    ("  x", {"names": None}, True),
]


@pytest.mark.parametrize("line, trained, is_metadata", FIRST_LINES)
def test_the_first_line_is_metadata_only_if_it_may_name_a_tool(
    base, tokenizer, line, trained, is_metadata
):
    """Otherwise it is content. Whatever it is, nothing of it is lost."""
    assistant = infer.Assistant(infer.Decoder(base), tokenizer, Preamble(trained_tools=trained))
    whole = f"{line}\nrest\n\n end"
    ids = tokenizer.encode(whole)
    if is_metadata:  # as it is trained
        ids = tokenizer.encode(f"{line}\n") + tokenizer.encode("rest\n\n end")
    wanted = (line.strip(), "rest\n\n end") if is_metadata else ("", whole)
    assert assistant.split(ids) == wanted
    shown = "".join(assistant.stream(ids, []))
    assert shown == (whole.strip() if is_metadata else whole)


def test_a_record_s_own_tools_may_be_called(base, tokenizer):
    preamble = Preamble(tools=tools_message([{"name": "f"}]), trained_tools=NOTHING_TRAINED)
    assistant = infer.Assistant(infer.Decoder(base), tokenizer, preamble)
    asked = [tools_message([{"type": "function", "function": {"name": "g"}}])]
    ids_of = {name: tokenizer.encode(f"{name}\n") + tokenizer.encode("x") for name in "fgh"}
    assert [assistant.split(ids)[0] for ids in ids_of.values()] == ["f", "", ""]
    assert [assistant.split(ids, asked)[0] for ids in ids_of.values()] == ["f", "g", ""]


# --- the command: train.py, then infer.py -----------------------------------------------------


def said(capsys, *arguments):
    """What infer.py prints."""
    infer.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def talked(monkeypatch, capsys, typed, *arguments):
    """What infer.py prints when these lines are its input."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed.encode()), "utf-8"))
    return said(capsys, *arguments)


def share_of_right_answers(model, tokenizer):
    prompts, wanted, answers, decoder = [], [], [], infer.Decoder(model)
    for _, messages in read_conversations([SAMPLE]):
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                prompts.append(data.encode_prompt(tokenizer, messages[:i]))
                wanted.append(message["content"])
    for start in range(0, len(prompts), 32):
        answers += generate(decoder, prompts[start : start + 32], 128, tokenizer.stop_ids)
    given = [data.split_answer(tokenizer, ids)[1] for ids in answers]
    right = [said == answer for said, answer in zip(given, wanted, strict=True)]
    assert len(right) > 100
    return sum(right) / len(right)


def test_the_built_in_model_learns_the_sample(trained, tokenizer):
    adapter, device = trained
    base = chatglm.load_model(chatglm.BUILT_IN, device)
    assert share_of_right_answers(base, tokenizer) == 0
    assert share_of_right_answers(infer.add_adapter(base, adapter), tokenizer) >= 0.9


def test_one_prompt_is_answered(trained, capsys):
    adapter, device = trained
    common = ["--adapter", adapter, "--device", device, "--prompt", QUESTION]
    answer = run("infer.py", *common, "--greedy")
    assert (answer.returncode, answer.stdout) == (0, f"{ANSWER}\n"), answer.stderr
    assert "The built-in tiny model, random weights." in answer.stderr
    assert said(capsys, *common, "--greedy", "--no-adapter") != answer.stdout


def test_a_seed_makes_an_answer_repeatable(trained, capsys):
    adapter, device = trained
    common = ["--adapter", adapter, "--device", device, "--prompt", QUESTION]
    common += ["--temperature", 5, "--top-p", 1, "--seed"]
    drawn = [said(capsys, *common, seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_temperature_0_is_greedy(trained, capsys):
    adapter, device = trained
    common = ["--adapter", adapter, "--device", device, "--prompt", QUESTION]
    assert said(capsys, *common, "--temperature", 0) == said(capsys, *common, "--greedy")


def test_compare_prints_both_answers(trained, capsys):
    adapter, device = trained
    common = ["--adapter", adapter, "--device", device, "--prompt", QUESTION, "--seed", 1]
    base = said(capsys, *common, "--no-adapter")
    assert said(capsys, *common, "--compare") == f"--- base\n{base}--- adapter\n{ANSWER}\n"


def test_an_answer_that_is_cut_is_said_to_be(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no adapter is here
    common = ["--no-adapter", "--device", "cpu", "--greedy", "--prompt", "q"]
    infer.main([*common, "--max-new-tokens", "3"])
    assert capsys.readouterr().err.endswith("\n(cut at --max-new-tokens 3)\n")


def test_the_system_message_of_training_is_used(tmp_path):
    file = write_jsonl(tmp_path / "d.jsonl", [{"instruction": "q", "output": "a"}])
    out = str(tmp_path / "out")
    flags = ["--data", file, "--system", "甲", "--max-steps", 1, "--output-dir", out]
    train_main(*flags)
    for given, wanted in (
        ([], "<|system|>\n 甲<|user|>"),
        (["--system", "乙"], "<|system|>\n 乙<|user|>"),
        (["--system", ""], "sop<|user|>"),
    ):
        common = ["--prompt", "q", "--adapter", out, "--device", "cpu"]
        arguments = infer.parse_args([*common, *given])
        assistant = infer.new_assistant(arguments, *infer.load(arguments))
        prompt_ids = assistant.encode([{"role": "user", "content": "q"}])
        assert wanted in assistant.tokenizer.decode(prompt_ids)
        assert assistant.max_new_tokens == 128


# --- tools ------------------------------------------------------------------------------------

TOOLS = [{"name": "get_weather", "parameters": {"city": "城市"}}]
CALL = "```python\ntool_call(city='厦门')\n```"


@pytest.fixture(scope="module")
def trained_with_tools(tmp_path_factory):
    """The directory of an adapter that has learnt one conversation with a tool."""
    directory = tmp_path_factory.mktemp("tools")
    call = {"id": "c1", "function": {"name": "get_weather", "arguments": '{"city": "厦门"}'}}
    turns = [
        {"role": "user", "content": "厦门热吗"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "31"},
        {"role": "assistant", "content": "31度，\n热。"},
    ]
    file = write_jsonl(directory / "d.jsonl", [{"tools": TOOLS, "messages": turns}])
    out = str(directory / "out")
    train.main(["--data", str(file), "--max-steps", "40", "--output-dir", out, "--device", "cpu"])
    (directory / "tools.json").write_text(json.dumps(TOOLS), "utf-8")
    return directory


def test_a_tool_is_called_by_a_prompt_a_chat_and_a_batch(trained_with_tools, monkeypatch, capsys):
    directory = trained_with_tools
    common = ["--adapter", directory / "out", "--device", "cpu", "--greedy"]
    with_tools = [*common, "--tools", directory / "tools.json"]
    capsys.readouterr()
    assert said(capsys, *with_tools, "--prompt", "厦门热吗") == f"get_weather\n{CALL}\n"

    lines = "厦门热吗\n/observation 31\n"
    talk = talked(monkeypatch, capsys, lines, *with_tools)
    assert talk == f"> get_weather\n{CALL}\n> 31度，\n热。\n> \n"

    own = {"tools": TOOLS, "messages": [{"role": "user", "content": "厦门热吗"}]}
    questions = write_jsonl(directory / "q.jsonl", [{"instruction": "厦门热吗"}, own])
    infer.main(list(map(str, [*with_tools, "--input", questions, "--output", directory / "a"])))
    answers = [json.loads(line) for line in (directory / "a").read_text("utf-8").splitlines()]
    assert len(answers) == 2
    for line in answers:
        assert (line["prediction_metadata"], line["prediction"]) == ("get_weather", CALL)


def test_tools_that_are_missing_are_said_to_be(trained_with_tools, capsys):
    common = ["--adapter", trained_with_tools / "out", "--device", "cpu", "--prompt", "q"]
    common += ["--max-new-tokens", 1]
    told = (
        "(this adapter was trained with tools (get_weather); --tools FILE lists them in a prompt)"
    )
    capsys.readouterr()
    for flags, is_told in (([], True), (["--tools", trained_with_tools / "tools.json"], False)):
        infer.main(list(map(str, [*common, *flags])))
        assert (told in capsys.readouterr().err) == is_told


def test_an_answer_without_the_newline_is_shown_whole(tmp_path, monkeypatch, capsys):
    """An adapter whose answers begin without the newline, and have two paragraphs."""
    encode = data.encode_conversation

    def without_newline(tokenizer, messages, encode_text=None):
        parts = encode(tokenizer, messages, encode_text)
        start = parts[0].index(tokenizer.special["<|assistant|>"]) + 1
        end = start + len(tokenizer.encode("\n"))
        return tuple(part[:start] + part[end:] for part in parts)

    answer = "先看书，再练习。\n然后总结，最后复习。"
    file = write_jsonl(tmp_path / "d.jsonl", [{"instruction": "怎么学习？", "output": answer}])
    with monkeypatch.context() as patch:
        patch.setattr(data, "encode_conversation", without_newline)
        out = str(tmp_path / "out")
        flags = ["--data", str(file), "--max-steps", "40", "--output-dir", out]
        train.main([*flags, "--device", "cpu"])
    common = ["--adapter", out, "--device", "cpu", "--greedy"]
    capsys.readouterr()
    assert said(capsys, *common, "--prompt", "怎么学习？") == f"{answer}\n"
    talk = talked(monkeypatch, capsys, "怎么学习？\n", *common)
    assert talk == f"> {answer}\n> \n"
    infer.main([*common, "--input", str(file), "--output", str(tmp_path / "a")])
    (line,) = (tmp_path / "a").read_text("utf-8").splitlines()
    assert json.loads(line)["prediction"] == answer and "prediction_metadata" not in line


def test_both_paragraphs_of_an_answer_are_shown(tmp_path, capsys):
    file, out = reference("cases/two_paragraph_answers.jsonl"), str(tmp_path)
    train.main(["--data", str(file), "--max-steps", "60", "--output-dir", out, "--device", "cpu"])
    capsys.readouterr()
    flags = ["--adapter", out, "--device", "cpu", "--greedy", "--prompt", "怎么学习？"]
    assert said(capsys, *flags) == "先看书，再练习。\n然后总结，最后复习。\n"


# --- mistakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--no-adapter", "--tools", "nowhere"], "nowhere: No such file"),
        (["--adapter", "damaged"], "damaged: cannot read this adapter"),
        (["--adapter", "other"], "this adapter was not trained on this model"),
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
    for name in ("damaged", "other"):
        shutil.copytree(FIXTURES / "tiny" / "adapter", tmp_path / name)
        file = tmp_path / name / "adapter_config.json"
        of_built_in = {"base_model_name_or_path": str(chatglm.BUILT_IN)}
        file.write_text(json.dumps(json.loads(file.read_text()) | of_built_in))
    os.truncate(tmp_path / "damaged" / "adapter_model.safetensors", 5000)
    monkeypatch.chdir(tmp_path)
    assert message in refused_by_infer(capsys, "--prompt", "q", *arguments)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--input", "f"], "--input and --output go together"),
        (["--output", "f"], "--input and --output go together"),
        (["--compare"], "--compare needs --prompt"),
        (
            ["--prompt", "q", "--compare", "--no-adapter"],
            "--compare needs --prompt, and an adapter",
        ),
        (
            ["--prompt", "q", "--merge-to", "d"],
            "argument --merge-to: not allowed with argument --prompt",
        ),
        (["--merge-to", "d", "--load-in", "4bit"], "a quantised base can't be merged"),
        (["--gguf-adapter", "d", "--no-adapter"], "--gguf-adapter needs an adapter"),
        (["--gguf", "d", "--load-in", "4bit"], "--gguf: a quantised base can't be merged"),
        (["--gguf", "d", "--dtype", "fp16"], "--gguf: its type is that of --gguf-type"),
        (["--gguf", ""], "argument --gguf: it is empty"),
        (["--gguf-type", "q8_0"], "--gguf-type needs --gguf"),
        (["--gguf", "d", "--layout", "glm"], "--layout needs --merge-to"),
        (["--check", "d", "--no-check"], "--check and --no-check: give one of them"),
        (["--check", "d", "--dtype", "fp16"], "--check: the export has a type; no --dtype"),
        (["--with-official-code"], "--with-official-code needs --merge-to"),
        (["--merge-to", "tests"], "tests exists already"),
        (["--top-k", "0"], "argument --top-k: must be between"),
        (["--keys", "a=output"], "--keys needs --input"),
        (["--keys", "a=b"], "argument --keys: must be OLD=NEW, and NEW one of conversations"),
    ],
)
def test_flags_that_do_not_go_together(capsys, monkeypatch, flags, message):
    monkeypatch.chdir(ROOT)
    assert message in refused_by_infer(capsys, *flags)
