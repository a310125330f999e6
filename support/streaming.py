"""The text of an answer, piece by piece, while its ids are generated."""


class TextOfIds:
    """Decodes ids that come one by one. Each id is decoded once. Those of a character that is not
    complete yet are decoded together with the next one."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.pending = []  # ids that no text was given for
        self.is_inside = False  # whether ordinary pieces of the same text stand before `pending`

    def add(self, id):
        """→ the text that is complete now: tokenizer.decode of all ids, without what was given"""
        self.pending.append(id)
        text = self._decode_pending()
        if not text or text.endswith("\ufffd"):
            return ""
        self.pending = []
        self.is_inside = 0 <= id < self.tokenizer.pieces.get_piece_size()
        return text

    def end(self):
        """→ the text of the last ids, without an incomplete character"""
        return self._decode_pending().rstrip("\ufffd")

    def _decode_pending(self):
        if not self.is_inside:
            return self.tokenizer.decode(self.pending)
        # sentencepiece removes the first space of a text. So there is a newline in front of it.
        return self.tokenizer.decode([self.tokenizer.newline_id, *self.pending])[1:]


def stream_text(assistant, new_ids, ids):
    """Yields the pieces of text that `new_ids`, an iterable, add to the answer: Assistant.text_of.

    A piece never holds a part of a character. Each id is also appended to the list `ids`. The first
    line may be metadata, which is stripped: until its end, spaces are kept back.
    """
    decoder, is_first_line, text, shown = TextOfIds(assistant.tokenizer), True, "", 0
    separator = ""  # what is between metadata and content
    for id in new_ids:
        ids.append(id)
        piece = decoder.add(id)
        if not is_first_line:
            yield separator + piece if piece else ""
            separator = "" if piece else separator
            continue
        text += piece
        if id == assistant.tokenizer.newline_id:
            is_first_line = False
            metadata, _ = assistant.split(ids)
            yield assistant.text_of(ids)[shown:]
            if metadata or not text.strip():
                decoder, separator = TextOfIds(assistant.tokenizer), "\n" if metadata else ""
        elif not text[:1].isspace():
            stripped = text.rstrip()
            yield stripped[shown:]
            shown = len(stripped)
    rest = decoder.end()
    if is_first_line:
        yield text[shown:] + rest
    elif rest:
        yield separator + rest
