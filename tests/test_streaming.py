"""support/streaming.py: the text of an answer, piece by piece, while its ids are generated.

python -m pytest -q tests/test_streaming.py
"""

import random
from types import SimpleNamespace

import pytest

import infer


@pytest.fixture(params=["tokenizer", "official_tokenizer"])
def assistant(request):
    """An Assistant with a vocabulary, but without a model: it generates nothing."""
    model = SimpleNamespace(config=SimpleNamespace(seq_length=8192))
    decoder = SimpleNamespace(model=model)
    return infer.Assistant(decoder, request.getfixturevalue(request.param))


def shown_at_each_id(assistant, ids):
    """→ [what is shown when the next id is asked for], for each of `ids`; and for the end"""
    shown, states, seen = [], [], []

    def generate():
        for id in ids:
            yield id
            states.append("".join(shown))

    shown.extend(assistant.stream(generate(), seen))
    assert seen == ids
    return [*states, "".join(shown)]


# --- the pieces add up ------------------------------------------------------------------------

TEXTS = [
    "\nok 👋🏳️‍🌈 甄嬛 \n\n end",
    "get_weather\ncall(city='北京')",
    " lead",
    "  \n x",
    "two words  ",
]
WITH_FFFD = ["a \ufffd b", "\ufffd", "x\ufffd\n"]  # the character that stands for wrong bytes


def kinds_of_ids(tokenizer):
    size = tokenizer.pieces.get_piece_size()
    return [
        [id for id in range(300) if tokenizer.pieces.is_byte(id)],
        [id for id in range(size) if set(tokenizer.pieces.id_to_piece(id)) == {"▁"}],
        [tokenizer.newline_id],
        [tokenizer.eos_id, tokenizer.pieces.unk_id()],
        list(tokenizer.special_names),
        range(size),
        range(tokenizer.vocab_size, tokenizer.vocab_size + 30),  # no piece has them
    ]


def test_the_pieces_of_any_ids_add_up(assistant):
    tokenizer, draw = assistant.tokenizer, random.Random(0)
    kinds = kinds_of_ids(tokenizer)
    assert all(kinds)
    for _ in range(3000):
        ids, seen = [], []
        for _ in range(draw.randrange(12)):
            ids.append(draw.choice(draw.choice(kinds)))
            if draw.random() < 0.15:
                ids += tokenizer.encode(draw.choice(TEXTS + WITH_FFFD))[: draw.randrange(1, 30)]
        assert "".join(assistant.stream(iter(ids), seen)) == assistant.text_of(ids), ids
        assert seen == ids


def test_a_character_is_shown_when_it_is_complete_and_not_before(assistant):
    """The first line has rules of its own: see below."""
    tokenizer, draw = assistant.tokenizer, random.Random(0)
    assert len(tokenizer.encode("👋")) > 3  # its bytes, one by one
    for _ in range(100):
        whole = "".join(draw.choices(TEXTS, k=3))
        ids = tokenizer.encode(whole)
        start = ids.index(tokenizer.newline_id) if tokenizer.newline_id in ids else len(ids)
        states = shown_at_each_id(assistant, ids)
        for count in range(start + 1, len(ids) + 1):
            assert states[count - 1] == assistant.text_of(ids[:count])
        assert not any("\ufffd" in state for state in states)


def test_an_answer_that_is_cut_ends_before_the_character_that_is_not_complete(assistant):
    ids = assistant.tokenizer.encode("so: ok 👋")
    assert "".join(assistant.stream(ids, [])) == "so: ok 👋"
    assert "".join(assistant.stream(ids[:-1], [])) == "so: ok "


# --- the first line, which may be metadata ----------------------------------------------------

FIRST_LINES = [  # (the first line, what is shown before it ends, what is shown after it)
    ("two words", "two words", "two words\n"),
    ("two words  ", "two words", "two words  \n"),
    (" two words", "", " two words\n"),
    ("get_weather", "get_weather", "get_weather"),  # metadata: the newline waits for content
    (" get_weather ", "", "get_weather"),
    ("get_weather ", "get_weather", "get_weather"),
    ("", "", ""),
    ("   ", "", ""),
]


@pytest.mark.parametrize("line, before, after", FIRST_LINES)
def test_spaces_of_the_first_line_wait_for_its_end(assistant, line, before, after):
    ids = assistant.tokenizer.encode(f"{line}\nend")
    end = ids.index(assistant.tokenizer.newline_id)
    states = shown_at_each_id(assistant, ids)
    assert ["", *states][end] == before and states[end] == after
    newline = "\n" if after and not after.endswith("\n") else ""
    assert states[-1] == assistant.text_of(ids) == f"{after}{newline}end"


def test_an_only_line_is_shown_whole(assistant):
    for line in ("  two words  ", "get_weather ", "  "):
        ids = assistant.tokenizer.encode(line)
        assert shown_at_each_id(assistant, ids)[-1] == line == assistant.text_of(ids)


# --- the work ---------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["some words of one line 甄嬛👋 ", "甄嬛 👋\n", "get_weather\n "])
def test_an_id_is_decoded_a_few_times_however_long_the_answer_is(assistant, monkeypatch, text):
    ids, counts = assistant.tokenizer.encode(text * 50), []
    decode = assistant.tokenizer.decode
    monkeypatch.setattr(
        assistant.tokenizer, "decode", lambda ids: counts.append(len(ids)) or decode(ids)
    )
    most = 6 * len(ids) + 100
    assert "".join(assistant.stream(ids, [])).count("\n") == text.count("\n") * 50
    assert len(ids) < sum(counts) < most
    counts.clear()
    for count in range(len(ids)):  # as it would be if everything was decoded again
        assistant.text_of(ids[:count])
    assert sum(counts) > 10 * most
