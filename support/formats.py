"""A record of any common format → messages, and what is wrong with it.

A record is one question with its answer, or a conversation:

    {"instruction": "1+1?", "input": "", "output": "2"}
    {"conversations": [{"role": "user", "content": "1+1?"}, …]}

Other names of the question are prompt and query, of the answer response, of the list messages.

A message is {"role": system|user|assistant|observation, "content": str}, with "metadata" (the name
of a tool) and "loss" (False: it is not learnt) where these are needed. docs/data.md has an example
of each format.
"""

import shlex

from support.errors import DataError, kind_of
from support.fields import check_supported, closest, optional_list, optional_text, unread_keys
from support.tools import is_tools_message, tools_message
from support.turns import is_empty_answer, new_message, pair_calls, read_turn

MAY_FOLLOW = {  # the roles that may come after a role
    "the start": ("system", "user", "assistant"),
    "system": ("system", "user", "assistant"),
    "user": ("assistant",),
    "assistant": ("user", "observation", "assistant"),
    "observation": ("assistant",),
}
QUESTION_KEYS, ANSWER_KEYS = ("instruction", "prompt", "query"), ("output", "response")
LIST_KEYS = ("conversations", "messages")
EXTRA_KEYS = ("system", "history", "tools")
RECORD_KEYS = {*QUESTION_KEYS, "input", *ANSWER_KEYS, *LIST_KEYS, *EXTRA_KEYS}


def read_record(record, is_prompt, unread):
    """→ the messages of a record, a JSON value. Raises DataError with the first fault.

    is_prompt: the last answer may be missing. The names of keys that are not read go into the set
    `unread`: "id" of the record itself, "messages[].id" of its turns.
    """
    if not isinstance(record, dict):
        raise DataError(f"not an object but {kind_of(record)}; a record is {{...}}")
    check_supported(record)
    lists = [key for key in LIST_KEYS if record.get(key) is not None]
    if len(lists) > 1:
        raise DataError("it has both 'conversations' and 'messages'; leave one out")
    if lists:
        messages = _conversation(record, lists[0], is_prompt, unread)
    else:
        messages = _instruction(record, is_prompt, unread)
    if sum(map(is_tools_message, messages[:3])) > 1:
        raise DataError("it lists tools twice; leave one list out")
    return messages


# --- one question, one answer -----------------------------------------------------------------


def _instruction(record, is_prompt, unread):
    question, answer = _question_and_answer(record, is_prompt)
    read = {question, "input", answer, *EXTRA_KEYS}
    unread |= unread_keys(record, read, ("input", *EXTRA_KEYS))
    messages = _system_messages(record)
    for number, pair in enumerate(optional_list(record, "history"), 1):
        if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
            raise DataError(f"'history' {number} must be [question, answer], two strings")
        if not (pair[0].strip() and pair[1].strip()):
            raise DataError(f"'history' {number} has a question or an answer without text")
        messages += [new_message("user", pair[0]), new_message("assistant", pair[1])]
    parts = (optional_text(record, question), optional_text(record, "input"))
    text = "\n".join(filter(None, parts))
    if not text.strip():
        raise DataError(f"empty question: {question!r} and 'input' have no text")
    messages.append(new_message("user", text))
    if optional_text(record, answer).strip():
        messages.append(new_message("assistant", record[answer]))
    elif not is_prompt:
        raise DataError(f"empty answer: {answer!r} has no text")
    return messages


def _question_and_answer(record, is_prompt):
    """→ the keys of the two"""
    if "instruction" in record and "output" in record:
        return "instruction", "output"  # some Alpaca files have a `prompt` of both, too
    found = []
    for names, what in ((QUESTION_KEYS, "question"), (ANSWER_KEYS, "answer")):
        there = [name for name in names if name in record]
        if len(there) > 1:
            which = f"{there[0]!r} or {there[1]!r}: which one is the {what}?"
            raise DataError(f"{which} Rename or remove the other one")
        found += there or [None]
    question, answer = found
    if question is None or (answer is None and not is_prompt):
        wanted = [] if question else ["instruction"]
        wanted += [] if answer or is_prompt else ["output"]
        read = {question, answer, "system"} | ({"input"} if question else set())
        raise DataError(_missing(record, wanted, read))
    return question, answer or "output"


def _missing(record, wanted, read):
    """What to say of a record that lacks the `wanted` keys. read: keys that are not these."""
    for key in record:
        if close := closest(key, tuple(wanted)) or closest(key, LIST_KEYS, 0.85):
            return f"unknown key {key!r}; did you mean {close!r}?"
    others = [key for key, value in record.items() if isinstance(value, str) and key not in read]
    there = ", ".join(map(repr, list(record)[:8])) or "none"
    names = " and ".join(map(repr, wanted))
    told = f"missing key{'s' * (len(wanted) - 1)} {names} (the keys here: {there})"
    if len(others) == len(wanted):
        renamed = (f"{old}={new}" for old, new in zip(others, wanted, strict=True))
        told += f"; try --keys {shlex.join(renamed)}"
    return told


# --- conversations ----------------------------------------------------------------------------


def _conversation(record, key, is_prompt, unread):
    turns = record[key]
    if not isinstance(turns, list):
        raise DataError(f"{key!r} must be a list of messages, not {kind_of(turns)}")
    if is_prompt and turns and is_empty_answer(turns[-1]):
        turns = turns[:-1]
    if record.get("history"):
        raise DataError(f"it has both 'history' and {key!r}; leave one out")
    unread |= unread_keys(record, {key, *EXTRA_KEYS}, EXTRA_KEYS)
    numbered = []  # (number of the turn, message)
    for number, turn in enumerate(turns, 1):
        try:
            numbered += [(number, message) for message in read_turn(turn, f"{key}[].", unread)]
        except DataError as error:
            raise DataError(f"message {number}: {error}") from None
    messages = _in_order(pair_calls(numbered))
    if not messages:
        raise DataError(f"{key!r} has no messages")
    system = [m for m in messages if m["role"] == "system" and not is_tools_message(m)]
    if system and optional_text(record, "system").strip():
        raise DataError(f"it has 'system' beside {key!r}, and also in a message; leave one out")
    messages = _system_messages(record) + messages
    return sorted(messages, key=lambda message: not is_tools_message(message))  # tools come first


def _in_order(numbered):
    """[(number of the turn, message)] → the messages. Raises DataError for a wrong order."""
    before = "the start"
    for number, message in numbered:
        role = message["role"]
        if role not in MAY_FOLLOW[before]:
            expected = " or ".join(MAY_FOLLOW[before])
            what = f"wrong order of roles: {role} after {before}; expected {expected}"
            raise DataError(f"message {number}: {what}")
        before = role
    return [message for _, message in numbered]


def _system_messages(record):
    """The messages of `tools` and `system` of a record."""
    tools, text = tools_message(record.get("tools")), optional_text(record, "system")
    return [*([tools] if tools else []), *([new_message("system", text)] if text.strip() else [])]
