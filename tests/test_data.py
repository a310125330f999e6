"""data.py: the tokenizer, the prompt format, the Dataset, padding, and the order of samples.

python -m pytest -q tests/test_data.py
"""

import json

import pytest
import torch
from conftest import PERSONA, reference, write_jsonl

import data
import model as chatglm
from data import IGNORE
from support.reports import render

TURN = {"instruction": "1+1?", "input": "", "output": "2"}
MESSAGES = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]


# --- against the official implementation ------------------------------------------------------


def test_a_vocabulary_with_bytes_that_are_no_text_is_refused(tmp_path):
    """Else an answer that has the piece could not be shown."""
    raw = (chatglm.BUILT_IN / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(raw + b"\n\x03\n\x01\xff")  # one more piece
    with pytest.raises(
        ValueError, match="cannot read the vocabulary, its tokenizer.model: 'utf-8'"
    ):
        data.ChatGLMTokenizer(tmp_path)


def test_golden_conversations(official_tokenizer):
    """Ids, labels, prompts and decoded text are those of the official code."""
    tokenizer, count = official_tokenizer, 0
    for line in reference("golden/conversations.jsonl").read_text("utf-8").splitlines():
        wanted = json.loads(line)
        messages = wanted["messages"]
        last_answer = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
        input_ids, labels = data.encode_conversation(tokenizer, messages)
        assert (input_ids, labels) == (wanted["input_ids"], wanted["labels"])
        assert data.encode_prompt(tokenizer, messages[:last_answer]) == wanted["prompt_ids"]
        assert tokenizer.decode(wanted["input_ids"]) == wanted["decoded"]
        count += 1
    assert count == 52


def test_official_special_ids(official_tokenizer):
    special = official_tokenizer.special
    assert (special["[gMASK]"], special["sop"]) == (64790, 64792)
    assert (special["<|system|>"], special["<|user|>"]) == (64794, 64795)
    assert (special["<|assistant|>"], special["<|observation|>"]) == (64796, 64797)
    assert official_tokenizer.stop_ids == (2, 64795, 64797)


def test_huanhuan(official_tokenizer):
    """The tutorial's data set has the numbers of samples and tokens that are known of it."""
    file = reference("data/huanhuan.json")
    dataset = data.ConversationDataset([file], official_tokenizer, 512, PERSONA)
    assert (len(dataset), dataset.cut, dataset.dropped, dataset.prefix_length) == (3729, 0, 0, 16)
    assert round(sum(dataset.lengths) / len(dataset), 1) == 63.7


# --- tokenizer --------------------------------------------------------------------------------


def test_role_names_in_text_stay_text(tokenizer):
    text = "<|user|> [gMASK] sop </s> <unk>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & {0, 1, 2, *tokenizer.special.values()}


def test_text_that_is_not_unicode(tokenizer):
    with pytest.raises(ValueError, match="not valid UTF-8"):
        tokenizer.encode("a\udcff")


TEXTS = ["", "你好👋", "  two  spaces ", "tab\tand\nnewline\r\n", "é 𝔘 日本語 🏳️‍🌈", "\x00"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_from_its_ids(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_past_the_vocabulary_decode_to_nothing(tokenizer):
    assert tokenizer.decode([*tokenizer.encode("ab"), 10**6, -1, 2]) == "ab"


# --- prompt format ----------------------------------------------------------------------------


def ids_of(tokenizer, *parts):
    """Names of special tokens become their ids. Other parts are encoded."""
    special = tokenizer.special
    encoded = [[special[p]] if p in special else tokenizer.encode(p) for p in parts]
    return sum(encoded, [])


def test_labels_of_a_conversation_with_tools(tokenizer):
    """What the assistant says is learnt, with its metadata and the id that ends its turn."""
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "call()", "metadata": "tool"},
        {"role": "observation", "content": "22"},
        {"role": "assistant", "content": "Warm."},
    ]
    before = ids_of(tokenizer, "[gMASK]", "sop", "<|system|>", "\n", "Be brief.")
    before += ids_of(tokenizer, "<|user|>", "\n", "weather?", "<|assistant|>")
    call = ids_of(tokenizer, "tool\n", "call()", "<|observation|>")
    result = ids_of(tokenizer, "\n", "22", "<|assistant|>")
    answer = [*ids_of(tokenizer, "\n", "Warm."), 2]
    input_ids, labels = data.encode_conversation(tokenizer, messages)
    assert input_ids == before + call + result + answer
    assert labels == [IGNORE] * len(before) + call + [IGNORE] * len(result) + answer
    assert data.encode_prompt(tokenizer, messages[:2]) == before
    assert data.split_answer(tokenizer, call[:-1]) == ("tool", "call()")
    assert data.split_answer(tokenizer, answer) == ("", "Warm.")
    sample = torch.tensor(input_ids), torch.tensor(labels)
    assert "⟦tool\n call()<|observation|>⟧" in render(tokenizer, *sample)


def test_a_turn_with_loss_false_is_not_learnt(tokenizer):
    """None of its tokens, nor the role id that ends it."""
    marked = [MESSAGES[0], MESSAGES[1] | {"loss": False}, *MESSAGES]
    unmarked = data.encode_conversation(tokenizer, [*MESSAGES, *MESSAGES])[0]
    input_ids, labels = data.encode_conversation(tokenizer, marked)
    answer = [*ids_of(tokenizer, "\n", "2"), tokenizer.eos_id]
    assert input_ids == unmarked
    assert labels == [IGNORE] * (len(input_ids) - len(answer)) + answer


# --- the formats of records; support/formats.py reads them ------------------------------------

# The ids were written down from sentencepiece's own encoding with the built-in vocabulary.
IDS = {
    "a question": [1401, 1403, 1406, 923, 13, 448, 46, 982, 945, 1407, 923, 13, 923, 53, 2],
    "two questions": [
        *(1401, 1403, 1405, 923, 13, 312, 934, 934, 939, 1406, 923, 13, 448, 46, 982, 945, 1407),
        *(923, 13, 923, 53, 1406, 923, 13, 350, 928, 945, 1407, 923, 13, 294, 404, 939, 2),
    ],
    "a tool": [
        *(1401, 1403, 1405, 923, 13, 478, 493, 270, 289, 765, 598, 281, 923, 770, 589, 473, 927),
        *(263, 927, 278, 589, 263, 927, 297, 497, 939, 495, 326, 925, 403, 263, 944, 472, 927),
        *(304, 270, 289, 765, 598, 281, 304, 765, 927, 61, 13, 94, 13, 923, 923, 923, 923, 37),
        *(946, 61, 923, 988, 37, 13, 96, 1406, 923, 13, 259, 945, 1407, 923, 13, 268, 925, 303),
        *(939, 1407, 289, 13, 923, 99, 99, 99, 526, 399, 311, 13, 528, 765, 1193, 944, 338, 43),
        *(1098, 64, 42, 88, 42, 44, 13, 99, 99, 99, 1408, 923, 13, 776, 1407, 923, 13, 776, 939),
        2,
    ],
}
USER, CALL = {"role": "user", "content": "t?"}, {"name": "f", "arguments": {"z": "U"}}
OPENAI_CALL = {"id": "c1", "function": {"name": "f", "arguments": '{"z": "U"}'}}
RESULT, END = {"role": "tool", "tool_call_id": "c1", "content": "7"}, ("assistant", "7.")
WAIT = {"role": "assistant", "content": "Wait."}
TOOL_TURN = {"role": "tool", "name": "f", "parameters": {"z": "U"}, "observation": 7}
NATIVE_CALL = {
    "role": "assistant",
    "metadata": "f",
    "content": "```python\ntool_call(z='U')\n```",
}
LISTED = (
    "Answer the following questions as best as you can. You have access to the following tools:\n"
    '[\n    "f: x"\n]'
)


def turns(*pairs, role="role", content="content"):
    """(a role, a text) → a turn; turns stay as they are"""
    return [pair if isinstance(pair, dict) else {role: pair[0], content: pair[1]} for pair in pairs]


QUESTION_TURNS = [("user", "1+1?"), ("assistant", "2"), ("user", "So?"), ("assistant", "Two.")]
SHAREGPT_TURNS = [("human", "1+1?"), ("gpt", "2"), ("human", "So?"), ("gpt", "Two.")]
FORMATS = {
    "Alpaca": ("a question", {"instruction": "1+1?", "input": "", "output": "2"}),
    "Alpaca, input": ("a question", {"instruction": "", "input": "1+1?", "output": "2"}),
    "prompt and response": ("a question", {"prompt": "1+1?", "response": "2"}),
    "query and response": ("a question", {"query": "1+1?", "response": "2", "history": None}),
    "CSV": ("a question", "instruction,output\n1+1?,2\n"),
    "TSV": ("a question", "prompt\tresponse\n1+1?\t2\n"),
    "Alpaca, history": (
        "two questions",
        {"instruction": "So?", "output": "Two.", "system": "Add.", "history": [["1+1?", "2"]]},
    ),
    "query, history": (
        "two questions",
        {"query": "So?", "response": "Two.", "system": "Add.", "history": [["1+1?", "2"]]},
    ),
    "conversations": (
        "two questions",
        {"conversations": turns(("system", "Add."), *QUESTION_TURNS)},
    ),
    "messages": ("two questions", {"system": "Add.", "messages": turns(*QUESTION_TURNS)}),
    "content parts": (
        "two questions",
        {
            "messages": [
                turn | {"content": [{"type": "text", "text": turn["content"]}]}
                for turn in turns(("system", "Add."), *QUESTION_TURNS)
            ]
        },
    ),
    "ShareGPT": (
        "two questions",
        {
            "system": "Add.",
            "conversations": turns(*SHAREGPT_TURNS, role="from", content="value"),
        },
    ),
    "the official guide": (
        "a tool",
        {"tools": ["f: x"], "conversations": turns(USER, WAIT, TOOL_TURN, END)},
    ),
    "tools of a system message": (
        "a tool",
        {"messages": turns({"role": "system", "tools": ["f: x"]}, USER, WAIT, TOOL_TURN, END)},
    ),
    "OpenAI": (
        "a tool",
        {
            "tools": ["f: x"],
            "messages": turns(USER, WAIT | {"tool_calls": [OPENAI_CALL]}, RESULT, END),
        },
    ),
    "ShareGPT's call": (
        "a tool",
        {
            "tools": '["f: x"]',
            "conversations": turns(
                ("human", "t?"),
                ("gpt", "Wait."),
                ("function_call", json.dumps(CALL)),
                ("observation", "7"),
                ("gpt", "7."),
                role="from",
                content="value",
            ),
        },
    ),
    "ChatGLM3's own": (
        "a tool",
        {
            "conversations": turns(
                ("system", LISTED), USER, WAIT, NATIVE_CALL, ("observation", "7"), END
            )
        },
    ),
    "ChatGLM3's own, tools beside": (
        "a tool",
        {
            "tools": ["f: x"],
            "messages": turns(USER, WAIT, NATIVE_CALL, ("observation", "7"), END),
        },
    ),
}


def labels_of(tokenizer, input_ids):
    """What follows <|assistant|>, up to the next role id or </s>."""
    roles = {tokenizer.special[f"<|{role}|>"] for role in ("user", "assistant", "observation")}
    labels, is_answer = [], False
    for id in input_ids:
        labels.append(id if is_answer else IGNORE)
        is_answer = id == tokenizer.special["<|assistant|>"] or (is_answer and id not in roles)
    return labels


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_ids_that_are_written_down(tmp_path, tokenizer, name):
    meaning, record = FORMATS[name]
    is_text = isinstance(record, str)
    file = tmp_path / f"x.{name.lower() if is_text else 'json'}"
    file.write_text(record if is_text else json.dumps(record), "utf-8")
    dataset = data.ConversationDataset([file], tokenizer, 512)
    ((input_ids, labels),) = dataset
    assert input_ids.tolist() == IDS[meaning]
    assert labels.tolist() == labels_of(tokenizer, IDS[meaning])
    assert not dataset.reader.unread


def test_formats_of_tools_give_the_official_ids(tmp_path, official_tokenizer):
    """The golden conversation with a tool, written in six formats."""
    lines = reference("golden/conversations.jsonl").read_text("utf-8").splitlines()
    golden = next(json.loads(line) for line in lines if "metadata" in line)
    tools, question = [{"name": "get_weather"}], ("user", golden["messages"][1]["content"])
    start, wait = turns(question, ("assistant", "Let me look."))
    result, end = golden["messages"][4]["content"], golden["messages"][5]
    arguments = {"location": "Beijing"}
    call = {"id": "c", "function": {"name": "get_weather", "arguments": json.dumps(arguments)}}
    turn = {"role": "tool", "name": "get_weather", "parameters": arguments}
    turn["observation"] = json.loads(result)
    function_call = json.dumps({"name": "get_weather", "arguments": arguments})
    sharegpt = turns(
        *(("human", question[1]), ("gpt", "Let me look."), ("function_call", function_call)),
        *(("observation", result), ("gpt", end["content"])),
        role="from",
        content="value",
    )
    returned = {"role": "tool", "tool_call_id": "c", "content": json.loads(result)}
    records = [
        {"messages": golden["messages"]},
        {"tools": tools, "messages": golden["messages"][1:]},
        {"tools": tools, "conversations": [start, wait, turn, end]},
        {"tools": tools, "messages": [start, wait | {"tool_calls": [call]}, returned, end]},
        {"messages": [{"role": "system", "tools": tools}, start, wait, turn, end]},
        {"tools": json.dumps(tools), "conversations": sharegpt},
    ]
    dataset = data.ConversationDataset(
        [write_jsonl(tmp_path / "x", records)], official_tokenizer, 512
    )
    assert len(dataset) == 6
    for input_ids, labels in dataset:
        assert input_ids.tolist() == golden["input_ids"] and labels.tolist() == golden["labels"]


# --- Dataset ----------------------------------------------------------------------------------


def test_the_length_budget(tmp_path, tokenizer):
    """A sample that is too long loses its end. One without a token to learn is dropped."""
    whole, labels = data.encode_conversation(tokenizer, MESSAGES)
    question = labels.count(IGNORE)
    file = write_jsonl(tmp_path / "x", [TURN])

    def kept(max_length):
        return data.ConversationDataset([file], tokenizer, max_length)

    complete = kept(len(whole))
    assert [t.tolist() for t in complete[0]] == [whole, labels] and complete.cut == 0
    shorter = kept(len(whole) - 1)
    assert shorter[0][0].tolist() == whole[:-1] and shorter[0][1][-1] != tokenizer.eos_id
    assert (shorter.cut, shorter.dropped) == (1, 0)
    what = f"no sample has a token to learn within {question} tokens"
    with pytest.raises(data.DataError, match=what):
        kept(question)
    long = write_jsonl(tmp_path / "y", [TURN, TURN | {"instruction": "long " * 50}])
    mixed = data.ConversationDataset([long], tokenizer, len(whole))
    assert (len(mixed), mixed.cut, mixed.dropped, mixed.places) == (1, 0, 1, [f"{long}:1"])


def test_a_dataset_tells_what_is_wrong_with_its_files(tmp_path, tokenizer):
    bad = write_jsonl(tmp_path / "bad", [TURN, {"output": 1}])
    worse = write_jsonl(tmp_path / "worse", [{"output": "x"}])
    with pytest.raises(data.DataError) as error:
        data.ConversationDataset([bad, worse], tokenizer, 512)
    assert str(error.value).splitlines() == [
        f"{bad}:2: missing key 'instruction' (the keys here: 'output')",
        f"{worse}:1: missing key 'instruction' (the keys here: 'output')",
    ]


def test_system_message_only_where_there_is_none(tmp_path, tokenizer):
    own = {"conversations": [{"role": "system", "content": "own"}, *MESSAGES]}
    file = write_jsonl(tmp_path / "x", [TURN, own])
    dataset = data.ConversationDataset([file], tokenizer, 512, "given")
    first, second = (tokenizer.decode(dataset[i][0].tolist()) for i in (0, 1))
    assert "<|system|>\n given<|user|>" in first
    assert "<|system|>\n own<|user|>" in second and "given" not in second


# --- collate ----------------------------------------------------------------------------------


def test_collate_pads_right_and_finds_what_is_learnt():
    short = torch.tensor([5, 6, 7]), torch.tensor([IGNORE, 6, 7])
    long = torch.tensor(range(10, 19)), torch.tensor([IGNORE] * 6 + [16, IGNORE, 18])
    batch = data.collate([short, long])
    assert batch.prefix.tolist() == []
    assert batch.input_ids.tolist() == [[5, 6, 7] + [0] * 13, [*range(10, 19)] + [0] * 7]
    # A token is predicted by the one before it.
    assert batch.predicting.tolist() == [0, 1, 16 + 5, 16 + 7] + [0] * 124
    assert batch.targets.tolist() == [6, 7, 16, 18] + [IGNORE] * 124


def test_what_all_samples_begin_with_is_computed_once(tokenizer, tmp_path):
    records = [{"instruction": f"{i} {'more ' * i}", "output": "a"} for i in range(9)]
    file = write_jsonl(tmp_path / "d.jsonl", records)
    system = "be brief, and kind to all who ask"
    dataset = data.ConversationDataset([file], tokenizer, 512, system)
    P = dataset.prefix_length
    heads = {tuple(ids[:P].tolist()) for ids, _ in dataset}
    longer = {tuple(ids[: P + 8].tolist()) for ids, _ in dataset}
    assert P >= 8 and P % 8 == 0 and len(heads) == 1 and len(longer) > 1
    without_system = data.ConversationDataset([file], tokenizer, 512)
    assert without_system.prefix_length == 0  # too few to matter

    batch = data.collate([dataset[0], dataset[8]], P)
    (head,) = heads
    assert batch.prefix.tolist() == list(head)
    for row, i in zip(batch.input_ids.tolist(), (0, 8), strict=True):
        assert ([*head] + row)[: dataset.lengths[i]] == dataset[i][0].tolist()
    computed = torch.cat((batch.prefix, batch.input_ids.flatten()))
    samples = (dataset[0], dataset[8])
    before = torch.cat([ids[:-1][labels[1:] >= 0] for ids, labels in samples])
    targets = torch.cat([labels[labels >= 0] for _, labels in samples])
    count = len(targets)
    assert torch.equal(computed[batch.predicting[:count]], before)
    assert torch.equal(batch.targets[:count], targets)
    assert set(batch.targets[count:].tolist()) == {IGNORE}


def test_a_single_row_has_no_prefix():
    sample = torch.tensor(range(10, 30)), torch.tensor([IGNORE] * 9 + [*range(19, 30)])
    batch = data.collate([sample], 8)
    assert batch.prefix.tolist() == []
    assert batch.input_ids.tolist() == [[*range(10, 30)] + [0] * 4]


# --- order ------------------------------------------------------------------------------------


def test_order():
    """An epoch has every sample once, in batches of similar length, alike on every machine."""
    lengths = [i % 40 + 1 for i in range(1003)]
    everything = range(1003)
    batches = data.update_order(everything, lengths, 8, seed=42, epoch=0)
    assert sorted(i for batch in batches for i in batch) == list(range(1003))
    assert sorted(map(len, batches)) == [7] * 5 + [8] * 121
    assert batches[0] == [443, 964, 844, 364, 324, 604, 444, 924]  # so on every machine
    assert batches != data.update_order(everything, lengths, 8, 42, 1)
    assert batches != data.update_order(everything, lengths, 8, 43, 0)
    padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
    assert sum(lengths) / padded > 0.95
    starts = [lengths[batch[0]] for batch in batches]
    assert sorted(starts) != starts  # batches come in no order of length


def test_an_epoch_draws_a_share_of_each_file():
    parts = [(range(10), 1.0), (range(10, 20), 0.5), (range(20, 24), 2.5)]
    epochs = [data.draw_epoch(parts, 42, epoch) for epoch in (0, 1)]
    for drawn in epochs:
        assert drawn[:10] == list(range(10)) and len(drawn) == 10 + 5 + 10
        assert len({*drawn[10:15]}) == 5 and {*drawn[10:15]} < {*range(10, 20)}
        assert sorted(drawn.count(i) for i in range(20, 24)) == [2, 2, 3, 3]
    assert epochs[0] != epochs[1] != data.draw_epoch(parts, 43, 1)
    assert epochs[0] == data.draw_epoch(parts, 42, 0)


def test_files_are_used_as_often_as_is_asked(tmp_path, tokenizer):
    """FILE:N. A file whose whole name ends so is meant as it is."""
    records = [{"instruction": f"q{i}", "output": "a"} for i in range(4)]
    file = write_jsonl(tmp_path / "a:b.jsonl", records)
    odd = write_jsonl(tmp_path / "c:2", records[:1])
    dataset = data.ConversationDataset([f"{file}:0.5", f"{file}:2", odd], tokenizer, 64)
    assert dataset.parts == [(range(4), 0.5), (range(4, 8), 2.0), (range(8, 9), 1.0)]
    assert (len(dataset), dataset.samples_per_epoch) == (9, 2 + 8 + 1)
    other = data.ConversationDataset([file, f"{file}:2", odd], tokenizer, 64)
    assert other.digest != dataset.digest  # another run
    for name, told in (
        (f"{file}:0.1", "none of its 4 samples would be used"),
        (f"{file}:0", "the number must be more than 0"),
        (f"{file}:-1", "'-1' is no number of times"),
        (f"{file}x:2", "No such file"),
    ):
        with pytest.raises(data.DataError, match=told):
            data.ConversationDataset([name], tokenizer, 64)
