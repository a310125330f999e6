import re

from conftest import ROOT

README = (ROOT / "README.md").read_text("utf-8")


def test_links_into_the_code_point_at_what_they_name():
    links = re.findall(r"\[`([\w.]+)`\]\(([\w/]+\.py)#L(\d+)\)", README)
    assert len(links) >= 10
    for name, file, line in links:
        text = (ROOT / file).read_text("utf-8").splitlines()[int(line) - 1]
        assert name in text, f"{file}:{line} is {text!r}, not {name}"


def test_files_it_links_to_exist():
    for target in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / target).exists(), target
