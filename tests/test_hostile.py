"""Hostile input: whatever files and texts hold, what comes out is a result or a message. Nothing crashes or hangs, nothing
is run, fetched, or written where it doesn't belong.

A seeded minute as it stands. CHATGLM3_FUZZ_SECONDS=3600 python -m pytest -s tests/test_hostile.py draws fresh inputs for
that long, each test an equal share of it, and prints how many it tried.
"""

import contextlib
import copy
import functools
import inspect
import io
import json
import os
import pickle
import re
import resource
import secrets
import shutil
import signal
import sys
import time
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from conftest import FIXTURES
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import data
import infer
import model as chatglm
import train

SECONDS = float(os.environ.get("CHATGLM3_FUZZ_SECONDS", 0))


def hostile(examples, **strategies):
    """A test of that many seeded inputs; with CHATGLM3_FUZZ_SECONDS, of fresh ones until its share of the time is over."""
    profile = settings(
        max_examples=examples,
        derandomize=not SECONDS,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )

    def decorate(check):
        parameters = inspect.signature(check).parameters
        fixtures = [p for name, p in parameters.items() if name not in strategies]

        @functools.wraps(check)
        def run(request, **kwargs):
            tried, end = 0, time.monotonic() + SECONDS / request.session.testscollected

            @functools.wraps(check)
            def count_and_check(**arguments):
                nonlocal tried
                tried += 1
                check(**arguments)

            try:
                while not tried or time.monotonic() < end:
                    test = profile(given(**strategies)(count_and_check))
                    (seed(secrets.randbits(64))(test) if SECONDS else test)(**kwargs)
            finally:
                print(f"\n{check.__name__}: {tried:,} inputs tried")

        request = inspect.Parameter("request", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        run.__signature__ = inspect.Signature([request, *fixtures])
        return run

    return decorate


# --- nothing happens but reading --------------------------------------------------------------------------------------

FORBIDDEN = re.compile(r"socket\.(connect|getaddrinfo)|subprocess\.|os\.(system|exec|spawn|posix_spawn|fork|kill)")
CHANGES = re.compile(r"os\.(mkdir|remove|rename|rmdir|link|symlink|truncate|chmod)|shutil\.")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
happened, allowed = None, None  # what the audit hook saw; the directory that may be written


def audit(event, args):
    if happened is None:
        return
    bad = FORBIDDEN.match(event) or (event == "import" and "evil" in str(args[0]))
    if CHANGES.match(event) and not (
        event in ("os.remove", "os.rmdir") and args[1] != -1
    ):  # of shutil.rmtree, seen before
        bad = not all(may_be_written(path) for path in args[:2] if isinstance(path, str | bytes | os.PathLike))
    elif event == "open" and isinstance(args[2], int) and args[2] & WRITES:
        bad = not may_be_written(args[0])
    if bad:
        happened.append((event, args))


def may_be_written(path):
    path = path if isinstance(path, int) else os.path.abspath(os.fsdecode(path))
    return path == os.devnull or "__pycache__" in str(path) or (allowed and Path(path).is_relative_to(allowed))


sys.addaudithook(audit)


class TooLong(BaseException):
    """No `except Exception` stops it."""


def stop(*_):
    raise TooLong


@contextlib.contextmanager
def watched(output=None):
    """Inside, nothing is written but below `output`, nothing run, imported or fetched, and neither a minute nor 8 GiB used."""
    global happened, allowed
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, stop)
    happened, allowed = [], output
    signal.alarm(60)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**33, limits[1]))
    try:
        yield
    except TooLong:
        raise AssertionError("it takes too long") from None
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)
        seen, happened = happened, None
        assert not seen


def one_clear_line(error):
    text = str(error)
    assert text.isprintable() and 0 < len(text) < 2000, text  # so without line breaks and terminal codes
    assert "allocat" not in text and "MemoryError" not in text, "it tried to take all memory"


# --- strategies -------------------------------------------------------------------------------------------------------

unicode = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
special = [
    "<|user|>",
    "[gMASK]",
    "sop",
    "</s>",
    "<unk>",
    "<0x0A>",
    "\n",
    "\u2581",
    " ",
    "\0",
    "\ufeff",
    "\u2028",
    "é👋",
]
texts = unicode | st.lists(st.sampled_from(special) | unicode, max_size=6).map("".join)
says_something = texts.filter(str.strip)

KEYS = ["instruction", "input", "output", "conversations", "role", "content", "metadata"]
KEYS += ["instrution", "outputs", "contents", "conversation", "from", "value", "messages", "history", "id"]
TRICKS = [
    "user",
    "assistant",
    "observation",
    "../../x",
    "/etc/passwd",
    "evil",
    "evil.py",
    "\0",
    "a\nb",
    "\x1b[2J",
    "",
    " ",
]
TRICKS += [r"(\w|\w|\.)*!", "(", ".*", "all-linear", "dense", "word_embeddings", "layers", "0", "query_key_value"]
TRICKS += [
    "pissa",
    "pissa_niter_2",
    "eva",
    "olora",
    "loftq",
    "corda",
    "gaussian",
    "orthogonal",
    "mica",
    "lora_only",
    "float16",
]
TRICKS += [
    0,
    -1,
    1,
    2,
    3,
    7,
    2**31,
    2**40,
    2**63,
    2**64,
    10**400,
    0.0,
    1e308,
    float("nan"),
    float("inf"),
    True,
    False,
    None,
]
scalars = st.sampled_from(TRICKS) | st.integers() | st.floats() | st.text(max_size=20)
json_values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(KEYS + ["evil", "dense", "0"]) | st.text(max_size=9), inner, max_size=4)
    ),
    max_leaves=10,
)


def mostly(usual, odd):
    return st.integers(0, 9).flatmap(lambda n: usual if n else odd)


def places(value):
    """Every (container, key) inside a JSON value."""
    for key in range(len(value)) if isinstance(value, list) else value if isinstance(value, dict) else ():
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


@st.composite
def corrupted(draw, raw):
    """Bytes, cut short, changed here and there, or with a piece inserted."""
    raw = bytearray(draw(raw))
    at = st.integers(0, 2**30) | st.integers(0, 400)  # a file's start says what the rest is
    for _ in range(draw(st.integers(1, 3))):
        i = draw(at) % (len(raw) + 1)  # not drawn from the length: torch.save's varies by a byte or two
        action = draw(st.sampled_from(["cut", "flip", "insert"]))
        if action == "cut":
            del raw[i:]
        else:
            raw[i : i + (action == "flip")] = draw(st.binary(min_size=1, max_size=9))
    return bytes(raw)


@st.composite
def conversations(draw):
    """Messages in an allowed order."""
    roles = (
        draw(st.sampled_from(["", "s"]))
        + "ua"
        + "".join(draw(st.lists(st.sampled_from(["a", "ua", "oa"]), max_size=3)))
    )
    messages = []
    for role in (next(name for name in data.ROLES if name[0] == initial) for initial in roles):
        messages.append({"role": role, "content": draw(says_something if role in ("user", "assistant") else texts)})
        if draw(st.booleans()):
            messages[-1]["metadata"] = draw(texts).replace("\n", "")
    return messages


turns = st.fixed_dictionaries(
    {"instruction": texts, "output": says_something}, optional={"input": texts, "id": scalars}
)
turns = turns.filter(lambda turn: (turn["instruction"] + turn.get("input", "")).strip())
records = turns | conversations().map(lambda messages: {"conversations": messages})


def messages_of(record):
    if "conversations" in record:
        return record["conversations"]
    question = "\n".join(text for text in (record["instruction"], record.get("input", "")) if text)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": record["output"]}]


@st.composite
def files(draw, records):
    """Records as a JSON list or JSONL."""
    records = draw(st.lists(records, min_size=1, max_size=4))
    ascii, breaks = draw(st.booleans()), draw(st.sampled_from(["\n", "\r\n", "\n\n"]))
    if draw(st.booleans()):
        text = json.dumps(records, ensure_ascii=ascii, indent=draw(st.none() | st.integers(0, 2)))
    else:
        text = breaks.join(json.dumps(record, ensure_ascii=ascii) for record in records)
    return records, (draw(st.sampled_from(["", "\ufeff"])) + text).encode("utf-8", "surrogatepass")


encoded_odd = st.tuples(
    files(damaged(records)), st.sampled_from(["utf-16", "gbk", "utf-8"]), st.sampled_from("\r\u2028\0")
)
odd_files = st.one_of(
    st.binary(max_size=60),
    files(json_values).map(lambda pair: pair[1]),
    files(damaged(records)).map(lambda pair: pair[1]),
    files(records | damaged(records) | json_values).map(lambda pair: pair[1]),
    corrupted(files(records).map(lambda pair: pair[1])),
    encoded_odd.map(lambda t: t[0][1].decode("utf-8", "replace").replace("\n", t[2]).encode(t[1], "replace")),
    st.integers(1, 5000).map(lambda n: b'{"a":' * n + b"1" + b"}" * n),
    st.integers(1, 6000).map(lambda n: b'[{"instruction": ' + b"9" * n + b"}]"),
)


# --- data files and conversations -------------------------------------------------------------------------------------


@hostile(700, raw=odd_files, prompts=st.booleans())
def test_a_data_file_gives_conversations_or_faults_with_their_place(tmp_path, raw, prompts):
    """DataError's every line names the file; what is returned keeps the order of roles and has text where it must."""
    file = tmp_path / "x.json"
    file.write_bytes(raw)
    try:
        with watched():
            found = data.read_records([file], prompts)
    except data.DataError as error:
        lines = str(error).split("\n")
        assert len(lines) <= 21 and all(line.startswith(str(file)) and line.isprintable() for line in lines)
        return
    assert found
    for place, record, messages in found:
        assert place.startswith(str(file)) and isinstance(record, dict)
        roles = "".join(message["role"][0] for message in messages)
        assert re.fullmatch("s?u(a|au|ao)*" if prompts else "s?ua(a|ua|oa)*", roles)
        for message in messages:
            assert message["role"] in data.ROLES and "\n" not in message.get("metadata", "")
            assert message["content"].strip() or message["role"] in ("system", "observation")
            (message["content"] + message.get("metadata", "")).encode("utf-8")


@hostile(300, pair=files(records))
def test_a_valid_file_is_read_back_exactly(tmp_path, pair):
    """JSON or JSONL, either kind of record, escaped or not: nothing is lost or changed."""
    (tmp_path / "x").write_bytes(pair[1])
    assert [messages for _, messages in data.read_conversations([tmp_path / "x"])] == list(map(messages_of, pair[0]))


@pytest.fixture(params=["tokenizer", "official_tokenizer"])
def vocabulary(request):
    return request.getfixturevalue(request.param)


def shown(text):
    """What decoding gives back: everything, but sentencepiece's sign for a space is a space."""
    return text.replace("\u2581", " ")


@hostile(400, text=texts, ids=st.lists(st.integers(-9, 70000), max_size=20))
def test_text_comes_back_and_never_gives_special_ids(vocabulary, text, ids):
    """decode(encode(text)) is the text, but U+2581, sentencepiece's sign for a space, is one; any ids at all decode."""
    encoded = vocabulary.encode(text)
    assert vocabulary.decode(encoded) == shown(text)
    assert all(2 < id < vocabulary.pieces.get_piece_size() for id in encoded)
    assert isinstance(vocabulary.decode(ids), str)


@hostile(250, messages=conversations())
def test_a_conversation_s_ids_and_labels(vocabulary, messages):
    """A role id a message, one end; labels are exactly what follows each prompt, and decode to what the assistant says."""
    ids, labels = data.encode_conversation(vocabulary, messages)
    assert len(ids) == len(labels)
    specials = [vocabulary.names[id] for id in ids if id in vocabulary.names]
    assert specials == ["[gMASK]", "sop", *(f"<|{message['role']}|>" for message in messages)]
    assert ids.index(vocabulary.eos_id) == len(ids) - 1
    wanted = [data.IGNORE] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = data.encode_prompt(vocabulary, messages[:i])
            start, end = len(prompt), len(data.encode_conversation(vocabulary, messages[: i + 1])[0])
            assert ids[:start] == prompt
            wanted[start:end] = ids[start:end]  # with the token that ends the turn
            said = data.split_answer(vocabulary, ids[start : end - 1])
            assert said == (shown(message.get("metadata", "")).strip(), shown(message["content"]).rstrip("\ufffd"))
    assert labels == wanted
    learnt = [part.split("⟧")[0] for part in data.render(vocabulary, ids, labels).split("⟦")[1:]]
    assert learnt or any("⟦" in message["content"] for message in messages)


@hostile(150, pair=files(records), max_length=st.integers(1, 120), system=st.none() | texts)
def test_what_a_length_budget_cuts_and_drops(tmp_path, tokenizer, pair, max_length, system):
    """The dataset is the encoded file cut to any length, and counts what it cut and dropped."""
    (tmp_path / "x").write_bytes(pair[1])
    wanted, cut = [], 0
    for messages in map(messages_of, pair[0]):
        if system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        ids, labels = data.encode_conversation(tokenizer, messages)
        if set(labels[:max_length]) != {data.IGNORE}:
            wanted.append((ids[:max_length], labels[:max_length]))
            cut += len(ids) > max_length
    if not wanted:
        with pytest.raises(data.DataError, match="no sample has a token to learn"):
            data.ConversationDataset([tmp_path / "x"], tokenizer, max_length, system)
        return
    dataset = data.ConversationDataset([tmp_path / "x"], tokenizer, max_length, system)
    assert [tuple(tensor.tolist() for tensor in sample) for sample in dataset] == wanted
    assert (dataset.cut, dataset.dropped) == (cut, len(pair[0]) - len(wanted))
    assert dataset.lengths == [len(ids) for ids, _ in wanted]


tokens = st.lists(st.tuples(st.integers(0, 70000), st.booleans()), min_size=1, max_size=40)


@hostile(200, samples=st.lists(tokens, min_size=1, max_size=6), common=st.lists(st.integers(0, 9), max_size=20))
def test_a_padded_batch_holds_its_samples_and_predicts_the_next_token(samples, common):
    """With what all begin with put back, and the padding taken off, it is the samples; positions and targets are a shift by
    one, written out."""
    pairs = [([id for id, _ in s], [id if learnt else data.IGNORE for id, learnt in s]) for s in samples]
    pairs = [(common + ids, [data.IGNORE] * len(common) + labels) for ids, labels in pairs]
    batch = data.collate([(torch.tensor(ids), torch.tensor(labels)) for ids, labels in pairs], len(common))
    shared = len(common) if len(samples) > 1 else 0
    rows, rest = batch["input_ids"].shape
    length, longest = shared + rest, max(len(ids) for ids, _ in pairs)
    assert rows == len(samples) and length % 8 == 0 and length - 8 < longest <= length
    assert batch["prefix"].tolist() == common[:shared]
    for row, (ids, _) in zip(batch["input_ids"].tolist(), pairs, strict=True):
        assert common[:shared] + row == ids + [0] * (length - len(ids))
    computed = batch["prefix"].tolist() + batch["input_ids"].flatten().tolist()
    wanted = []
    for r, (ids, labels) in enumerate(pairs):
        for t in range(1, len(ids)):
            if labels[t] >= 0:
                place = t - 1 if t - 1 < shared else r * rest + t - 1
                assert computed[place] == ids[t - 1]
                wanted.append((place, labels[t]))
    found = list(zip(batch["positions"].tolist(), batch["targets"].tolist(), strict=True))
    assert found == wanted + [(0, data.IGNORE)] * (-len(wanted) % 128)


numbers = st.integers(0, 2**70)


@hostile(
    150,
    lengths=st.lists(st.integers(1, 99), max_size=300),
    size=st.integers(1, 40),
    seed=numbers,
    window=st.integers(1, 60),
)
def test_an_epoch_has_every_sample_once(lengths, size, seed, window):
    """The order is a permutation, in whole batches but one a window, and the same again."""
    batches = data.batch_order(lengths, size, seed, 1, window)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    sizes = {len(batch) for batch in batches}
    assert (
        len(batches) == -(-len(lengths) // size)
        and len(sizes) < 3
        and max(sizes, default=0) - min(sizes, default=0) < 2
    )
    assert batches == data.batch_order(lengths, size, seed, 1, window)


# --- adapters and checkpoints -----------------------------------------------------------------------------------------

TINY, IDS = FIXTURES / "tiny", torch.arange(3, 9)[None]
ADAPTER, WEIGHTS = (
    safetensors.torch.load_file(TINY / name) for name in ("adapter/adapter_model.safetensors", "model.safetensors")
)
LORA = json.loads((TINY / "adapter/adapter_config.json").read_text())
LORA = json.loads(json.dumps(chatglm.LoraConfig().to_dict(), default=list)) | LORA  # all the keys that peft knows
CONFIG = json.loads((TINY / "config.json").read_text())
DTYPES = "float64 float16 bfloat16 float8_e4m3fn float8_e5m2 int64 int8 uint16 bool complex64".split()


class Evil:
    """Unpickling it is noticed."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


EVIL = [
    (open, ("ran", "w")),
    (os.system, ("true",)),
    (exec, ("import evil",)),
    (__import__, ("evil",)),
    (os.mkdir, ("ran",)),
]


@st.composite
def tensors(draw, state):
    """Tensors, some of them renamed, dropped, added, reshaped or of another dtype."""
    state = dict(state)
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(sorted(state)))
        other = draw(
            st.sampled_from([*sorted(state), "../../x", "a\nb", "", name.replace("layers.0", "layers.99")]) | st.text()
        )
        action = draw(st.sampled_from(["drop", "rename", "add", "reshape", "dtype", "dtype", "values"]))
        if action == "dtype":
            state[name] = state[name].to(getattr(torch, draw(st.sampled_from(DTYPES))))
        elif action == "reshape":
            state[name] = torch.zeros(draw(st.lists(st.integers(0, 70), max_size=3)))
        elif action == "values":
            state[name] = torch.full(state[name].shape, draw(st.sampled_from([0, 1e38, torch.nan, torch.inf])))
        elif action != "add" or len(state) > 1:
            state[other] = state[name].clone()
            if action != "add":
                del state[name if action == "rename" else other]
        if not state:
            return {}
    return state


def with_header(raw, header):
    """A safetensors file with another header: bytes, or a length that isn't there."""
    if isinstance(header, int):
        return header.to_bytes(8, "little") + raw[8:]
    return len(header).to_bytes(8, "little") + header + raw[8 + int.from_bytes(raw[:8], "little") :]


def safetensors_files(state):
    whole = st.just(safetensors.torch.save(state, {"format": "pt"}))
    header = json.loads(safetensors.torch.save(state, {"format": "pt"})[8:].split(b"}}")[0] + b"}}")
    lengths = st.sampled_from([0, 2, 2**20, 2**27, 2**40, 2**62, 2**63, 2**64 - 1])
    return st.one_of(
        tensors(state).map(lambda state: safetensors.torch.save(state, {"format": "pt"})),
        corrupted(whole),
        st.builds(with_header, whole, lengths | damaged(st.just(header)).map(lambda h: json.dumps(h).encode())),
        st.binary(max_size=40),
    )


def saved(value, zipped=True):
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def bin_files(state, *odd):
    """torch.save's files, of tensors, other things, and things that do something when they are unpickled."""
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
    states = (
        tensors(state) | st.builds(lambda key, thing: state | {key: thing}, keys, odd | json_values) | json_values | odd
    )
    zipped = st.builds(saved, states, st.booleans())
    return zipped | corrupted(zipped) | st.sampled_from([pickle.dumps({name: thing}) for thing in EVIL_THINGS])


HUGE = torch.zeros(1, dtype=torch.float16).expand(2**20, 2**20)  # a few bytes in the file
EVIL_THINGS = [Evil(*call) for call in EVIL]
adapter_weights = st.tuples(st.just("safetensors"), safetensors_files(ADAPTER)) | st.tuples(
    st.just("bin"), bin_files(ADAPTER, HUGE)
)
texts_of_json = st.builds(json.dumps, json_values) | st.text(max_size=9)
deep = st.integers(1, 5000).map(lambda n: '{"r":' * n)


@pytest.fixture(scope="module")
def pristine():
    chatglm.quiet_libraries()
    return chatglm.load_model(TINY, "cpu")


def fresh(directory):
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    return directory


def loads_or_refuses(load):
    """The model that `load` gives computes logits, merged too, or ValueError says in one line why there is none."""
    try:
        with watched(), torch.no_grad():
            model = load()
            assert model(input_ids=IDS).logits.shape == (1, 6, 512)
            if isinstance(model, peft.PeftModel):
                assert model.merge_and_unload()(IDS).logits.shape == (1, 6, 512)
    except ValueError as error:
        one_clear_line(error)


@hostile(400, weights=adapter_weights)
def test_an_adapter_s_weights(tmp_path, pristine, weights):
    """Tensors of other names, shapes and dtypes, damaged files, pickles: logits or one line."""
    directory = fresh(tmp_path / "adapter")
    (directory / f"adapter_model.{weights[0]}").write_bytes(weights[1])
    (directory / "adapter_config.json").write_text(json.dumps(LORA))
    loads_or_refuses(lambda: chatglm.load_adapter(copy.deepcopy(pristine), directory))


@hostile(700, config=mostly(damaged(st.just(LORA)).map(json.dumps), texts_of_json | deep))
def test_an_adapter_s_configuration(tmp_path, pristine, config):
    """Any value for any key that peft knows: logits or one line."""
    directory = fresh(tmp_path / "adapter")
    shutil.copy(TINY / "adapter" / "adapter_model.safetensors", directory)
    (directory / "adapter_config.json").write_text(config)
    loads_or_refuses(lambda: chatglm.load_adapter(copy.deepcopy(pristine), directory))


def copy_of_checkpoint(directory):
    fresh(directory)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    safetensors.torch.save_file(WEIGHTS, directory / "model.safetensors", {"format": "pt"})
    return directory


@hostile(300, config=mostly(damaged(st.just(CONFIG)).map(json.dumps), texts_of_json | deep))
def test_a_checkpoint_s_configuration(tmp_path, config):
    """Any value for any key: logits or one line."""
    directory = copy_of_checkpoint(tmp_path / "base")
    (directory / "config.json").write_text(config)
    loads_or_refuses(lambda: chatglm.load_model(directory, "cpu"))
    loads_or_refuses(lambda: chatglm.ChatGLMForCausalLM.from_pretrained(directory))


checkpoint_weights = st.tuples(st.just("model.safetensors"), safetensors_files(WEIGHTS))
checkpoint_weights |= st.tuples(st.just("pytorch_model.bin"), bin_files(WEIGHTS))


@hostile(200, weights=checkpoint_weights)
def test_a_checkpoint_s_weights(tmp_path, weights):
    """As of an adapter."""
    directory = copy_of_checkpoint(tmp_path / "base")
    (directory / "model.safetensors").unlink()
    (directory / weights[0]).write_bytes(weights[1])
    loads_or_refuses(lambda: chatglm.load_model(directory, "cpu"))


@hostile(
    100,
    index=damaged(st.just({"metadata": {}, "weight_map": {name: "model-1.safetensors" for name in WEIGHTS}}), most=1),
)
def test_a_checkpoint_s_index(tmp_path, index):
    """Any value in it; no file that isn't beside it is read, even if it would do."""
    directory = copy_of_checkpoint(tmp_path / "base")
    shutil.copy(directory / "model.safetensors", tmp_path / "x")
    (directory / "model.safetensors").rename(directory / "model-1.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    loads_or_refuses(lambda: chatglm.load_model(directory, "cpu"))


lora = dict(r=st.integers(1, 9), alpha=st.floats(0, 99), modules_to_save=st.none() | st.just(["output_layer"]))
linear = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "word_embeddings", "1.mlp.dense_4h_to_h"]
lora["target_modules"] = st.lists(st.sampled_from(linear), min_size=1, unique=True) | st.just(
    r".*\.[02]\..*(dense|value)"
)


@hostile(60, arguments=st.fixed_dictionaries(lora), salt=st.integers(0, 2**32))
def test_an_adapter_that_was_saved_loads_as_it_was(tmp_path, pristine, arguments, salt):
    """Whatever it adapts: the same logits bit for bit, and the same files when it is saved again."""
    torch.manual_seed(salt)
    trained = chatglm.add_lora(copy.deepcopy(pristine), dropout=0.0, **arguments).eval()
    with torch.no_grad():
        for param in trained.parameters():
            param += 0.01 * param.requires_grad
        chatglm.save_adapter(trained, fresh(tmp_path / "a"))
        loaded = chatglm.load_adapter(copy.deepcopy(pristine), tmp_path / "a")
        assert torch.equal(loaded(input_ids=IDS).logits, trained(input_ids=IDS).logits)
        chatglm.save_adapter(loaded, fresh(tmp_path / "b"))
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


VOCABULARY = (chatglm.TINY / "tokenizer.model").read_bytes()
parts = [
    b"</s>",
    b"<unk>",
    b"<0x0A>",
    b"<s>",
    b"\x18\x06",
    b"\x18\x03",
    b"\x18\x02",
    "\u2581".encode(),
]  # 18: a piece's kind
bits = st.sampled_from([b"a", b"<", b"\0", b"\x18\x01", b"\x18\x04", b"\x18\x05", b"\xff"])
edits = st.tuples(st.sampled_from(parts), bits, st.integers(-1, 3))
edited = edits.map(lambda e: VOCABULARY.replace(e[0], (e[1] * len(e[0]))[: len(e[0])], e[2]))


@hostile(150, raw=corrupted(st.just(VOCABULARY)) | edited | st.binary(max_size=20), text=texts)
def test_a_vocabulary_s_file(tmp_path, raw, text):
    """It encodes without a special id, or one line says why it can't be used."""
    (tmp_path / "tokenizer.model").write_bytes(raw)
    try:
        with watched():
            vocabulary = data.ChatGLMTokenizer(tmp_path)
            ids = vocabulary.encode(text)
            assert isinstance(vocabulary.decode(ids), str) and not {-1, vocabulary.eos_id, *vocabulary.names} & set(ids)
    except ValueError as error:
        one_clear_line(error)


# --- the commands -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def little(tmp_path_factory):
    """A base with a vocabulary that fits it, and its adapter's directory."""
    directory = tmp_path_factory.mktemp("little")
    base = chatglm.load_model(chatglm.tiny_model(), "cpu")
    chatglm.save_adapter(chatglm.add_lora(base, 8, 32, 0.0, ["query_key_value"]), directory)
    return directory


def runs_or_refuses(main, arguments, capsys, output=None):
    """The command ends well, or with exit code 2 and lines that begin with its name; → those."""
    capsys.readouterr()
    try:
        with watched(output):
            main([str(argument) for argument in arguments])
    except SystemExit as ended:
        assert ended.code == 2
        lines = capsys.readouterr().err.split("\n")
        more = ("built-in tiny model", "(see its SHA256SUMS): skipped", "%|")  # what stands beside the error
        lines = [line for line in lines if not any(text in line for text in more)]
        assert lines and lines.pop() == ""
        assert all(re.match(r"(train|infer)\.py: error: .", line) and line.isprintable() for line in lines)
        return lines
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@hostile(40, raw=odd_files | files(records).map(lambda pair: pair[1]), system=st.none() | texts)
def test_train_py_on_a_data_file(tmp_path, little, capsys, raw, system):
    """It trains or says what is wrong with the file, and writes into its output directory only."""
    (tmp_path / "x").write_bytes(raw)
    arguments = [
        "--data",
        tmp_path / "x",
        "--max-steps",
        1,
        "--device",
        "cpu",
        "--overwrite",
        "--output-dir",
        tmp_path / "out",
    ]
    arguments += [] if system is None else [f"--system={system}"]
    if lines := runs_or_refuses(train.main, arguments, capsys, tmp_path / "out"):
        assert len(lines) <= 21


TINY_LORA = LORA | {"base_model_name_or_path": str(chatglm.TINY)}
no_hub = damaged(st.just(TINY_LORA)).filter(
    lambda config: not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(config.get("base_model_name_or_path")))
)
config_texts = st.one_of(st.just(json.dumps(TINY_LORA)), no_hub.map(json.dumps), texts_of_json)
notes = damaged(st.just({"system": "s", "base": {"shape": {}, "vocabulary": None}})).map(json.dumps) | texts_of_json


@hostile(
    150,
    config=config_texts,
    weights=mostly(st.none(), adapter_weights),
    notes=mostly(st.none(), notes),
    base=st.booleans(),
)
def test_infer_py_on_an_adapter(tmp_path, little, capsys, config, weights, notes, base):
    """It answers, or says in one line what is wrong with the adapter, and writes nothing."""
    directory = fresh(tmp_path / "adapter")
    shutil.copy(little / "adapter_model.safetensors", directory)
    (directory / "adapter_config.json").write_text(config)
    if weights:
        (directory / "adapter_model.safetensors").unlink()
        (directory / f"adapter_model.{weights[0]}").write_bytes(weights[1])
    if notes:
        (directory / "training_args.json").write_text(notes)
    arguments = ["--adapter", directory, "--prompt", "q", "--greedy", "--max-new-tokens", 2, "--device", "cpu"]
    lines = runs_or_refuses(infer.main, [*arguments, *(["--model", chatglm.TINY] if base else [])], capsys)
    assert lines is None or len(lines) == 1


@hostile(40, raw=odd_files | files(records).map(lambda pair: pair[1]), output=st.binary(max_size=20))
def test_infer_py_on_a_batch_file(tmp_path, little, capsys, raw, output):
    """Each record has its answer, or the command says what is wrong with the file."""
    (tmp_path / "x").write_bytes(raw)
    (tmp_path / "y").write_bytes(output)
    arguments = ["--adapter", little, "--model", chatglm.TINY, "--input", tmp_path / "x", "--output", tmp_path / "y"]
    arguments += ["--greedy", "--max-new-tokens", 2, "--device", "cpu"]
    if not runs_or_refuses(infer.main, arguments, capsys, tmp_path / "y"):
        records = [record for _, record, _ in data.read_records([tmp_path / "x"], prompts=True)]
        answers = [json.loads(line) for line in (tmp_path / "y").read_bytes().split(b"\n")[:-1]]
        assert len(answers) == len(records) and all(isinstance(line["prediction"], str) for line in answers)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The output directory of a run that was killed after the first of its two updates."""
    directory = tmp_path_factory.mktemp("stopped") / "out"
    train.main([*ONE_MORE, "--output-dir", str(directory)])
    shutil.rmtree(directory / "checkpoint-2")
    return directory


ONE_MORE = (
    "--max-steps 2 --save-steps 1 --device cpu --batch-size 1 --lora-r 1 --target-modules query_key_value".split()
)


@hostile(
    40, draw=st.data(), name=st.sampled_from([*train.WHOLE, *train.STATE]), sums=mostly(st.just(True), st.just(False))
)
def test_train_py_on_a_checkpoint(tmp_path, stopped, capsys, draw, name, sums):
    """With a file of it changed, and its sum too, mostly: it continues, or says in one line why it doesn't."""
    directory = tmp_path / "out"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(stopped, directory)
    file = directory / "checkpoint-1" / name
    raw = file.read_bytes()
    if file.suffix == ".safetensors":
        raw = draw.draw(safetensors_files(safetensors.torch.load(raw)))
    elif file.suffix == ".json":
        raw = draw.draw(damaged(st.just(json.loads(raw))).map(json.dumps) | texts_of_json | deep).encode()
    else:
        raw = draw.draw(corrupted(st.just(raw)))
    file.write_bytes(raw)
    if sums:
        lines = (f"{train.sha256((file.parent / name).read_bytes())}  {name}\n" for name in train.WHOLE)
        (file.parent / "SHA256SUMS").write_text("".join(lines))
    lines = runs_or_refuses(train.main, [*ONE_MORE, "--output-dir", directory, "--resume"], capsys, directory)
    assert lines is None or len(lines) == 1
