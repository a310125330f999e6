import json

import pytest
import torch
from conftest import PERSONA, reference, write_jsonl

import data

TURN = {"instruction": "1+1?", "input": "", "output": "2"}


# --- tokenizer and prompt ---------------------------------------------------------------------------------------------


def test_golden_conversations(official_tokenizer):
    tokenizer, count = official_tokenizer, 0
    for line in reference("golden/conversations.jsonl").read_text("utf-8").splitlines():
        wanted = json.loads(line)
        messages = wanted["messages"]
        last_answer = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
        assert data.encode_conversation(tokenizer, messages) == (wanted["input_ids"], wanted["labels"])
        assert data.encode_prompt(tokenizer, messages[:last_answer]) == wanted["prompt_ids"]
        assert tokenizer.decode(wanted["input_ids"]) == wanted["decoded"]
        count += 1
    assert count == 52


def test_official_special_ids(official_tokenizer):
    special = official_tokenizer.special
    assert (special["[gMASK]"], special["sop"], special["<|system|>"], special["<|user|>"]) == (
        64790,
        64792,
        64794,
        64795,
    )
    assert (special["<|assistant|>"], special["<|observation|>"]) == (64796, 64797)
    assert official_tokenizer.stop_ids == (2, 64795, 64797)


def test_huanhuan(official_tokenizer):
    dataset = data.ConversationDataset([reference("data/huanhuan.json")], official_tokenizer, 512, PERSONA)
    assert (len(dataset), dataset.cut, dataset.dropped, dataset.shared) == (3729, 0, 0, 16)
    assert round(sum(dataset.lengths) / len(dataset), 1) == 63.7


def ids_of(tokenizer, *parts):
    """Names of special tokens become their ids; other parts are encoded."""
    return [
        id
        for part in parts
        for id in ([tokenizer.special[part]] if part in tokenizer.special else tokenizer.encode(part))
    ]


def test_labels_of_a_conversation_with_tools(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "call()", "metadata": "tool"},
        {"role": "observation", "content": "22"},
        {"role": "assistant", "content": "Warm."},
    ]
    input_ids, labels = data.encode_conversation(tokenizer, messages)
    before = ids_of(
        tokenizer, "[gMASK]", "sop", "<|system|>", "\n", "Be brief.", "<|user|>", "\n", "weather?", "<|assistant|>"
    )
    call = ids_of(tokenizer, "tool\n", "call()", "<|observation|>")
    result = ids_of(tokenizer, "\n", "22", "<|assistant|>")
    answer = [*ids_of(tokenizer, "\n", "Warm."), 2]
    ignored = data.IGNORE
    assert input_ids == before + call + result + answer
    assert labels == [ignored] * len(before) + call + [ignored] * len(result) + answer
    assert data.encode_prompt(tokenizer, messages[:2]) == before
    assert data.split_answer(tokenizer, call[:-1]) == ("tool", "call()")
    assert data.split_answer(tokenizer, answer) == ("", "Warm.")
    assert "⟦tool\n call()<|observation|>⟧" in data.render(tokenizer, input_ids, labels)


def test_role_names_in_text_stay_text(tokenizer):
    text = "<|user|> [gMASK] sop </s> <unk>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & {0, 1, 2, *tokenizer.special.values()}


def test_text_that_is_not_unicode(tokenizer):
    with pytest.raises(ValueError, match="not valid UTF-8"):
        tokenizer.encode("a\udcff")


@pytest.mark.parametrize("text", ["", "你好👋", "  two  spaces ", "tab\tand\nnewline\r\n", "é 𝔘 日本語 🏳️‍🌈", "\x00"])
def test_text_comes_back_from_its_ids(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_past_the_vocabulary_decode_to_nothing(tokenizer):
    assert tokenizer.decode([*tokenizer.encode("ab"), 10**6, -1, 2]) == "ab"


# --- files ------------------------------------------------------------------------------------------------------------


def test_json_and_jsonl_by_content_with_and_without_bom(tmp_path):
    for name, text in (
        ("a.jsonl", json.dumps(TURN) + "\n\n" + json.dumps(TURN) + "\r\n"),
        ("b.txt", "\ufeff" + json.dumps([TURN, TURN], indent=1)),
        ("c.json", "\ufeff" + json.dumps(TURN) + "\n" + json.dumps(TURN)),
    ):
        (tmp_path / name).write_text(text, "utf-8")
        found = [messages for _, messages in data.read_conversations([tmp_path / name])]
        assert found == [[{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]] * 2


def test_instruction_and_input_make_the_question(tmp_path):
    records = [TURN | {"instruction": i, "input": t} for i, t in (("a", "b"), ("", "b"), ("a", ""))]
    file = write_jsonl(tmp_path / "x", [*records, {"instruction": "a", "output": "2"}])
    assert [m[0]["content"] for _, m in data.read_conversations([file])] == ["a\nb", "b", "a", "a"]


def talk(*turns, **more):
    return {"conversations": [{"role": role, "content": content} | more for role, content in turns]}


Q, A = ("user", "q"), ("assistant", "a")
FAULTS = [
    ('{"instruction": "a", ', ":1: not JSON"),
    ("[1, 2", ":1: not JSON"),
    ("[" * 100_000, ":1: not usable JSON"),
    ("[3]", ": record 1: not an object but a number"),
    ('"text"', ":1: not an object but a string"),
    ('{"instruction": "a",\n"output": "b"}', ":1: one object over several lines"),
    ("", ": the file is empty"),
    ("[]", ": the file is empty"),
    ({"instrution": "a", "output": "b"}, ":1: unknown key 'instrution'; did you mean 'instruction'?"),
    (TURN | {"inputs": "a", "input": "b"}, None),
    ({"instruction": "a", "inputs": "b", "output": "c"}, ":1: unknown key 'inputs'; did you mean 'input'?"),
    ({"instruction": "a"}, ":1: missing key 'output' (the keys here: 'instruction')"),
    (TURN | {"output": 3}, ":1: 'output' must be a string, not a number"),
    (TURN | {"input": None}, ":1: 'input' must be a string, not null"),
    (TURN | {"output": " \n"}, ":1: empty answer"),
    (TURN | {"instruction": ""}, ":1: empty question"),
    (TURN | {"output": "\ud800"}, ":1: 'output' has half of a surrogate pair"),
    ({"conversations": "a"}, ":1: 'conversations' must be a list of messages, not a string"),
    ({"conversations": []}, ":1: 'conversations' has no messages"),
    ({"conversation": []}, ":1: unknown key 'conversation'; did you mean 'conversations'?"),
    ({"messages": []}, ":1: the key 'messages' is not read; use conversations"),
    (TURN | {"history": []}, ":1: the key 'history' is not read; use conversations"),
    ({"conversations": [{"from": "human"}]}, ":1: message 1: the key 'from' is not read; use role"),
    ("\n" + json.dumps(TURN) + "\n", None),
    ({"conversations": ["a"]}, ":1: message 1: not an object but a string"),
    (talk(Q, A, A, Q, A), None),
    (talk(("system", "s"), Q, A, ("observation", "o"), A), None),
    (talk(Q), ":1: a conversation must end with an assistant's message, not user"),
    (talk(Q, Q, A), ":1: message 2: wrong order of roles: user after user; expected assistant"),
    (talk(A), ":1: message 1: wrong order of roles: assistant after the start; expected system or user"),
    (talk(Q, A, ("system", "s")), ":1: message 3: wrong order of roles: system after assistant"),
    (talk(("human", "q"), A), ":1: message 1: unknown role 'human'; roles are system, user, assistant, observation"),
    (talk(("h" * 2_000_000, "q"), A), ":1: message 1: unknown role 'hhh"),
    (talk(Q, ("assistant", "")), ":1: message 2: empty answer"),
    (talk(("user", " "), A), ":1: message 1: empty question"),
    (talk(Q, A, metadata="a\nb"), ":1: message 1: 'metadata' must be one line"),
    (talk(Q, A, metadata=1), ":1: message 1: 'metadata' must be a string, not a number"),
    (
        {"conversations": [{"role": "user", "contents": "q"}]},
        ":1: message 1: unknown key 'contents'; did you mean 'content'?",
    ),
]


@pytest.mark.parametrize("content, fault", FAULTS)
def test_faults_are_told_with_their_place(tmp_path, content, fault):
    file = tmp_path / "x.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    if fault is None:
        assert data.read_conversations([file])
        return
    with pytest.raises(data.DataError) as error:
        data.read_conversations([file])
    told = str(error.value)
    assert told.startswith(f"{file}{fault}") and "\n" not in told and len(told) < 1500


def test_unreadable_files(tmp_path):
    with pytest.raises(data.DataError, match="nowhere.json: No such file"):
        data.read_conversations([tmp_path / "nowhere.json"])
    with pytest.raises(data.DataError, match="Is a directory"):
        data.read_conversations([tmp_path])
    (tmp_path / "gbk").write_bytes(b"\n" + "甄嬛".encode("gbk"))
    with pytest.raises(data.DataError, match="gbk:2: not UTF-8"):
        data.read_conversations([tmp_path / "gbk"])


def test_all_faults_are_listed_up_to_twenty(tmp_path, tokenizer):
    bad = write_jsonl(tmp_path / "bad", [TURN if i % 2 else {"output": 1} for i in range(30)])
    worse = write_jsonl(tmp_path / "worse", [{"output": "x"}] * 25)
    with pytest.raises(data.DataError) as error:
        data.ConversationDataset([bad, worse], tokenizer, 512)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{bad}:1: 'output' must be a string, not a number"
    assert lines[20] == f"{bad}: and 10 more"  # 15 records with two faults each
    assert lines[21] == f"{worse}:1: missing key 'instruction' (the keys here: 'output')"
    assert lines[-1] == f"{worse}: and 5 more" and len(lines) == 42


# --- dataset, batches, order ------------------------------------------------------------------------------------------


def test_the_length_budget(tmp_path, tokenizer):
    whole, labels = data.encode_conversation(
        tokenizer, [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    )
    question = labels.count(data.IGNORE)
    file = write_jsonl(tmp_path / "x", [TURN])

    def kept(max_length):
        return data.ConversationDataset([file], tokenizer, max_length)

    assert [t.tolist() for t in kept(len(whole))[0]] == [whole, labels] and kept(len(whole)).cut == 0
    shorter = kept(len(whole) - 1)
    assert shorter[0][0].tolist() == whole[:-1] and shorter[0][1][-1] != tokenizer.eos_id
    assert (shorter.cut, shorter.dropped) == (1, 0)
    with pytest.raises(data.DataError, match=f"no sample has a token to learn within {question} tokens"):
        kept(question)
    long = write_jsonl(tmp_path / "y", [TURN, TURN | {"instruction": "long " * 50}])
    mixed = data.ConversationDataset([long], tokenizer, len(whole))
    assert (len(mixed), mixed.cut, mixed.dropped, mixed.places) == (1, 0, 1, [f"{long}:1"])


def test_system_message_only_where_there_is_none(tmp_path, tokenizer):
    file = write_jsonl(tmp_path / "x", [TURN, talk(("system", "own"), Q, A)])
    dataset = data.ConversationDataset([file], tokenizer, 512, "given")
    first, second = (tokenizer.decode(dataset[i][0].tolist()) for i in (0, 1))
    assert "<|system|>\n given<|user|>" in first
    assert "<|system|>\n own<|user|>" in second and "given" not in second


def test_collate_pads_right_and_finds_what_is_learnt():
    ignored = data.IGNORE
    batch = data.collate(
        [
            (torch.tensor([5, 6, 7]), torch.tensor([ignored, 6, 7])),
            (torch.tensor(range(10, 19)), torch.tensor([ignored] * 6 + [16, ignored, 18])),
        ]
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7] + [0] * 13, [*range(10, 19)] + [0] * 7]
    assert batch["positions"].tolist() == [0, 1, 16 + 5, 16 + 7] + [0] * 124  # one before the token that is learnt
    assert batch["targets"].tolist() == [6, 7, 16, 18] + [ignored] * 124


def test_what_all_samples_begin_with_is_computed_once(tokenizer, tmp_path):
    records = [{"instruction": f"{i} {'more ' * i}", "output": "a"} for i in range(9)]
    file = write_jsonl(tmp_path / "d.jsonl", records)
    dataset = data.ConversationDataset([file], tokenizer, 512, "be brief, and kind to all who ask")
    heads = {tuple(ids[: dataset.shared].tolist()) for ids, _ in dataset}
    longer = {tuple(ids[: dataset.shared + 8].tolist()) for ids, _ in dataset}
    assert dataset.shared >= 8 and dataset.shared % 8 == 0 and len(heads) == 1 and len(longer) > 1
    assert data.ConversationDataset([file], tokenizer, 512).shared == 0  # too few to matter
    batch = data.collate([dataset[0], dataset[8]], dataset.shared)
    assert batch["prefix"].tolist() == list(*heads)
    for row, i in zip(batch["input_ids"].tolist(), (0, 8), strict=True):
        assert (list(*heads) + row)[: dataset.lengths[i]] == dataset[i][0].tolist()
    computed = torch.cat((batch["prefix"], batch["input_ids"].flatten()))
    learnt = [(ids[:-1][labels[1:] >= 0], labels[labels >= 0]) for ids, labels in (dataset[0], dataset[8])]
    before, targets = (torch.cat(parts) for parts in zip(*learnt, strict=True))
    count = len(targets)
    assert torch.equal(computed[batch["positions"][:count]], before)
    assert torch.equal(batch["targets"][:count], targets) and set(batch["targets"][count:].tolist()) == {data.IGNORE}
    assert len(data.collate([dataset[0]], dataset.shared)["prefix"]) == 0


def test_order():
    lengths = [i % 40 + 1 for i in range(1003)]
    batches = data.batch_order(lengths, 8, seed=42, epoch=0)
    assert sorted(i for batch in batches for i in batch) == list(range(1003))
    assert sorted(map(len, batches)) == [7] * 5 + [8] * 121
    assert batches[0] == [443, 964, 844, 364, 324, 604, 444, 924]  # so on every machine
    assert batches != data.batch_order(lengths, 8, 42, 1) and batches != data.batch_order(lengths, 8, 43, 0)
    padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
    assert sum(lengths) / padded > 0.95
    starts = [lengths[batch[0]] for batch in batches]
    assert sorted(starts) != starts  # batches come in no order of length
