"""README and docs/: their links, the two languages, the tables of flags, and what README shows.

python -m pytest -q tests/test_readme.py
"""

import re

import flag_tables
import pytest
from conftest import ROOT
from pages import BLOCK, ENGLISH, PAGES, anchors, blocks, commands_of, sections

import infer
import train
from support import infer_flags, train_flags

README = (ROOT / "README.md").read_text("utf-8")
IN_BOTH_LANGUAGES = [page for page in ENGLISH if page.name != "CONTRIBUTING.md"]


def chinese(page):
    return page.with_name(page.name.replace(".md", ".zh.md"))


def facts_of_tables(text):
    """→ for each row of the tables, its code and its numbers"""
    rows = [re.sub(r"\]\(.*?\)|\.zh", "", line) for line in text.splitlines() if line[:1] == "|"]
    return [sorted(re.findall(r"`[^`]*`|\d(?:[\d.,]*\d)?", row)) for row in rows if "**" not in row]


def test_readme_is_short():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = BLOCK.sub("", page.read_text("utf-8"))
    for name, target in re.findall(r"\[([^\[\]]+)\]\(([^()\s]+)\)", text):
        if target.startswith("https://"):
            continue
        file, _, part = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists() and there.is_relative_to(ROOT), f"{page.name}: {target}"
        if line := re.fullmatch(r"L(\d+)", part):
            line = there.read_text("utf-8").splitlines()[int(line[1]) - 1]
            assert re.search(rf"(def|class) {name.strip('`')}\b", line), f"{page.name}: {name}"
        elif part:
            assert part in anchors(there), f"{page.name}: {target}"


def test_every_page_is_linked_from_readme():
    for page in [page for page in PAGES if page.name != "README.md"]:
        name = "README.zh.md" if page.name.endswith(".zh.md") else "README.md"
        links = (ROOT / name).read_text("utf-8")
        assert page.name == name or f"({page.relative_to(ROOT).as_posix()})" in links, page.name


@pytest.mark.parametrize("page", IN_BOTH_LANGUAGES, ids=lambda page: page.name)
def test_both_languages_show_the_same(page):
    """The same blocks, but for comments. README.zh.md has more: how to get weights in China."""

    def plain(file):
        return [
            "\n".join(re.sub(r"\s+# .*$|^# .*$", "", line) for line in code.splitlines())
            for _, code in blocks(file.read_text("utf-8"))
        ]

    ours, theirs = plain(page), plain(chinese(page))
    if page.name == "README.md":
        assert [block for block in theirs if block in ours] == ours
    else:
        assert theirs == ours
    english, translated = page.read_text("utf-8"), chinese(page).read_text("utf-8")
    assert facts_of_tables(english) == facts_of_tables(translated)
    assert len(sections(english)) <= len(sections(translated))
    marked = [sum(bool(command.needs) for command in commands_of(t)) for t in (english, translated)]
    assert marked[0] == marked[1] or page.name == "README.md"


@pytest.mark.parametrize("language", flag_tables.PAGES)
def test_the_tables_of_flags_are_those_of_the_parsers(language):
    text = flag_tables.PAGES[language].read_text("utf-8")
    assert text == flag_tables.with_tables(text, language), "run python tests/flag_tables.py"
    rows = flag_tables.ROW.findall(text)
    groups = [*flag_tables.flags_of(train_flags), *flag_tables.flags_of(infer_flags)]
    flags = [flag for _, rows_of_group in groups for flag, _, _ in rows_of_group]
    assert [flag.replace("\\|", "|") for flag, _, _ in rows] == flags
    if language == "zh":  # every flag was translated
        assert all(re.search("[\u4e00-\u9fff]", words) for _, words, _ in rows)


def test_readme_shows_what_infer_py_answers(trained, capsys):
    adapter, device = trained
    if device != "cpu":
        pytest.skip("README's answers are those of a CPU")
    commands = [command.words for command in commands_of(sections(README)["Try it"])]
    answers = [words[2:] for words in commands if words[:2] == ["python", "infer.py"]]
    for flags in answers:
        infer.main([*flags, "--adapter", str(adapter), "--device", device])
    shown = [code for language, code in blocks(README) if language == "text"]
    assert len(answers) == 2 and capsys.readouterr().out == shown[1]


def test_readme_shows_what_train_py_prints(tmp_path, capsys):
    train.main(["--max-steps", "1", "--device", "cpu", "--output-dir", str(tmp_path / "out")])
    printed = capsys.readouterr().out.replace(str(ROOT / "dataset"), "dataset").splitlines()
    transcript = next(code for language, code in blocks(README) if language == "text")
    for line in transcript.splitlines():
        # These depend on the machine, the number of updates, and --output-dir.
        if not re.match("model|updates|100%|saved|         python", line):
            assert line in printed, line
    model = re.search(r"^model .*, loaded", transcript, re.M)[0]
    assert any(line.startswith(model) for line in printed)
