"""From files of conversations to padded batches: the tokenizer, the prompt format, reading and checking, the order.

dataset = ConversationDataset(["dataset/sample.jsonl"], ChatGLMTokenizer("THUDM/chatglm3-6b"), max_length=512)
"""

import difflib
import hashlib
import itertools
import json
import math
import random
import re
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from transformers.utils import cached_file

SAMPLE = Path(__file__).parent / "dataset" / "sample.jsonl"
IGNORE = -100  # the label of a token that is not learnt
ROLES = ("system", "user", "assistant", "observation")


class DataError(ValueError):
    """What is wrong with data files: one line per fault, each with file, line or record, what, and the remedy."""


def told(faults, where="", most=20):
    """One line per fault, cut where it quotes something endless: the first of them, then a count of those that are left."""
    more = [f"{where}and {len(faults) - most} more"] if len(faults) > most else []
    return "\n".join([*(fault if len(fault) <= 1000 else f"{fault[:1000]}…" for fault in faults[:most]), *more])


# --- tokenizer and prompt ---------------------------------------------------------------------------------------------


class ChatGLMTokenizer:
    """ChatGLM3's vocabulary: the sentencepiece model `tokenizer.model` in a directory or hub repository, and the special
    ids that follow its last piece. Those are never the encoding of any text. Raises ValueError if it can't be read.
    """

    SPECIAL = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *(f"<|{role}|>" for role in ROLES))

    def __init__(self, path):
        try:
            file = Path(path, "tokenizer.model")
            file = file if Path(path).is_dir() else cached_file(str(path), "tokenizer.model")
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (OSError, RuntimeError, ValueError) as error:
            reason = "".join(filter(str.isprintable, str(error).partition("\n")[0]))
            hint = "" if Path(path).is_dir() else "; without a network, give the directory of a checkpoint"
            raise ValueError(f"{path}: cannot read the vocabulary, its tokenizer.model: {reason}{hint}") from error
        first = self.pieces.get_piece_size()
        self.special = {name: first + i for i, name in enumerate(self.SPECIAL)}
        self.names = {id: name for name, id in self.special.items()}
        self.vocab_size = first + len(self.special)
        self.digest = hashlib.sha256(self.pieces.serialized_model_proto()).hexdigest()
        self.eos_id = self.pieces.eos_id()
        self.newline_id = self.pieces.piece_to_id("<0x0A>")
        self.stop_ids = (self.eos_id, self.special["<|user|>"], self.special["<|observation|>"])
        if self.eos_id < 0 or self.newline_id == self.pieces.unk_id():
            raise ValueError(f"{path}: its tokenizer.model is not ChatGLM3's: it lacks </s>, or the newline's byte")

    def check_fits(self, rows):
        """Raises ValueError if an embedding of `rows` rows lacks some of the ids."""
        if self.vocab_size > rows:
            raise ValueError(f"tokenizer.model has {self.vocab_size} ids, the model's embedding only {rows}")

    def encode(self, text):
        """Ordinary pieces only: "<|user|>" in a text stays text. Raises ValueError for what is not Unicode."""
        try:
            return self.pieces.encode(text)
        except RuntimeError as error:  # a command line's bytes that are not UTF-8 arrive as halves of surrogate pairs
            raise ValueError(f"{text!r} is not valid UTF-8") from error

    def decode(self, ids):
        """Special ids appear by name. Ids past the vocabulary (the model's is padded) and </s> give nothing."""
        text, run = "", []
        for id in [*ids, None]:  # each run of pieces is decoded as one, so that its leading space goes
            if id is not None and 0 <= id < self.pieces.get_piece_size():
                run.append(id)
            elif run or id in self.names:
                text, run = text + self.pieces.decode(run) + self.names.get(id, ""), []
        return text


def encode_conversation(tokenizer, messages):
    """messages → (input_ids, labels), two lists of one length: the official ChatGLM3 format

        [gMASK] sop  <|role|> metadata \\n content  <|role|> metadata \\n content  …  </s>

    where metadata-and-newline and content are encodings of their own. labels[i] is input_ids[i] where the model has to
    produce that token (an assistant's turn after its role id, and the id that ends the turn), else -100.
    """
    input_ids = [tokenizer.special["[gMASK]"], tokenizer.special["sop"]]
    labels = [IGNORE, IGNORE]
    learnt = False  # whether the turn before this token was the assistant's
    for message in messages:
        role = tokenizer.special[f"<|{message['role']}|>"]
        text = tokenizer.encode(message.get("metadata", "") + "\n") + tokenizer.encode(message["content"])
        input_ids += [role, *text]
        labels.append(role if learnt else IGNORE)
        learnt = message["role"] == "assistant"
        labels += text if learnt else [IGNORE] * len(text)
    return [*input_ids, tokenizer.eos_id], [*labels, tokenizer.eos_id if learnt else IGNORE]


def encode_prompt(tokenizer, messages):
    """messages → input_ids up to and including <|assistant|>: the answer is what the model says next."""
    return encode_conversation(tokenizer, messages)[0][:-1] + [tokenizer.special["<|assistant|>"]]


def split_answer(tokenizer, ids):
    """What the model said after <|assistant|>, without the stop id → (metadata, content), "" for no metadata; without the
    bytes of a last character that is not whole."""
    end = ids.index(tokenizer.newline_id) if tokenizer.newline_id in ids else -1
    metadata = tokenizer.decode(ids[: max(end, 0)]).strip()
    return metadata, tokenizer.decode(ids[end + 1 :]).rstrip("\ufffd")


def with_system(messages, system):
    """A conversation that has no system message of its own gets `system` (None or "" for none)."""
    has_own = messages and messages[0]["role"] == "system"
    return messages if has_own or not system else [{"role": "system", "content": system}, *messages]


def render(tokenizer, input_ids, labels):
    """The decoded sample, with what is learnt between ⟦ and ⟧."""
    text, start = "", 0
    for i in range(1, len(input_ids) + 1):
        if i == len(input_ids) or (labels[i] == IGNORE) != (labels[start] == IGNORE):
            part = tokenizer.decode(input_ids[start:i])
            part += "</s>" if input_ids[i - 1] == tokenizer.eos_id else ""
            text += part if labels[start] == IGNORE else f"⟦{part}⟧"
            start = i
    return text


# --- files ------------------------------------------------------------------------------------------------------------


def read_conversations(files):
    """Reads JSON lists and JSONL files of instruction records {"instruction", "input" (optional), "output"} and
    conversation records {"conversations": [{"role", "content", "metadata" (optional)}, …]}, told apart by content.

    → [(place, messages)], place being "file:line" or "file: record N". Raises DataError with the faults of all files,
    the first 20 of each.
    """
    return [(place, messages) for place, _, messages in read_records(files)]


def read_records(files, prompts=False):
    """read_conversations with the records as they were: → [(place, record, messages)]. prompts: their answers are not
    needed; the messages are those before the last answer, if there is one."""
    records, faults = [], []
    for file in map(Path, files):
        found, wrong = [], []
        for place, record, fault in _records(file):
            here = [fault] if fault else []
            if not fault:
                found.append((place, record, _messages(record, here, prompts)))
            wrong += [f"{place}: {what}" for what in here]
        if not found and not wrong:
            wrong = [f"{file}: the file is empty: it has no records"]
        records += found
        faults += [told(wrong, f"{file}: ")] if wrong else []
    if faults:
        raise DataError("\n".join(faults))
    return records


def _records(path):
    """Yields (place, record, None), or (place, None, fault) for what can't be read."""
    try:
        if path.is_char_device():  # /dev/zero has no end
            raise OSError("not a file")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        yield str(path), None, f"{error.strerror or error}; check the path"
        return
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        yield f"{path}:{line}", None, "not UTF-8; save the file as UTF-8"
        return
    if text.lstrip().startswith("["):
        records, line, fault = _parse(text)
        if fault:
            yield f"{path}:{line}", None, fault
        else:
            for number, record in enumerate(records, 1):
                yield f"{path}: record {number}", record, None
        return
    if "\n" in text.strip() and _parse(text.strip().split("\n")[0])[2] and not _parse(text)[2]:
        yield f"{path}:1", None, "one object over several lines; use a list of objects, or one object a line"
        return
    for number, content in enumerate(text.split("\n"), 1):
        if content.strip():
            record, _, fault = _parse(content)
            yield f"{path}:{number}", record, fault


def _parse(text):
    """→ (value, line, fault)"""
    try:
        return json.loads(text), 1, None
    except json.JSONDecodeError as error:
        return None, error.lineno, f"not JSON ({error.msg} at column {error.colno}); give a JSON list, or JSONL"
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        return None, 1, f"not usable JSON ({error})"


def _messages(record, faults, prompts):
    """The record's messages; what is wrong with them is appended to `faults`."""
    if not isinstance(record, dict):
        faults.append(f"not an object but {_kind(record)}; a record is {{...}}")
        return []
    if "conversations" not in record:
        required, optional = ("instruction", "output"), ("input", "conversations")
        _check_keys(record, required[: 1 if prompts else 2], (*optional, "output") if prompts else optional, faults)
        if faults:
            return []
        question = "\n".join(filter(None, (record["instruction"], record.get("input"))))
        if not question.strip():
            faults.append("empty question: 'instruction' and 'input' are both empty")
        messages = [{"role": "user", "content": question}]
        if prompts:
            return messages
        if not record["output"].strip():
            faults.append("empty answer: 'output' has no text")
        return [*messages, {"role": "assistant", "content": record["output"]}]
    messages = record["conversations"]
    if not isinstance(messages, list):
        faults.append(f"'conversations' must be a list of messages, not {_kind(messages)}")
        return []
    if not messages:
        faults.append("'conversations' has no messages")
        return []
    before = "the start"
    for number, message in enumerate(messages, 1):
        found = []
        if not isinstance(message, dict):
            found.append(f"not an object but {_kind(message)}")
        else:
            _check_keys(message, ("role", "content"), ("metadata",), found)
        if not found:
            role = message["role"]
            if role not in ROLES:
                found.append(f"unknown role {role!r}; roles are {', '.join(ROLES)}")
            elif role not in MAY_FOLLOW[before]:
                found.append(f"wrong order of roles: {role} after {before}; expected {' or '.join(MAY_FOLLOW[before])}")
            if role in ("user", "assistant") and not message["content"].strip():
                found.append(
                    f"empty {'answer' if role == 'assistant' else 'question'}: the {role}'s content has no text"
                )
            if "\n" in message.get("metadata", ""):
                found.append("'metadata' must be one line")
            before = role
        faults += [f"message {number}: {what}" for what in found]
        if found:
            return []
    if prompts and before == "system":
        faults.append("there is nothing to answer after the system's message")
    if prompts:
        return messages[:-1] if before == "assistant" else messages
    if before != "assistant":
        faults.append(f"a conversation must end with an assistant's message, not {before}")
    return messages


# Keys of other formats, and what says the same here.
FOREIGN_KEYS = {
    "from": "role",
    "value": "content",
    "messages": "conversations",
    "history": "conversations",
    "system": "--system, or conversations",
    "prompt": "instruction",
    "query": "input",
    "response": "output",
}
MAY_FOLLOW = {
    "the start": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "observation", "assistant"),
    "observation": ("assistant",),
}


def _check_keys(record, required, optional, faults):
    """All of `required` are there, no key looks like a misspelt one, and every value is a proper string."""
    absent = [key for key in (*required, *optional) if key not in record]
    for key in record:
        if key in required or key in optional:
            if not isinstance(record[key], str):
                faults.append(f"{key!r} must be a string, not {_kind(record[key])}")
            elif re.search("[\ud800-\udfff]", record[key]):
                faults.append(f"{key!r} has half of a surrogate pair, which is not a character")
        elif key in FOREIGN_KEYS:
            faults.append(f"the key {key!r} is not read; use {FOREIGN_KEYS[key]}")
            absent = []  # another format: what it lacks of ours follows from that
        elif close := difflib.get_close_matches(key, absent, n=1, cutoff=0.75):
            faults.append(f"unknown key {key!r}; did you mean {close[0]!r}?")
            absent = [other for other in absent if other != close[0] and close[0] != "conversations"]
    for key in required:
        if key in absent:
            there = ", ".join(map(repr, list(record)[:8])) or "none"
            faults.append(f"missing key {key!r} (the keys here: {there})")


def _kind(value):
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true/false", type(None): "null"}
    return kinds.get(type(value), "a number")


# --- dataset, batches, order ------------------------------------------------------------------------------------------


class ConversationDataset(Dataset):
    """Every conversation of `files`, encoded. dataset[i] → (input_ids [T], labels [T]), int64.

    At most `max_length` tokens of a sample are kept, prompt and answer together: `cut` counts the samples that lost
    their end (a cut answer has no end token, so the model doesn't learn to stop there), `dropped` those with nothing
    left to learn. `shared` is how many tokens all samples begin with, mostly those of the system message, rounded down to
    a multiple of 8. Raises DataError (see read_conversations), also if no sample remains.
    """

    def __init__(self, files, tokenizer, max_length, system=None):
        self.samples, self.places = [], []
        self.cut = self.dropped = 0
        for place, messages in read_conversations(files):
            input_ids, labels = encode_conversation(tokenizer, with_system(messages, system))
            if all(label == IGNORE for label in labels[:max_length]):
                self.dropped += 1
                continue
            self.cut += len(input_ids) > max_length
            self.samples.append(torch.tensor([input_ids[:max_length], labels[:max_length]], dtype=torch.int32))
            self.places.append(place)
        if not self.samples:
            raise DataError(f"no sample has a token to learn within {max_length} tokens; raise --max-length")
        self.lengths = [sample.shape[1] for sample in self.samples]
        self.supervised = sum(int((sample[1] != IGNORE).sum()) for sample in self.samples)
        shortest = min(self.lengths)
        starts = torch.stack([sample[0, : shortest - 1] for sample in self.samples])
        same = int((starts == starts[0]).all(0).cumprod(0).sum())  # tokens that all begin with
        self.shared = same - same % 8  # tensor cores want multiples of 8
        self.digest = hashlib.sha256(b"".join(sample.numpy().tobytes() for sample in self.samples)).hexdigest()

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        input_ids, labels = self.samples[i].long()
        return input_ids, labels


def collate(samples, shared=0):
    """[(input_ids, labels)] → a micro-batch, padded on the right to the longest of them, to a multiple of 8:

    prefix [P], the `shared` tokens that all samples begin with, so that the network computes them once (none for a single
    sample); input_ids [B, T - P], what follows; positions [N], where among these P + B × (T - P) tokens a supervised one
    is predicted; targets [N], those tokens. N is padded too, to a multiple of 128 (position 0, target -100), so that few
    shapes occur. Computed once, the prefix also has one dropout mask for all rows.
    """
    shared = shared if len(samples) > 1 else 0
    length = max(len(input_ids) for input_ids, _ in samples)
    length += -length % 8  # tensor cores want multiples of 8
    input_ids = torch.stack([F.pad(ids, (0, length - len(ids))) for ids, _ in samples])
    # The shift: position t predicts token t + 1.
    labels = torch.stack([F.pad(labels[1:], (0, length - len(labels) + 1), value=IGNORE) for _, labels in samples])
    # Where each token of [B, T] stands among those that are computed.
    index = torch.arange(shared + len(samples) * (length - shared))
    rows = index[shared:].view(len(samples), -1)
    index = torch.cat((index[:shared].expand(len(samples), -1), rows), dim=1)
    supervised = labels != IGNORE
    fill = (0, -int(supervised.sum()) % 128)
    return {
        "prefix": input_ids[0, :shared],
        "input_ids": input_ids[:, shared:].contiguous(),
        "positions": F.pad(index[supervised], fill),
        "targets": F.pad(labels[supervised], fill, value=IGNORE),
    }


def batch_order(lengths, batch_size, seed, epoch, window=50):
    """The epoch's batches, as lists of sample indices. Samples are shuffled, sorted by length inside windows of `window`
    batches so that a batch needs little padding, and the batches shuffled again. Every sample comes once; where batches of
    `batch_size` don't come out even, some have one sample less. The same for a seed and epoch on every machine."""
    rng = random.Random(f"{seed} {epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    count = math.ceil(len(order) / batch_size)
    ends = [len(order) * i // count for i in range(count + 1)] if count else []
    for first in range(0, count, window):
        part = slice(ends[first], ends[min(first + window, count)])
        order[part] = sorted(order[part], key=lengths.__getitem__)
    batches = [order[start:end] for start, end in itertools.pairwise(ends)]
    rng.shuffle(batches)
    return batches
