"""The tables of docs/flags.md and docs/flags.zh.md, from the parsers of the two commands.

    python tests/flag_tables.py    # after a flag was added or changed: writes both pages

The Chinese words of a flag stay as they are. A new flag gets the English ones, to be translated.
"""

import re
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import commands, infer_flags, train_flags

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {"en": DOCS / "flags.md", "zh": DOCS / "flags.zh.md"}
HEADS = {"en": "| flag | what it does | default |", "zh": "| 参数 | 作用 | 默认值 |"}
DEFAULTS = {"without --model: ": "不带 --model 时 ", "an epoch": "一轮"}
DEFAULTS |= {"on CUDA, where that is possible": "CUDA 上能用就用", "; ": "；"}
ROW = re.compile(r"^\| `(-.+?)` \| (.*?) \| (.*?) \|$", re.M)


def parser_of(module):
    """→ the ArgumentParser that a module's parse_args makes"""
    made, new_parser = [], commands.new_parser

    def remember(*args, **options):
        made.append(new_parser(*args, **options))
        return made[-1]

    with mock.patch.object(commands, "new_parser", remember):
        module.parse_args([])
    return made[0]


def flags_of(module):
    """→ [(title of a group, [(flag with its value, what it does, default)])], as --help has them"""
    parser = parser_of(module)
    formatter, groups = parser._get_formatter(), []
    for group in parser._action_groups:
        rows = []
        for action in group._group_actions:
            help_words = formatter._expand_help(action)
            default = re.search(r" ?\(default: (.*?)\)", help_words)
            words = help_words.replace(default[0], "") if default else help_words
            flag = formatter._format_action_invocation(action)
            rows.append((flag, words, default[1] if default else ""))
        if rows:
            groups.append((group.title, rows))
    return groups


def in_chinese(default):
    for english, chinese in DEFAULTS.items():
        default = default.replace(english, chinese)
    return default


def tables(module, language="en", words_of=None):
    """→ one command's table. words_of: {flag: its words} in the page's language, or None"""
    lines = [HEADS[language], "|---|---|---|"]
    for title, rows in flags_of(module):
        if language == "en":
            lines.append(f"| **{title}** | | |")
        for flag, words, default in rows:
            name = flag.split()[0].rstrip(",")
            if language == "zh":
                words, default = words_of.get(name, words), in_chinese(default)
            lines.append("| " + " | ".join((f"`{escaped(flag)}`", words, default)) + " |")
    return "\n".join(lines) + "\n"


def escaped(text):
    return text.replace("|", "\\|")  # a bar would end the cell


def with_tables(text, language):
    """→ a page's text with its two tables made anew"""
    for module in (train_flags, infer_flags):
        title = module.__name__.removeprefix("support.").replace("_flags", ".py")
        start = text.index(f"## {title}\n")
        begin = text.index("| ", start)
        end = begin + re.search(r"\n(?!\|)|$", text[begin:]).end()
        old = {row[0].split()[0].rstrip(","): row[1] for row in ROW.findall(text[begin:end])}
        text = text[:begin] + tables(module, language, old) + text[end:]
    return text


if __name__ == "__main__":
    for language, page in PAGES.items():
        page.write_text(with_tables(page.read_text("utf-8"), language), "utf-8")
