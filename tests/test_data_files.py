"""support/data_files.py: data files become JSON values, and every fault is told with its line.

python -m pytest -q tests/test_data_files.py
"""

import pytest

from support.data_files import read_values


def read(tmp_path, name, content):
    """→ [(place behind the path of the file, value, fault)] of a file of this content"""
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    values = [*read_values(file)]
    assert all(place.startswith(str(file)) for place, _, _ in values)
    return [(place.removeprefix(str(file)), value, fault) for place, value, fault in values]


AB, CD = {"a": "1", "b": "2"}, {"a": "3", "b": "4"}
FILES = [  # (name, content, [(place, value)])
    # JSONL and a JSON list are told apart by their content
    ("x.jsonl", '{"a": "1", "b": "2"}\n{"a": "3", "b": "4"}', [(":1", AB), (":2", CD)]),
    ("x.json", '\n{"a": "1", "b": "2"}\r\n\n \n{"a": "3", "b": "4"}\n', [(":2", AB), (":5", CD)]),
    ("x.txt", '\ufeff{"a": "1", "b": "2"}\n3\nnull\n', [(":1", AB), (":2", 3), (":3", None)]),
    ("x.jsonl", '[{"a": "1", "b": "2"}, 3]', [(": record 1", AB), (": record 2", 3)]),
    ("x", '\ufeff \r\n[\n\t"]"\n,[[]]\n]\n', [(": record 1", "]"), (": record 2", [[]])]),
    ("x.json", "[]", []), ("x.json", " \n", []), ("x.json", "", []),
    ("x.json", '{"a": "\u2028\\n"}\n', [(":1", {"a": "\u2028\n"})]),  # U+2028 ends no line
    # CSV and TSV: the place is the line on which a row begins
    ("x.csv", "a,b\n1,2\n3,4\n", [(":2", AB), (":3", CD)]),
    ("x.TSV", "\ufeffa\tb\r\n1\t2\r\n\r\n3\t4", [(":2", AB), (":4", CD)]),
    ("x.csv", '\ufeff"a","b"\n"1","x\n""y"", z"\n3,4\n',
     [(":2", {"a": "1", "b": 'x\n"y", z'}), (":4", CD)]),
    ("x.csv", "a,b\n,\n", [(":2", {"a": "", "b": ""})]),
    ("x.csv", "a,b\n\n", []), ("x.csv", "", []),
    ("x.csv", "\na,b\n1,2\n", [(":3", AB)]),  # a blank line before the header
]  # fmt: skip


@pytest.mark.parametrize("name, content, values", FILES)
def test_values_have_their_places(tmp_path, name, content, values):
    assert read(tmp_path, name, content) == [(place, value, None) for place, value in values]


def test_nan_is_read(tmp_path):
    """pandas writes it, and support/formats.py refuses it with a reason."""
    for content in ('{"a": NaN}', '[{"a": NaN}]'):
        ((_, value, fault),) = read(tmp_path, "x", content)
        assert value["a"] != value["a"] and fault is None


GBK, LFS = "甄".encode("gbk"), b"version https://git-lfs.github.com/spec/v1\noid sha256:8e\n"
SEVERAL_LINES = "one object over several lines; use a list of objects, or one object a line"
ONE = [(": record 1", 1)]
FAULTS = [  # (name, content, [(place, value)] before the fault, place of the fault, its beginning)
    ("x.jsonl", b'{}\n{"a": }\n', [(":1", {})], ":2", "not JSON (Expecting value at column 7)"),
    ("x.jsonl", b'{\n"a": 1\n}\n', [], ":1", SEVERAL_LINES),
    ("x.jsonl", b'\n{\n"a": 1\n}\n', [], ":2", SEVERAL_LINES),
    ("x.jsonl", b"[" * 100_000, [], ":1", "not usable JSON"),
    ("x.jsonl", b"{}\n" + b"1" * 5000, [(":1", {})], ":2", "not usable JSON"),
    ("x.jsonl", b"{}\n\n" + GBK, [(":1", {})], ":3", "not UTF-8; save the file as UTF-8"),
    ("x.jsonl", LFS, [], "", "a Git LFS pointer, not the file; run `git lfs pull`"),
    # The elements of a list before the fault are still yielded
    ("x.json", b'[1,\n\n{"a": }]', ONE, ":3", "not JSON (Expecting value at column 7)"),
    ("x.json", b"[1\n 2]", ONE, ":2", "not JSON (Expecting ',' or ']' at column 2)"),
    ("x.json", b"[1,\n]", ONE, ":2", "not JSON (Expecting value at column 1)"),
    ("x.json", b"[1", ONE, ":1", "not JSON (Expecting ',' or ']' at column 3)"),
    ("x.json", b"[1]\n\n[2]", ONE, ":3", "not JSON (Extra data at column 1)"),
    ("x.json", b"[1,\n\n" + b"1" * 5000 + b"]", ONE, ":3", "not usable JSON"),
    ("x.json", b'[1,\n\n"' + GBK + b'"]', [], ":3", "not UTF-8; save the file as UTF-8"),
    # CSV and TSV
    (
        "x.csv",
        b"a,b\n1,2\n3,4,5\n",
        [(":2", AB)],
        ":3",
        "the header has 2 columns, this row 3; quote",
    ),
    ("x.tsv", b"a\tb\n1\t2\n3,4\n", [(":2", AB)], ":3", "the header has 2 columns, this row 1"),
    ("x.csv", b"a,b,a\n1,2,3\n4,5,6\n", [], ":1", "the header names a column twice"),
    ("x.csv", b'a,b\n1,2\n3,"4\n5,6\n', [(":2", AB)], ":3", "not usable CSV (unexpected end"),
    ("x.csv", b'a,b\n1,2\n"3" x,4\n', [(":2", AB)], ":3", "not usable CSV (',' expected after"),
    ("x.csv", b"a,b\n1,2\n\n" + GBK + b",4\n", [(":2", AB)], ":4", "not UTF-8; save the file"),
    ("x.csv", b'a,b\n1,"2\n' + GBK + b'"\n', [], ":3", "not UTF-8; save the file"),
    ("x.csv", "a,b".encode("utf-16"), [], ":1", "not UTF-8; save the file"),
    ("x.csv", LFS, [], "", "a Git LFS pointer, not the file"),
]


@pytest.mark.parametrize("name, content, values, place, told", FAULTS)
def test_faults_have_their_line(tmp_path, name, content, values, place, told):
    *before, (place_of_fault, value, fault) = read(tmp_path, name, content)
    assert before == [(place, value, None) for place, value in values]
    assert (place_of_fault, value) == (place, None) and fault.startswith(told)


def test_rows_and_lines_behind_a_fault_are_still_read(tmp_path):
    places = [place for place, _, _ in read(tmp_path, "x.csv", "a,b\n1\n1,2\n")]
    assert places == [":2", ":3"]
    places = [place for place, _, _ in read(tmp_path, "x.jsonl", b"{}\n" + GBK + b"\n{\n{}\n")]
    assert places == [":1", ":2", ":3", ":4"]


def test_what_is_no_file(tmp_path):
    nowhere = tmp_path / "nowhere"
    told = "No such file or directory; check the path"
    assert [*read_values(nowhere)] == [(str(nowhere), None, told)]
    assert [*read_values(tmp_path)] == [(str(tmp_path), None, "Is a directory; check the path")]


def test_a_name_with_a_line_break_is_one_line(tmp_path):
    (tmp_path / "a\nb.jsonl").write_text("{")
    for name in ("a\nb.jsonl", "absent\n.csv"):
        places = [place for place, _, fault in read_values(tmp_path / name) if fault]
        assert len(places) == 1 and places[0].isprintable() and "\\n" in places[0]
