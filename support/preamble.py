"""What a conversation begins with: the system message, and the list of tools."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from support.data_files import NOT_UTF8
from support.errors import DataError, first_few
from support.files import LFS_POINTER, LFS_START
from support.tools import is_tools_message, names_of_tools, tools_message


@dataclass
class Preamble:
    """What every prompt begins with, and what is known of the tools that an answer may call."""

    system: str | None = None  # the system message
    tools: dict | None = None  # the system message that lists tools, of --tools
    trained_tools: dict = field(default_factory=dict)  # see RecordReader.about_tools; or {}

    def added_to(self, messages):
        """→ `messages` with the list of tools and the system message in front.

        A conversation that already has one of the two keeps its own.
        """
        has_tools = bool(messages) and is_tools_message(messages[0])
        tools = messages[0] if has_tools else self.tools
        rest = messages[1:] if has_tools else messages
        if self.system and not (rest and rest[0]["role"] == "system"):
            rest = [{"role": "system", "content": self.system}, *rest]
        return [tools, *rest] if tools else rest

    def callable_tools(self, messages=()):
        """→ the names that the answer to `messages` may call; None if they are not known"""
        listed = [*([self.tools] if self.tools else []), *filter(is_tools_message, messages)]
        sources = [names_of_tools([message]) for message in listed]
        if self.trained_tools:
            names = self.trained_tools.get("names")
            sources.append(names if names is None else {*names})
        return None if None in sources or not sources else set().union(*sources)

    def warn_if_tools_are_not_listed(self, records=()):
        """Warns the user if the adapter was trained with lists of tools, and there is none now.

        records: those to be answered. They may list tools of their own.
        """
        have_own = bool(records) and all(is_tools_message(each.messages[0]) for each in records)
        if self.tools or have_own or not self.trained_tools.get("are_listed"):
            return
        names = first_few(self.trained_tools.get("names") or [], most=10)
        of = f" ({names})" if names else ""
        what = f"this adapter was trained with tools{of}; --tools FILE lists them in a prompt"
        print(f"({what})", file=sys.stderr)


def read_tools(file):
    """→ the system message that lists the tools in a file: JSON, or text. Raises ValueError."""
    content = Path(file).read_bytes()
    try:
        if content.startswith(LFS_START):
            raise DataError(LFS_POINTER)
        text = content.decode("utf-8-sig")
        if text.lstrip().startswith(("[", "{")):
            json.loads(text)  # tools_message would take broken JSON for a text
        message = tools_message(text)
        if message is None:
            raise DataError("it lists no tools")
        return message
    except DataError as error:
        raise ValueError(f"{file}: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: {NOT_UTF8}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({error})") from error
