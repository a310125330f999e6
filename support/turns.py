"""The turns of a conversation, as the common formats write them → messages.

A turn is {"role", "content"}, or ShareGPT's {"from", "value"}. Sources of the formats: OpenAI's
chat completions (tool_calls, tool_call_id), LLaMA-Factory's ShareGPT (function_call), and the guide
of the official repository (a turn of a tool with its parameters and its observation).
"""

from support.errors import DataError, kind_of
from support.fields import check_supported, check_unicode, optional_list, required, unread_keys
from support.tools import HEADER, as_text, parse_if_json, tool_call, tools_message

ROLES = ("system", "user", "assistant", "observation")
ROLE_NAMES = {role: role for role in ROLES} | {  # those of other formats
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "observation",
    "function": "observation",
    "function_response": "observation",
}
TURN_KEYS = {  # what a turn may have beside its role and its content
    "system": ("loss", "weight", "metadata", "tools"),
    "user": ("loss", "weight", "metadata"),
    "assistant": ("loss", "weight", "metadata", "tool_calls", "function_call"),
    "observation": ("loss", "weight", "metadata", "tool_call_id"),
}
PARTS = {"text", "image", "image_url", "input_audio", "audio", "video", "video_url", "file"}


def read_turn(turn, path, unread):
    """A turn → its messages. OpenAI's calls and their results also have an "id": see pair_calls.

    path: how a key that is not read is named in `unread`, before the key.
    """
    if not isinstance(turn, dict):
        raise DataError(f"not an object but {kind_of(turn)}")
    check_supported(turn)
    is_sharegpt = "from" in turn and "role" not in turn
    role_key, content_key = ("from", "value") if is_sharegpt else ("role", "content")
    name = required(turn, role_key)
    role = ROLE_NAMES.get(name) if isinstance(name, str) else None
    if role is None:
        raise DataError(f"unknown role {name!r}; roles are {', '.join(ROLE_NAMES)}")
    if name == "tool" and "parameters" in turn:
        return _official_tool_turn(turn, role_key, path, unread)
    if name == "function_call":
        return _function_call(turn, role_key, content_key, path, unread)
    known = (content_key, *TURN_KEYS[role])
    unread |= unread_keys(turn, {role_key, *known}, known, path)
    loss = _loss(turn, role)
    content = _joined(turn.get(content_key), f"{path}{content_key}[].", unread)
    if role == "observation":
        required(turn, content_key)
        id = _id(turn, "tool_call_id")
        return [_with_metadata(role, as_text(content), turn) | ({"id": id} if id else {})]

    tools = tools_message(turn.get("tools")) if role == "system" else None
    calls = _openai_calls(turn, path, unread) if role == "assistant" else []
    may_be_empty = role == "system" or calls
    if not may_be_empty:
        required(turn, content_key)
    if not isinstance(content, str | None):
        raise DataError(f"{content_key!r} must be a string, not {kind_of(content)}")
    text = content or ""
    if tools and text.strip() == HEADER:  # the official guide repeats it; `tools` has it already
        text = ""
    messages = [tools] if tools else []
    if text.strip():
        messages.append(_with_metadata(role, text, turn) | loss)
    elif not may_be_empty:
        what = "answer" if role == "assistant" else "question"
        raise DataError(f"empty {what}: the {role}'s {content_key} has no text")
    elif turn.get("metadata"):
        raise DataError("'metadata' without a text")
    return messages + [call | loss for call in calls]


def is_empty_answer(turn):
    """Whether a turn is an assistant's without anything in it."""
    if not isinstance(turn, dict) or turn.get("role", turn.get("from")) not in ("assistant", "gpt"):
        return False
    return not any(turn.get(key) for key in ("content", "value", "tool_calls", "function_call"))


def _official_tool_turn(turn, role_key, path, unread):
    """A turn of the official guide: a call with its result. → two messages"""
    read = {role_key, "name", "parameters", "observation", "loss", "weight"}
    unread |= unread_keys(turn, read, ("loss", "weight"), path)
    call = tool_call(required(turn, "name"), turn["parameters"])
    result = as_text(required(turn, "observation"))
    return [call | _loss(turn, "assistant"), new_message("observation", result)]


def _function_call(turn, role_key, content_key, path, unread):
    """A turn of ShareGPT whose text is JSON of {"name", "arguments"} → a call"""
    read = {role_key, content_key, "loss", "weight"}
    unread |= unread_keys(turn, read, ("loss", "weight"), path)
    value = required(turn, content_key)
    call = parse_if_json(value) if isinstance(value, str) else value
    if isinstance(call, list) and len(call) == 1:
        call = call[0]
    if not isinstance(call, dict) or "name" not in call:
        what = "one call, as JSON: {'name': …, 'arguments': …}"
        raise DataError(f"{content_key!r} must be {what}")
    return [_named_call(call, f"{path}{content_key}.", unread) | _loss(turn, "assistant")]


def _openai_calls(turn, path, unread):
    """tool_calls of an assistant's turn, or the older function_call → messages with an "id" """
    calls, older = optional_list(turn, "tool_calls"), turn.get("function_call")
    if older and calls:
        raise DataError("it has both 'tool_calls' and 'function_call'; leave one out")
    messages = []
    for number, call in enumerate(calls or ([{"function": older}] if older else []), 1):
        if not isinstance(call, dict):
            raise DataError(f"call {number} is no object but {kind_of(call)}")
        id, function = _id(call, "id") or f"number {number}", call.get("function")
        if not isinstance(function, dict) or "name" not in function:
            raise DataError(f"the call {id} has no function with a name")
        if call.get("type", "function") != "function":
            raise DataError(f"the call {id} is of type {call['type']!r}; only function is read")
        unread |= unread_keys(call, {"id", "type", "function"}, (), f"{path}tool_calls[].")
        inside = "tool_calls[].function." if calls else "function_call."
        messages.append(_named_call(function, path + inside, unread) | {"id": id})
    return messages


def _named_call(call, path, unread):
    """{"name", "arguments"}, or "parameters" as some write it → a message"""
    key = "arguments" if "arguments" in call else "parameters"
    unread |= unread_keys(call, {"name", key}, (), path)
    return tool_call(call["name"], call.get(key))


def pair_calls(numbered):
    """Reorders OpenAI's calls. OpenAI writes all calls of a turn, and then all results. ChatGLM3
    needs a call, its result, the next call, its result.

    numbered: [(number of the turn, message)]. The "id" of a message is taken out of it.
    """
    paired, calls, turn_of_calls = [], {}, None  # calls: {id: [the call, its result]} of one turn
    for number, message in numbered:
        id = message.pop("id", None)
        if message["role"] == "observation" and (calls or id):
            waiting = [each for each, pair in calls.items() if len(pair) == 1]
            id = waiting[0] if id is None and waiting else id
            if id not in waiting:
                of = "" if id is None else f" {id!r}"
                raise DataError(f"message {number}: no call{of} before it waits for a result")
            calls[id].append((number, message))
            continue
        if calls and number != turn_of_calls:
            paired += _with_results(calls)
            calls = {}
        if id in calls:
            raise DataError(f"message {number}: two calls have the id {id!r}")
        if id:
            calls[id], turn_of_calls = [(number, message)], number
        else:
            paired.append((number, message))
    ends_with_a_call = len(calls) == 1  # the conversation: then the call alone is learnt
    return paired + (sum(calls.values(), []) if ends_with_a_call else _with_results(calls))


def _with_results(calls):
    for id, pair in calls.items():
        if len(pair) == 1:
            raise DataError(f"message {pair[0][0]}: the call {id!r} has no result")
    return sum(calls.values(), [])


# --- the values of a turn ---------------------------------------------------------------------


def new_message(role, content):
    return {"role": role, "content": check_unicode(content)}


def _with_metadata(role, content, turn):
    message, metadata = new_message(role, content), turn.get("metadata")
    if not metadata:
        return message
    if not isinstance(metadata, str) or "\n" in metadata:
        is_text = isinstance(metadata, str)
        what = "one line" if is_text else f"a string, not {kind_of(metadata)}"
        raise DataError(f"'metadata' must be {what}")
    return message | {"metadata": check_unicode(metadata)}


def _joined(content, path, unread):
    """OpenAI's list of parts of text → a string. Anything else stays what it is."""
    parts = content if isinstance(content, list) else []
    kinds = [part.get("type") if isinstance(part, dict) else None for part in parts]
    if not any(kind in PARTS for kind in kinds if isinstance(kind, str)):
        return content  # a tool may return any list
    for part in parts:
        if not isinstance(part, dict) or "type" not in part:
            raise DataError(f"a part of the content must be {{'type': …}}, not {kind_of(part)}")
        if part["type"] != "text":
            raise DataError(f"a part of type {part['type']!r} can't be read, only text")
        if not isinstance(part.get("text"), str):
            raise DataError("a part of type 'text' has no text")
        check_supported(part)
        unread |= unread_keys(part, {"type", "text"}, (), path)
    return "".join(part["text"] for part in parts)


def _id(given, key):
    """The id of a call, or None. Raises DataError if it is neither a string nor a number."""
    id = given.get(key)
    if not isinstance(id, str | int | None):
        raise DataError(f"{key!r} must be a string, not {kind_of(id)}")
    return None if id == "" else id


def _loss(turn, role):
    """→ {"loss": False} if the turn is not to be learnt, else {}"""
    loss, weight = turn.get("loss"), turn.get("weight")
    if loss is None and weight is None:
        return {}
    if loss is not None and not isinstance(loss, bool):
        raise DataError(f"'loss' must be true or false, not {kind_of(loss)}")
    if weight is not None and weight not in (0, 1):
        raise DataError(f"'weight' must be 0 or 1, not {weight!r}")
    if loss is not None and weight is not None and loss != weight:
        raise DataError("'loss' and 'weight' contradict each other")
    is_learnt = weight if loss is None else loss
    if is_learnt and role != "assistant":
        raise DataError(f"a message of the {role} is never learnt: take out its loss or weight")
    return {} if is_learnt or role != "assistant" else {"loss": False}
