"""Reads the records of data files, tells each fault with its place, and counts what is not used.

support/data_files.py reads a file, support/formats.py a record.
"""

import collections
import gc
import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from support.commands import bar_options
from support.data_files import read_values
from support.errors import DataError, escaped, one_a_line, printable
from support.formats import ANSWER_KEYS, read_record
from support.preamble import Preamble
from support.processes import cores, rank_and_count
from support.tools import is_tools_message, names_of_tools


class Record(NamedTuple):
    file_number: int  # of the file that it came from, counted from 0
    place: str  # "file:line", or "file: record N" in a JSON list
    value: dict  # the record as it was in the file
    messages: list


class RecordReader:
    """Reads the records of `files`. Iterating over it yields Records, one pass for each reader.

    At the end it raises DataError with the first 20 faults of each file. After the first fault it
    yields nothing more.

    preamble: what conversations begin with. is_prompt: records are questions. An answer may be
    missing, and the messages are those before the last answer. keys: (old, new) pairs; keys of
    records are renamed.

    Counts of what was read:
    unread: {key: number of records that have it, but it is not read}
    not_learnt: assistant's messages with loss False
    unanswered: questions at the end of a conversation, which are dropped
    tool_names: of the tools that were listed or called; None if the name of one can't be told
    lists_tools: whether a record has a list of tools
    """

    def __init__(self, files, preamble=None, is_prompt=False, keys=None):
        self.files, self.is_prompt = [Path(file) for file in files], is_prompt
        self.preamble = preamble or Preamble()
        self.keys = dict(keys or ())
        if len(self.keys) < len(keys or ()):
            raise DataError("--keys: an old name is given twice; leave one out")
        self.unread, self.not_learnt, self.unanswered = collections.Counter(), 0, 0
        self.tool_names, self.lists_tools = set(), False
        self.renamed = set()  # the keys of `keys` that were found

    def __iter__(self):
        faults = []
        for file_number, file in enumerate(self.files):
            wrong, is_empty = [], True
            for place, value, fault in read_values(file):
                is_empty = False
                try:
                    if fault:
                        raise DataError(fault)
                    messages = self._messages(value)
                    if not (faults or wrong):
                        messages = self.preamble.added_to(messages)
                        yield Record(file_number, place, value, messages)
                except DataError as error:
                    wrong.append(f"{place}: {escaped(str(error))}")  # it may quote the record
                except RecursionError:
                    wrong.append(f"{place}: not usable: lists or objects are nested too deeply")
            name = escaped(str(file))
            if is_empty:
                wrong = [f"{name}: it has no records"]
            faults += [one_a_line(wrong, f"{name}: ")] if wrong else []
        for old in sorted(self.keys.keys() - self.renamed):
            if not (self.is_prompt and self.keys[old] in ANSWER_KEYS):  # questions may have none
                faults.append(f"--keys {old}={self.keys[old]}: no record has the key {old!r}")
        if faults:
            raise DataError("\n".join(faults))

    def about_tools(self):
        """→ what an adapter keeps in training_args.json"""
        names = None if self.tool_names is None else sorted(self.tool_names)
        return {"names": names, "are_listed": self.lists_tools}

    def about_unread(self, most=10):
        """→ the keys that are not read, in words; "" if there are none"""
        counts = self.unread.most_common()
        if not counts:
            return ""
        named = [f"{printable(key) or repr(key)} ({count:,}" for key, count in counts[:most]]
        named[0] += " record" if counts[0][1] == 1 else " records"
        told = ", ".join(f"{each})" for each in named)  # id (119 records), source (40)
        told += f", and {len(counts) - most} more keys" if len(counts) > most else ""
        return f"not read: {told}"

    def _messages(self, value):
        unread = set()
        if self.keys and isinstance(value, dict):
            value = self._rename(value)
        messages = read_record(value, self.is_prompt, unread)
        messages = self._up_to_question(messages) if self.is_prompt else self._to_learn(messages)
        self.unread.update(unread)
        # Only such messages list tools or call them.
        if messages[0]["role"] == "system" or any("metadata" in m for m in messages):
            found = names_of_tools(messages)
            if found is None or self.tool_names is None:
                self.tool_names = None
            else:
                self.tool_names |= found
            self.lists_tools |= is_tools_message(messages[0])
        return messages

    def _rename(self, value):
        self.renamed |= value.keys() & self.keys.keys()
        new = {self.keys.get(key, key): each for key, each in value.items()}
        if len(new) < len(value):
            raise DataError("--keys gives two keys of this record one name")
        return new

    def _to_learn(self, messages):
        if messages[-1]["role"] == "user":
            messages.pop()
            self.unanswered += 1
        answers = [message for message in messages if message["role"] == "assistant"]
        not_learnt = sum("loss" in message for message in answers)
        if len(answers) == not_learnt:
            why = "every answer has loss false, or weight 0" if answers else "it has no answer"
            raise DataError(f"nothing to learn: {why}; remove it")
        self.not_learnt += not_learnt
        return messages

    def _up_to_question(self, messages):
        if messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages or messages[-1]["role"] == "system":
            raise DataError("there is nothing to answer")
        return messages


def in_batches(records, size):
    """Yields lists of `size` records. A bar appears after two seconds."""
    shown = dict(desc="reading", unit=" records", delay=2, leave=False)
    bar = tqdm(records, disable=rank_and_count()[0] > 0, **shown, **bar_options())
    iterator = iter(bar)
    gc.freeze()  # else each garbage collection would visit all objects of all libraries
    try:
        while batch := [*itertools.islice(iterator, size)]:
            yield batch
    finally:
        gc.unfreeze()


def encode_texts(tokenizer, records):
    """→ {text: ids} of all that data.encode_conversation encodes, in sentencepiece's threads"""
    texts = set()
    for record in records:
        texts.update(message["content"] for message in record.messages)
        texts.update(message.get("metadata", "") + "\n" for message in record.messages)
    threads = max(1, cores() - 1)  # Python takes one core
    return dict(zip(texts, tokenizer.pieces.encode([*texts], num_threads=threads), strict=True))


def one_ahead(function, items):
    """Yields (item, function(item)). A thread computes the next one meanwhile."""
    with ThreadPoolExecutor(1) as thread:
        before = None
        for item in items:
            result = thread.submit(function, item)
            if before:
                yield before[0], before[1].result()
            before = item, result
        if before:
            yield before[0], before[1].result()
