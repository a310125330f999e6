"""Turns text into batches: tokenizer, prompt format, Dataset, padding, and the order of samples.

    tokenizer = ChatGLMTokenizer("THUDM/chatglm3-6b")
    dataset = ConversationDataset(["dataset/sample.jsonl"], tokenizer, max_length=512)
    batch = collate([dataset[0], dataset[1]], dataset.prefix_length)

Files are read and checked in support/records.py. Letters in shapes: B rows of a micro-batch,
T tokens of a row, P of them a prefix that all rows begin with, N tokens to predict.
"""

import copy
import hashlib
import itertools
import math
import random
from bisect import bisect_left
from functools import partial
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers.utils import cached_file

from support.config import IGNORE
from support.data_files import split_times
from support.errors import DataError, one_line, printable
from support.files import check_no_lfs_pointer
from support.preamble import Preamble
from support.processes import rank_and_count
from support.records import RecordReader, encode_texts, in_batches, one_ahead
from support.samples import PackedSamples, check_times, in_parts
from support.tools import may_be_tool
from support.turns import ROLES


class ChatGLMTokenizer:
    """ChatGLM3's vocabulary: the pieces of tokenizer.model, then SPECIAL in the order of their ids.

    `path` is a directory or a hub repository with the file tokenizer.model, a sentencepiece model.
    Special ids never come from text: "<|user|>" inside a text is encoded as ordinary pieces.
    Raises ValueError if the vocabulary can't be read.
    """

    SPECIAL = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *(f"<|{role}|>" for role in ROLES))

    def __init__(self, path):
        try:
            file = Path(path, "tokenizer.model")
            if not Path(path).is_dir():
                file = cached_file(str(path), "tokenizer.model")
            check_no_lfs_pointer(file)
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
            size = self.pieces.get_piece_size()
            self.pieces.id_to_piece([*range(size)])  # raises if one is not UTF-8
        except (OSError, RuntimeError, ValueError) as error:
            hint = "; without a network, give the directory of a checkpoint"
            what = f"cannot read the vocabulary, its tokenizer.model: {one_line(error)}"
            raise ValueError(f"{path}: {what}{'' if Path(path).is_dir() else hint}") from error
        first = self.pieces.get_piece_size()
        self.special = {name: first + i for i, name in enumerate(self.SPECIAL)}
        self.special_names = {id: name for name, id in self.special.items()}
        self.vocab_size = first + len(self.special)
        self.digest = hashlib.sha256(self.pieces.serialized_model_proto()).hexdigest()
        self.eos_id = self.pieces.eos_id()
        self.newline_id = self.pieces.piece_to_id("<0x0A>")
        self.stop_ids = (self.eos_id, self.special["<|user|>"], self.special["<|observation|>"])
        if self.eos_id < 0 or self.newline_id == self.pieces.unk_id():
            what = "its tokenizer.model is not ChatGLM3's: it has no </s>, or no <0x0A>"
            raise ValueError(f"{path}: {what}")

    def check_fits(self, embedding_size):
        """Raises ValueError if the model's embedding lacks some of the ids."""
        if self.vocab_size > embedding_size:
            has = f"tokenizer.model has {self.vocab_size} ids"
            raise ValueError(f"{has}, the model's embedding only {embedding_size}")

    def encode(self, text):
        """text → ids. Raises ValueError for surrogates, which stand for bytes that aren't UTF-8."""
        try:
            return self.pieces.encode(text)
        except RuntimeError as error:
            raise ValueError(f"{printable(text)} is not valid UTF-8") from error

    def decode(self, ids):
        """ids → text. Special ids appear by name; </s> and ids past the vocabulary are left out."""
        text, pending = "", []
        for id in [*ids, None]:  # None: the end
            if id is not None and 0 <= id < self.pieces.get_piece_size():
                pending.append(id)
            elif pending or id in self.special_names:
                # All at once, because sentencepiece removes the first space of each call.
                text += self.pieces.decode(pending) + self.special_names.get(id, "")
                pending = []
        return text


# --- the prompt format ------------------------------------------------------------------------


def encode_conversation(tokenizer, messages, encode=None):
    """messages → (input_ids, labels), two lists of one length, in the official ChatGLM3 format:

        [gMASK] sop  <|role|> metadata\\n content  <|role|> metadata\\n content  …  </s>

    Each metadata with its newline, and each content, is encoded separately, as the official
    tokenizer does it. encode: text → ids; without it, tokenizer.encode.
    labels[i] is input_ids[i] where a token is supervised: all ids of an assistant's turn after
    <|assistant|> (metadata, newline, content), and the id that ends the turn (the next role id, or
    </s>). Elsewhere labels[i] is -100: in other turns, and in a turn with "loss": False.
    """
    encode = encode or tokenizer.encode
    input_ids = [tokenizer.special["[gMASK]"], tokenizer.special["sop"]]
    labels = [IGNORE, IGNORE]
    after_learnt = False
    for message in messages:
        role_id = tokenizer.special[f"<|{message['role']}|>"]
        body = encode(message.get("metadata", "") + "\n") + encode(message["content"])
        is_learnt = message["role"] == "assistant" and message.get("loss", True)
        input_ids += [role_id, *body]
        labels.append(role_id if after_learnt else IGNORE)
        labels += body if is_learnt else [IGNORE] * len(body)
        after_learnt = is_learnt
    labels.append(tokenizer.eos_id if after_learnt else IGNORE)
    return [*input_ids, tokenizer.eos_id], labels


def encode_prompt(tokenizer, messages):
    """messages → input_ids up to and including <|assistant|>. The answer is what comes next."""
    input_ids, _ = encode_conversation(tokenizer, messages)
    return [*input_ids[:-1], tokenizer.special["<|assistant|>"]]  # instead of </s>


def split_answer(tokenizer, ids, tool_names=None):
    """Splits an answer's ids, without the stop id, into two texts: (metadata, content).

    Metadata is the first line, stripped, if it is empty or may be a tool's name: see may_be_tool.
    Otherwise the whole answer is content. An incomplete last character is left out.
    """
    if tokenizer.newline_id in ids:
        end = ids.index(tokenizer.newline_id)
        metadata = tokenizer.decode(ids[:end]).strip()
        if not metadata or may_be_tool(metadata, tool_names):
            return metadata, tokenizer.decode(ids[end + 1 :]).rstrip("\ufffd")
    return "", tokenizer.decode(ids).rstrip("\ufffd")


class ConversationDataset(Dataset):
    """Every conversation of `files`, encoded. dataset[i] → (input_ids [T], labels [T]), int64.

    "FILE:N" stands for N times a file in each epoch, which may be less than once: see draw_epoch.
    A conversation without a system message gets `system`. Samples are cut to `max_length` tokens,
    prompt and answer together. keys: [(old, new)], keys of the records that are renamed. Raises
    DataError: see support/records.py.

    lengths, supervised: how many tokens each sample has, and how many of them are supervised
    places: the file and line that each sample came from
    cut: how many samples were cut. They have no </s>, so the model doesn't learn to stop there.
    dropped: how many samples had no supervised token within max_length
    reader: the RecordReader, with its counts of what was not used
    parts: (indices of a file's samples, how many times an epoch has each of them)
    prefix_length: how many tokens, in multiples of 8, all samples begin with: see collate
    """

    def __init__(self, files, tokenizer, max_length, system=None, keys=None):
        tokenizer.encode(system or "")  # raises ValueError for what is not UTF-8
        names, times = zip(*map(split_times, files), strict=True)
        self.samples, self.places = PackedSamples(), []
        self.cut = self.dropped = 0
        self.reader = RecordReader(names, Preamble(system), keys=keys)
        self.files, self.times = files, times
        counts = [0] * len(names)  # of the samples of each file
        # While the samples of a batch are made, the texts of the next one are encoded.
        batches = in_batches(self.reader, 1000)
        for batch, ids_of in one_ahead(partial(encode_texts, tokenizer), batches):
            for record in batch:
                sample = encode_conversation(tokenizer, record.messages, ids_of.__getitem__)
                if not self.samples.add(*(part[:max_length] for part in sample)):
                    self.dropped += 1
                    continue
                self.cut += len(sample[0]) > max_length
                self.places.append(record.place)
                counts[record.file_number] += 1
        if not self.places:
            within = f"within {max_length} tokens; raise --max-length"
            raise DataError(f"no sample has a token to learn {within}")
        self.samples.pack()
        self._finish([0, *itertools.accumulate(counts)])

    def _finish(self, bounds):
        """Sets what depends on the samples. bounds: the first sample of each file, and the end"""
        self.parts = [*zip(map(range, bounds, bounds[1:]), self.times, strict=True)]
        check_times(self.files, self.parts)
        self.lengths, self.supervised = self.samples.lengths, self.samples.supervised
        self.samples_per_epoch = len(draw_epoch(self.parts, 0, 0))
        self.digest = self.samples.digest()
        if {*self.times} != {1.0}:
            self.digest += f" {self.parts}"
        prefix = self.samples.common_prefix()
        self.prefix_length = prefix - prefix % 8  # tensor cores want multiples of 8

    def split(self, share, seed):
        """→ two datasets: one to train on, and this share of the samples, to evaluate.

        A sample's content and the seed decide where it goes. So equal samples stay together.
        """
        chosen = self.samples.draw(share, seed)
        if len(chosen) == len(self):
            what = f"--eval-split {share} leaves no sample to train on (equal ones stay together)"
            raise DataError(f"{what}; give a smaller share, or --eval-data")
        others = [i for i in range(len(self)) if i not in chosen]
        each_once = [1.0] * len(self.files)
        return self._select(others, self.times), self._select(sorted(chosen), each_once)

    def _select(self, indices, times):
        selected = copy.copy(self)
        selected.samples, selected.times = self.samples.select(indices), times
        selected.places = [self.places[i] for i in indices]
        selected._finish([0, *(bisect_left(indices, part.stop) for part, _ in self.parts)])
        return selected

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        return self.samples[i]


# --- batches ----------------------------------------------------------------------------------


class MicroBatch(NamedTuple):
    """The tensors of one forward pass."""

    prefix: Tensor  # [P] the tokens that all rows begin with, computed once
    input_ids: Tensor  # [B, T - P] the rest of each row, padded on the right
    predicting: Tensor  # [N] the numbers (see collate) of the tokens that predict a target
    targets: Tensor  # [N] the token that each of them predicts, or -100 for padding of this list

    def shapes(self):
        """→ what decides whether two micro-batches share a CUDA graph"""
        return tuple(tensor.shape for tensor in self)

    def to(self, device):
        return MicroBatch(*(tensor.to(device, non_blocking=True) for tensor in self))


def round_up(number, step, parts):
    """→ the next multiple of `step`, which is doubled as long as it is at most number / parts"""
    while 2 * step * parts <= number:
        step *= 2
    return number + (-number) % step


def longest_and_supervised(samples):
    """[(input_ids, labels)] → (the longest length, the number of labels to predict)"""
    lengths = [len(input_ids) for input_ids, _ in samples]
    return max(lengths), sum(int((labels[1:] != IGNORE).sum()) for _, labels in samples)


def collate(samples, prefix_length=0, sizes=None):
    """[(input_ids, labels)] → MicroBatch. Three rows, drawn with T = 8 and P = 2:

        p p a a a a a a
            b b b . . .
            c c c c . .

    The prefix p is stored once. The rows are padded (.) on the right, to a multiple of 8 (16 from
    256 tokens on, 32 from 512 …). They need no mask: see SelfAttention.forward in model.py.

    The P + B × (T - P) computed tokens are numbered as in this drawing, from left to right and from
    top to bottom. `predicting` holds such numbers. The labels are shifted here: token t of a row
    predicts label t + 1. `predicting` is padded to a multiple of 128 (256 from 1,024 on …),
    with number 0 and target -100. So there are few different shapes, and few CUDA graphs.

    sizes: longest_and_supervised of these samples, or larger numbers to pad to
    """
    P = prefix_length if len(samples) > 1 else 0  # one row has nothing to share
    longest, supervised = sizes or longest_and_supervised(samples)
    T = round_up(longest, 8, 16)  # tensor cores want multiples of 8
    input_ids = torch.stack([F.pad(ids, (0, T - len(ids))) for ids, _ in samples])
    next_labels = torch.stack(
        [F.pad(labels[1:], (0, T - len(labels) + 1), value=IGNORE) for _, labels in samples]
    )
    B = len(samples)
    flat = torch.arange(P + B * (T - P))
    prefix, rests = flat[:P].expand(B, P), flat[P:].view(B, T - P)
    number = torch.cat((prefix, rests), dim=1)  # [B, T] of each token of each row
    is_supervised = next_labels != IGNORE
    padding = (0, round_up(supervised, 128, 4) - int(is_supervised.sum()))
    return MicroBatch(
        prefix=input_ids[0, :P],
        input_ids=input_ids[:, P:].contiguous(),
        predicting=F.pad(number[is_supervised], padding),
        targets=F.pad(next_labels[is_supervised], padding, value=IGNORE),
    )


class Update(NamedTuple):
    """The data of one update: this process's micro-batches, and counts over all processes."""

    epoch: int  # from 0
    micro_batches: list
    samples: int
    tokens: int
    supervised: int  # supervised tokens


def make_update(epoch, batch_size, prefix_length, samples):
    """[(input_ids, labels)] of a whole update → Update

    Micro-batches that the processes compute in one turn get the same shape. So they capture graphs
    together. Rows of padding complete the last micro-batch: at most an eighth of all rows.
    """
    total, tokens = len(samples), sum(len(input_ids) for input_ids, _ in samples)
    missing, (rank, count) = -len(samples) % batch_size, rank_and_count()
    if 8 * missing <= len(samples) + missing:
        padding = (torch.zeros(1, dtype=torch.long), torch.tensor([IGNORE]))  # without a target
        samples = [*samples, *[padding] * missing]
    parts, micro_batches = in_parts(samples, batch_size), []
    sizes = [longest_and_supervised(part) for part in parts]
    supervised = sum(number for _, number in sizes)
    for turn, sizes_of_turn in zip(in_parts(parts, count), in_parts(sizes, count), strict=True):
        if rank < len(turn):
            largest = [max(each) for each in zip(*sizes_of_turn, strict=True)]
            micro_batches.append(collate(turn[rank], prefix_length, largest))
    return Update(epoch, micro_batches, total, tokens, supervised)


def eval_batches(dataset, batch_size, pin_memory=False):
    """→ DataLoader of this process's micro-batches of a whole dataset, the shortest first"""
    rank, count = rank_and_count()
    order = sorted(range(len(dataset)), key=dataset.lengths.__getitem__)
    batches = in_parts(order, batch_size)[rank::count]
    options = dict(collate_fn=partial(collate, prefix_length=dataset.prefix_length))
    return DataLoader(dataset, batch_sampler=batches, pin_memory=pin_memory, **options)


def draw_epoch(parts, seed, epoch):
    """→ the indices of an epoch's samples, from [(indices of a file's samples, times)].

    2.5 times means each of them twice, and a random half once more. Each epoch draws a new half.
    """
    rng = random.Random(f"{seed} {epoch} parts")
    drawn = []
    for indices, times in parts:
        extra = round(times % 1 * len(indices))
        drawn += [*indices] * int(times) + rng.sample(indices, extra)
    return drawn


def update_order(indices, lengths, samples_per_update, seed, epoch, window=50):
    """→ for each update of an epoch, the indices of its samples. It depends on its arguments only.

    Samples are shuffled, then sorted by length inside each window of `window` updates, so that
    little is padded; then the updates are shuffled. Every index comes as often as it is in
    `indices`. If they don't divide evenly, some updates have one less than others.
    """
    rng = random.Random(f"{seed} {epoch}")
    order = list(indices)
    rng.shuffle(order)
    count = math.ceil(len(order) / samples_per_update)
    bounds = [len(order) * i // max(1, count) for i in range(count + 1)]
    for first in range(0, count, window):
        part = slice(bounds[first], bounds[min(first + window, count)])
        order[part] = sorted(order[part], key=lengths.__getitem__)
    updates = [order[start:end] for start, end in itertools.pairwise(bounds)]
    rng.shuffle(updates)
    return updates
