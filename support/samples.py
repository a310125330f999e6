"""Encoded samples in a few flat arrays. Two tensors for each would need far more memory."""

import hashlib
import itertools
from array import array

import torch

from support.config import IGNORE


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
