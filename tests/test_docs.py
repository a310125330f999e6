"""docs/data.md: every example of a format is read, and trained on.

python -m pytest -q tests/test_docs.py
"""

import re

import pytest
from conftest import ROOT, metrics_of

import train

DOCUMENT = (ROOT / "docs" / "data.md").read_text("utf-8")
EXAMPLES = {  # title: (kind of file, content)
    title: (kind, content)
    for title, kind, content in re.findall(
        r"^### (.+?)\n(?:(?!^###).)*?^```(jsonl|csv)\n(.*?)^```", DOCUMENT, re.M | re.S
    )
}


def test_every_format_of_the_table_has_an_example():
    table = DOCUMENT.partition("## Formats")[2].partition("### ")[0]
    titles = [title.lower() for title in re.findall(r"^\| \[(.+?)\]", table, re.M)]
    assert titles == [title.lower() for title in EXAMPLES]
    assert all(content.count("\n") == 2 for _, content in EXAMPLES.values())


@pytest.mark.parametrize("title", EXAMPLES)
def test_an_example_is_trained_on(tmp_path, capsys, title):
    kind, content = EXAMPLES[title]
    file, out = tmp_path / f"d.{kind}", tmp_path / "out"
    file.write_text(content, "utf-8")
    flags = ["--data", str(file), "--output-dir", str(out), "--device", "cpu", "--max-steps", "8"]
    flags += ["--logging-steps", "1"]
    flags += ["--keys", "content=instruction", "summary=output"] if title == "Other names" else []
    train.main(flags)
    told = capsys.readouterr().out
    assert f"{content.count(chr(10)) - (kind == 'csv')} samples" in told
    assert "0 cut, 0 dropped" in told and "not read" not in told and "are dropped" not in told
    assert ("2 answers with loss false are not learnt" in told) == ("not learnt" in title)
    losses = [line["loss"] for line in metrics_of(out)]
    assert losses[-1] < losses[0]
