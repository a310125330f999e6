"""Every common format of data: read back exactly, nothing dropped in silence, no traceback.

A conversation is drawn first. A function for each format then writes it as a record. What the
messages must be is written out here, from the specification of the formats.

python -m pytest -q tests/fuzz/test_fuzz_formats.py
"""

import copy
import csv
import io
import json
from dataclasses import dataclass

import pytest
from conftest import read_conversations
from hostile import hostile, watched
from hypothesis import strategies as st

import data
from data import IGNORE
from support.errors import DataError
from support.records import RecordReader

# --- what is drawn ----------------------------------------------------------------------------

SPECIAL = ["\n", '"', "'", "\\", "`", "```", "```python\n", "\r\n", "\t", " ", "\0", "\u2028"]
SPECIAL += [",", "，", "é👋", "\ufeff", "<|user|>", "{}", "[]", "null", "\\u4f60", "\x1b[2J"]
unicode = st.text(max_size=8)  # without halves of surrogate pairs
texts = unicode | st.builds("{}{}{}".format, unicode, st.sampled_from(SPECIAL), unicode)
some_text = texts.filter(str.strip)
lines = texts.map(lambda text: text.replace("\n", "")).filter(str.strip)
numbers = st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)


def has_typed_parts(value):
    """Whether a list looks like OpenAI's parts, which are joined or refused."""
    return isinstance(value, list) and any(isinstance(p, dict) and "type" in p for p in value)


results = texts | json_values.filter(lambda v: v is not None and not has_typed_parts(v))


@dataclass
class Text:
    role: str
    content: str
    metadata: str = ""
    is_learnt: bool = True


@dataclass
class Calls:
    """Calls of one assistant's turn: [(name, arguments, result)], perhaps after a text."""

    text: str
    calls: list
    is_learnt: bool
    has_results: bool = True  # only one call at the end of a conversation may have none


@dataclass
class Conversation:
    tools: object
    system: str
    turns: list


HEADER = (
    "Answer the following questions as best as you can. You have access to the following tools:\n"
)


def messages_of(conversation, with_last_question=False):
    """What a conversation means, from the specification."""
    messages = []
    if tools := conversation.tools:
        listed = (
            tools if isinstance(tools, str) else json.dumps(tools, indent=4, ensure_ascii=False)
        )
        messages.append({"role": "system", "content": HEADER + listed})
    if conversation.system:
        messages.append({"role": "system", "content": conversation.system})
    for turn in conversation.turns:
        loss = {} if turn.role != "assistant" or turn.is_learnt else {"loss": False}
        if isinstance(turn, Text):
            metadata = {"metadata": turn.metadata} if turn.metadata else {}
            messages.append({"role": turn.role, "content": turn.content} | metadata | loss)
            continue
        if turn.text:
            messages.append({"role": "assistant", "content": turn.text} | loss)
        for name, arguments, result in turn.calls:
            given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
            content = "```python\n" + f"tool_call({given})" + "\n```"
            messages.append({"role": "assistant", "metadata": name, "content": content} | loss)
            if turn.has_results:
                is_text = isinstance(result, str)
                observed = result if is_text else json.dumps(result, ensure_ascii=False)
                messages.append({"role": "observation", "content": observed})
    if messages[-1]["role"] == "user" and not with_last_question:
        messages.pop()
    return messages


Calls.role = "assistant"

flags = st.booleans()
rarely = st.sampled_from([False] * 5 + [True])


@st.composite
def conversations(draw, some_text=some_text, lines=lines, results=results, values=json_values):
    """Only what every rule of the specification allows."""
    tool = st.fixed_dictionaries({"name": lines}, optional={"description": some_text, "x": values})
    tools = draw(st.just([]) | st.lists(tool, max_size=2) | some_text.map("tool: {}".format))
    turns = []
    called = st.tuples(lines, st.dictionaries(some_text, values, max_size=3), results)

    def add(role):
        learnt = role != "assistant" or not draw(rarely)
        turns.append(Text(role, draw(some_text), draw(lines) if draw(rarely) else "", learnt))

    def add_calls(at_least=1):
        calls = draw(st.lists(called, min_size=1, max_size=3))
        turns.append(Calls(draw(some_text) if draw(flags) else "", calls, not draw(rarely)))

    if draw(rarely):
        add("assistant")  # a greeting
    for _ in range(draw(st.integers(1, 3))):
        add("user")
        for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
            add_calls()
        add("assistant")
    end = draw(st.sampled_from(["answer"] * 4 + ["question", "call", "result"]))
    if end == "question":
        add("user")
    elif end != "answer":
        add("user")
        add_calls()
        if end == "call":
            turns[-1].has_results, turns[-1].calls = False, turns[-1].calls[:1]
    if not any(turn.role == "assistant" and turn.is_learnt for turn in turns):
        next(turn for turn in turns if turn.role == "assistant").is_learnt = True
    return Conversation(tools, draw(some_text) if draw(flags) else "", turns)


# --- what is written: functions (draw, conversation) → a record --------------------------------


class AsJson(dict):
    """An object that is written as a text of JSON, once the record is complete."""


def finished(value):
    """A record with its AsJson as texts."""
    if isinstance(value, list):
        return [finished(each) for each in value]
    if not isinstance(value, dict):
        return value
    plain = {key: finished(each) for key, each in value.items()}
    return json.dumps(plain, ensure_ascii=len(plain) % 2) if isinstance(value, AsJson) else plain


def either(draw, value):
    """An object, or the text of it."""
    return AsJson(value) if draw(flags) else value


def nothing(draw, key):
    """A key without a value: absent, null or empty."""
    return draw(st.sampled_from([{}, {key: None}, {key: ""}]))


def tools_of(draw, conversation):
    """`tools` as a key: a list, or the text of it."""
    tools = conversation.tools
    if not tools:
        return draw(st.sampled_from([{}, {"tools": []}, {"tools": None}, {"tools": "[]"}]))
    return {"tools": tools if isinstance(tools, str) or draw(flags) else json.dumps(tools)}


def is_flat(conversation):
    """Whether it is questions and answers, one after the other, and nothing else."""
    turns = conversation.turns
    roles = [turn.role for turn in turns]
    plain = all(isinstance(turn, Text) and not turn.metadata for turn in turns)
    return plain and roles == ["user", "assistant"] * (len(turns) // 2)


def flat(draw, conversation):
    """instruction, input, output; prompt, response; query, response; with system and history."""
    *before, question, answer = conversation.turns
    keys = [("instruction", "output"), ("prompt", "response"), ("query", "response")]
    ask, reply = draw(st.sampled_from(keys))
    first, _, second = question.content.partition("\n")
    record = {ask: question.content} | nothing(draw, "input")
    if first and second and draw(flags):
        record = {ask: first, "input": second}
    elif draw(flags):
        record = {ask: draw(st.sampled_from(["", None])), "input": question.content}
    record[reply] = answer.content
    has_system = conversation.system
    record |= {"system": has_system} if has_system else nothing(draw, "system")
    pairs = [[before[i].content, before[i + 1].content] for i in range(0, len(before), 2)]
    none = [{}, {"history": None}, {"history": []}]
    record |= {"history": pairs} if pairs else draw(st.sampled_from(none))
    return record | tools_of(draw, conversation)


def loss_of(draw, turn):
    """loss or weight of a turn."""
    if turn.role == "assistant" and turn.is_learnt:
        return draw(st.sampled_from([{}, {}, {"loss": True}, {"weight": 1}, {"loss": None}]))
    zero = [{"loss": False}, {"weight": 0}, {"loss": False, "weight": 0}]
    return draw(st.sampled_from(zero if turn.role == "assistant" else [{}, {}, *zero]))


def conversation_record(draw, conversation, turns, role, content):
    """The record of a list of turns. System message and tools: beside the list or in it."""
    record, first = {}, []
    tools, system = tools_of(draw, conversation), conversation.system
    beside = draw(flags)
    if system and not beside:
        first = [{role: "system", content: system}]
    elif system:
        record = {"system": system}
    if "tools" in tools and draw(flags):
        text = draw(st.sampled_from([{}, {content: ""}, {content: None}, {content: HEADER}]))
        if first and draw(flags):
            first[0] |= tools
        else:
            first.insert(draw(st.integers(0, len(first))), {role: "system"} | text | tools)
            if not conversation.tools and text.get(content):
                del first[[*map(lambda t: t.get(content), first)].index(HEADER)]
    else:
        record |= tools
    return record | {draw(st.sampled_from(["conversations", "messages"])): first + turns}


def text_turn(draw, turn, name, role, content):
    metadata = {"metadata": turn.metadata} if turn.metadata else {}
    return {role: name, content: turn.content} | metadata | loss_of(draw, turn)


def sharegpt(draw, conversation, role="from", content="value"):
    """from, value; function_call and observation."""
    turns = []
    for turn in conversation.turns:
        if isinstance(turn, Text):
            names = {"user": ["human", "user"], "assistant": ["gpt", "assistant"]}[turn.role]
            turns.append(text_turn(draw, turn, draw(st.sampled_from(names)), role, content))
            continue
        if turn.text:
            turns.append({role: "gpt", content: turn.text} | loss_of(draw, turn))
        for name, arguments, result in turn.calls:
            call = {"name": name, "arguments": either(draw, arguments)}
            if not arguments and draw(flags):
                del call["arguments"]
            call = either(draw, call)
            turns.append({role: "function_call", content: call} | loss_of(draw, turn))
            names = ["observation", "tool", "function", "function_response"]
            if turn.has_results:
                turns.append({role: draw(st.sampled_from(names)), content: result})
    return conversation_record(draw, conversation, turns, role, content)


def parts(draw, text):
    """A text, or OpenAI's list of its parts."""
    if not draw(flags):
        return text
    cut = draw(st.integers(0, len(text)))
    return [{"type": "text", "text": part} for part in (text[:cut], text[cut:])]


def openai(draw, conversation):
    """messages with tool_calls, several in one turn, and their results in any order."""
    turns, number = [], 0
    for turn in conversation.turns:
        if isinstance(turn, Text):
            turns.append(text_turn(draw, turn, turn.role, "role", "content"))
            turns[-1]["content"] = parts(draw, turn.content)
            continue
        calls, observed = [], []
        has_ids = draw(st.sampled_from([True, True, False]))
        for name, arguments, result in turn.calls:
            number += 1
            function = {"name": name, "arguments": either(draw, arguments)}
            id = {"id": f"call_{number}"} if has_ids else {}
            calls.append({"type": "function", "function": function} | id)
            result = parts(draw, result) if isinstance(result, str) else result
            pair = {"tool_call_id": f"call_{number}"} if has_ids else {}
            observed.append({"role": "tool", "content": result} | pair)
        none = [{}, {"content": None}, {"content": ""}]
        text = {"content": parts(draw, turn.text)} if turn.text else draw(st.sampled_from(none))
        said = {"role": "assistant"} | text | loss_of(draw, turn)
        if len(calls) == 1 and not has_ids and draw(flags):
            turns.append(said | {"function_call": calls[0]["function"]})
            observed[0]["role"] = "function"
        else:
            turns.append(said | {"tool_calls": calls})
        if turn.has_results:
            turns += draw(st.permutations(observed)) if has_ids else observed
    return conversation_record(draw, conversation, turns, "role", "content")


def official(draw, conversation):
    """The official guide's turns of a tool: a call and its observation in one."""
    turns = []
    for turn in conversation.turns:
        if isinstance(turn, Text):
            turns.append(text_turn(draw, turn, turn.role, "role", "content"))
            continue
        if turn.text:
            turns.append({"role": "assistant", "content": turn.text} | loss_of(draw, turn))
        for name, arguments, result in turn.calls:
            tool = {"role": "tool", "name": name, "parameters": either(draw, arguments)}
            turns.append(tool | {"observation": result} | loss_of(draw, turn))
    return conversation_record(draw, conversation, turns, "role", "content")


def native(draw, conversation):
    """role, content, metadata, loss: the messages themselves."""
    messages = copy.deepcopy(messages_of(conversation, with_last_question=True))
    return {draw(st.sampled_from(["conversations", "messages"])): messages}


@st.composite
def written(draw, conversations):
    """(a conversation, a record of it in some format, still with AsJson)"""
    conversation = draw(conversations)
    formats = [sharegpt, openai, native]
    if draw(st.integers(0, 2)) == 0:  # or few would be flat
        turns = [turn for turn in conversation.turns if isinstance(turn, Text)]
        turns = turns[turns[0].role == "assistant" :]
        turns = turns[: len(turns) // 2 * 2]
        conversation.turns = [Text(turn.role, turn.content) for turn in turns]
        formats = [flat]
    if all(getattr(turn, "has_results", True) for turn in conversation.turns):
        formats = [*formats, official]
    return conversation, draw(st.sampled_from(formats))(draw, conversation)


def write(file, records, form):
    """form: JSONL or a JSON list, in ASCII or not"""
    is_list, ascii, indent = form
    if is_list:
        text = json.dumps(records, ensure_ascii=ascii, indent=indent)
    else:
        text = "\n".join(json.dumps(record, ensure_ascii=ascii) for record in records)
    file.write_text(text, "utf-8", newline="")


forms = st.tuples(flags, flags, st.sampled_from([None, 0, 1]))


# --- read back --------------------------------------------------------------------------------


@hostile(100, pairs=st.lists(written(conversations()), min_size=1, max_size=2), form=forms)
def test_every_format_is_read_back_exactly(tmp_path, pairs, form):
    """No text changes, calls alternate with their results, and only a last question is dropped."""
    write(tmp_path / "x", [finished(record) for _, record in pairs], form)
    reader = RecordReader([tmp_path / "x"])
    found = [record.messages for record in reader]
    assert found == [messages_of(conversation) for conversation, _ in pairs]
    assert not {key for key in reader.unread if not key.endswith("[].type")}
    ends = [conversation.turns[-1].role for conversation, _ in pairs]
    assert reader.unanswered == ends.count("user")
    assert reader.not_learnt == sum("loss" in m for messages in found for m in messages)


rows = st.fixed_dictionaries(
    {"instruction": some_text, "output": some_text},
    optional={"input": texts, "system": some_text, "tools": some_text.map("tool: {}".format)},
)


@hostile(
    400, row=rows, suffix=st.sampled_from([".csv", ".tsv", ".CSV"]), end=st.sampled_from("\r\n")
)
def test_rows_are_read_back_exactly(tmp_path, row, suffix, end):
    """CSV and TSV, with either line break. The second row has the empty cells."""
    end = "\n" if end == "\n" else "\r\n"
    least = dict.fromkeys(row, "") | {"instruction": row["instruction"], "output": row["output"]}
    out = io.StringIO(newline="")
    delimiter = "\t" if suffix == ".tsv" else ","
    # The writer of Python 3.11 leaves a "\r" unquoted, if lines end with "\n".
    quoting = csv.QUOTE_ALL if end == "\n" else csv.QUOTE_MINIMAL
    how = dict(delimiter=delimiter, lineterminator=end, quoting=quoting)
    writer = csv.DictWriter(out, row, **how)
    writer.writeheader()
    writer.writerows([row, least])
    (tmp_path / f"x{suffix}").write_text(out.getvalue(), "utf-8", newline="")
    found = [record.messages for record in RecordReader([tmp_path / f"x{suffix}"])]
    wanted = []
    for each in (row, least):
        question = "\n".join(filter(None, (each["instruction"], each.get("input"))))
        turns = [Text("user", question), Text("assistant", each["output"])]
        wanted.append(
            messages_of(Conversation(each.get("tools", ""), each.get("system", ""), turns))
        )
    assert found == wanted


# --- what is learnt ---------------------------------------------------------------------------


def check_labels(tokenizer, messages, ids, labels):
    """A label is the token itself in a learnt assistant's turn and at the end of the turn: the
    next role's id, or </s>. All others are -100."""
    roles = {tokenizer.special[f"<|{name}|>"] for name in ("system", "user", "assistant")}
    roles.add(tokenizer.special["<|observation|>"])
    starts = [i for i, id in enumerate(ids) if id in roles]
    assert len(starts) == len(messages) and ids[-1] == tokenizer.eos_id
    wanted = [IGNORE] * len(ids)
    ends = [*starts[1:], len(ids) - 1]
    for message, start, end in zip(messages, starts, ends, strict=True):
        said = [message.get("metadata", "") + "\n", message["content"]]
        assert ids[start + 1 : end] == sum(map(tokenizer.encode, said), [])
        if message["role"] == "assistant" and "loss" not in message:
            wanted[start + 1 : end + 1] = ids[start + 1 : end + 1]
    assert labels == wanted


@hostile(20, pairs=st.lists(written(conversations()), min_size=1, max_size=2))
def test_what_is_learnt(tmp_path, tokenizer, pairs):
    write(tmp_path / "x", [finished(record) for _, record in pairs], (False, False, None))
    dataset = data.ConversationDataset([tmp_path / "x"], tokenizer, 10**6)
    for (conversation, _), (ids, labels) in zip(pairs, dataset, strict=True):
        check_labels(tokenizer, messages_of(conversation), ids.tolist(), labels.tolist())
    unlearnt = [m for conversation, _ in pairs for m in messages_of(conversation) if "loss" in m]
    assert dataset.reader.not_learnt == len(unlearnt)


# --- nothing is dropped in silence ------------------------------------------------------------

KEYS = "instruction input output prompt response query system history tools conversations messages"
KEYS += " role content from value metadata loss weight name parameters observation arguments id"
KEYS += " tool_calls function_call tool_call_id function type text description thought note images"
KEYS += " reasoning_content index"
KEYS = KEYS.split() + ["metadata", "system", "tools", "history", "parameters"] * 3
# Each text has a number, so that it is not found in another one by chance.
marked = st.integers(0, 10**9).map("text {}.".format)
marked_values = marked | marked.map(lambda text: [text]) | marked.map(lambda text: {"k": text})
marked_conversations = conversations(marked, marked, marked_values, marked_values)


def places(value):
    """Yields every (container, key) inside a JSON value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], list | dict):
            yield from places(value[key])


@st.composite
def sprinkled(draw):
    """A record with texts where none are expected, and without some that are."""
    record = copy.deepcopy(draw(written(marked_conversations))[1])
    for _ in range(draw(st.integers(1, 2))):
        spots = list(places(record))
        inner = [c[key] for c, key in spots if isinstance(c[key], list | dict)]
        containers = [record, *inner]
        kind = draw(st.sampled_from(["add", "add", "add", "empty", "replace", "drop"]))
        if kind == "add" or not spots:
            container = draw(st.sampled_from(containers))
            if isinstance(container, list):
                container.append(draw(marked_values))
            else:
                container[draw(st.sampled_from(KEYS))] = draw(marked_values)
            continue
        container, key = draw(st.sampled_from(spots))
        if kind == "drop":
            del container[key]
        else:
            empty = st.sampled_from([None, "", " ", [], {}, 0, False])
            container[key] = draw(empty if kind == "empty" else marked_values)
    return finished(record)


def texts_of(value, path=()):
    """Yields (path, text) of all texts in a JSON value. Texts of JSON are parsed."""
    if isinstance(value, list | dict):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield from texts_of(value[key], (*path, key))
        return
    if not isinstance(value, str):
        return
    try:
        parsed = json.loads(value)
    except ValueError:
        parsed = None
    if isinstance(parsed, list | dict):
        yield from texts_of(parsed, path)
    else:
        yield path, value


def is_structural(path, text):
    """Role names, ids of calls, and names of types."""
    turn, *inner = path[2:] or [None]
    in_turn = path[0] in ("conversations", "messages")
    if not in_turn or turn is None:
        return False
    return (
        (turn in ("role", "from", "tool_call_id") and not inner)
        or (turn == "tool_calls" and inner[1:] == ["id"])
        or (turn == "tool_calls" and inner[1:] == ["type"] and text == "function")
        or (
            turn in ("content", "value", "observation") and inner[1:] == ["type"] and text == "text"
        )
    )


def is_named(path, unread):
    """Whether a key on this path is in `unread`: "key", "messages[].key", "messages[].….key"."""
    if path[0] in unread:
        return True
    if path[0] not in ("conversations", "messages") or len(path) < 3:
        return False
    deeper = [f".{key}" for key in path[3:] if isinstance(key, str)]
    start = f"{path[0]}[]."
    return f"{start}{path[2]}" in unread or any(
        name.startswith(start) and name.endswith(end) for name in unread for end in deeper
    )


def lost_texts(record, reader, messages):
    """→ [(path, text)] that are neither in the messages nor named"""
    said = "\0".join(m["content"] + "\0" + m.get("metadata", "") for m in messages)
    turns = next((record[key] for key in ("conversations", "messages") if key in record), [])
    lost = []
    for path, text in texts_of(record):
        escaped = json.dumps(text, ensure_ascii=False)[1:-1]
        is_there = text in said or escaped in said or repr(text)[1:-1] in said
        is_dropped_question = reader.unanswered and path[1:2] == (len(turns) - 1,)
        if not text.strip() or is_there or is_structural(path, text):
            continue
        if is_dropped_question and path[2] in ("content", "value", "metadata"):
            continue
        if not is_named(path, reader.unread):
            lost.append((path, text))
    return lost


def check_nothing_is_lost(file, record):
    write(file, [record], (False, False, None))
    reader = RecordReader([file])
    try:
        (found,) = reader
    except DataError:
        return "refused"
    assert lost_texts(record, reader, found.messages) == []
    return "read"


@hostile(150, record=sprinkled())
def test_nothing_is_dropped_in_silence(tmp_path, record):
    """A record is refused, or each of its texts is in a message, or its key is named as unread."""
    check_nothing_is_lost(tmp_path / "x", record)


Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
RESULT = {"role": "tool", "content": "r"}


def calling(**call):
    """Turns with an OpenAI call that has these keys."""
    call = {"function": {"name": "f", "arguments": "{}"}} | call
    return [Q, {"role": "assistant", "tool_calls": [call]}, RESULT, A]


def with_function(function):
    return [Q, {"role": "assistant", "function_call": function}, RESULT, A]


def with_system(**system):
    return [{"role": "system", "metadata": "LOST"} | system, Q, A]


PARTS = [{"type": "text", "text": "q", "note": "LOST"}]
SHAREGPT_CALL = '{"name": "f", "parameters": {"city": "LOST"}}'
OFFICIAL = {"role": "tool", "name": "f", "parameters": {}, "observation": "r"}
HIDDEN = {  # where a text is easily dropped in silence
    "key of a turn": [Q | {"note": "LOST"}, A],
    "key of an official tool's turn": [Q, OFFICIAL | {"note": "LOST"}, A],
    "key of a function_call's turn": [
        Q,
        {"role": "function_call", "content": {"name": "f"}, "metadata": "LOST"},
        RESULT,
        A,
    ],
    "key of a part": [Q | {"content": PARTS}, A],
    "key of a part of a result": [*calling()[:2], RESULT | {"content": PARTS}, A],
    "key of a call": calling(note="LOST"),
    "type of a call": calling(type="LOST"),
    "key of a call's function": calling(function={"name": "f", "parameters": {"city": "LOST"}}),
    "key of function_call": with_function({"name": "f", "parameters": {"city": "LOST"}}),
    "key of ShareGPT's call": [Q, {"role": "function_call", "content": SHAREGPT_CALL}, RESULT, A],
    "metadata beside calls": [Q, calling()[1] | {"metadata": "LOST"}, RESULT, A],
    "metadata beside tools": with_system(content="", tools=["f: x"]),
    "metadata without a text": with_system(content=""),
    "a list as metadata": with_system(content="", metadata=["LOST"]),
}


@pytest.mark.parametrize("turns", HIDDEN.values(), ids=HIDDEN)
def test_a_text_that_hides_is_not_dropped_in_silence(tmp_path, turns):
    assert "LOST" in json.dumps(turns)
    check_nothing_is_lost(tmp_path / "x", {"messages": turns})


def test_the_check_finds_what_is_lost(tmp_path):
    """Otherwise the tests above prove nothing."""
    record = {"messages": [Q | {"note": "LOST"}, A]}
    write(tmp_path / "x", [record], (False, False, None))
    reader = RecordReader([tmp_path / "x"])
    (found,) = reader
    assert lost_texts(record, reader, found.messages) == []
    reader.unread.clear()
    assert lost_texts(record, reader, found.messages) == [(("messages", 0, "note"), "LOST")]


# --- anything at all --------------------------------------------------------------------------

ODD = [
    "user",
    "assistant",
    "system",
    "observation",
    "tool",
    "function_call",
    "human",
    "gpt",
    "text",
]
ODD += [
    "",
    " ",
    "\n",
    "\0",
    "\ud800",
    "a\nb",
    "\x1b[2J",
    "{}",
    "[]",
    "NaN",
    '{"name": "f"}',
    HEADER,
]
ODD += [None, True, False, 0, 1, -1, 0.0, 1.0, 10**400, 1e308, float("nan"), float("inf"), [], {}]
odd_scalars = st.sampled_from(ODD) | st.text(max_size=9) | st.integers() | st.floats()
odd_keys = st.sampled_from(KEYS) | st.text(max_size=5)
anything = st.recursive(
    odd_scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(odd_keys, inner, max_size=5),
    max_leaves=25,
)


@st.composite
def damaged(draw):
    """A record of some format, in which a few values are replaced, dropped, renamed or added."""
    record = finished(copy.deepcopy(draw(written(conversations()))[1]))
    for _ in range(draw(st.integers(1, 3))):
        if not (spots := list(places(record))):
            break
        container, key = draw(st.sampled_from(spots))
        old = container[key]
        kind = draw(st.sampled_from(["replace", "replace", "wrap", "drop", "rename", "add"]))
        if kind in ("drop", "rename"):
            del container[key]
        if kind in ("rename", "add") and isinstance(container, dict):
            container[draw(odd_keys)] = old if kind == "rename" else draw(anything)
        elif kind == "replace":
            container[key] = draw(odd_scalars | anything)
        elif kind == "wrap":
            container[key] = [old]
    return record


@hostile(150, record=damaged() | anything, is_prompt=flags)
def test_any_value_gives_messages_or_a_fault(tmp_path, tokenizer, record, is_prompt):
    """A fault is one printable line with its place. Messages can be encoded."""
    file = tmp_path / "x"
    file.write_text(json.dumps([record]), "utf-8")
    reader = RecordReader([file], is_prompt=is_prompt)
    try:
        with watched():
            (found,) = reader
    except DataError as error:
        text = str(error)
        assert text.startswith(f"{file}: record 1: ") and len(text) < 1500
        assert text.isprintable(), ascii(text)
        return
    finally:
        assert reader.about_unread().isprintable()
    for message in found.messages:
        assert set(message) <= {"role", "content", "metadata", "loss"}
        assert message.get("loss", False) is False and message.get("metadata", "x")
    ids, labels = data.encode_conversation(tokenizer, found.messages)
    check_labels(tokenizer, found.messages, ids, labels)
    learnt = [m for m in found.messages if m["role"] == "assistant" and "loss" not in m]
    assert learnt or is_prompt


ODD_IDS = ["a\nb\x1b[2J", ["1"], {"k": 1}, "\ud800", 1.5, True]


@pytest.mark.parametrize("id", ODD_IDS)
@pytest.mark.parametrize("function", [{"name": "f"}, {}])
def test_an_odd_id_of_a_call(tmp_path, id, function):
    """It is told in one printable line, or read as any id."""
    (tmp_path / "x").write_text(json.dumps({"messages": calling(id=id, function=function)}))
    try:
        ((_, messages),) = read_conversations([tmp_path / "x"])
    except DataError as error:
        assert str(error).isprintable()
        return
    roles = [message["role"] for message in messages]
    assert roles == "user assistant observation assistant".split()


@pytest.mark.parametrize("key", ["a\nb\x1b[2J", "\x0c", "\ud800", "\u2028"])
def test_an_odd_key_is_told_in_one_printable_line(tmp_path, key):
    """Such a key is proposed for --keys."""
    (tmp_path / "x").write_text(json.dumps({key: "q", "output": "a"}))
    with pytest.raises(DataError, match="missing key 'instruction'") as error:
        read_conversations([tmp_path / "x"])
    assert str(error.value).isprintable()
