"""What the tests of hostile input draw: texts, JSON, files of records, tensors, and model files.

Most inputs begin as something valid. A few of its parts are then replaced, dropped or renamed,
because pure noise is refused by the first check.
"""

import copy
import io
import json
import os
import pickle
import struct

import hypothesis
import peft
import safetensors.torch
import torch
from conftest import FIXTURES
from hypothesis import strategies as st

from model import BUILT_IN, ChatGLMForCausalLM
from support.config import ChatGLMConfig
from support.turns import ROLES

# --- texts and JSON ---------------------------------------------------------------------------

unicode = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
SPECIAL = ["<|user|>", "[gMASK]", "sop", "</s>", "<unk>", "<0x0A>", "\n", "\u2581", " ", "\0"]
SPECIAL += ["\ufeff", "\u2028", "é👋"]
texts = unicode | st.lists(st.sampled_from(SPECIAL) | unicode, max_size=6).map("".join)
says_something = texts.filter(str.strip)

KEYS = ["instruction", "input", "output", "conversations", "role", "content", "metadata"]
KEYS += ["instrution", "outputs", "contents", "conversation", "from", "value", "messages"]
KEYS += ["history", "id"]
TRICKS = ["user", "assistant", "observation"]
TRICKS += ["../../x", "/etc/passwd", "evil", "evil.py", "\0", "a\nb", "\x1b[2J", "", " "]
TRICKS += [r"(\w|\w|\.)*!", "(", ".*", "all-linear"]  # the first takes forever as a pattern
TRICKS += ["dense", "word_embeddings", "layers", "0", "query_key_value"]
TRICKS += ["pissa", "pissa_niter_2", "eva", "olora", "loftq", "corda", "gaussian", "orthogonal"]
TRICKS += ["mica", "lora_only", "float16"]
TRICKS += [0, -1, 1, 2, 3, 7, 2**31, 2**40, 2**63, 2**64, 10**400]
TRICKS += [0.0, 1e308, float("nan"), float("inf"), True, False, None]
scalars = st.sampled_from(TRICKS) | st.integers() | st.floats() | st.text(max_size=20)
odd_keys = st.sampled_from([*KEYS, "evil", "dense", "0"]) | st.text(max_size=9)


def lists_and_objects(inner):
    return st.lists(inner, max_size=4) | st.dictionaries(odd_keys, inner, max_size=4)


json_values = st.recursive(scalars, lists_and_objects, max_leaves=10)
texts_of_json = st.builds(json.dumps, json_values) | st.text(max_size=9)
deep = st.integers(1, 5000).map(lambda n: '{"r":' * n)


def mostly(usual, odd):
    """Nine in ten are `usual`."""
    return st.integers(0, 9).flatmap(lambda n: usual if n else odd)


def places(value):
    """Yields every (container, key) inside a JSON value."""
    if isinstance(value, list):
        keys = range(len(value))
    else:
        keys = value if isinstance(value, dict) else ()
    for key in keys:
        yield value, key
        yield from places(value[key])


@st.composite
def damaged(draw, value, most=3):
    """`value` with some of its parts replaced, dropped or renamed."""
    value = copy.deepcopy(draw(value))
    for _ in range(draw(st.integers(1, most))):
        spots = list(places(value))
        if not spots:
            return value
        container, key = draw(st.sampled_from(spots))
        action = draw(st.sampled_from(["replace", "replace", "replace", "drop", "rename"]))
        old = container[key] if action == "replace" else container.pop(key)
        if action == "replace":
            wrapped = st.just([old]) | st.just({"evil": old})
            container[key] = draw(mostly(st.sampled_from(TRICKS), json_values | wrapped))
        elif action == "rename" and isinstance(container, dict):
            container[draw(st.sampled_from(KEYS) | st.text(max_size=9))] = old
    return value


def damaged_json(value, most=3):
    """The text of `value`, damaged."""
    return damaged(st.just(value), most).map(json.dumps)


@st.composite
def corrupted(draw, raw):
    """Bytes that are cut short, changed here and there, or have a piece inserted."""
    raw = bytearray(draw(raw))
    at = st.integers(0, 2**30) | st.integers(0, 400)  # a file's start says what the rest is
    for _ in range(draw(st.integers(1, 3))):
        # The place is not drawn from the length, because torch.save's varies by a byte or two.
        i = draw(at) % (len(raw) + 1)
        action = draw(st.sampled_from(["cut", "flip", "insert"]))
        if action == "cut":
            del raw[i:]
        else:
            raw[i : i + (action == "flip")] = draw(st.binary(min_size=1, max_size=9))
    return bytes(raw)


# --- files of records -------------------------------------------------------------------------


@st.composite
def conversations(draw):
    """Messages in an allowed order."""
    turns = st.lists(st.sampled_from(["a", "ua", "oa"]), max_size=3)
    initials = draw(st.sampled_from(["", "s"])) + "ua" + "".join(draw(turns))
    messages = []
    for role in (next(role for role in ROLES if role[0] == initial) for initial in initials):
        contents = texts if role == "observation" else says_something
        messages.append({"role": role, "content": draw(contents)})
        if draw(st.booleans()):
            messages[-1]["metadata"] = draw(texts).replace("\n", "")
    return messages


def asks_something(turn):
    return (turn["instruction"] + turn.get("input", "")).strip()


turns = st.fixed_dictionaries(
    {"instruction": texts, "output": says_something},
    optional={"input": texts, "id": scalars},
).filter(asks_something)
records = turns | conversations().map(lambda messages: {"conversations": messages})


def messages_of(record):
    """What a valid record says."""
    if "conversations" in record:
        return record["conversations"]
    parts = (record["instruction"], record.get("input", ""))
    question = "\n".join(text for text in parts if text)
    answer = {"role": "assistant", "content": record["output"]}
    return [{"role": "user", "content": question}, answer]


@st.composite
def files(draw, records):
    """(records, the bytes of a JSON list or JSONL of them)"""
    records = draw(st.lists(records, min_size=1, max_size=4))
    ascii, breaks = draw(st.booleans()), draw(st.sampled_from(["\n", "\r\n", "\n\n"]))
    if draw(st.booleans()):
        indent = draw(st.none() | st.integers(0, 2))
        text = json.dumps(records, ensure_ascii=ascii, indent=indent)
    else:
        text = breaks.join(json.dumps(record, ensure_ascii=ascii) for record in records)
    mark = draw(st.sampled_from(["", "\ufeff"]))
    return records, (mark + text).encode("utf-8", "surrogatepass")


def raw_files(records):
    """The bytes alone."""
    return files(records).map(lambda pair: pair[1])


def encoded_oddly(raw, encoding, newline):
    text = raw.decode("utf-8", "replace").replace("\n", newline)
    return text.encode(encoding, "replace")


valid_files = raw_files(records)
odd_files = st.one_of(
    st.binary(max_size=60),
    raw_files(json_values),
    raw_files(damaged(records)),
    raw_files(records | damaged(records) | json_values),
    corrupted(valid_files),
    st.builds(
        encoded_oddly,
        raw_files(damaged(records)),
        st.sampled_from(["utf-16", "gbk", "utf-8"]),
        st.sampled_from("\r\u2028\0"),
    ),
    st.integers(1, 5000).map(lambda n: b'{"a":' * n + b"1" + b"}" * n),
    st.integers(1, 6000).map(lambda n: b'[{"instruction": ' + b"9" * n + b"}]"),
)


# --- files of tensors -------------------------------------------------------------------------

DTYPES = "float64 float16 bfloat16 float8_e4m3fn float8_e5m2 int64 int8 uint16 bool complex64"
DTYPES = [getattr(torch, name) for name in DTYPES.split()]
VALUES = [0, 1e38, torch.nan, torch.inf]


@st.composite
def tensors(draw, state):
    """Tensors, some of them renamed, dropped, added, reshaped or of another dtype."""
    state = dict(state)
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(sorted(state)))
        names = [*sorted(state), "../../x", "a\nb", "", name.replace("layers.0", "layers.99")]
        other = draw(st.sampled_from(names) | st.text())
        actions = ["drop", "rename", "add", "reshape", "dtype", "dtype", "values"]
        action = draw(st.sampled_from(actions))
        if action == "dtype":
            state[name] = state[name].to(draw(st.sampled_from(DTYPES)))
        elif action == "reshape":
            state[name] = torch.zeros(draw(st.lists(st.integers(0, 70), max_size=3)))
        elif action == "values":
            state[name] = torch.full(state[name].shape, draw(st.sampled_from(VALUES)))
        elif action != "add" or len(state) > 1:
            state[other] = state[name].clone()
            if action != "add":
                del state[name if action == "rename" else other]
        if not state:
            return {}
    return state


def as_safetensors(state):
    return safetensors.torch.save(state, {"format": "pt"})


def with_header(raw, header):
    """A safetensors file with another header: bytes, or a length that is not there."""
    if isinstance(header, int):
        return header.to_bytes(8, "little") + raw[8:]
    tensors = raw[8 + int.from_bytes(raw[:8], "little") :]
    return len(header).to_bytes(8, "little") + header + tensors


def safetensors_files(state):
    """A damaged safetensors file, made from `state`."""
    raw = as_safetensors(state)
    header = json.loads(raw[8:].split(b"}}")[0] + b"}}")
    lengths = st.sampled_from([0, 2, 2**20, 2**27, 2**40, 2**62, 2**63, 2**64 - 1])
    return st.one_of(
        tensors(state).map(as_safetensors),
        corrupted(st.just(raw)),
        st.builds(with_header, st.just(raw), lengths | damaged_json(header).map(str.encode)),
        st.binary(max_size=40),
    )


class Evil:
    """Unpickling it is noticed."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


EVIL_THINGS = [
    Evil(open, ("ran", "w")),
    Evil(os.system, ("true",)),
    Evil(exec, ("import evil",)),
    Evil(__import__, ("evil",)),
    Evil(os.mkdir, ("ran",)),
]
HUGE = torch.zeros(1, dtype=torch.float16).expand(2**20, 2**20)  # a few bytes in the file


def saved(value, zipped=True):
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def bin_files(state, *odd):
    """torch.save's files: of tensors, of other things, and of things that do something when they
    are unpickled."""
    name = sorted(state)[0]
    odd = st.sampled_from(
        [
            *odd,
            torch.empty(state[name].shape, device="meta"),
            state[name].to_sparse(),
            torch.quantize_per_tensor(state[name], 0.1, 0, torch.qint8),
            torch.nn.Parameter(state[name].clone()),
            *EVIL_THINGS,
        ]
    )
    keys = st.sampled_from([name, 0, None, ("a",), "x", "a\nb"])
    one_odd = st.builds(lambda key, thing: state | {key: thing}, keys, odd | json_values)
    whole = st.builds(saved, tensors(state) | one_odd | json_values | odd, st.booleans())
    pickled = [pickle.dumps({name: thing}) for thing in EVIL_THINGS]
    return whole | corrupted(whole) | st.sampled_from(pickled)


# --- adapters ---------------------------------------------------------------------------------

TINY = FIXTURES / "tiny"
ADAPTER = safetensors.torch.load_file(TINY / "adapter" / "adapter_model.safetensors")
# All the keys that peft knows, not only those of the file.
LORA = json.loads(json.dumps(peft.LoraConfig().to_dict(), default=list))
LORA |= json.loads((TINY / "adapter" / "adapter_config.json").read_text())
# (the file's suffix, its bytes)
adapter_weights = st.tuples(st.just("safetensors"), safetensors_files(ADAPTER))
adapter_weights |= st.tuples(st.just("bin"), bin_files(ADAPTER, HUGE))


# --- vocabularies -----------------------------------------------------------------------------

# A tokenizer.model is a message of protobuf, and so are the pieces and the two specs in it. Here a
# message is a list of (number, wire type, value). A value is an int for VARINT, otherwise bytes.
VARINT, EIGHT_BYTES, BYTES, FOUR_BYTES = 0, 1, 2, 5
PIECE, TRAINER, NORMALIZER, DENORMALIZER = 1, 2, 3, 5  # the numbers of fields of the file
TEXT, SCORE, TYPE = (1, BYTES), (2, FOUR_BYTES), (3, VARINT)  # of a piece


def varint(number):
    raw, number = bytearray(), number % 2**64
    while number > 127:
        raw.append(number % 128 + 128)
        number //= 128
    return bytes(raw) + bytes([number])


def read_varint(raw, start):
    """→ (number, where it ends)"""
    end = next(i for i in range(start, len(raw)) if raw[i] < 128) + 1
    return sum((byte % 128) << 7 * i for i, byte in enumerate(raw[start:end])), end


def as_message(fields):
    """[(number, wire type, value)] → bytes"""
    raw = b""
    for number, kind, value in fields:
        raw += varint(number << 3 | kind)
        raw += varint(len(value)) if kind == BYTES else b""
        raw += varint(value) if kind == VARINT else value
    return raw


def read_message(raw):
    """The reverse"""
    fields, i = [], 0
    while i < len(raw):
        tag, i = read_varint(raw, i)
        kind = tag % 8
        if kind == VARINT:
            value, i = read_varint(raw, i)
        else:
            size, i = read_varint(raw, i) if kind == BYTES else ({5: 4, 1: 8}[kind], i)
            value, i = raw[i : i + size], i + size
        fields.append((tag >> 3, kind, value))
    return fields


VOCABULARY = (BUILT_IN / "tokenizer.model").read_bytes()
FIELDS = read_message(VOCABULARY)
assert as_message(FIELDS) == VOCABULARY
NAMES = [read_message(value)[0][2] for number, _, value in FIELDS if number == PIECE]
# What sentencepiece reads while it encodes and decodes.
KNOWN = {
    PIECE: [TEXT, TEXT, SCORE, TYPE, TYPE, TYPE],
    # The kind of model, its size, flags such as byte_fallback; then ids and names of <unk>, <s>,
    # </s>, <pad>.
    TRAINER: [(number, VARINT) for number in (3, 3, 4, 24, 26, 35, 40, 41, 42, 43)]
    + [(number, BYTES) for number in (7, 30, 31, 36, 44, 45, 46, 47, 48)],
    NORMALIZER: [(1, BYTES), (2, BYTES), (3, VARINT), (4, VARINT), (5, VARINT), (6, BYTES)],
}
KNOWN[DENORMALIZER] = KNOWN[NORMALIZER]
odd_texts = st.sampled_from(
    [b"", b"</s>", b"<s>", b"<unk>", b"<0x0A>", b"<0x0a>", b"<0xGG>", b"<|user|>", b"[gMASK]"]
    + [b"\n", b" ", b"\0", b"\xff", b"\xe4\xbd", b"x" * 2**17, "\u2581".encode(), "é👋".encode()]
)
odd_texts |= st.sampled_from(NAMES) | st.binary(max_size=9)
odd_values = {
    VARINT: st.integers(0, 7) | st.sampled_from([1399, 1400, 2**31 - 1, 2**31, 2**63, 2**64 - 1]),
    EIGHT_BYTES: st.binary(min_size=8, max_size=8),
    BYTES: odd_texts,
    FOUR_BYTES: st.floats(width=32).map(lambda score: struct.pack("<f", score)),
}
PIECES_OF_NOTE = [0, 1, 2, 3, NAMES.index(b"<0x0A>"), NAMES.index(b"<0xFF>"), len(NAMES) - 1]
ODD_ENDS = [b"\x0b" * 9999, b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\0" * 99, b"\xff" * 99]
ODD_ENDS += [as_message([(200, BYTES, b"x" * 2**20)]), VOCABULARY]


@st.composite
def vocabularies(draw):
    """tokenizer.model with some of its pieces and settings replaced, dropped, added or moved."""
    fields = list(FIELDS)
    for _ in range(draw(st.integers(1, 4))):
        pieces = [i for i, (number, *_) in enumerate(fields) if number == PIECE] or [0]
        others = [i for i, (number, *_) in enumerate(fields) if number != PIECE] or [0]
        of_note = st.sampled_from([pieces[i % len(pieces)] for i in PIECES_OF_NOTE])
        i = draw(of_note | of_note | st.sampled_from(pieces) | st.sampled_from(others))
        if not fields:
            break
        actions = ["set", "set", "set", "set", "drop", "repeat", "move"]
        action = draw(st.sampled_from(actions))
        number, kind, value = fields[i]
        if action == "set" and number in KNOWN:
            fields[i] = (number, kind, draw(changed(value, KNOWN[number])))
        elif action == "set":
            fields[i] = (draw(st.sampled_from([*KNOWN])), kind, value)
        elif action == "repeat":
            fields.insert(draw(st.integers(0, len(fields))), fields[i])
        else:
            del fields[i]
            if action == "move":
                fields.insert(draw(st.integers(0, len(fields))), (number, kind, value))
        # The file's bytes alone would tell nobody what is wrong with it.
        now = repr(fields[i])[:200] if action == "set" else ""
        hypothesis.note(f"{action} field {i}, {(number, kind, value[:200])!r} {now}")
    if draw(st.integers(0, 9)) == 0:
        number = draw(st.sampled_from([TRAINER, NORMALIZER, DENORMALIZER]))
        fields.append((number, BYTES, draw(changed(b"", KNOWN[number]))))
    return as_message(fields) + draw(mostly(st.just(b""), st.sampled_from(ODD_ENDS)))


@st.composite
def changed(draw, raw, known):
    """A message with a field of `known`, (number, wire type), set to something odd."""
    number, kind = draw(st.sampled_from(known))
    kind = draw(mostly(st.just(kind), st.sampled_from([*odd_values])))
    fields = [field for field in read_message(raw) if field[0] != number or draw(rarely)]
    dropped = draw(rarely)
    return as_message(fields + ([] if dropped else [(number, kind, draw(odd_values[kind]))]))


rarely = mostly(st.just(False), st.just(True))


# --- a small base -----------------------------------------------------------------------------

# With the built-in model's vocabulary, but few weights, so that the commands are fast.
SMALL_CONFIG = json.loads((BUILT_IN / "config.json").read_text())
SMALL_CONFIG |= dict(num_layers=2, hidden_size=16, ffn_hidden_size=24, kv_channels=8)


def small_state():
    torch.manual_seed(0)
    return ChatGLMForCausalLM(ChatGLMConfig.from_dict(SMALL_CONFIG)).state_dict()


SMALL_STATE = small_state()


def write_small_base(directory):
    """→ directory"""
    (directory / "config.json").write_text(json.dumps(SMALL_CONFIG))
    (directory / "tokenizer.model").write_bytes(VOCABULARY)
    (directory / "model.safetensors").write_bytes(as_safetensors(SMALL_STATE))
    return directory
