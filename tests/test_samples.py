"""support/samples.py: samples in flat arrays come out as they went in.

python -m pytest -q tests/test_samples.py
"""

import hashlib
import random
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


def contents_of(samples):
    return sorted((tuple(ids.tolist()), tuple(labels.tolist())) for ids, labels in samples)


def split(samples, share, seed):
    """→ (what is not drawn, what is drawn), as `select` gives it"""
    drawn = samples.draw(share, seed)
    others = [i for i in range(len(samples)) if i not in drawn]
    return [contents_of(samples.select(part)) for part in (others, sorted(drawn))]


def test_content_and_seed_alone_decide_what_is_drawn():
    """Of 100 samples, half stand for two. Some have the same ids, with other labels."""
    once = [([1, n % 25, 3], [NO, NO if n < 25 else n % 25, 3]) for n in range(50)]
    whole, shuffled = 2 * once, random.Random(0).sample(2 * once, 100)
    left, drawn = split(packed(*whole), 0.31, seed=0)
    assert contents_of(packed(*whole)) == sorted(left + drawn) and len(drawn) == 32
    assert not {*left} & {*drawn}  # so equal samples are drawn together
    assert split(packed(*shuffled), 0.31, seed=0) == [left, drawn]
    assert split(packed(*whole), 0.31, seed=1) != [left, drawn]
    assert {ids for ids, _ in left} & {ids for ids, _ in drawn}  # labels are part of the content


@pytest.mark.parametrize("share, count", [(1e-6, 1), (0.04, 1), (0.5, 10), (0.999, 20)])
def test_a_share_is_rounded_and_at_least_one(share, count):
    samples = packed(*(([1, 2, n], [NO, NO, n]) for n in range(20)))
    assert len(samples.draw(share, seed=0)) == count


def test_selected_samples_are_as_if_the_others_had_never_been():
    three = ([7, 8], [NO, 8])
    selected, alone = packed(ONE, TWO, three, ONE).select([1, 2]), packed(TWO, three)
    for name in ("lengths", "supervised", "starts"):
        assert getattr(selected, name) == getattr(alone, name)
    assert contents_of(selected) == contents_of(alone)
    assert selected.digest() == alone.digest()
    assert selected.common_prefix() == alone.common_prefix() == 0
