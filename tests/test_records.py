"""support/records.py: data files become messages, and every fault is told with its place.

python -m pytest -q tests/test_records.py
"""

import json

import pytest
from conftest import write_jsonl

from support.records import DataError, read_conversations, read_records

TURN = {"instruction": "1+1?", "input": "", "output": "2"}
MESSAGES = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]


def talk(*turns, **more):
    """A conversation record of (role, content)."""
    return {"conversations": [{"role": role, "content": content} | more for role, content in turns]}


SYSTEM, Q = ("system", "s"), ("user", "q")
A, TOOL = ("assistant", "a"), ("observation", "o")


# --- what is read -----------------------------------------------------------------------------

KINDS_OF_FILE = {
    "a.jsonl": json.dumps(TURN) + "\n\n" + json.dumps(TURN) + "\r\n",
    "b.txt": "\ufeff" + json.dumps([TURN, TURN], indent=1),
    "c.json": "\ufeff" + json.dumps(TURN) + "\n" + json.dumps(TURN),
}


@pytest.mark.parametrize("name", KINDS_OF_FILE)
def test_json_and_jsonl_are_told_apart_by_content(tmp_path, name):
    """The name of the file does not matter, nor a byte order mark, nor the kind of line break."""
    (tmp_path / name).write_text(KINDS_OF_FILE[name], "utf-8")
    found = [messages for _, messages in read_conversations([tmp_path / name])]
    assert found == [MESSAGES] * 2


def test_instruction_and_input_make_the_question(tmp_path):
    records = [TURN | {"instruction": i, "input": t} for i, t in (("a", "b"), ("", "b"), ("a", ""))]
    file = write_jsonl(tmp_path / "x", [*records, {"instruction": "a", "output": "2"}])
    questions = [messages[0]["content"] for _, messages in read_conversations([file])]
    assert questions == ["a\nb", "b", "a", "a"]


def test_a_record_is_kept_with_its_place(tmp_path):
    record = TURN | {"id": 7}
    lines = write_jsonl(tmp_path / "lines", [record, record])
    (tmp_path / "list").write_text(json.dumps([record, record]), "utf-8")
    found = read_records([lines, tmp_path / "list"])
    places = [f"{lines}:1", f"{lines}:2"]
    places += [f"{tmp_path / 'list'}: record 1", f"{tmp_path / 'list'}: record 2"]
    assert [each.place for each in found] == places
    assert all(each.value == record and each.messages == MESSAGES for each in found)


QUESTIONS = [  # (a record, the turns of its prompt)
    ({"instruction": "q", "output": "a"}, [Q]),
    ({"instruction": "q"}, [Q]),
    (talk(Q, A), [Q]),
    (talk(SYSTEM, Q), [SYSTEM, Q]),
    (talk(Q, A, Q, A), [Q, A, Q]),
    (talk(Q, A, TOOL), [Q, A, TOOL]),
]


@pytest.mark.parametrize("record, turns", QUESTIONS)
def test_a_question_needs_no_answer(tmp_path, record, turns):
    """With prompts=True, the messages are those before the last answer."""
    (found,) = read_records([write_jsonl(tmp_path / "x", [record])], prompts=True)
    assert found.value == record
    assert found.messages == talk(*turns)["conversations"]


def test_a_system_message_alone_is_no_question(tmp_path):
    file = write_jsonl(tmp_path / "x", [talk(SYSTEM)])
    with pytest.raises(DataError, match=":1: there is nothing to answer after the system's"):
        read_records([file], prompts=True)


# --- what is wrong ----------------------------------------------------------------------------

M1 = ":1: message 1: "
ROLES = "roles are system, user, assistant, observation"
FAULTS = [  # (the file, as a text or one record; how its fault is told, None if there is none)
    ('{"instruction": "a", ', ":1: not JSON"),
    ("[1, 2", ":1: not JSON"),
    ("[" * 100_000, ":1: not usable JSON"),
    ("[3]", ": record 1: not an object but a number"),
    ('"text"', ":1: not an object but a string"),
    ('{"instruction": "a",\n"output": "b"}', ":1: one object over several lines"),
    ("", ": the file is empty"),
    ("[]", ": the file is empty"),
    ("\n" + json.dumps(TURN) + "\n", None),
    # records of an instruction
    (
        {"instrution": "a", "output": "b"},
        ":1: unknown key 'instrution'; did you mean 'instruction'?",
    ),
    (TURN | {"inputs": "a", "input": "b"}, None),
    (
        {"instruction": "a", "inputs": "b", "output": "c"},
        ":1: unknown key 'inputs'; did you mean 'input'?",
    ),
    ({"instruction": "a"}, ":1: missing key 'output' (the keys here: 'instruction')"),
    (TURN | {"output": 3}, ":1: 'output' must be a string, not a number"),
    (TURN | {"input": None}, ":1: 'input' must be a string, not null"),
    (TURN | {"output": " \n"}, ":1: empty answer"),
    (TURN | {"instruction": ""}, ":1: empty question"),
    (TURN | {"output": "\ud800"}, ":1: 'output' has half of a surrogate pair"),
    (TURN | {"history": []}, ":1: the key 'history' is not read; use conversations"),
    # records of a conversation
    ({"conversations": "a"}, ":1: 'conversations' must be a list of messages, not a string"),
    ({"conversations": []}, ":1: 'conversations' has no messages"),
    ({"conversation": []}, ":1: unknown key 'conversation'; did you mean 'conversations'?"),
    ({"messages": []}, ":1: the key 'messages' is not read; use conversations"),
    ({"conversations": ["a"]}, M1 + "not an object but a string"),
    ({"conversations": [{"from": "human"}]}, M1 + "the key 'from' is not read; use role"),
    (
        {"conversations": [{"role": "user", "contents": "q"}]},
        M1 + "unknown key 'contents'; did you mean 'content'?",
    ),
    # the order of roles
    (talk(Q, A, A, Q, A), None),
    (talk(SYSTEM, Q, A, TOOL, A), None),
    (talk(Q), ":1: a conversation must end with an assistant's message, not user"),
    (
        talk(Q, Q, A),
        ":1: message 2: wrong order of roles: user after user; expected assistant",
    ),
    (
        talk(A),
        M1 + "wrong order of roles: assistant after the start; expected system or user",
    ),
    (talk(Q, A, SYSTEM), ":1: message 3: wrong order of roles: system after assistant"),
    (talk(("human", "q"), A), M1 + f"unknown role 'human'; {ROLES}"),
    (talk(("h" * 2_000_000, "q"), A), M1 + "unknown role 'hhh"),
    # the messages
    (talk(Q, ("assistant", "")), ":1: message 2: empty answer"),
    (talk(("user", " "), A), M1 + "empty question"),
    (talk(Q, A, metadata="a\nb"), M1 + "'metadata' must be one line"),
    (talk(Q, A, metadata=1), M1 + "'metadata' must be a string, not a number"),
]


@pytest.mark.parametrize("content, fault", FAULTS)
def test_faults_are_told_with_their_place(tmp_path, content, fault):
    file = tmp_path / "x.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    if fault is None:
        assert read_conversations([file])
        return
    with pytest.raises(DataError) as error:
        read_conversations([file])
    told = str(error.value)
    assert told.startswith(f"{file}{fault}") and "\n" not in told and len(told) < 1500


def test_unreadable_files(tmp_path):
    with pytest.raises(DataError, match="nowhere.json: No such file"):
        read_conversations([tmp_path / "nowhere.json"])
    with pytest.raises(DataError, match="Is a directory"):
        read_conversations([tmp_path])
    (tmp_path / "gbk").write_bytes(b"\n" + "甄嬛".encode("gbk"))
    with pytest.raises(DataError, match="gbk:2: not UTF-8"):
        read_conversations([tmp_path / "gbk"])


def test_all_faults_are_listed_up_to_twenty(tmp_path):
    """Each file has twenty lines of its own, and one that counts the rest."""
    bad = write_jsonl(tmp_path / "bad", [TURN if i % 2 else {"output": 1} for i in range(60)])
    worse = write_jsonl(tmp_path / "worse", [{"output": "x"}] * 25)
    with pytest.raises(DataError) as error:
        read_conversations([bad, worse])
    lines = str(error.value).splitlines()
    assert lines[0] == f"{bad}:1: 'output' must be a string, not a number"
    assert lines[20] == f"{bad}: and 10 more"
    assert lines[21] == f"{worse}:1: missing key 'instruction' (the keys here: 'output')"
    assert lines[-1] == f"{worse}: and 5 more" and len(lines) == 42


def test_only_the_first_fault_of_a_record_is_told(tmp_path):
    file = write_jsonl(tmp_path / "x", [{"output": 1, "input": 2}, talk(A, ("human", ""))])
    with pytest.raises(DataError) as error:
        read_conversations([file])
    assert [line.partition(": ")[0] for line in str(error.value).splitlines()] == [
        f"{file}:1",
        f"{file}:2",
    ]
