"""Tools in ChatGLM3's native form: the system message that lists them, calls, and their names.

Source of the format: the official repository's guide to tools, and its composite demo. A call is an
assistant's message whose metadata is the tool's name, and whose content is Python to be run.
"""

import functools
import json
import re

from support.errors import DataError, kind_of
from support.fields import check_unicode

INTERPRETER = "interpreter"  # the official name for a call that is a program
HEADER = (
    "Answer the following questions as best as you can. You have access to the following tools:"
)


def as_text(value, indent=None):
    """A JSON value as a text: a string as it is, else JSON. Raises DataError for NaN."""
    try:
        options = dict(ensure_ascii=False, allow_nan=False, indent=indent)
        return value if isinstance(value, str) else json.dumps(value, **options)
    except ValueError as error:
        raise DataError("NaN or an infinity, which is not JSON") from error


def parse_if_json(text):
    """→ the list or object that `text` is in JSON, or `text` itself"""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, list | dict) else text


def tools_message(tools):
    """→ the system message that lists `tools`, a JSON value or a text; None if there are none."""
    listed = parse_if_json(tools) if isinstance(tools, str) else tools
    if listed in (None, [], {}) or (isinstance(listed, str) and listed.strip() in ("", "null")):
        return None
    if isinstance(listed, bool | int | float):
        raise DataError(f"'tools' must be a list, not {kind_of(listed)}")
    return {"role": "system", "content": f"{HEADER}\n{check_unicode(as_text(listed, indent=4))}"}


def is_tools_message(message):
    return message["role"] == "system" and message["content"].startswith(f"{HEADER}\n")


def tool_call(name, arguments):
    """→ the assistant's message that calls the tool `name`. arguments: {name: JSON value}"""
    if not isinstance(name, str):
        raise DataError(f"a tool's name must be a string, not {kind_of(name)}")
    if not name.strip() or "\n" in name:
        raise DataError("a tool's name must be one line, and not empty")
    given = parse_if_json(arguments) if isinstance(arguments, str) else arguments
    given = {} if given in (None, "") else given
    if not isinstance(given, dict):
        raise DataError(f"the arguments of {name!r} must be an object, not {kind_of(given)}")
    as_text(given)  # which refuses NaN
    listed = ", ".join(f"{key}={value!r}" for key, value in given.items())
    content = f"```python\ntool_call({listed})\n```"
    return {"role": "assistant", "metadata": check_unicode(name), "content": check_unicode(content)}


def names_of_tools(messages):
    """→ the names of the tools that `messages` list or call, None if some can't be told.

    A tool is {"name": …}, {"function": {"name": …}}, or a text that begins with the name and ":".
    """
    calls = [m for m in messages if m["role"] == "assistant" and m.get("metadata")]
    names = {message["metadata"] for message in calls}
    for message in filter(is_tools_message, messages):
        names |= _names_in(message["content"])
    return None if None in names else names


@functools.lru_cache(maxsize=1000)
def _names_in(content):
    """→ the names of the tools in a tools' message, and None for each that can't be told"""
    tools = parse_if_json(content.removeprefix(HEADER))
    if isinstance(tools, str):  # a text may name tools anywhere in it
        return {None}
    return {*map(_name_of_tool, tools if isinstance(tools, list) else [tools])}


def _name_of_tool(tool):
    if isinstance(tool, dict):
        function = tool.get("function")
        name = tool.get("name") or (function.get("name") if isinstance(function, dict) else None)
        return name if isinstance(name, str) else None
    match = re.match(r"\s*([\w.-]+)\s*[:：]", tool) if isinstance(tool, str) else None
    return match[1] if match else None


def may_be_tool(name, known):
    """Whether the first line of an answer may be a tool's name. known: names, or None if unknown.

    It must be an identifier. Without known names it must be ASCII too: "你好" is no tool.
    """
    if not re.fullmatch(r"[^\W\d][\w.-]*", name):
        return False
    return name.isascii() if known is None else name in known or name == INTERPRETER
