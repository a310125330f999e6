"""Encoded samples in a few flat arrays. Two tensors for each would need far more memory."""

import hashlib
import itertools
from array import array

import torch

from support.config import IGNORE
from support.errors import DataError


def in_parts(values, size):
    """→ lists of `size` values; the last one may be shorter"""
    return [values[start : start + size] for start in range(0, len(values), size)]


def check_times(files, parts):
    """Raises DataError if an epoch would have no sample of a file. parts: [(its samples, times)]"""
    for file, (samples, times) in zip(files, parts, strict=True):
        if samples and round(times * len(samples)) == 0:
            none = f"none of its {len(samples)} samples would be used"
            raise DataError(f"{file}: {none}; give a larger number")


class PackedSamples:
    """A sequence of (input_ids [T], labels [T]), int64. `add` all, then `pack`, then read.

    lengths: how many tokens each sample has
    supervised: how many of them are supervised
    """

    def __init__(self):
        self.ids, self.labels = array("i"), array("i")  # of all samples, one after another
        self.lengths, self.supervised = [], []
        self.starts = [0]

    def add(self, input_ids, labels):
        """Two lists of one length. → whether it was added: a sample without a target is not."""
        targets = labels[1:]  # nothing predicts the first token
        supervised = len(targets) - targets.count(IGNORE)
        if supervised:
            self.ids.fromlist(input_ids)
            self.labels.fromlist(labels)
            self.lengths.append(len(input_ids))
            self.supervised.append(supervised)
            self.starts.append(self.starts[-1] + len(input_ids))
        return supervised > 0

    def pack(self):
        """Makes tensors of the arrays. No sample can be added after it."""
        self.ids = torch.frombuffer(self.ids, dtype=torch.int32)
        self.labels = torch.frombuffer(self.labels, dtype=torch.int32)

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        i = range(len(self))[i]  # which raises IndexError
        part = slice(self.starts[i], self.starts[i + 1])
        return self.ids[part].long(), self.labels[part].long()

    def digests(self, start=""):
        """→ a digest of each sample. `start` makes it another one."""
        ids, labels, start = self.ids.numpy(), self.labels.numpy(), start.encode()
        return [
            hashlib.sha256(start + ids[a:b].tobytes() + labels[a:b].tobytes()).digest()
            for a, b in itertools.pairwise(self.starts)
        ]

    def draw(self, share, seed):
        """→ the indices of a share of the samples, at least one, chosen by content and seed.

        A few more are drawn if that keeps equal samples together.
        """
        digests = self.digests(str(seed))
        last = sorted(digests)[max(1, round(share * len(self))) - 1]
        return {i for i, digest in enumerate(digests) if digest <= last}

    def select(self, indices):
        """→ PackedSamples of these samples; `indices` rise"""
        selected = PackedSamples()
        for name in ("lengths", "supervised"):
            values = getattr(self, name)
            setattr(selected, name, [values[i] for i in indices])
        selected.starts = [0, *itertools.accumulate(selected.lengths)]
        is_selected = torch.zeros(len(self), dtype=torch.bool)
        is_selected[indices] = True
        is_selected = is_selected.repeat_interleave(torch.tensor(self.lengths))
        selected.ids, selected.labels = self.ids[is_selected], self.labels[is_selected]
        return selected

    def common_prefix(self):
        """→ how many tokens all samples begin with; the last token of the shortest is left out"""
        starts = torch.tensor(self.starts[:-1])
        most = min(self.lengths) - 1
        columns = (self.ids[starts + i] for i in range(most))
        return next((i for i, ids in enumerate(columns) if (ids != ids[0]).any()), most)

    def digest(self):
        """→ a digest of all samples, in hexadecimal"""
        sha256, ids, labels = hashlib.sha256(), self.ids.numpy(), self.labels.numpy()
        for start, end in itertools.pairwise(self.starts):
            sha256.update(ids[start:end])
            sha256.update(labels[start:end])
        return sha256.hexdigest()
