"""The text of an answer, part by part, while its ids are generated."""

INCOMPLETE = "\ufffd"  # what bytes become that are no whole character


class TextOfIds:
    """Decodes ids that come one by one. An id is decoded once, unless its character is incomplete:
    then again, with the next id."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.pending = []  # ids whose text was not returned yet
        self.follows_piece = False  # whether `pending` continues a text

    def add(self, id):
        """→ the text that this id completes. All of them together are tokenizer.decode of all."""
        self.pending.append(id)
        text = self._decode_pending()
        if not text or text.endswith(INCOMPLETE):
            return ""
        self.pending = []
        self.follows_piece = 0 <= id < self.tokenizer.pieces.get_piece_size()
        return text

    def end(self):
        """→ the text of the last ids, without an incomplete character"""
        return self._decode_pending().rstrip(INCOMPLETE)

    def _decode_pending(self):
        if not self.follows_piece:
            return self.tokenizer.decode(self.pending)
        # sentencepiece removes the first space of a text. So a newline is decoded in front of it.
        return self.tokenizer.decode([self.tokenizer.newline_id, *self.pending])[1:]


def stream_text(assistant, new_ids, ids):
    """Yields an answer part by part, while `new_ids`, an iterable, generates its ids. Together the
    parts are Assistant.text_of(ids).

    A part never holds a piece of a character. Each id is also appended to the list `ids`. The first
    line may be metadata, which is stripped: so its outer spaces are shown when the line has ended.
    """
    new_ids, texts, line, shown = iter(new_ids), TextOfIds(assistant.tokenizer), "", 0
    for id in new_ids:  # the first line
        ids.append(id)
        line += texts.add(id)
        if id == assistant.tokenizer.newline_id:
            break
        if not line[:1].isspace():
            yield line.rstrip()[shown:]
            shown = len(line.rstrip())
    else:  # there is no other line
        yield line[shown:] + texts.end()
        return
    yield assistant.text_of(ids)[shown:]
    metadata, _ = assistant.split(ids)
    separator = "\n" if metadata else ""
    if metadata or not line.strip():  # data.split_answer then decodes the content on its own
        texts = TextOfIds(assistant.tokenizer)
    for id in new_ids:
        ids.append(id)
        if text := texts.add(id):
            yield separator + text
            separator = ""
    if text := texts.end():
        yield separator + text
