"""support/samples.py: samples in flat arrays come out as they went in.

python -m pytest -q tests/test_samples.py
"""

import hashlib
import struct

import pytest
import torch

from support.samples import PackedSamples

NO = -100  # the label of a token that is not learnt
ONE, TWO = ([1, 2, 3, 4], [NO, NO, 3, 4]), ([1, 2, 5], [NO, NO, 5])


def packed(*samples):
    result = PackedSamples()
    assert all([result.add(ids, labels) for ids, labels in samples])
    result.pack()
    return result


def test_samples_come_out_as_they_went_in():
    samples = packed(ONE, TWO)
    assert len(samples) == 2
    assert (samples.lengths, samples.supervised) == ([4, 3], [2, 1])
    for (ids, labels), expected in zip([samples[0], samples[1]], [ONE, TWO], strict=True):
        assert ids.dtype == labels.dtype == torch.int64
        assert (ids.tolist(), labels.tolist()) == expected


@pytest.mark.parametrize("labels", [[NO, NO, NO], [1, NO, NO]])
def test_a_sample_without_a_target_is_not_added(labels):
    """Nothing predicts the first token, so that its label is no target."""
    samples = PackedSamples()
    assert samples.add(*TWO) and not samples.add([1, 2, 3], labels) and samples.add(*ONE)
    samples.pack()
    assert samples.lengths == [3, 4] and samples[1][0].tolist() == [1, 2, 3, 4]


PREFIXES = [  # (ids of the samples, how many tokens all of them begin with)
    ([[1, 2, 3, 4], [1, 2, 5]], 2),
    ([[1, 2, 3], [4, 2, 3]], 0),
    ([[1, 2, 3], [1, 2, 3, 4]], 2),  # the last token of the shortest is left out
    ([[1, 2, 3], [1, 2, 3]], 2),
    ([[1, 2, 3], [1, 2, 4], [1, 3, 3]], 1),
    ([[1, 2, 3]], 2),
]


@pytest.mark.parametrize("lists, length", PREFIXES)
def test_common_prefix(lists, length):
    assert packed(*((ids, [NO, *ids[1:]]) for ids in lists)).common_prefix() == length


def test_digest():
    """Of each sample's ids and labels as int32, as checkpoints have it since the first version."""
    content = struct.pack("<8i", 1, 2, 3, 4, NO, NO, 3, 4)
    content += struct.pack("<6i", 1, 2, 5, NO, NO, 5)
    assert packed(ONE, TWO).digest() == hashlib.sha256(content).hexdigest()
