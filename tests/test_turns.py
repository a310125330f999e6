"""support/turns.py: a turn of any common format becomes messages, and calls meet their results.

python -m pytest -q tests/test_turns.py
"""

import json

import pytest

from support.errors import DataError
from support.turns import pair_calls, read_turn


def read(turn):
    """→ (messages, names of the keys that are not read)"""
    unread = set()
    return read_turn(turn, "messages[].", unread), unread


def fault_of(function, *arguments):
    with pytest.raises(DataError) as error:
        function(*arguments)
    return str(error.value)


def call(arguments, **more):
    """The message that a call of the tool f becomes."""
    text = f"```python\ntool_call({arguments})\n```"
    return {"role": "assistant", "metadata": "f", "content": text} | more


def observation(text):
    return {"role": "observation", "content": text}


# --- one turn ---------------------------------------------------------------------------------

ROLES = [  # (name of a role, role of the message)
    ("system", "system"), ("user", "user"), ("human", "user"),
    ("assistant", "assistant"), ("gpt", "assistant"),
    ("observation", "observation"), ("tool", "observation"),
    ("function", "observation"), ("function_response", "observation"),
]  # fmt: skip


@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")])
@pytest.mark.parametrize("name, role", ROLES)
def test_names_of_roles(name, role, keys):
    turn = dict(zip(keys, (name, "t"), strict=True))
    assert read(turn) == ([{"role": role, "content": "t"}], set())


PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b\n"}]
GUIDE = {"role": "tool", "name": "f", "parameters": {"a": 1}, "observation": "o"}
F = {"name": "f", "arguments": '{"a": 1, "b": "x"}'}  # as OpenAI writes it
SAID, ASKED = {"role": "assistant", "content": "a"}, {"role": "user", "content": "q"}
TURNS = [  # (a turn, its messages)
    ({"role": "user", "content": PARTS}, [{"role": "user", "content": "ab\n"}]),
    ({"role": "system", "content": ""}, []),
    ({"role": "system", "content": None}, []),
    (SAID | {"tool_calls": []}, [SAID]),
    # observations
    ({"role": "tool", "content": ""}, [observation("")]),
    ({"role": "tool", "content": PARTS}, [observation("ab\n")]),
    ({"role": "tool", "content": {"温": [1, None]}}, [observation('{"温": [1, null]}')]),
    ({"role": "tool", "content": 31}, [observation("31")]),
    ({"role": "tool", "content": []}, [observation("[]")]),
    # a list of the tool's own, not OpenAI's parts
    ({"role": "tool", "content": [{"type": "hotel"}]}, [observation('[{"type": "hotel"}]')]),
    # calls
    (GUIDE, [call("a=1"), observation("o")]),
    (GUIDE | {"observation": {"t": 1}}, [call("a=1"), observation('{"t": 1}')]),
    (GUIDE | {"parameters": None}, [call(""), observation("o")]),
    ({"from": "tool", "name": "f", "parameters": {}, "observation": "o"},
     [call(""), observation("o")]),
    ({"from": "function_call", "value": json.dumps(F)}, [call("a=1, b='x'")]),
    ({"from": "function_call", "value": F}, [call("a=1, b='x'")]),
    ({"role": "function_call", "content": '[{"name": "f", "arguments": {"a": 1}}]'}, [call("a=1")]),
    ({"role": "function_call", "content": '{"name": "f"}'}, [call("")]),
    # metadata
    (SAID | {"metadata": "f"}, [SAID | {"metadata": "f"}]),
    (SAID | {"metadata": ""}, [SAID]),
    ({"role": "tool", "content": "x", "metadata": "f"}, [observation("x") | {"metadata": "f"}]),
]  # fmt: skip


@pytest.mark.parametrize("turn, messages", TURNS)
def test_a_turn_becomes_messages(turn, messages):
    assert read(turn) == (messages, set())


def test_keys_that_are_not_read_are_named():
    turn = ASKED | {"id": 1, "tool_calls": [1]}
    assert read(turn)[1] == {"messages[].id", "messages[].tool_calls"}
    assert read(ASKED | {"id": None, "tool_calls": []})[1] == set()
    assert read(GUIDE | {"metadata": "f"})[1] == {"messages[].metadata"}
    result = {"role": "tool", "content": "o", "name": "f", "id": 1}
    assert read(result)[1] == {"messages[].name", "messages[].id"}


ONE_CALL = "must be one call, as JSON: {'name': …, 'arguments': …}"
FAULTS = [  # (a turn, how its fault begins)
    ("a", "not an object but a string"),
    ({}, "missing key 'role' (the keys here: none)"),
    ({"rolle": "user", "content": "q"}, "unknown key 'rolle'; did you mean 'role'?"),
    ({"role": None, "content": "q"}, "'role' is null"),
    ({"role": "User", "content": "q"}, "unknown role 'User'; roles are system, user, assistant"),
    ({"role": "user", "contents": "q"}, "unknown key 'contents'; did you mean 'content'?"),
    ({"role": "system", "contents": "q"}, "unknown key 'contents'; did you mean 'content'?"),
    ({"role": "user", "value": "q"}, "missing key 'content' (the keys here: 'role', 'value')"),
    ({"from": "human", "content": "q"}, "missing key 'value' (the keys here: 'from', 'content')"),
    ({"role": "user", "content": " "}, "empty question: the user's content has no text"),
    ({"from": "gpt", "value": ""}, "empty answer: the assistant's value has no text"),
    ({"role": "user", "content": 3}, "'content' must be a string, not a number"),
    ({"role": "assistant", "content": None}, "'content' is null"),
    (SAID | {"content": 0, "tool_calls": [{"function": F}]}, "'content' must be a string"),
    ({"role": "user", "content": ["q"]}, "'content' must be a string, not a list"),
    (ASKED | {"content": [{"type": "image_url"}]}, "a part of type 'image_url' can't be read"),
    ({"role": "user", "content": "\udfff"}, "a text holds half of a surrogate pair"),
    (ASKED | {"images": ["x"]}, "'images' is not supported"),
    (ASKED | {"metadata": 3}, "'metadata' must be a string, not a number"),
    (SAID | {"metadata": "a\nb"}, "'metadata' must be one line"),
    ({"role": "tool", "name": "f", "parameters": {}}, "missing key 'observation'"),
    ({"role": "tool", "parameters": {}, "observation": "o"}, "missing key 'name'"),
    (GUIDE | {"parameters": [1]}, "the arguments of 'f' must be an object, not a list"),
    ({"role": "function_call", "content": "f(1)"}, f"'content' {ONE_CALL}"),
    ({"from": "function_call", "value": '[{"name": "f"}, {"name": "g"}]'}, f"'value' {ONE_CALL}"),
    (SAID | {"tool_calls": {}}, "'tool_calls' must be a list, not an object"),
    (SAID | {"tool_calls": [{"id": "c1"}]}, "the call c1 has no function with a name"),
    (SAID | {"tool_calls": ["f"]}, "call 1 is no object but a string"),
    (SAID | {"function_call": "f"}, "the call number 1 has no function with a name"),
]  # fmt: skip


@pytest.mark.parametrize("turn, fault", FAULTS)
def test_what_is_wrong_with_a_turn(turn, fault):
    assert fault_of(read, turn).startswith(fault)


# --- which turns are learnt -------------------------------------------------------------------

LOSS = [  # (loss, weight, whether an assistant's turn is learnt: None if nothing is said of it)
    (None, None, None),
    (True, None, True), (None, 1, True), (True, 1, True),
    (False, None, False), (None, 0, False), (False, 0, False),
]  # fmt: skip


@pytest.mark.parametrize("loss, weight, is_learnt", LOSS)
def test_loss_and_weight_say_whether_a_turn_is_learnt(loss, weight, is_learnt):
    marks = {"loss": loss, "weight": weight}
    assert read(SAID | marks)[0] == [SAID | {"loss": False} if is_learnt is False else SAID]
    if is_learnt:
        told = "a message of the user is never learnt: take out its loss or weight"
        assert fault_of(read, ASKED | marks) == told
    else:
        assert read(ASKED | marks)[0] == [ASKED]


NO_LOSS = [  # (loss, weight, the fault)
    (True, 0, "'loss' and 'weight' contradict each other"),
    (False, 1, "'loss' and 'weight' contradict each other"),
    (0, None, "'loss' must be true or false, not a number"),
    ("false", None, "'loss' must be true or false, not a string"),
    (None, 0.5, "'weight' must be 0 or 1, not 0.5"),
]


@pytest.mark.parametrize("loss, weight, told", NO_LOSS)
def test_a_loss_or_weight_that_says_nothing_is_refused(loss, weight, told):
    for turn in (SAID, ASKED):
        assert fault_of(read, turn | {"loss": loss, "weight": weight}) == told


def test_calls_that_are_not_learnt():
    assert read(GUIDE | {"loss": False})[0][0] == call("a=1", loss=False)
    turn = {"role": "function_call", "content": '{"name": "f"}', "weight": 0}
    assert read(turn)[0] == [call("", loss=False)]
    turn = SAID | {"tool_calls": [{"function": F}], "loss": False}
    assert [message["loss"] for message in read(turn)[0]] == [False, False]


# --- OpenAI's calls and their results ---------------------------------------------------------


def calling(*ids, **more):
    """A turn with calls of f0, f1, …, which have these ids."""
    functions = [{"name": f"f{i}", "arguments": ""} for i in range(len(ids))]
    calls = [{"id": id, "function": f} for id, f in zip(ids, functions, strict=True)]
    return {"role": "assistant", "content": None, "tool_calls": calls} | more


def result(content, id=None):
    return {"role": "tool", "content": content} | ({"tool_call_id": id} if id else {})


def paired(*turns):
    """→ the messages in brief: (number of the turn, tool or role, content of anything else)"""
    numbered = [(number, m) for number, turn in enumerate(turns, 1) for m in read(turn)[0]]
    return [(n, m.get("metadata") or m["content"]) for n, m in pair_calls(numbered)]


OLDER = {"role": "assistant", "content": None, "function_call": {"name": "f0", "arguments": "{}"}}
PAIRED = {
    "one": ([calling("x"), result("1", "x"), SAID], [(1, "f0"), (2, "1"), (3, "a")]),
    "with a text": ([calling("x", content="t"), result("1", "x")], [(1, "t"), (1, "f0"), (2, "1")]),
    "several": ([calling("x", "y"), result("1", "x"), result("2", "y"), SAID],
                [(1, "f0"), (2, "1"), (1, "f1"), (3, "2"), (4, "a")]),
    "answered in another order": ([calling("x", "y"), result("2", "y"), result("1", "x")],
                                  [(1, "f0"), (3, "1"), (1, "f1"), (2, "2")]),
    "without ids": ([calling(None, None), result("1"), result("2")],
                    [(1, "f0"), (2, "1"), (1, "f1"), (3, "2")]),
    "turn after turn, the same id": ([calling("x"), result("1", "x")] * 2,
                                     [(1, "f0"), (2, "1"), (3, "f0"), (4, "1")]),
    "the older form": ([OLDER, {"role": "function", "content": "1"}], [(1, "f0"), (2, "1")]),
    "a call at the end": ([SAID, calling("x")], [(1, "a"), (2, "f0")]),
    "a result of no call": ([SAID, result("1")], [(1, "a"), (2, "1")]),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRED)
def test_each_call_is_followed_by_its_result(name):
    turns, expected = PAIRED[name]
    assert paired(*turns) == expected


UNPAIRED = [  # (turns, the fault)
    ([calling("x"), result("1", "z")], "message 2: no call 'z' before it waits for a result"),
    ([SAID, result("1", "z")], "message 2: no call 'z' before it waits for a result"),
    ([calling("x"), result("1", "x"), result("2", "x")], "message 3: no call 'x' before it waits"),
    ([calling("x"), SAID], "message 1: the call 'x' has no result"),
    ([calling("x", "y"), result("1", "x"), SAID], "message 1: the call 'y' has no result"),
    ([calling("x", "y")], "message 1: the call 'x' has no result"),
    ([calling("x", "x")], "message 1: two calls have the id 'x'"),
    ([calling(["x"])], "'id' must be a string, not a list"),  # an id that is no string
]


@pytest.mark.parametrize("turns, fault", UNPAIRED)
def test_calls_and_results_that_do_not_match(turns, fault):
    assert fault_of(paired, *turns).startswith(fault)
