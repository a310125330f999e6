"""data.ChatGLMTokenizer, on hostile tokenizer.model files: texts become ids and texts again, or one
line says why the vocabulary can't be used.

test_fuzz_data.py damages the bytes of the file. Here its pieces and settings are changed. Each file
is read in a process of its own, so that a crash of sentencepiece is a failure and no end.

python -m pytest -q tests/fuzz/test_fuzz_vocabulary.py
"""

from hostile import fresh, hostile, in_a_child, one_clear_line, watched
from hostile_inputs import VOCABULARY, corrupted, mostly, texts, vocabularies
from hypothesis import strategies as st

import data
from support.records import Record, encode_texts
from support.streaming import TextOfIds

TEXTS = ["", " ", "hello 你好\n", "\0", "<unk></s><0x0A><|user|>", "a" * 2000, "\u2581 \u2581é👋"]


def encodes_and_decodes(directory, text):
    """Only the constructor may refuse. What it gives works on every text, and on any ids."""
    try:
        with watched():
            vocabulary = data.ChatGLMTokenizer(directory)
    except ValueError as error:
        one_clear_line(error)
        return
    with watched():
        size = vocabulary.pieces.get_piece_size()
        assert 0 <= vocabulary.eos_id < size
        assert vocabulary.decode([vocabulary.newline_id]) == "\n"
        for each in (*TEXTS, text):
            ids = vocabulary.encode(each)
            assert all(0 <= id < size for id in ids) and vocabulary.eos_id not in ids
            vocabulary.decode(ids).encode()
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "a"}]
        together = encode_texts(vocabulary, [Record(0, "x:1", {}, messages)])
        assert together[text] == vocabulary.encode(text)
        ids, labels = data.encode_conversation(vocabulary, messages, together.__getitem__)
        assert ids.count(vocabulary.eos_id) == 1 and labels[-1] == ids[-1] == vocabulary.eos_id
        all_ids = range(-1, vocabulary.vocab_size + 1)
        vocabulary.decode(all_ids).encode()
        streamed = TextOfIds(vocabulary)
        for id in [*all_ids[:300], *ids]:
            streamed.add(id)
        data.split_answer(vocabulary, ids)


@hostile(30, raw=mostly(vocabularies(), corrupted(st.just(VOCABULARY))), text=texts)
def test_a_vocabulary(tmp_path, raw, text):
    """Pieces have other texts, kinds and scores. Some are missing, or there twice. Settings too."""
    directory = fresh(tmp_path / "base")
    (directory / "tokenizer.model").write_bytes(raw)
    in_a_child(encodes_and_decodes, directory, text)
