"""How a mistake is told to a user: on one line, printable, and short.

The project raises ValueError (and lets OSError pass) with a message that is written for the user.
The commands print it without a traceback: see support/commands.py.
"""

import math
import pickle


class DataError(ValueError):
    """What is wrong with data files: one line for each fault, with its place and the remedy."""


def printable(text, most=300):
    """`text` without line breaks and terminal codes, cut to `most` characters.

    Names that come out of a file need this: they may hold anything and be of any length.
    """
    return text[:most] if text.isprintable() else repr(text[:most])


def escaped(text):
    """`text` with each line break and terminal code written as Python writes it"""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def one_line(error):
    """The first line of a library's error message.

    It starts with the type of the error where the message alone could be a bare word or number.
    """
    if isinstance(error, pickle.UnpicklingError):  # its own message says how to run what is inside
        return "it is damaged, or holds more than tensors"
    if type(error).__name__ == "OutOfMemoryError":
        return "it needs more memory than the GPU has free; try --load-in 4bit"
    line = printable((str(error).strip().splitlines() or ["no message"])[0])
    return line if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {line}"


def first_few(faults, most=3):
    """The first faults on one line, and how many more there are."""
    more = f"; and {len(faults) - most} more" if len(faults) > most else ""
    return "; ".join(printable(fault) for fault in faults[:most]) + more


def one_a_line(faults, where="", most=20):
    """The first faults, one on each line, and a last line that counts the rest.

    A fault may quote something endless, so each is cut. `where` begins the last line.
    """
    lines = [fault if len(fault) <= 1000 else f"{fault[:1000]}…" for fault in faults[:most]]
    if len(faults) > most:
        lines.append(f"{where}and {len(faults) - most} more")
    return "\n".join(lines)


def kind_of(value):
    """What a JSON value is, in words."""
    if isinstance(value, float) and math.isnan(value):
        return 'NaN (pandas writes it for an empty cell; write "" instead)'
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true/false"}
    return kinds.get(type(value), "null" if value is None else "a number")
