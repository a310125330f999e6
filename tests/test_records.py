"""support/records.py: data files become records with messages; what is not used is counted.

python -m pytest -q tests/test_records.py
"""

import json
import threading
import time

import pytest
from conftest import read_conversations, reference, write_jsonl

from support import records
from support.data_files import split_times
from support.errors import DataError
from support.preamble import Preamble
from support.records import RecordReader, in_batches, one_ahead


def said(role, content, **more):
    return {"role": role, "content": content} | more


S, Q = said("system", "s"), said("user", "q")
A, OBS = said("assistant", "a"), said("observation", "o")
SILENT, CALL = A | {"loss": False}, A | {"metadata": "f"}
PAIR = {"prompt": "q", "response": "a"}


def talk(*messages):
    return {"messages": [*messages]}


def read(tmp_path, records, **options):
    """→ (the reader, the messages of each record)"""
    reader = RecordReader([write_jsonl(tmp_path / "x", records)], **options)
    return reader, [record.messages for record in reader]


def faults(files, **options):
    """→ the lines of what is told of faulty files"""
    with pytest.raises(DataError) as error:
        [*RecordReader(files, **options)]
    return str(error.value).splitlines()


# --- records and what is told of them ---------------------------------------------------------


def test_a_record_is_kept_with_its_file_and_place(tmp_path):
    lines = write_jsonl(tmp_path / "lines", [PAIR | {"id": 7}, PAIR])
    (tmp_path / "list").write_text(json.dumps([talk(Q, A)]), "utf-8")
    assert [*RecordReader([lines, str(tmp_path / "list")])] == [
        (0, f"{lines}:1", PAIR | {"id": 7}, [Q, A]),
        (0, f"{lines}:2", PAIR, [Q, A]),
        (1, f"{tmp_path / 'list'}: record 1", talk(Q, A), [Q, A]),
    ]
    places = [(f"{lines}:1", [Q, A]), (f"{lines}:2", [Q, A])]
    assert read_conversations([lines]) == places


def test_a_conversation_begins_with_the_preamble(tmp_path):
    _, (first, second) = read(tmp_path, [PAIR, talk(S, Q, A)], preamble=Preamble("t"))
    assert (first, second) == ([said("system", "t"), Q, A], [S, Q, A])


PROMPTS = [  # (a record, the messages before its last answer)
    (PAIR, [Q]), ({"prompt": "q"}, [Q]), (talk(Q, A), [Q]), (talk(Q, SILENT), [Q]),
    (talk(S, Q), [S, Q]), (talk(Q, A, Q, A), [Q, A, Q]), (talk(Q, CALL, OBS), [Q, CALL, OBS]),
    (talk(Q, A, CALL), [Q, A]),  # a call follows a text
    (talk(Q, said("assistant", "")), [Q]), (talk(Q, said("assistant", None)), [Q]),
]  # fmt: skip


@pytest.mark.parametrize("record, messages", PROMPTS)
def test_a_prompt_is_what_stands_before_the_last_answer(tmp_path, record, messages):
    reader, found = read(tmp_path, [record], is_prompt=True)
    assert found == [messages] and reader.unanswered == reader.not_learnt == 0


@pytest.mark.parametrize("record", [talk(S), talk(A), talk(S, A)])
def test_a_prompt_without_a_question(tmp_path, record):
    file = write_jsonl(tmp_path / "x", [record])
    told = f"{file}:1: there is nothing to answer"
    assert faults([file], is_prompt=True) == [told]


def test_keys_are_renamed(tmp_path):
    keys = [("content", "instruction"), ("summary", "output")]
    record = {"content": "q", "summary": "a"}
    file = write_jsonl(tmp_path / "x", [record])
    assert [*RecordReader([file], keys=keys)] == [(0, f"{file}:1", record, [Q, A])]
    assert [*RecordReader([file], keys=keys, is_prompt=True)][0].messages == [Q]
    assert faults([file], keys=[*keys, ("n", "input")]) == [
        "--keys n=input: no record has the key 'n'"
    ]
    write_jsonl(file, [record | {"output": "b"}])
    assert faults([file], keys=keys) == [f"{file}:1: --keys gives two keys of this record one name"]


def test_all_faults_are_told_up_to_twenty_of_each_file(tmp_path):
    """The last line of a file counts its others. Nothing is yielded after the first fault."""
    good = write_jsonl(tmp_path / "good", [PAIR])
    bad = write_jsonl(tmp_path / "bad", [{"output": 1} if i % 2 else PAIR for i in range(60)])
    worse = write_jsonl(tmp_path / "worse", [PAIR | {"input": 3, "prompt": 4}] * 21)
    (tmp_path / "empty").write_text("[]")
    reader = iter(RecordReader([good, bad, worse, tmp_path / "empty", tmp_path / "none", good]))
    assert [next(reader).place, next(reader).place] == [f"{good}:1", f"{bad}:1"]
    with pytest.raises(DataError) as error:
        next(reader)
    missing = "missing key 'instruction' (the keys here: 'output')"
    assert str(error.value).splitlines() == [
        *(f"{bad}:{line}: {missing}" for line in range(2, 41, 2)),
        f"{bad}: and 10 more",
        *(f"{worse}:{line}: 'prompt' must be a string, not a number" for line in range(1, 21)),
        f"{worse}: and 1 more",
        f"{tmp_path / 'empty'}: it has no records",
        f"{tmp_path / 'none'}: No such file or directory; check the path",
    ]


def test_a_fault_is_one_short_line(tmp_path):
    file = write_jsonl(tmp_path / "x", [talk(said("h\n" * 10**6, "q")), PAIR])
    (line,) = faults([file])
    assert line.startswith(f"{file}:1: message 1: unknown role 'h\\nh\\n") and len(line) < 1100


# --- what is counted --------------------------------------------------------------------------


def test_keys_that_are_not_read_are_counted_by_records(tmp_path):
    records = [PAIR | {"id": i} for i in range(1200)] + [talk(Q | {"n": 1}, A | {"n": 2}), PAIR]
    reader, _ = read(tmp_path, records)
    assert reader.unread == {"id": 1200, "messages[].n": 1}
    assert reader.about_unread() == "not read: id (1,200 records), messages[].n (1)"
    assert reader.about_unread(most=1) == "not read: id (1,200 records), and 1 more keys"
    assert read(tmp_path, [PAIR])[0].about_unread() == ""


def test_a_key_with_a_bracket_is_named_as_it_is(tmp_path):
    reader, _ = read(tmp_path, [PAIR | {"n (kg)": 1}])
    assert reader.about_unread() == "not read: n (kg) (1 record)"


def test_answers_that_are_not_learnt_and_unanswered_questions_are_counted(tmp_path):
    records = [talk(Q, SILENT, Q, A, Q), talk(Q, SILENT, SILENT, A), talk(A, Q), PAIR]
    reader, found = read(tmp_path, records)
    assert (reader.not_learnt, reader.unanswered) == (3, 2)
    assert found == [[Q, SILENT, Q, A], [Q, SILENT, SILENT, A], [A], [Q, A]]


NONE = "nothing to learn: it has no answer; remove it"
SILENCED = "nothing to learn: every answer has loss false, or weight 0; remove it"


@pytest.mark.parametrize(
    "record, told", [(talk(Q), NONE), (talk(S), NONE), (talk(Q, SILENT, Q), SILENCED)]
)
def test_a_conversation_without_anything_to_learn(tmp_path, record, told):
    file = write_jsonl(tmp_path / "x", [record])
    assert faults([file]) == [f"{file}:1: {told}"]


TOOLS = [  # (records, names of tools, whether there are lists of tools)
    ([PAIR, talk(S, Q, A)], [], False),
    ([PAIR, talk(Q, CALL, OBS, A)], ["f"], False),
    ([PAIR | {"tools": ["h: x", "g: x"]}, talk(Q, CALL, OBS, A)], ["f", "g", "h"], True),
    ([PAIR | {"tools": [{"description": "x"}]}, talk(Q, CALL, OBS, A)], None, True),
]


@pytest.mark.parametrize("records, names, are_listed", TOOLS)
def test_tools_are_collected(tmp_path, records, names, are_listed):
    reader, _ = read(tmp_path, records)
    assert reader.about_tools() == {"names": names, "are_listed": are_listed}
    assert reader.tool_names == (names if names is None else {*names})
    assert reader.lists_tools is are_listed


# --- inputs of the kind that people have reported ---------------------------------------------

HEADER = (
    "Answer the following questions as best as you can. You have access to the following tools:\n"
)
WEATHER = (
    '[\n    {\n        "name": "get_weather",\n        "description": "查天气",\n'
    '        "parameters": {\n            "city": "城市"\n        }\n    }\n]'
)
HELLO = [said("user", "你好"), said("assistant", "你好！")]
WEIGHTED = [
    said("user", "第一问"), said("assistant", "胡说八道一号", loss=False),
    said("user", "第二问"), said("assistant", "正确答案"),
]  # fmt: skip
CASES = {  # file: (messages of its records, counts of the reader that are not 0 or empty)
    "conversations_with_system_beside.jsonl": (
        [[said("system", "你是严谨的医生。"), said("user", "头疼怎么办"),
          said("assistant", "先休息。")]], {}),
    "glm3_tools_top_level.jsonl": (
        [[said("system", HEADER + WEATHER), said("user", "厦门热吗"),
          said("assistant", "我查一下。")]],
        {"tool_names": {"get_weather"}, "lists_tools": True}),
    "glm3_tool_turn.json": (
        [[said("system", HEADER + '[\n    "get_weather: 查天气"\n]'),
          said("user", "厦门热吗"), said("assistant", "我需要查天气。"),
          said("assistant", "```python\ntool_call(city='厦门')\n```", metadata="get_weather"),
          said("observation", '{"t": 31}'), said("assistant", "31度，热。")]],
        {"tool_names": {"get_weather"}, "lists_tools": True}),
    "glm3_loss_false.jsonl": ([WEIGHTED], {"not_learnt": 1}),
    "openai_weight0.jsonl": ([WEIGHTED], {"not_learnt": 1}),
    "sharegpt.json": ([[S, *HELLO]], {}),
    "alpaca_history.json": ([[*HELLO, said("user", "再说一遍"), HELLO[1]]], {}),
    "alpaca_system.json": ([[said("system", "你是甄嬛"), *HELLO]], {}),
    "starts_with_assistant.jsonl": ([[said("assistant", "欢迎！"), *HELLO]], {}),
    "ends_with_user.jsonl": ([HELLO], {"unanswered": 1}),
    "alpaca_empty_history.json": ([HELLO], {}), "alpaca_empty_system.json": ([HELLO], {}),
    "alpaca_null_input.json": ([HELLO], {}), "prompt_response.jsonl": ([HELLO], {}),
    "openai_content_parts.jsonl": ([HELLO], {}), "qa.csv": ([HELLO], {}),
    "conversation_id.jsonl": ([HELLO], {"unread": {"conversation_id": 1}}),
    "extra_from_key.jsonl": ([HELLO], {"unread": {"from": 1}}),
    "two_paragraph_answers.jsonl": (
        [[said("user", "怎么学习？"), said("assistant", "先看书，再练习。\n然后总结，最后复习。")],
         [said("user", "你是谁？"), said("assistant", "我是小砚。")]], {}),
}  # fmt: skip
REFUSED = {  # file: what is told after its path
    "advertisegen.jsonl": ":1: missing keys 'instruction' and 'output' (the keys here: 'content', "
                          "'summary'); try --keys content=instruction summary=output",
    "messages_swift.jsonl": f":1: {SILENCED}",
    "openai_messages_tool.jsonl": ":1: message 3: the call c1 has no function with a name",
    "two_observations.jsonl": ":1: message 4: wrong order of roles: observation after observation; "
                              "expected assistant",
    "pandas_nan.jsonl": ":1: 'input' must be a string, not NaN (pandas writes it for an empty "
                        'cell; write "" instead)',
    "lfs_pointer.json": ": a Git LFS pointer, not the file; run `git lfs pull`, or download it "
                        "again",
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_reported_files_that_are_trained(name):
    messages, expected = CASES[name]
    reader = RecordReader([reference(f"cases/{name}")])
    assert [record.messages for record in reader] == messages
    counts = {
        "unread": {},
        "not_learnt": 0,
        "unanswered": 0,
        "tool_names": set(),
        "lists_tools": False,
    }
    assert {key: getattr(reader, key) for key in counts} == counts | expected


@pytest.mark.parametrize("name", REFUSED)
def test_reported_files_that_are_refused(name):
    file = reference(f"cases/{name}")
    assert faults([file]) == [f"{file}{REFUSED[name]}"]


def test_a_refused_file_is_trained_with_the_keys_that_it_was_told():
    keys = [("content", "instruction"), ("summary", "output")]
    (record,) = RecordReader([reference("cases/advertisegen.jsonl")], keys=keys)
    assert record.messages == [said("user", "类型#裤*版型#宽松"), said("assistant", "宽松的裤子。")]


def test_every_reported_file_is_tested():
    names = {file.name for file in reference("cases").iterdir()} - {"README.md"}
    assert names == CASES.keys() | REFUSED.keys()


# --- helpers of reading -----------------------------------------------------------------------


def test_batches():
    assert [*in_batches(range(5), 2)] == [[0, 1], [2, 3], [4]]
    assert [*in_batches([], 2)] == []


def test_one_ahead_computes_the_next_result_meanwhile():
    started, taken = [threading.Event() for _ in range(4)], []

    def double(item):
        started[item].set()
        if item == 3:
            raise ValueError("three")
        return 2 * item

    pairs = one_ahead(double, (taken.append(i) or i for i in range(4)))
    for item in range(3):
        assert next(pairs) == (item, 2 * item)
        assert started[item + 1].wait(10), "the next one waits until it is asked for"
        assert taken == [*range(item + 2)], "more than one is ahead"
    with pytest.raises(ValueError, match="three"):
        next(pairs)
    assert [*one_ahead(double, [])] == []


TIMES = [  # (what is given, file, times)
    ("a", "a", 1), ("a:3", "a", 3), ("a:0.5", "a", 0.5), ("a:.25", "a", 0.25),
    ("a:2:1000", "a:2", 1000), ("a:x", "a:x", 1), ("a:-1", "a:-1", 1), (":2", ":2", 1),
    ("there:2", "there:2", 1),  # a file of this name exists
]  # fmt: skip


@pytest.mark.parametrize("given, file, times", TIMES)
def test_how_many_times_a_file_is_used(tmp_path, monkeypatch, given, file, times):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there:2").touch()
    assert split_times(given) == (file, times)


@pytest.mark.parametrize("given", ["a:0", "a:0.0", "a:1000.5"])
def test_times_out_of_range(given):
    with pytest.raises(DataError, match=f"{given}: the number must be more than 0, and at most"):
        split_times(given)


def test_keys_of_training_serve_questions_too(tmp_path):
    """A question has no answer, whose key could be renamed."""
    keys = [("content", "instruction"), ("summary", "output")]
    _, found = read(tmp_path, [{"content": "q"}], is_prompt=True, keys=keys)
    assert found == [[Q]]
    with pytest.raises(DataError, match="no record has the key 'summary'"):
        read(tmp_path, [{"content": "q", "output": "a"}], keys=keys)
    with pytest.raises(DataError, match="an old name is given twice"):
        RecordReader([], keys=[("a", "output"), ("a", "input")])


@pytest.mark.parametrize(
    "head, told", [(b"\x1f\x8b", "a gzip file"), (b"PK\x03\x04", "a zip file")]
)
def test_a_file_that_is_no_text_is_named(tmp_path, head, told):
    (tmp_path / "x").write_bytes(head + bytes(99))
    with pytest.raises(DataError, match=told):
        list(RecordReader([tmp_path / "x"]))


@pytest.mark.parametrize("seconds, is_shown", [(2.3, True), (0, False)])
def test_a_bar_appears_after_two_seconds(monkeypatch, capsys, seconds, is_shown):
    def slow():
        for i in range(4):
            time.sleep(seconds / 4)
            yield i

    monkeypatch.setattr(records, "bar_options", lambda: dict(mininterval=0.1))  # as on a terminal
    assert list(in_batches(slow(), 3)) == [[0, 1, 2], [3]]
    assert ("reading: " in capsys.readouterr().err) == is_shown
