"""Answers files of records, --input, into one file, --output: JSONL, a record with its prediction.

A run that was stopped continues: records that have a complete line in --output are not answered
again. Equal records have a line each.
"""

import collections
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from support.commands import bar_options
from support.errors import one_a_line
from support.files import locked
from support.records import RecordReader, in_batches

PREDICTION = ("prediction", "prediction_metadata")  # the keys that an answer adds to its record


class Unanswered(NamedTuple):
    """What is still to be done."""

    records: list  # support.records.Record
    done: int  # how many records have an answer
    end: int  # how many bytes of --output their lines take
    size: int  # how many bytes --output has
    unread: str  # the keys of the records that are not read, in words


def without_prediction(value):
    """A record as it was before it was answered."""
    return {name: each for name, each in value.items() if name not in PREDICTION}


def as_line(value):
    """→ a line of JSONL in bytes. Half of a surrogate pair is written as in JSON, \\udxxx."""
    return (json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def _record_key(value):
    """The same for equal records, answered or not."""
    return json.dumps(without_prediction(value), sort_keys=True)


def unanswered(input_files, output, keys=None):
    """→ Unanswered. Raises ValueError for an `output` that does not belong to these files."""
    reader = RecordReader(input_files, is_prompt=True, keys=keys)
    records = [record for batch in in_batches(reader, 1000) for record in batch]
    file = Path(output)
    _check_writable(output)
    if file.exists() and any(file.samefile(each) for each in input_files):
        raise ValueError(f"{output}: it is an --input; choose another --output")
    lines = file.read_bytes().split(b"\n") if file.exists() else [b""]
    unfinished = lines.pop()  # what follows the last newline
    _check_unfinished(unfinished, records, output)
    remaining = collections.Counter(_record_key(record.value) for record in records)
    for number, line in enumerate(lines, 1):
        key = _record_key(_parse_line(line, f"{output}:{number}"))
        remaining[key] -= 1
        if remaining[key] < 0:
            what = "this record is not in --input; choose another --output"
            raise ValueError(f"{output}:{number}: {what}")
    left = []
    for record in records:
        key = _record_key(record.value)
        if remaining[key]:
            remaining[key] -= 1
            left.append(record)
    end = sum(len(line) + 1 for line in lines)
    return Unanswered(left, len(lines), end, end + len(unfinished), reader.about_unread())


def _check_writable(output):
    file = Path(output)
    directory, is_there = file.absolute().parent, file.exists()
    if not directory.is_dir():
        raise ValueError(f"{output}: there is no such directory; make it first")
    if (is_there and not file.is_file()) or not os.access(file if is_there else directory, os.W_OK):
        raise ValueError(f"{output}: cannot write there; choose another --output")


def _check_unfinished(text, records, output):
    """`text` must be the start of a line that was being written."""
    starts = [as_line(without_prediction(record.value))[:-2] for record in records]  # without "}"
    if text and not any(text.startswith(s) or s.startswith(text) for s in starts):
        what = "its last line is not one that infer.py wrote"
        raise ValueError(f"{output}: {what}; choose another --output")


def _parse_line(line, place):
    try:
        value = json.loads(line)
        if not isinstance(value["prediction"], str):
            raise ValueError("prediction")
        return value
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        what = "not a line that infer.py wrote; mend or remove it"
        raise ValueError(f"{place}: {what}") from error


def answer_all(assistant, todo, output, batch_size):
    """Answers the records of `todo`, and adds each to `output` as soon as its answer is complete.

    Records of similar length are answered together. assistant: an infer.Assistant. Raises
    ValueError for records that are too long, before any is answered.
    """
    jobs = sorted(_encode(assistant, todo.records), key=lambda job: len(job[0]))
    if todo.done:
        kept = f"{todo.done} answers in {output} are kept; for new ones, give another --output"
        print(f"({kept})", file=sys.stderr)
    if todo.unread:
        print(f"({todo.unread})", file=sys.stderr)
    cut = 0  # answers
    done = dict(total=todo.done + len(jobs), initial=todo.done, unit="answer")
    bar = tqdm(**done, **bar_options())
    target = Path(output).resolve()
    lock_file = target.with_name(f".{target.name}.lock")
    with locked(lock_file, output), open(output, "ab") as file, bar:
        if file.tell() != todo.size:
            raise ValueError(f"{output}: it has changed meanwhile; give the same command again")
        file.truncate(todo.end)
        for start in range(0, len(jobs), batch_size):
            prompts, records = zip(*jobs[start : start + batch_size], strict=True)
            ids_of = [[] for _ in prompts]
            for row, id in assistant.generate(list(prompts)):
                if id is not None:
                    ids_of[row].append(id)
                    continue
                cut += assistant.why_cut(prompts[row], ids_of[row]) is not None
                metadata, content = assistant.split(ids_of[row], records[row].messages)
                line = without_prediction(records[row].value) | {"prediction": content}
                line |= {"prediction_metadata": metadata} if metadata else {}
                file.write(as_line(line))
                file.flush()
                bar.update()
    if cut:
        where = "at --max-new-tokens, or where the context is full"
        print(f"({cut} of {len(jobs)} answers are cut {where})", file=sys.stderr)


def _encode(assistant, records):
    """→ [(prompt ids, record)]"""
    jobs, faults = [], []
    for record in records:
        try:
            jobs.append((assistant.encode(record.messages), record))
        except ValueError as error:
            faults.append(f"{record.place}: {error}")
    if faults:
        raise ValueError(one_a_line(faults))
    return jobs
