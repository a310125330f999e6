"""data.py: the tokenizer, the prompt format, the Dataset, padding, and the order of samples.

python -m pytest -q tests/test_data.py
"""

import json

import pytest
import torch
from conftest import PERSONA, reference, write_jsonl

import data
from data import IGNORE
from support.reports import render

TURN = {"instruction": "1+1?", "input": "", "output": "2"}
MESSAGES = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]


# --- against the official implementation ------------------------------------------------------


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
    assert "⟦tool\n call()<|observation|>⟧" in render(tokenizer, input_ids, labels)


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
        f"{bad}:2: 'output' must be a string, not a number",
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
    batches = data.update_order(lengths, 8, seed=42, epoch=0)
    assert sorted(i for batch in batches for i in batch) == list(range(1003))
    assert sorted(map(len, batches)) == [7] * 5 + [8] * 121
    assert batches[0] == [443, 964, 844, 364, 324, 604, 444, 924]  # so on every machine
    assert batches != data.update_order(lengths, 8, 42, 1)
    assert batches != data.update_order(lengths, 8, 43, 0)
    padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
    assert sum(lengths) / padded > 0.95
    starts = [lengths[batch[0]] for batch in batches]
    assert sorted(starts) != starts  # batches come in no order of length
