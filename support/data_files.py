"""Data files → JSON values, each with its place; and FILE:N, a file that is used N times.

A file is a JSON list, JSONL (one object on each line), or CSV or TSV with a header line. JSON and
JSONL are recognised by their content, CSV and TSV by the ending of the name.
"""

import csv
import itertools
import json
import re
from pathlib import Path

from support.errors import DataError, escaped
from support.files import LFS_POINTER, LFS_START

# How files begin that are no text, and what is said of them.
NO_TEXT = {
    LFS_START: LFS_POINTER,
    b"\x1f\x8b": "a gzip file; unpack it first",
    b"PK\x03\x04": "a zip file, perhaps of a spreadsheet; unpack it, or save it as CSV",
    b"PAR1": "a Parquet file; save it as JSONL",
}
DELIMITERS = {".csv": ",", ".tsv": "\t"}
BOM = b"\xef\xbb\xbf"  # of UTF-8
NOT_UTF8 = "not UTF-8; save the file as UTF-8"


def split_times(name):
    """FILE:N → (FILE, N): how many times a file is used, which is 1 without ":N"."""
    file, _, number = str(name).rpartition(":")
    if not file or Path(name).exists():
        return name, 1.0
    if not re.fullmatch(r"\d+\.?\d*|\.\d+", number):
        if Path(file).is_file():
            raise DataError(f"{name}: {number!r} is no number of times that {file} is used")
        return name, 1.0
    if not 0 < float(number) <= 1000:
        raise DataError(f"{name}: the number must be more than 0, and at most 1000")
    return file, float(number)


def read_values(path):
    """Yields (place, value, None) for each JSON value, (place, None, fault) for anything else.

    place: "file:line", or "file: record N" in a JSON list
    """
    name = escaped(str(path))
    try:
        if path.is_char_device():  # /dev/zero would never end
            raise OSError("not a file")
        with open(path, "rb") as file:
            start = file.peek(64)
            if fault := next((NO_TEXT[head] for head in NO_TEXT if start.startswith(head)), None):
                yield name, None, fault
            elif delimiter := DELIMITERS.get(path.suffix.lower()):
                yield from _rows(name, file, delimiter)
            elif start.removeprefix(BOM).lstrip().startswith(b"["):
                yield from _elements(name, file)
            else:
                yield from _lines(name, file)
    except OSError as error:
        yield name, None, f"{error.strerror or error}; check the path"


def _lines(name, file):
    """JSONL. If the first line is not JSON, tells whether the whole file is one object."""
    numbered = enumerate(file, 1)
    first_number, first = next((each for each in numbered if each[1].strip()), (1, b""))
    value, fault = _parse(first)
    rest = file.readlines() if fault else file
    if fault and rest and not _parse(b"".join((first, *rest)))[1]:
        what = "one object over several lines; use a list of objects, or one object a line"
        yield f"{name}:{first_number}", None, what
        return
    for number, line in enumerate(itertools.chain((first,), rest), first_number):
        if line.strip():
            value, fault = _parse(line)
            yield f"{name}:{number}", value, fault


def _elements(name, file):
    """A JSON list. The text is in memory as a whole, but only one parsed element at a time."""
    content = file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        yield f"{name}:{line}", None, NOT_UTF8
        return
    del content
    decoder, space = json.JSONDecoder(), re.compile(r"[ \t\n\r]*")

    def after_space(position):
        """→ (where the next character that is no space stands, that character)"""
        position = space.match(text, position).end()
        return position, text[position : position + 1]

    position, character = after_space(text.index("[") + 1)
    number = 0
    try:
        while character != "]":
            value, position = decoder.raw_decode(text, position)
            number += 1
            yield f"{name}: record {number}", value, None
            position, character = after_space(position)
            if character == ",":
                position, _ = after_space(position + 1)
            elif character != "]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
        position, character = after_space(position + 1)
        if character:
            raise json.JSONDecodeError("Extra data", text, position)
    except (ValueError, RecursionError) as error:
        end = error.pos if isinstance(error, json.JSONDecodeError) else position
        line = text.count("\n", 0, end) + 1
        yield f"{name}:{line}", None, _fault(error)


def _rows(name, file, delimiter):
    """CSV and TSV: an object of strings for each row"""
    csv.field_size_limit(2**31 - 1)
    lines = (line.decode("utf-8" if i else "utf-8-sig") for i, line in enumerate(file))
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    header, number = None, 1  # number: the line on which the next row begins
    try:
        for row in rows:
            place, number = f"{name}:{number}", rows.line_num + 1
            if not row:
                continue
            if header is None:
                header = row
                if fault := _fault_of_header(header, rows.dialect.delimiter):
                    yield place, None, fault
                    return
            elif len(row) != len(header):
                fault = f"the header has {len(header)} columns, this row {len(row)}"
                if len(row) > len(header):
                    fault += "; quote a field that has the delimiter in it"
                yield place, None, fault
            else:
                yield place, dict(zip(header, row, strict=True)), None
    except UnicodeDecodeError:
        yield f"{name}:{rows.line_num + 1}", None, NOT_UTF8
    except csv.Error as error:
        yield f"{name}:{number}", None, f"not usable CSV ({error})"


def _fault_of_header(header, delimiter):
    if len(header) == 1 and re.search(r"[,;\t]", header[0]):
        return f"the header has one column; separate columns by {delimiter!r}"
    if len(set(header)) < len(header):
        return "the header names a column twice"
    return None


def _parse(line):
    """→ (value, None) or (None, fault)"""
    try:
        return json.loads(line.removeprefix(BOM).decode()), None
    except UnicodeDecodeError:
        return None, NOT_UTF8
    except (ValueError, RecursionError) as error:
        return None, _fault(error)


def _fault(error):
    if isinstance(error, json.JSONDecodeError):
        where = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        return f"not JSON ({where}); give a JSON list, or JSONL"
    return f"not usable JSON ({error})"  # thousands of digits, or of brackets
