"""data.py, support/records.py and support/samples.py: hostile data files, texts, conversations and
vocabularies. The formats of records have tests of their own in test_fuzz_formats.py.

python -m pytest -q tests/fuzz/test_fuzz_data.py
"""

import os
import re

import pytest
import torch
from conftest import read_conversations
from hostile import hostile, one_clear_line, watched
from hostile_inputs import (
    conversations,
    corrupted,
    files,
    messages_of,
    odd_files,
    records,
    texts,
)
from hypothesis import strategies as st

import data
import model as chatglm
from data import IGNORE
from support.errors import DataError
from support.records import Record, RecordReader, encode_texts
from support.reports import render
from support.samples import PackedSamples
from support.turns import ROLES

# --- files ------------------------------------------------------------------------------------


@hostile(350, raw=odd_files, prompts=st.booleans())
def test_a_data_file_gives_conversations_or_faults_with_their_place(tmp_path, raw, prompts):
    """Every line of DataError names the file. What is returned has the allowed order of roles, and
    text where it must have some."""
    file = tmp_path / "x.json"
    file.write_bytes(raw)
    try:
        with watched():
            found = list(RecordReader([file], is_prompt=prompts))
    except DataError as error:
        lines = str(error).split("\n")
        assert len(lines) <= 21
        assert all(line.startswith(str(file)) and line.isprintable() for line in lines)
        return
    assert found
    for record in found:
        assert record.place.startswith(str(file)) and isinstance(record.value, dict)
        initials = "".join(message["role"][0] for message in record.messages)
        # A greeting may come before the first question. Nothing need follow a tool's result. A
        # prompt may end with an answer: the text before a call, which is an answer of its own.
        pattern = "s*(u|u?a(a|ua|oa)*[uo]?)" if prompts else "s*u?a(a|ua|oa)*o?"
        assert re.fullmatch(pattern, initials)
        for message in record.messages:
            assert message["role"] in ROLES and "\n" not in message.get("metadata", "")
            assert message["content"].strip() or message["role"] == "observation"
            (message["content"] + message.get("metadata", "")).encode("utf-8")


def as_read(record):
    """What a valid record says. A system message without text is none, nor is empty metadata."""
    messages = []
    for message in messages_of(record):
        if message["role"] != "system" or message["content"].strip():
            messages.append({key: value for key, value in message.items() if key != "metadata"})
            if message.get("metadata"):
                messages[-1]["metadata"] = message["metadata"]
    return messages


@hostile(150, pair=files(records))
def test_a_valid_file_is_read_back_exactly(tmp_path, pair):
    """JSON or JSONL, either kind of record, escaped or not: nothing is lost or changed."""
    written, raw = pair
    (tmp_path / "x").write_bytes(raw)
    found = [messages for _, messages in read_conversations([tmp_path / "x"])]
    assert found == [as_read(record) for record in written]


# --- ids and text -----------------------------------------------------------------------------


@pytest.fixture(params=["tokenizer", "official_tokenizer"])
def vocabulary(request):
    return request.getfixturevalue(request.param)


def shown(text):
    """What decoding gives back. U+2581 is sentencepiece's sign for a space, and becomes one."""
    return text.replace("\u2581", " ")


@hostile(200, text=texts, ids=st.lists(st.integers(-9, 70000), max_size=20))
def test_text_comes_back_and_never_gives_special_ids(vocabulary, text, ids):
    """Text that is encoded and decoded is the same text. Any ids at all can be decoded."""
    encoded = vocabulary.encode(text)
    assert vocabulary.decode(encoded) == shown(text)
    assert all(2 < id < vocabulary.pieces.get_piece_size() for id in encoded)
    assert isinstance(vocabulary.decode(ids), str)


@hostile(125, messages=conversations())
def test_a_conversation_s_ids_and_labels(vocabulary, messages):
    """Each message has one role id, and the conversation has one end. The labels are exactly what
    follows each prompt, and decode to what the assistant says."""
    ids, labels = data.encode_conversation(vocabulary, messages)
    assert len(ids) == len(labels)
    names = [vocabulary.special_names[id] for id in ids if id in vocabulary.special_names]
    assert names == ["[gMASK]", "sop", *(f"<|{message['role']}|>" for message in messages)]
    assert ids.index(vocabulary.eos_id) == len(ids) - 1
    wanted = [IGNORE] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = data.encode_prompt(vocabulary, messages[:i])
            start = len(prompt)
            end = len(data.encode_conversation(vocabulary, messages[: i + 1])[0])
            assert ids[:start] == prompt
            wanted[start:end] = ids[start:end]  # with the token that ends the turn
            name, said = shown(message.get("metadata", "")).strip(), shown(message["content"])
            metadata, content = data.split_answer(vocabulary, ids[start : end - 1], {name})
            if re.fullmatch(r"([^\W\d][\w.-]*)?", name):
                assert (metadata, content) == (name, said.rstrip("\ufffd"))
            else:  # what is no identifier is no tool
                assert metadata == "" and content.endswith(said.rstrip("\ufffd"))
    assert labels == wanted
    rendered = render(vocabulary, torch.tensor(ids), torch.tensor(labels))
    learnt = [part.split("⟧")[0] for part in rendered.split("⟦")[1:]]
    assert learnt or any("⟦" in message["content"] for message in messages)


VOCABULARY = (chatglm.BUILT_IN / "tokenizer.model").read_bytes()
# Parts of the file: names of pieces, and after the byte 0x18 the kind of a piece.
PARTS = [
    b"</s>",
    b"<unk>",
    b"<0x0A>",
    b"<s>",
    "\u2581".encode(),
    b"\x18\x06",
    b"\x18\x03",
    b"\x18\x02",
]
BYTES = [b"a", b"<", b"\0", b"\x18\x01", b"\x18\x04", b"\x18\x05", b"\xff"]


def with_part_replaced(part, by, count):
    return VOCABULARY.replace(part, (by * len(part))[: len(part)], count)


edited = st.builds(
    with_part_replaced, st.sampled_from(PARTS), st.sampled_from(BYTES), st.integers(-1, 3)
)


@hostile(75, raw=corrupted(st.just(VOCABULARY)) | edited | st.binary(max_size=20), text=texts)
def test_a_vocabulary_s_file(tmp_path, raw, text):
    """It encodes without a special id, or one line says why it can't be used."""
    (tmp_path / "tokenizer.model").write_bytes(raw)
    try:
        with watched():
            vocabulary = data.ChatGLMTokenizer(tmp_path)
            ids = vocabulary.encode(text)
            assert isinstance(vocabulary.decode(ids), str)
            assert not {-1, vocabulary.eos_id, *vocabulary.special_names} & set(ids)
    except ValueError as error:
        one_clear_line(error)


# --- samples and batches ----------------------------------------------------------------------


@hostile(75, pair=files(records), max_length=st.integers(1, 120), system=st.none() | texts)
def test_what_a_length_budget_cuts_and_drops(tmp_path, tokenizer, pair, max_length, system):
    """The dataset is the encoded file cut to any length. It counts what it cut and dropped."""
    written, raw = pair
    file = tmp_path / "x"
    file.write_bytes(raw)
    wanted, cut = [], 0
    for messages in map(as_read, written):
        if system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        ids, labels = data.encode_conversation(tokenizer, messages)
        if set(labels[:max_length]) != {IGNORE}:
            wanted.append((ids[:max_length], labels[:max_length]))
            cut += len(ids) > max_length
    if not wanted:
        with pytest.raises(DataError, match="no sample has a token to learn"):
            data.ConversationDataset([file], tokenizer, max_length, system)
        return
    dataset = data.ConversationDataset([file], tokenizer, max_length, system)
    assert [tuple(tensor.tolist() for tensor in sample) for sample in dataset] == wanted
    assert (dataset.cut, dataset.dropped) == (cut, len(written) - len(wanted))
    assert dataset.lengths == [len(ids) for ids, _ in wanted]


# (an id, whether it is learnt)
tokens = st.lists(st.tuples(st.integers(0, 70000), st.booleans()), min_size=1, max_size=40)
prefixes = st.lists(st.integers(0, 9), max_size=20)


@hostile(100, samples=st.lists(tokens, min_size=1, max_size=6), prefix=prefixes)
def test_a_padded_batch_holds_its_samples_and_predicts_the_next_token(samples, prefix):
    """With the prefix put back and the padding taken off, the batch is the samples. What predicts
    what is a shift by one, written out."""
    pairs = []
    for sample in samples:
        ids = [id for id, _ in sample]
        labels = [id if is_learnt else IGNORE for id, is_learnt in sample]
        pairs.append((prefix + ids, [IGNORE] * len(prefix) + labels))
    batch = data.collate([tuple(map(torch.tensor, pair)) for pair in pairs], len(prefix))
    prefix = prefix if len(samples) > 1 else []
    P = len(prefix)
    rows, rest = batch.input_ids.shape
    length, longest = P + rest, max(len(ids) for ids, _ in pairs)
    assert rows == len(samples) and length % 8 == 0 and length - 8 < longest <= length
    assert batch.prefix.tolist() == prefix
    for row, (ids, _) in zip(batch.input_ids.tolist(), pairs, strict=True):
        assert prefix + row == ids + [0] * (length - len(ids))
    computed = batch.prefix.tolist() + batch.input_ids.flatten().tolist()
    wanted = []
    for r, (ids, labels) in enumerate(pairs):
        for t in range(1, len(ids)):
            if labels[t] >= 0:
                place = t - 1 if t - 1 < P else r * rest + t - 1
                assert computed[place] == ids[t - 1]
                wanted.append((place, labels[t]))
    found = list(zip(batch.predicting.tolist(), batch.targets.tolist(), strict=True))
    assert found == wanted + [(0, IGNORE)] * (-len(wanted) % 128)


# An epoch's indices: some samples come several times, others never.
drawn_indices = st.lists(st.integers(0, 99), max_size=300)


@hostile(
    150,
    indices=drawn_indices,
    lengths=st.lists(st.integers(1, 99), min_size=100, max_size=100),
    size=st.integers(1, 40),
    seed=st.integers(0, 2**70),
    window=st.integers(1, 60),
)
def test_the_updates_have_every_index_as_often_as_it_was_drawn(
    indices, lengths, size, seed, window
):
    """The updates are of one size, or of two that differ by one. The order is repeatable."""
    before = list(indices)
    updates = data.update_order(indices, lengths, size, seed, 1, window)
    assert indices == before
    assert sorted(i for update in updates for i in update) == sorted(indices)
    sizes = {len(update) for update in updates}
    assert len(updates) == -(-len(indices) // size)
    assert max(sizes, default=0) - min(sizes, default=0) < 2
    assert updates == data.update_order(indices, lengths, size, seed, 1, window)


# (number of a file's samples, thousandths of how many times it is used)
shares = st.tuples(st.integers(0, 60), st.integers(1, 5000))


@hostile(75, shares=st.lists(shares, min_size=1, max_size=4), seed=st.integers(0, 2**70))
def test_an_epoch_has_each_file_as_often_as_is_asked(shares, seed):
    """2.5 times: each sample twice or three times, and half of them three times."""
    parts, first = [], 0
    for count, thousandths in shares:
        parts.append((range(first, first + count), thousandths / 1000))
        first += count
    drawn = data.draw_epoch(parts, seed, 1)
    assert drawn == data.draw_epoch(parts, seed, 1)
    assert set(drawn) <= set(range(first))
    for (indices, _), (count, thousandths) in zip(parts, shares, strict=True):
        whole, more = divmod(thousandths, 1000)
        often = [drawn.count(i) for i in indices]
        assert set(often) <= {whole, whole + 1}
        assert abs(sum(often) - whole * count - more * count / 1000) <= 0.5 + 1e-9


@hostile(75, samples=st.lists(tokens, min_size=1, max_size=6), prefix=prefixes)
def test_packed_samples_are_what_was_added(samples, prefix):
    """A sample without a target is left out. The first token is none: nothing predicts it."""
    packed, kept = PackedSamples(), []
    for sample in samples:
        ids = prefix + [id for id, _ in sample]
        labels = [IGNORE] * len(prefix) + [id if learnt else IGNORE for id, learnt in sample]
        targets = [label for label in labels[1:] if label != IGNORE]
        assert packed.add(ids, labels) == bool(targets)
        if targets:
            kept.append((ids, labels, len(targets)))
    assert len(packed) == len(kept)
    if not kept:
        return
    packed.pack()
    assert packed.lengths == [len(ids) for ids, _, _ in kept]
    assert packed.supervised == [count for _, _, count in kept]
    for (ids, labels), (wanted_ids, wanted_labels, _) in zip(packed, kept, strict=True):
        assert ids.dtype == labels.dtype == torch.int64
        assert (ids.tolist(), labels.tolist()) == (wanted_ids, wanted_labels)
    common = os.path.commonprefix([ids for ids, _, _ in kept])
    assert packed.common_prefix() == min(len(common), min(packed.lengths) - 1)


@hostile(50, conversations=st.lists(conversations(), max_size=4))
def test_texts_that_are_encoded_together_are_encoded_alike(vocabulary, conversations):
    """encode_texts has every text of the records, and gives what encoding each alone gives."""
    found = [Record(0, "x:1", {}, messages) for messages in conversations]
    ids_of = encode_texts(vocabulary, found)
    for messages in conversations:
        encoded = data.encode_conversation(vocabulary, messages, ids_of.__getitem__)
        assert encoded == data.encode_conversation(vocabulary, messages)
