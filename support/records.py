"""Data files → messages, and what is wrong with them, by file and line.

    [{"instruction": "1+1?", "input": "", "output": "2"}, …]         a JSON list of records, or
    {"conversations": [{"role": "user", "content": "1+1?"}, …]}      JSONL: one record on each line

An instruction record is one question and its answer. A conversation record has a list of messages:
{"role": system|user|assistant|observation, "content": str, "metadata": str (optional)}. A file may
hold both kinds, and the two kinds of file are told apart by their content.
"""

import difflib
import json
import re
from pathlib import Path
from typing import NamedTuple

from support.errors import one_a_line

ROLES = ("system", "user", "assistant", "observation")
MAY_FOLLOW = {  # the roles that may come after a role
    "the start": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "observation", "assistant"),
    "observation": ("assistant",),
}
OTHER_FORMATS = {  # keys of other formats, and what says the same here
    "from": "role",
    "value": "content",
    "messages": "conversations",
    "history": "conversations",
    "system": "--system, or conversations",
    "prompt": "instruction",
    "query": "input",
    "response": "output",
}


class DataError(ValueError):
    """What is wrong with data files: one line for each fault, with its place and the remedy."""


class Record(NamedTuple):
    place: str  # "file:line", or "file: record N" in a JSON list
    value: dict  # the record as it was in the file
    messages: list


def read_conversations(files):
    """→ [(place, messages)] of all records. Raises DataError: see read_records."""
    return [(record.place, record.messages) for record in read_records(files)]


def read_records(files, prompts=False):
    """→ [Record] of all `files`. Raises DataError with the first 20 faults of each file.

    With `prompts`, records are questions to answer: an answer may be missing, and the messages are
    those that come before the last answer.
    """
    records, faults = [], []
    for file in map(Path, files):
        found, wrong = [], []
        for place, value, fault in _values(file):
            try:
                if fault:
                    raise DataError(fault)
                found.append(Record(place, value, _messages(value, prompts)))
            except DataError as error:
                wrong.append(f"{place}: {error}")
        if not found and not wrong:
            wrong = [f"{file}: the file is empty: it has no records"]
        records += found
        faults += [one_a_line(wrong, f"{file}: ")] if wrong else []
    if faults:
        raise DataError("\n".join(faults))
    return records


# --- from a file to JSON values ---------------------------------------------------------------


def _values(path):
    """Yields (place, value, None) for each JSON value, (place, None, fault) for anything else."""
    try:
        if path.is_char_device():  # /dev/zero would never end
            raise OSError("not a file")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        yield str(path), None, f"{error.strerror or error}; check the path"
        return
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        yield f"{path}:{line}", None, "not UTF-8; save the file as UTF-8"
        return
    if text.lstrip().startswith("["):
        values, line, fault = _parse(text)
        if fault:
            yield f"{path}:{line}", None, fault
        else:
            for number, value in enumerate(values, 1):
                yield f"{path}: record {number}", value, None
    elif _is_one_object_over_lines(text):
        fault = "one object over several lines; use a list of objects, or one object a line"
        yield f"{path}:1", None, fault
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                value, _, fault = _parse(line)
                yield f"{path}:{number}", value, fault


def _is_one_object_over_lines(text):
    first_line, newline, _ = text.strip().partition("\n")
    return bool(newline and _parse(first_line)[2] and not _parse(text)[2])


def _parse(text):
    """→ (value, the line of a fault, fault or None)"""
    try:
        return json.loads(text), 1, None
    except json.JSONDecodeError as error:
        where = f"{error.msg} at column {error.colno}"
        return None, error.lineno, f"not JSON ({where}); give a JSON list, or JSONL"
    except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
        return None, 1, f"not usable JSON ({error})"


# --- from a JSON value to messages ------------------------------------------------------------


def _messages(value, prompts):
    """Raises DataError with the first thing that is wrong."""
    if not isinstance(value, dict):
        raise DataError(f"not an object but {_kind(value)}; a record is {{...}}")
    if "conversations" in value:
        return _conversation(value["conversations"], prompts)
    return _instruction(value, prompts)


def _instruction(record, prompts):
    required = ("instruction",) if prompts else ("instruction", "output")
    _check_keys(record, required, ("input", "output", "conversations"))
    question = "\n".join(filter(None, (record["instruction"], record.get("input"))))
    if not question.strip():
        raise DataError("empty question: 'instruction' and 'input' are both empty")
    messages = [{"role": "user", "content": question}]
    if prompts:
        return messages
    if not record["output"].strip():
        raise DataError("empty answer: 'output' has no text")
    return [*messages, {"role": "assistant", "content": record["output"]}]


def _conversation(messages, prompts):
    if not isinstance(messages, list):
        raise DataError(f"'conversations' must be a list of messages, not {_kind(messages)}")
    if not messages:
        raise DataError("'conversations' has no messages")
    before = "the start"
    for number, message in enumerate(messages, 1):
        try:
            _check_message(message, before)
        except DataError as error:
            raise DataError(f"message {number}: {error}") from None
        before = message["role"]
    if prompts:
        if before == "system":
            raise DataError("there is nothing to answer after the system's message")
        return messages[:-1] if before == "assistant" else messages
    if before != "assistant":
        raise DataError(f"a conversation must end with an assistant's message, not {before}")
    return messages


def _check_message(message, before):
    if not isinstance(message, dict):
        raise DataError(f"not an object but {_kind(message)}")
    _check_keys(message, ("role", "content"), ("metadata",))
    role = message["role"]
    if role not in ROLES:
        raise DataError(f"unknown role {role!r}; roles are {', '.join(ROLES)}")
    if role not in MAY_FOLLOW[before]:
        expected = " or ".join(MAY_FOLLOW[before])
        raise DataError(f"wrong order of roles: {role} after {before}; expected {expected}")
    if role in ("user", "assistant") and not message["content"].strip():
        what = "answer" if role == "assistant" else "question"
        raise DataError(f"empty {what}: the {role}'s content has no text")
    if "\n" in message.get("metadata", ""):
        raise DataError("'metadata' must be one line")


def _check_keys(record, required, optional):
    """The required keys are there, no key looks like a misspelt one, and values are proper text."""
    known = dict.fromkeys((*required, *optional))
    absent = [key for key in known if key not in record]
    for key, value in record.items():
        if key in known:
            if not isinstance(value, str):
                raise DataError(f"{key!r} must be a string, not {_kind(value)}")
            if re.search("[\ud800-\udfff]", value):
                raise DataError(f"{key!r} has half of a surrogate pair, which is not a character")
        elif key in OTHER_FORMATS:
            raise DataError(f"the key {key!r} is not read; use {OTHER_FORMATS[key]}")
        elif close := difflib.get_close_matches(key, absent, n=1, cutoff=0.75):
            raise DataError(f"unknown key {key!r}; did you mean {close[0]!r}?")
    for key in required:
        if key not in record:
            there = ", ".join(map(repr, list(record)[:8])) or "none"
            raise DataError(f"missing key {key!r} (the keys here: {there})")


def _kind(value):
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true/false"}
    return kinds.get(type(value), "null" if value is None else "a number")
