"""data.make_update: few shapes, the same shapes in all processes, and rows of padding.

python -m pytest -q tests/test_micro_batches.py
"""

import random
from collections import Counter
from functools import partial

import pytest
import torch
from conftest import random_samples, trained_parameters, with_random_lora
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import model as chatglm
import train

inputs = settings(max_examples=100, derandomize=True, database=None, deadline=None)
VOCABULARY = 1400  # ids that the built-in model has


# --- rounding ---------------------------------------------------------------------------------


@inputs
@given(st.integers(0, 100_000), st.sampled_from([1, 8, 128]), st.sampled_from([1, 4, 16]))
def test_a_number_is_rounded_up_by_little(number, step, parts):
    rounded = data.round_up(number, step, parts)
    assert rounded % step == 0 and rounded >= number
    assert rounded - number <= max(step - 1, number / parts)
    assert data.round_up(rounded, step, parts) == rounded  # what is round stays


def test_larger_numbers_get_larger_steps():
    """So lengths up to 8,192 are rounded to 112 different ones, and not to 1,024."""
    lengths = [data.round_up(n, 8, 16) for n in range(1, 8193)]
    assert lengths == sorted(lengths) and len(set(lengths)) == 32 + 5 * 16
    for n, rounded in ((255, 256), (257, 272), (511, 512), (513, 544), (1023, 1024)):
        assert data.round_up(n, 8, 16) == rounded


# --- an update of one or more processes -------------------------------------------------------


def marked_samples(lengths, prefix_length=0):
    """Samples with a common prefix. The token after it is another one in each sample."""
    samples = random_samples(lengths, 500, seed=len(lengths))
    for number, (input_ids, labels) in enumerate(samples):
        input_ids[:prefix_length] = torch.arange(3, 3 + prefix_length)
        input_ids[prefix_length] = 1000 + number
        labels[labels != data.IGNORE] = input_ids[labels != data.IGNORE]
    return samples


def updates_of(samples, batch_size, prefix_length, count):
    """→ the data.Update of each of `count` processes"""
    with pytest.MonkeyPatch.context() as patch:
        updates = []
        for rank in range(count):
            patch.setattr(data, "rank_and_count", lambda: (rank, count))  # noqa: B023
            updates.append(data.make_update(0, batch_size, prefix_length, samples))
    return updates


def rows_of(batch):
    """→ the rows of a data.MicroBatch, each with the prefix"""
    prefix = batch.prefix.expand(len(batch.input_ids), -1)
    return torch.cat((prefix, batch.input_ids), dim=1)


def targets_of(batch):
    """→ [(token that predicts, its target)] of a data.MicroBatch, without padding"""
    computed = torch.cat((batch.prefix, batch.input_ids.flatten()))
    is_real = batch.targets != data.IGNORE
    return [*zip(computed[batch.predicting[is_real]].tolist(), batch.targets[is_real].tolist())]  # noqa: B905


@st.composite
def updates_of_any_size(draw):
    """→ (samples, batch size, prefix length, number of processes)"""
    prefix_length = draw(st.sampled_from([0, 0, 8, 16]))
    count, batch_size = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    size = draw(st.integers(1, 40))
    lengths = st.integers(prefix_length + 2, prefix_length + draw(st.sampled_from([9, 90, 400])))
    lengths = draw(st.lists(lengths, min_size=size, max_size=size))
    return marked_samples(lengths, prefix_length), batch_size, prefix_length, count


def is_filled_up(samples, batch_size):
    """Whether no rows are missing, or those that are missing are an eighth of all, or fewer."""
    missing = -len(samples) % batch_size
    return 8 * missing <= len(samples) + missing


@inputs
@given(updates_of_any_size())
def test_micro_batches_of_one_moment_have_equal_shapes(given_update):
    samples, batch_size, _, count = given_update
    updates = updates_of(*given_update)
    turns = -(-len(samples) // (batch_size * count))
    for turn in range(turns):
        together = [u.micro_batches[turn] for u in updates if turn < len(u.micro_batches)]
        assert len(together) == count or turn == turns - 1
        if is_filled_up(samples, batch_size):
            assert len({batch.shapes() for batch in together}) == 1
            assert all(len(batch.input_ids) == batch_size for batch in together)
        else:  # only rows may be missing, and only in the last one
            assert len({batch.targets.shape for batch in together}) == 1
            sizes = [len(batch.input_ids) for batch in together]
            assert sizes[:-1] == [batch_size] * (len(sizes) - 1)
            lengths = {rows_of(batch).shape[1] for batch in together}
            assert len(lengths) == 1
    assert sum(len(u.micro_batches) for u in updates) == -(-len(samples) // batch_size)


@inputs
@given(updates_of_any_size())
def test_every_sample_appears_once_in_one_process(given_update):
    samples, batch_size, prefix_length, _ = given_update
    updates = updates_of(*given_update)
    batches = [batch for update in updates for batch in update.micro_batches]
    rows = [row for batch in batches for row in rows_of(batch)]
    real = [row for row in rows if row[prefix_length] >= 1000]
    assert sorted(int(row[prefix_length]) - 1000 for row in real) == [*range(len(samples))]
    for row in real:
        input_ids, _ = samples[int(row[prefix_length]) - 1000]
        assert torch.equal(row[: len(input_ids)], input_ids)
        assert not row[len(input_ids) :].any()
    missing = -len(samples) % batch_size if is_filled_up(samples, batch_size) else 0
    assert len(rows) - len(real) == missing


@inputs
@given(updates_of_any_size())
def test_an_update_counts_real_samples_only(given_update):
    samples, *_ = given_update
    updates = updates_of(*given_update)
    supervised = sum(int((labels[1:] != data.IGNORE).sum()) for _, labels in samples)
    for update in updates:
        assert update.samples == len(samples)
        assert update.tokens == sum(len(input_ids) for input_ids, _ in samples)
        assert update.supervised == supervised
    batches = [batch for update in updates for batch in update.micro_batches]
    assert sum(int((batch.targets != data.IGNORE).sum()) for batch in batches) == supervised


@inputs
@given(updates_of_any_size())
def test_every_target_is_predicted_once_by_the_token_before_it(given_update):
    samples, *_ = given_update
    wanted = Counter()
    for input_ids, labels in samples:
        pairs = zip(input_ids[:-1].tolist(), labels[1:].tolist(), strict=True)
        wanted.update(pair for pair in pairs if pair[1] != data.IGNORE)
    found = Counter()
    for update in updates_of(*given_update):
        for batch in update.micro_batches:
            found.update(targets_of(batch))
    assert found == wanted


@pytest.mark.parametrize("prefix_length", [0, 8])
@pytest.mark.parametrize("count", [1, 2])
def test_a_tiny_data_set_is_not_filled_up(prefix_length, count):
    """Five of eight rows would be padding."""
    samples = marked_samples([20, 30, 25], prefix_length)
    for rank, update in enumerate(updates_of(samples, 8, prefix_length, count)):
        assert [len(batch.input_ids) for batch in update.micro_batches] == ([3] if not rank else [])
        assert update.samples == 3 and update.tokens == 75


# --- rows of padding --------------------------------------------------------------------------


@pytest.mark.parametrize("prefix_length", [0, 8])
def test_a_row_of_padding_changes_nothing(prefix_length):
    peft_model = with_random_lora(chatglm.load_model(chatglm.built_in_model(), "cpu", "fp32"))
    model, trained = peft_model.get_base_model().train(), trained_parameters(peft_model)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    samples = marked_samples([12, 17, 23, 24, 31, 33, 40], prefix_length)
    results = []
    for batch_size in (7, 8):
        update = data.make_update(0, batch_size, prefix_length, samples)
        (batch,) = update.micro_batches
        assert batch.input_ids.shape == (batch_size, 40 - prefix_length)
        for param in trained.values():
            param.grad = None
        divisor = torch.tensor(float(update.supervised))
        loss = train.forward_backward(model, scaler, batch, divisor)
        results.append({"loss": loss, **{name: p.grad for name, p in trained.items()}})
    alone, filled = results
    assert len(alone) == 17
    for name, wanted in alone.items():
        largest = wanted.abs().max()
        assert largest > 0 and (filled[name] - wanted).abs().max() < 1e-6 * largest, name


# --- how many shapes there are ----------------------------------------------------------------


def test_few_shapes_and_little_padding():
    """Lengths like those of huanhuan.json: each shape costs a CUDA graph, padding costs time."""
    rng = random.Random(0)
    prefix = 24
    lengths = [
        min(240, max(prefix + 2, round(rng.lognormvariate(4.094, 0.4)))) for _ in range(3729)
    ]
    assert 58 <= sorted(lengths)[len(lengths) // 2] <= 62
    order = data.update_order(range(3729), lengths, 8, seed=42, epoch=0)
    samples = marked_samples(lengths, prefix)
    for i, (input_ids, labels) in enumerate(samples):  # what is learnt begins anywhere
        labels[:] = input_ids
        labels[: rng.randint(prefix, lengths[i] - 1)] = data.IGNORE
    make = partial(data.make_update, 0, 8, prefix)
    batches = [make([samples[i] for i in indices]).micro_batches for indices in order]
    batches = [batch for (batch,) in batches]
    shapes = Counter(batch.shapes() for batch in batches)
    computed = sum(rows_of(batch).numel() for batch in batches)
    padding = 1 - sum(lengths) / computed
    figures = f"{len(shapes)} shapes, {padding:.1%} padding"
    assert len(batches) == 467 and all(len(batch.input_ids) == 8 for batch in batches)
    assert len(shapes) <= 60 and padding < 0.12, figures
