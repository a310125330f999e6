"""Reads the keys of a JSON object, and tells which are missing, misspelt, or of a wrong kind."""

import difflib
import functools
import re

from support.errors import DataError, kind_of

# These keys would change what is learnt, but this project cannot do what they say.
REFUSED = {"image", "images", "audio", "audios", "video", "videos"}
REFUSED |= {"chosen", "rejected", "rejected_response"}
EMPTY = (None, "", [], {})
HALF_OF_A_PAIR = re.compile("[\ud800-\udfff]")


def check_supported(given):
    """Raises DataError for a key of REFUSED that holds something."""
    for key in sorted(REFUSED & given.keys()):
        if given[key]:
            raise DataError(f"{key!r} is not supported; remove the key or the record")


def unread_keys(given, read, known, path=""):
    """→ the names of the keys that are not read, but hold something. Raises DataError for one that
    looks like a misspelt key of the tuple `known`."""
    if given.keys() <= read:
        return set()
    names = [key for key in given.keys() - read if given[key] not in EMPTY]
    for key in sorted(names):
        if (close := closest(key, known, 0.83)) and close not in given:
            raise DataError(f"unknown key {key!r}; did you mean {close!r}?")
    return {path + key for key in names}


@functools.lru_cache(maxsize=100_000)
def closest(key, known, cutoff=0.75):
    """→ the name in the tuple `known` that `key` may be a misspelt form of, or None"""
    return next(iter(difflib.get_close_matches(key, known, n=1, cutoff=cutoff)), None)


def required(turn, key):
    """The value of a key of a turn. Raises DataError if it is not there, or null."""
    if turn.get(key) is not None:
        return turn[key]
    if key in turn:
        raise DataError(f"{key!r} is null")
    for other in turn:
        if closest(other, (key,)):
            raise DataError(f"unknown key {other!r}; did you mean {key!r}?")
    there = ", ".join(map(repr, list(turn)[:8])) or "none"
    raise DataError(f"missing key {key!r} (the keys here: {there})")


def optional_text(record, key):
    """The text of a key of a record; "" if it is not there, or null."""
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{key!r} must be a string, not {kind_of(value)}")
    return value or ""


def optional_list(record, key):
    value = record.get(key)
    if value not in (None, "") and not isinstance(value, list):
        raise DataError(f"{key!r} must be a list, not {kind_of(value)}")
    return value or []


def check_unicode(text):
    """→ `text`. Raises DataError if it is no Unicode: JSON can hold half of a surrogate pair."""
    if HALF_OF_A_PAIR.search(text):
        raise DataError("a text holds half of a surrogate pair, which is not a character")
    return text
