"""Files of flags: `python train.py @run.args`, and the run.args that every run writes.

A file holds flags as they are typed in a shell, one or several on a line. Quotes keep spaces
together. "#" at the start of a word begins a comment.
"""

import re
import shlex
import sys
from pathlib import Path

from support.errors import printable

RUN_ARGS = "run.args"  # the name of the file that a run writes
WORD_OR_COMMENT = re.compile(
    r"""
    \#[^\n]*                    # a comment, to the end of the line
    | \\\r?\n                    # a line that goes on in the next one, as in a shell
    | (?P<word>(?:
        [^\ \t\r\n"'\\] | \\[^\r\n]   # one character
        | '[^']*'               # text in single quotes
        | "(?:[^"\\]|\\.)*"     # text in double quotes
    )+)
    """,
    re.DOTALL | re.VERBOSE,
)


def flag_of(name):
    """→ the flag of an argument: batch_size → --batch-size"""
    return f"--{name.replace('_', '-')}"


def expand(argv, parser):
    """A command line, sys.argv's if it is None → the same with the flags of each @FILE instead.

    parser.error tells of a file that can't be read.
    """
    expanded = []
    for argument in sys.argv[1:] if argv is None else argv:
        if not argument.startswith("@"):
            expanded.append(argument)
            continue
        file = argument[1:]
        try:
            expanded += read_flags(Path(file).read_bytes().decode("utf-8-sig"))
        except OSError as error:
            name = printable(argument)
            hint = f"check the path; a value that begins with @ is given as --flag={name}"
            parser.error(f"{name}: {error.strerror}; {hint}")
        except UnicodeDecodeError:
            parser.error(f"{printable(argument)}: not a file of flags: it is not UTF-8")
        except ValueError as error:
            parser.error(f"{printable(argument)}{error}")
    return expanded


def read_flags(text):
    """The text of a file of flags → its words. Raises ValueError if a quote is not closed."""
    unread = WORD_OR_COMMENT.sub(lambda match: "\n" * match[0].count("\n"), text)
    if left := unread.strip(" \t\r\n"):
        line = 1 + unread[: unread.index(left)].count("\n")
        raise ValueError(f":{line}: a quote is not closed, or a backslash ends the file")
    words = (match["word"] for match in WORD_OR_COMMENT.finditer(text))
    return [shlex.split(word)[0] for word in words if word]


def flags_text(args, defaults):
    """→ the bytes of run.args: each flag of `args` that has a value, on a line of its own.

    defaults: {name: value} of all flags; its order is that of the lines
    """
    lines = ["# This run again: python train.py @run.args --output-dir NEW"]
    for name, default in defaults.items():
        flag, value = flag_of(name), getattr(args, name)
        if value is None or (value is False and default is False):
            continue
        if isinstance(value, bool):
            lines.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, list):
            words = ["=".join(each) if isinstance(each, tuple) else each for each in value]
            # A single word may begin with "-" or "@".
            lines.append(f"{flag}{'=' if len(words) == 1 else ' '}{shlex.join(words)}")
        else:
            lines.append(f"{flag}={shlex.quote(str(value))}")
    return "\n".join(lines).encode() + b"\n"
