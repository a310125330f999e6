"""Turns text into batches: tokenizer, prompt format, Dataset, padding, and the order of samples.

    tokenizer = ChatGLMTokenizer("THUDM/chatglm3-6b")
    dataset = ConversationDataset(["dataset/sample.jsonl"], tokenizer, max_length=512)
    batch = collate([dataset[0], dataset[1]], dataset.prefix_length)

Files are read and checked in support/records.py. Letters in shapes: B rows of a micro-batch,
T tokens of a row, P of them a prefix that all rows begin with, N tokens to predict.
"""

import hashlib
import itertools
import math
import random
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from transformers.utils import cached_file

from support.config import IGNORE
from support.errors import one_line, printable
from support.records import ROLES, DataError, read_conversations

SAMPLE = Path(__file__).parent / "dataset" / "sample.jsonl"


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
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
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


def encode_conversation(tokenizer, messages):
    """messages → (input_ids, labels), two lists of one length, in the official ChatGLM3 format:

        [gMASK] sop  <|role|> metadata\\n content  <|role|> metadata\\n content  …  </s>

    Each metadata with its newline, and each content, is encoded by itself, as the official
    tokenizer does it.
    labels[i] is input_ids[i] where a token is supervised: all ids of an assistant's turn after
    <|assistant|> (metadata, newline, content), and the id that ends the turn (the next role id, or
    </s>). Elsewhere labels[i] is -100.
    """
    input_ids = [tokenizer.special["[gMASK]"], tokenizer.special["sop"]]
    labels = [IGNORE, IGNORE]
    after_assistant = False
    for message in messages:
        role_id = tokenizer.special[f"<|{message['role']}|>"]
        body = tokenizer.encode(message.get("metadata", "") + "\n")
        body += tokenizer.encode(message["content"])
        is_assistant = message["role"] == "assistant"
        input_ids += [role_id, *body]
        labels.append(role_id if after_assistant else IGNORE)
        labels += body if is_assistant else [IGNORE] * len(body)
        after_assistant = is_assistant
    labels.append(tokenizer.eos_id if after_assistant else IGNORE)
    return [*input_ids, tokenizer.eos_id], labels


def encode_prompt(tokenizer, messages):
    """messages → input_ids up to and including <|assistant|>. The answer is what comes next."""
    input_ids, _ = encode_conversation(tokenizer, messages)
    return [*input_ids[:-1], tokenizer.special["<|assistant|>"]]  # instead of </s>


def split_answer(tokenizer, ids):
    """Splits an answer's ids, without the stop id, into two texts: (metadata, content).

    Metadata is the first line, without its newline. If there is no newline, all is content. An
    incomplete last character is left out.
    """
    metadata = []
    if tokenizer.newline_id in ids:
        end = ids.index(tokenizer.newline_id)
        metadata, ids = ids[:end], ids[end + 1 :]
    return tokenizer.decode(metadata).strip(), tokenizer.decode(ids).rstrip("\ufffd")


def with_system(messages, system):
    """Adds the system message `system`, if it is not None or "", unless there is one already."""
    if not system or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": system}, *messages]


class ConversationDataset(Dataset):
    """Every conversation of `files`, encoded. dataset[i] → (input_ids [T], labels [T]), int64.

    A conversation without a system message gets `system`. Samples are cut to `max_length` tokens,
    prompt and answer together. Raises DataError: see support/records.py.

    lengths: how many tokens each sample has
    places: the file and line that each sample came from
    cut: how many samples were cut. They have no </s>, so the model doesn't learn to stop there.
    dropped: how many samples had no supervised token within max_length
    supervised: how many tokens of all samples are supervised
    prefix_length: how many tokens, in multiples of 8, all samples begin with: see collate
    """

    def __init__(self, files, tokenizer, max_length, system=None):
        self.samples, self.places = [], []
        self.cut = self.dropped = 0
        for place, messages in read_conversations(files):
            input_ids, labels = encode_conversation(tokenizer, with_system(messages, system))
            if set(labels[:max_length]) == {IGNORE}:
                self.dropped += 1
                continue
            self.cut += len(input_ids) > max_length
            sample = torch.tensor([input_ids[:max_length], labels[:max_length]], dtype=torch.int32)
            self.samples.append(sample)
            self.places.append(place)
        if not self.samples:
            within = f"within {max_length} tokens; raise --max-length"
            raise DataError(f"no sample has a token to learn {within}")
        self.lengths = [sample.shape[1] for sample in self.samples]
        self.supervised = sum(count_supervised(sample[1]) for sample in self.samples)
        self.prefix_length = self._common_prefix()
        self.digest = hashlib.sha256(
            b"".join(s.numpy().tobytes() for s in self.samples)
        ).hexdigest()

    def _common_prefix(self):
        shortest = min(self.lengths)  # its last token is left out, so that no row becomes empty
        starts = torch.stack([sample[0, : shortest - 1] for sample in self.samples])
        same = int((starts == starts[0]).all(0).cumprod(0).sum())  # leading True values
        return same - same % 8  # tensor cores want multiples of 8

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        input_ids, labels = self.samples[i].long()
        return input_ids, labels


# --- batches ----------------------------------------------------------------------------------


class MicroBatch(NamedTuple):
    """The tensors of one forward pass."""

    prefix: Tensor  # [P] the tokens that all rows begin with, computed once
    input_ids: Tensor  # [B, T - P] the rest of each row, padded on the right
    predicting: Tensor  # [N] the numbers (see collate) of the tokens that predict a target
    targets: Tensor  # [N] the token that each of them predicts, or -100 for padding of this list

    def to(self, device):
        return MicroBatch(*(tensor.to(device, non_blocking=True) for tensor in self))


def collate(samples, prefix_length=0):
    """[(input_ids, labels)] → MicroBatch. Three rows, drawn with T = 8 and P = 2:

        p p a a a a a a
            b b b . . .
            c c c c . .

    The prefix p is stored once. The rows are padded (.) on the right, to a multiple of 8 that holds
    the longest of them. They need no mask: see SelfAttention.forward in model.py.

    The P + B × (T - P) computed tokens are numbered as they are drawn, from left to right and from
    top to bottom. `predicting` holds such numbers. The labels are shifted here: token t of a row
    predicts label t + 1. `predicting` is padded to a multiple of 128, with number 0 and target
    -100. So there are few different shapes, and few CUDA graphs.
    """
    P = prefix_length if len(samples) > 1 else 0  # one row has nothing to share
    T = max(len(input_ids) for input_ids, _ in samples)
    T += (-T) % 8  # tensor cores want multiples of 8
    input_ids = torch.stack([F.pad(ids, (0, T - len(ids))) for ids, _ in samples])
    next_labels = torch.stack(
        [F.pad(labels[1:], (0, T - len(labels) + 1), value=IGNORE) for _, labels in samples]
    )
    B = len(samples)
    flat = torch.arange(P + B * (T - P))
    prefix, rests = flat[:P].expand(B, P), flat[P:].view(B, T - P)
    number = torch.cat((prefix, rests), dim=1)  # [B, T] of each token of each row
    is_supervised = next_labels != IGNORE
    padding = (0, -int(is_supervised.sum()) % 128)
    return MicroBatch(
        prefix=input_ids[0, :P],
        input_ids=input_ids[:, P:].contiguous(),
        predicting=F.pad(number[is_supervised], padding),
        targets=F.pad(next_labels[is_supervised], padding, value=IGNORE),
    )


def count_supervised(labels):
    """→ how many tokens of a sample are supervised; the first one can't be"""
    return int((labels[1:] != IGNORE).sum())


def update_order(lengths, samples_per_update, seed, epoch, window=50):
    """→ for each update of an epoch, the indices of its samples. It depends on its arguments only.

    Samples are shuffled, then sorted by length inside each window of `window` updates, so that
    little is padded; then the updates are shuffled. Every sample comes once. If the samples don't
    divide evenly, some updates have one less than others.
    """
    rng = random.Random(f"{seed} {epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    count = math.ceil(len(order) / samples_per_update)
    bounds = [len(order) * i // max(1, count) for i in range(count + 1)]
    for first in range(0, count, window):
        part = slice(bounds[first], bounds[min(first + window, count)])
        order[part] = sorted(order[part], key=lengths.__getitem__)
    updates = [order[start:end] for start, end in itertools.pairwise(bounds)]
    rng.shuffle(updates)
    return updates
