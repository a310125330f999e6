"""support/preamble.py: what a prompt begins with, and which tools an answer may call.

python -m pytest -q tests/test_preamble.py
"""

import pytest

from support.preamble import Preamble, read_tools
from support.tools import may_be_tool

HEADER = (
    "Answer the following questions as best as you can. You have access to the following tools:\n"
)


def system(text):
    return {"role": "system", "content": text}


S, OWN = system("s"), system("own")
TOOLS, OWN_TOOLS = system(f'{HEADER}["f: x"]'), system(f'{HEADER}["g: x"]')
Q = {"role": "user", "content": "q"}
BEFORE = [  # (system, tools, a conversation, the conversation with the two)
    (None, None, [Q], [Q]),
    ("", None, [Q], [Q]),
    ("s", None, [Q], [S, Q]),
    (None, TOOLS, [Q], [TOOLS, Q]),
    ("s", TOOLS, [Q], [TOOLS, S, Q]),
    ("s", TOOLS, [], [TOOLS, S]),
    ("s", TOOLS, [OWN, Q], [TOOLS, OWN, Q]),
    ("s", TOOLS, [OWN_TOOLS, Q], [OWN_TOOLS, S, Q]),
    ("s", TOOLS, [OWN_TOOLS, OWN, Q], [OWN_TOOLS, OWN, Q]),
]


@pytest.mark.parametrize("text, tools, messages, expected", BEFORE)
def test_a_conversation_keeps_its_own_system_messages(text, tools, messages, expected):
    given = [*messages]
    assert Preamble(text, tools).added_to(given) == expected
    assert given == messages, "the argument was changed"


UNNAMED = system(f'{HEADER}[{{"description": "x"}}]')
TRAINED = {"names": ["h"], "are_listed": True}
CALLABLE = [  # (tools, trained_tools, messages, the names that may be called)
    (None, {}, [Q], None),
    (TOOLS, {}, [Q], {"f"}),
    (None, {}, [OWN_TOOLS, Q], {"g"}),
    (TOOLS, TRAINED, [OWN_TOOLS, Q], {"f", "g", "h"}),
    (None, TRAINED, [Q], {"h"}),
    (None, {"names": [], "are_listed": False}, [Q], set()),
    (TOOLS, {"names": None, "are_listed": True}, [Q], None),
    (UNNAMED, TRAINED, [Q], None),
]


@pytest.mark.parametrize("tools, trained, messages, names", CALLABLE)
def test_which_tools_may_be_called(tools, trained, messages, names):
    assert Preamble(None, tools, trained).callable_tools(messages) == names


MAY_BE = [  # (the first line of an answer, the known names, whether it may be a tool's)
    ("f", {"f"}, True), ("查天气", {"查天气"}, True), ("interpreter", set(), True),
    ("g", {"f"}, False), ("f", set(), False), ("", set(), False),
    ("get_weather-2.b", None, True),
    ("查天气", None, False), ("Hello, world", None, False), ("", None, False),
]  # fmt: skip


@pytest.mark.parametrize("line, known, may_be", MAY_BE)
def test_what_may_be_a_tool(line, known, may_be):
    assert may_be_tool(line, known) is may_be


# --- the list of --tools ----------------------------------------------------------------------


@pytest.mark.parametrize("content", ['["f: x"]', '\ufeff["f: x"]\n', '[\n"f: x"]'])
def test_a_file_of_tools_is_json(tmp_path, content):
    (tmp_path / "t").write_text(content, "utf-8")
    assert read_tools(tmp_path / "t") == system(f'{HEADER}[\n    "f: x"\n]')


def test_a_file_of_tools_is_text(tmp_path):
    (tmp_path / "t").write_text("f: 查天气\n", "utf-8")
    assert read_tools(str(tmp_path / "t"))["content"].rstrip() == f"{HEADER}f: 查天气"


BAD_FILES = [  # (content, what is told after the file's name)
    (b" \n", "it lists no tools"),
    (b"[]", "it lists no tools"),
    ("查天气".encode("gbk"), "not UTF-8; save the file as UTF-8"),
    (b'["\\ud800"]', "a text holds half of a surrogate pair"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:8e\n", "a Git LFS pointer"),
    (b'[{"name": "f",}]', "not JSON"),
]


@pytest.mark.parametrize("content, fault", BAD_FILES)
def test_a_bad_file_of_tools_is_refused_by_name(tmp_path, content, fault):
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_tools(tmp_path / "t")
    assert str(error.value).startswith(f"{tmp_path / 't'}: {fault}")


def test_no_file_of_tools(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_tools(tmp_path / "nowhere")


TRAINED_WITH = "this adapter was trained with tools"
SAID = [  # (tools, trained_tools, what is said)
    (None, {}, ""),
    (None, {"names": ["f"], "are_listed": False}, ""),
    (TOOLS, TRAINED, ""),
    (None, TRAINED, f"({TRAINED_WITH} (h); --tools FILE lists them in a prompt)\n"),
    (None, TRAINED | {"names": None}, f"({TRAINED_WITH}; --tools FILE lists them in a prompt)\n"),
    (None, TRAINED | {"names": [*"abcdefghijkl"]},
     f"({TRAINED_WITH} (a; b; c; d; e; f; g; h; i; j; and 2 more); "
     "--tools FILE lists them in a prompt)\n"),
]  # fmt: skip


@pytest.mark.parametrize("tools, trained, told", SAID)
def test_tools_that_are_missing_are_told(capsys, tools, trained, told):
    Preamble(None, tools, trained).warn_if_tools_are_not_listed()
    assert capsys.readouterr() == ("", told)
