"""README and the pages of docs/: their commands, and the files that they show."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").glob("*.md"))
ENGLISH = [page for page in PAGES if not page.name.endswith(".zh.md")]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
NEEDS = re.compile(r"\s*# (needs .*|需要.*)$")  # the mark of a command that not everybody can run


class Command(NamedTuple):
    words: list
    needs: str  # what is needed to run it, in the words of the page; "" for nothing


def blocks(text):
    """→ [(language, content)] of the blocks of code"""
    return BLOCK.findall(text)


def commands_of(text):
    """→ the commands of the blocks of shell"""
    lines = [
        line for language, code in blocks(text) if language == "sh" for line in code.split("\n")
    ]
    commands = []
    for line in lines:
        mark = NEEDS.search(line)
        if words := shlex.split(line, comments=True):
            commands.append(Command(words, mark[1] if mark else ""))
    return commands


def sections(text):
    """→ {title: text} of the sections of a page; "top": what comes before the first one"""
    parts, title, in_block = {"top": ""}, "top", False
    for line in text.splitlines(keepends=True):
        in_block ^= line.startswith("```")
        if line.startswith("## ") and not in_block:
            title = line[3:].strip()
        parts[title] = parts.get(title, "") + line
    return parts


def files_of(text):
    """→ {name: content} of the files that a text shows: blocks after `name` and a colon"""
    return dict(re.findall(r"`([\w/-]+\.jsonl?)`[:：]\n\n```jsonl?\n(.*?)^```", text, re.M | re.S))


def anchors(page):
    """→ the names that GitHub gives to the headings of a page"""
    text = BLOCK.sub("", page.read_text("utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
