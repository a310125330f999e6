"""support/formats.py: a record of any common format becomes messages, or is refused with a reason.

python -m pytest -q tests/test_formats.py
"""

import pytest

from support.errors import DataError
from support.formats import read_record


def said(role, content, **more):
    return {"role": role, "content": content} | more


S, Q = said("system", "s"), said("user", "q")
A, OBS = said("assistant", "a"), said("observation", "o")
PAIR = {"prompt": "q", "response": "a"}
LIST = ["get_weather: 查天气"]
TOOLS = said(  # what LIST becomes
    "system",
    "Answer the following questions as best as you can. You have access to the following tools:\n"
    '[\n    "get_weather: 查天气"\n]',
)


def read(record, is_prompt=False):
    """→ (messages, names of the keys that are not read)"""
    unread = set()
    return read_record(record, is_prompt, unread), unread


def fault_of(record, is_prompt=False):
    with pytest.raises(DataError) as error:
        read(record, is_prompt)
    return str(error.value)


# --- what is read -----------------------------------------------------------------------------

RECORDS = [  # (a record, its messages)
    ({"instruction": "q", "input": "i", "output": "a"}, [said("user", "q\ni"), A]),
    ({"instruction": "q", "output": "a"}, [Q, A]),
    (PAIR | {"input": ""}, [Q, A]), (PAIR | {"input": None}, [Q, A]),
    ({"instruction": "", "input": "i", "output": "a"}, [said("user", "i"), A]),
    ({"instruction": None, "input": "i", "output": "a"}, [said("user", "i"), A]),
    ({"prompt": "q", "response": "a"}, [Q, A]), ({"query": "q", "response": "a"}, [Q, A]),
    ({"prompt": "q", "input": "i", "output": "a"}, [said("user", "q\ni"), A]),
    ({"instruction": "q", "response": "a"}, [Q, A]),
    ({"query": " q\n", "output": "\na "}, [said("user", " q\n"), said("assistant", "\na ")]),
    (PAIR | {"tools": LIST, "system": "s"}, [TOOLS, S, Q, A]),
    (PAIR | {"tools": '["get_weather: 查天气"]'}, [TOOLS, Q, A]),
    (PAIR | {"tools": [], "system": "", "history": []}, [Q, A]),
    (PAIR | {"tools": None, "system": None, "history": None}, [Q, A]),
    (PAIR | {"tools": "[]", "system": " \n"}, [Q, A]),
    (PAIR | {"history": ""}, [Q, A]),  # the empty cell of a CSV file
    (PAIR | {"system": "s", "history": [["1", "2"], ["q", "a"]]},
     [S, said("user", "1"), said("assistant", "2"), Q, A, Q, A]),
    # conversations
    ({"conversations": [Q, A]}, [Q, A]),
    ({"messages": [S, Q, A, Q, A]}, [S, Q, A, Q, A]),
    ({"messages": [Q, A], "system": "s"}, [S, Q, A]),
    ({"messages": [Q, A], "system": None, "tools": "", "history": []}, [Q, A]),
    ({"messages": [Q, A], "system": "s", "tools": LIST}, [TOOLS, S, Q, A]),
    ({"messages": [S, Q, A], "tools": LIST}, [TOOLS, S, Q, A]),
    ({"messages": [TOOLS, Q, A], "system": "s"}, [TOOLS, S, Q, A]),
    ({"messages": [S | {"tools": LIST}, Q, A]}, [TOOLS, S, Q, A]),
    ({"messages": [S, TOOLS, Q, A]}, [TOOLS, S, Q, A]),
    ({"messages": [said("system", ""), Q, A], "system": "s"}, [S, Q, A]),
    ({"messages": [S, A, Q, A]}, [S, A, Q, A]),  # a greeting
]  # fmt: skip


@pytest.mark.parametrize("record, messages", RECORDS)
def test_a_record_becomes_messages(record, messages):
    assert read(record) == (messages, set())


PROMPTS = [  # (a record without an answer, its messages)
    ({"instruction": "q"}, [Q]), ({"query": "q"}, [Q]), ({"prompt": "q", "response": ""}, [Q]),
    ({"prompt": "q", "output": None, "history": [["q", "a"]]}, [Q, A, Q]),
    ({"messages": [Q, A, Q]}, [Q, A, Q]),
]  # fmt: skip


@pytest.mark.parametrize("record, messages", PROMPTS)
def test_a_prompt_needs_no_answer(record, messages):
    assert read(record, is_prompt=True) == (messages, set())


UNREAD = [  # (a record, the names of its keys that are not read)
    (PAIR | {"id": 1, "from": "x", "conversation_id": 1}, {"id", "from", "conversation_id"}),
    (PAIR | {"images": [], "chosen": None, "note": "", "n": 0}, {"n"}),  # three hold nothing
    (PAIR | {"input": "", "inputs": 3}, {"inputs"}),  # not misspelt: both are there
    ({"instruction": "q", "output": "a", "prompt": "x"}, {"prompt"}),
    ({"messages": [Q, A], "instruction": "x"}, {"instruction"}),
    ({"messages": [Q | {"id": 1}, A | {"id": 2, "n": 3}]}, {"messages[].id", "messages[].n"}),
    ({"conversations": [Q | {"images": []}, A | {"tool_call_id": None}]}, set()),
    (PAIR | {"system_id": 3, "history_id": 4}, {"system_id", "history_id"}),
]


@pytest.mark.parametrize("record, names", UNREAD)
def test_keys_that_are_not_read_are_named(record, names):
    assert read(record)[1] == names


# --- what is refused --------------------------------------------------------------------------

NAN = float("nan")
BESIDE_AND_INSIDE = "beside 'messages', and also in a message; leave one out"
FAULTS = [  # (a record, how its fault begins)
    (["q"], "not an object but a list; a record is {...}"),
    (None, "not an object but null"),
    (PAIR | {"input": NAN}, "'input' must be a string, not NaN"),
    (PAIR | {"prompt": 3}, "'prompt' must be a string, not a number"),
    (PAIR | {"system": {}}, "'system' must be a string, not an object"),
    (PAIR | {"tools": True}, "'tools' must be a list, not true/false"),
    (PAIR | {"prompt": ""}, "empty question: 'prompt' and 'input' have no text"),
    (PAIR | {"response": " \n"}, "empty answer: 'response' has no text"),
    (PAIR | {"response": None}, "empty answer: 'response' has no text"),
    (PAIR | {"response": "\ud800"}, "a text holds half of a surrogate pair"),
    (PAIR | {"history": "1"}, "'history' must be a list, not a string"),
    (PAIR | {"history": [["1", "2"], ["3"]]}, "'history' 2 must be [question, answer]"),
    (PAIR | {"history": [["1", ""]]}, "'history' 1 has a question or an answer without text"),
    # names of keys: ambiguous, misspelt, or of what can't be learnt here
    (PAIR | {"query": "q"}, "'prompt' or 'query': which one is the question?"),
    (PAIR | {"instruction": "q"}, "'instruction' or 'prompt': which one is the question?"),
    (PAIR | {"output": "a"}, "'output' or 'response': which one is the answer?"),
    ({"instrution": "q", "output": "a"}, "unknown key 'instrution'; did you mean 'instruction'?"),
    ({"instruction": "q", "outputs": "a"}, "unknown key 'outputs'; did you mean 'output'?"),
    ({"conversation": [Q, A]}, "unknown key 'conversation'; did you mean 'conversations'?"),
    (PAIR | {"inputs": "x"}, "unknown key 'inputs'; did you mean 'input'?"),
    ({"messages": [Q, A], "sytem": "s"}, "unknown key 'sytem'; did you mean 'system'?"),
    (PAIR | {"images": ["x"]}, "'images' is not supported"),
    (PAIR | {"rejected": "b"}, "'rejected' is not supported"),
    ({"messages": [Q, A], "videos": ["x"]}, "'videos' is not supported"),
    ({"messages": [Q | {"audios": ["x"]}, A]}, "message 1: 'audios' is not supported"),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, "'chosen' is not supported"),
    # conversations
    ({"messages": [Q, A], "conversations": [Q, A]}, "it has both 'conversations' and 'messages'"),
    ({"conversations": "q"}, "'conversations' must be a list of messages, not a string"),
    ({"messages": []}, "'messages' has no messages"),
    ({"messages": [said("system", "")], "system": "s"}, "'messages' has no messages"),
    ({"messages": [S, Q, A], "system": "s"}, f"it has 'system' {BESIDE_AND_INSIDE}"),
    ({"messages": [TOOLS, Q, A], "tools": LIST}, "it lists tools twice; leave one list out"),
    ({"messages": [S | {"tools": LIST}, Q], "tools": LIST}, "it lists tools twice"),
    ({"messages": [Q, A], "history": [["1", "2"]]},
     "it has both 'history' and 'messages'; leave one out"),
    ({"messages": [Q, said("assistant", "")]}, "message 2: empty answer"),
]  # fmt: skip


@pytest.mark.parametrize("record, fault", FAULTS)
def test_faults(record, fault):
    assert fault_of(record).startswith(fault)


BOTH = "missing keys 'instruction' and 'output'"
MISSING = [  # (a record, what is said of its missing keys)
    ({}, f"{BOTH} (the keys here: none)"),
    ({"instruction": "q"}, "missing key 'output' (the keys here: 'instruction')"),
    ({"text": "q", "system": "s", "n": 3, "answer": "a"},
     f"{BOTH} (the keys here: 'text', 'system', 'n', 'answer'); "
     "try --keys text=instruction answer=output"),
    ({"prompt": "q", "answer": "a"},
     "missing key 'output' (the keys here: 'prompt', 'answer'); try --keys answer=output"),
    ({"input": "q", "output": "a"},
     "missing key 'instruction' (the keys here: 'input', 'output'); try --keys input=instruction"),
    ({"a": "1", "b": "2", "c": "3"}, f"{BOTH} (the keys here: 'a', 'b', 'c')"),
    # `input` belongs to the question
    ({"instruction": "q", "input": "i"},
     "missing key 'output' (the keys here: 'instruction', 'input')"),
    # an id is no misspelt list
    ({"message_id": 1, "text": "q", "answer": "a"},
     f"{BOTH} (the keys here: 'message_id', 'text', 'answer'); "
     "try --keys text=instruction answer=output"),
]  # fmt: skip


@pytest.mark.parametrize("record, told", MISSING)
def test_a_missing_key_is_told_with_the_keys_that_may_be_meant(record, told):
    assert fault_of(record) == told


def test_a_prompt_misses_its_question_only():
    told = "missing key 'instruction' (the keys here: 'text'); try --keys text=instruction"
    assert fault_of({"text": "q"}, is_prompt=True) == told


MAY_FOLLOW = {  # what comes before: (the messages, what may follow)
    "the start": ([], "system or user or assistant"),
    "system": ([S], "system or user or assistant"),
    "user": ([Q], "assistant"),
    "assistant": ([Q, A], "user or observation or assistant"),
    "observation": ([Q, A, OBS], "assistant"),
}


@pytest.mark.parametrize("message", [S, Q, A, OBS], ids=lambda message: message["role"])
@pytest.mark.parametrize("before", MAY_FOLLOW)
def test_the_order_of_roles(before, message):
    messages, expected = MAY_FOLLOW[before]
    record, role = {"messages": [*messages, message]}, message["role"]
    if role in expected.split(" or "):
        assert read(record) == ([*messages, message], set())
        return
    place = f"message {len(messages) + 1}: wrong order of roles"
    assert fault_of(record) == f"{place}: {role} after {before}; expected {expected}"


# --- one conversation in six formats ----------------------------------------------------------

CALL = said("assistant", "```python\ntool_call(city='厦门')\n```", metadata="get_weather")
SAME = [TOOLS, S, Q, said("assistant", "t"), CALL, said("observation", '{"t": 31}'), A]
GIVEN = {"name": "get_weather", "arguments": '{"city": "厦门"}'}  # as OpenAI writes a call
SIX = {
    "as the messages are": {"conversations": SAME},
    "the official guide": {"tools": LIST, "conversations": [
        S, Q, said("assistant", "t"),
        {"role": "tool", "name": "get_weather", "parameters": {"city": "厦门"},
         "observation": {"t": 31}},
        A,
    ]},
    "ShareGPT": {"system": "s", "tools": '["get_weather: 查天气"]', "conversations": [
        {"from": "human", "value": "q"},
        {"from": "gpt", "value": "t"},
        {"from": "function_call",
         "value": '{"name": "get_weather", "arguments": {"city": "厦门"}}'},
        {"from": "observation", "value": '{"t": 31}'},
        {"from": "gpt", "value": "a"},
    ]},
    "OpenAI": {"tools": LIST, "messages": [
        S, Q, said("assistant", "t", tool_calls=[{"id": "c1", "function": GIVEN}]),
        {"role": "tool", "tool_call_id": "c1", "content": '{"t": 31}'}, A,
    ]},
    "OpenAI, the older form": {"messages": [
        S | {"tools": LIST}, Q, said("assistant", "t", function_call=GIVEN),
        {"role": "function", "content": '{"t": 31}'}, A,
    ]},
    "OpenAI, parts of text and a call of its own": {"tools": LIST, "messages": [
        S, said("user", [{"type": "text", "text": "q"}]), said("assistant", "t"),
        said("assistant", None, tool_calls=[{"id": "c1", "function": GIVEN}]),
        {"role": "tool", "tool_call_id": "c1", "content": {"t": 31}}, A,
    ]},
}  # fmt: skip


@pytest.mark.parametrize("name", SIX)
def test_the_same_conversation_in_six_formats_gives_the_same_messages(name):
    assert read(SIX[name]) == (SAME, set())
