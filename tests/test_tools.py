"""support/tools.py: lists of tools, calls and names of tools, in ChatGLM3's native form.

python -m pytest -q tests/test_tools.py
"""

import pytest
from conftest import ROOT
from pages import blocks

from support.errors import DataError
from support.tools import as_text, names_of_tools, tool_call, tools_message

HEADER = (
    "Answer the following questions as best as you can. You have access to the following tools:\n"
)
AS_JSON = '[\n    {\n        "name": "f",\n        "描述": "查天气"\n    }\n]'
LISTS = [  # (tools, what stands after the header)
    ([{"name": "f", "描述": "查天气"}], AS_JSON),
    ('[{"name":"f","描述":"查天气"}]', AS_JSON),  # a string that is JSON
    ('[{"name": "f", "描述": "\\u67e5天气"}]', AS_JSON),
    (["f: 查天气"], '[\n    "f: 查天气"\n]'),
    ({"f": {}}, '{\n    "f": {}\n}'),
    ("f: 查天气\ng: 查时间", "f: 查天气\ng: 查时间"),  # a string that is not
    ("[f]", "[f]"),
]


@pytest.mark.parametrize("tools, listed", LISTS)
def test_a_list_of_tools_is_a_system_message(tools, listed):
    assert tools_message(tools) == {"role": "system", "content": HEADER + listed}


@pytest.mark.parametrize("tools", [None, [], {}, "", " \n", "[]", "{}", "null"])
def test_no_tools_are_no_message(tools):
    assert tools_message(tools) is None


def test_what_is_no_list_of_tools():
    with pytest.raises(DataError, match="'tools' must be a list, not true/false"):
        tools_message(True)
    with pytest.raises(DataError, match="a text holds half of a surrogate pair"):
        tools_message(["\ud800"])


CALLS = [  # (arguments, what stands between the brackets of tool_call)
    ({"city": "厦门", "days": 3}, "city='厦门', days=3"),
    ({"b": None, "a": [1.5, True], "c": {"d": "it's"}}, "b=None, a=[1.5, True], c={'d': \"it's\"}"),
    ('{"city": "厦门", "text": "a\\nb"}', r"city='厦门', text='a\nb'"),
    ({}, ""), ("{}", ""), ("", ""), (None, ""),
]  # fmt: skip


@pytest.mark.parametrize("arguments, written", CALLS)
def test_a_call(arguments, written):
    content = "```python\ntool_call(" + written + ")\n```"
    assert tool_call("f", arguments) == {"role": "assistant", "metadata": "f", "content": content}


BAD_CALLS = [  # (name, arguments, how the fault begins)
    (None, {}, "a tool's name must be a string, not null"),
    ("f", "x=1", "the arguments of 'f' must be an object, not a string"),
    ("f", "[1]", "the arguments of 'f' must be an object, not a list"),
]


@pytest.mark.parametrize("name, arguments, fault", BAD_CALLS)
def test_what_is_no_call(name, arguments, fault):
    with pytest.raises(DataError) as error:
        tool_call(name, arguments)
    assert str(error.value).startswith(fault)


@pytest.mark.parametrize("name", ["", " ", "a\nb"])
def test_a_name_that_is_a_string_is_not_refused_for_being_one(name):
    with pytest.raises(DataError) as error:
        tool_call(name, {})
    assert "not a string" not in str(error.value)


LISTED = [  # (tools, their names; None if one can't be told)
    ([{"name": "f"}, {"type": "function", "function": {"name": "g"}}], {"f", "g"}),
    (["get_weather: 查天气", "get-time：查时间"], {"get_weather", "get-time"}),
    ({"name": "f"}, {"f"}),
    ("f: 查天气", None),
    ([{"name": "f"}, {"description": "查天气"}], None),
    ([{"name": 3}], None), (["查天气"], None), ("[1]", None),
]  # fmt: skip


@pytest.mark.parametrize("tools, names", LISTED)
def test_names_of_listed_tools(tools, names):
    assert names_of_tools([tools_message(tools)]) == names


def test_a_text_of_several_tools_loses_none():
    names = names_of_tools([tools_message("f: 查天气\ng: 查时间")])
    assert names is None or names >= {"f", "g"}


def test_names_of_called_tools():
    question = {"role": "user", "content": "q"}
    assert names_of_tools([question]) == set()
    messages = [tools_message(["f: x"]), question, tool_call("g", {}), tool_call("f", {})]
    assert names_of_tools(messages) == {"f", "g"}


def test_metadata_of_what_is_no_call_is_no_name():
    assert names_of_tools([{"role": "user", "content": "q", "metadata": "m"}]) == set()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [float("-inf")]])
def test_what_json_has_no_word_for_is_refused(value):
    for make in (as_text, tools_message, lambda value: tool_call("f", {"x": value})):
        if make is not tools_message or isinstance(value, list):
            with pytest.raises(DataError, match="NaN or an infinity, which is not JSON"):
                make(value)


def test_the_page_on_serving_lists_tools_as_training_does():
    text = (ROOT / "docs" / "serving.md").read_text("utf-8")
    _, code = (code for language, code in blocks(text) if language == "python")
    shown = {}
    exec(code, shown)
    assert shown["messages"][0] == tools_message(shown["tools"])
