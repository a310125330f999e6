"""support/memory.py: the trial before training, and --gradient-checkpointing auto.

python -m pytest -q tests/test_memory.py
"""

import re

import pytest
import torch
from conftest import SHORT, new_run, random_samples, refused, write_jsonl

import data
import model as chatglm
import train
from support import memory

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def built_in_lora():
    model = chatglm.load_model(chatglm.built_in_model(), "cpu")
    return chatglm.add_lora(model, 8, 32, 0.1, ["query_key_value"])


class Samples(list):
    """Samples with their lengths, as data.ConversationDataset has them."""

    @property
    def lengths(self):
        return [len(input_ids) for input_ids, _ in self]

    @property
    def samples_per_epoch(self):
        return len(self)

    @property
    def supervised(self):
        return [int((labels[1:] != data.IGNORE).sum()) for _, labels in self]


def test_the_longest_samples_need_as_much_memory_as_any():
    """They are all as long as the longest sample, and learn as much as any sample does."""
    samples = Samples(random_samples([40, 9, 20], 512))
    short_ids, short_labels = samples[2]
    short_labels[:] = short_ids  # of which all but the first token is learnt
    samples[0][1][:-3] = data.IGNORE
    rows = memory.longest_samples(samples, 2, 512)
    assert len(rows) == 2 and len(memory.longest_samples(samples, 8, 512)) == 3
    seven = Samples(random_samples([9] * 7, 512))  # make_update completes them to eight rows
    assert len(memory.longest_samples(seven, 8, 512)) == 8
    assert len(memory.longest_samples(seven, 9, 512)) == 8
    for input_ids, labels in rows:
        assert torch.equal(input_ids, samples[0][0])
        assert torch.equal(labels[-19:], input_ids[-19:])
        assert (labels[:-19] == data.IGNORE).all()


@pytest.mark.parametrize("needed", range(8))
def test_as_few_blocks_as_fit_are_found_by_halving(needed):
    tried = []

    def attempt(blocks):
        tried.append(blocks)
        return f"a step with {blocks}" if blocks >= needed else None

    found = memory.fewest_that_fit(attempt, layers=6)
    fewest = max(1, needed)  # that none at all does not fit is known before
    assert found == (f"a step with {fewest}" if needed <= 6 else None)
    assert 0 not in tried and len(tried) <= 4


@pytest.mark.parametrize("needed", [0, 1, 3, 4, 5])
def test_auto_takes_as_few_blocks_as_fit(monkeypatch, needed):
    """A stand-in runs out of memory until `needed` of the four blocks are checkpointed."""
    tried = []

    def forward_backward(model, *rest):
        tried.append(model.transformer.encoder.recomputed_layers)
        if tried[-1] < needed:
            raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(train, "forward_backward", forward_backward)
    run = new_run(built_in_lora(), "--compile")
    if needed > 4:
        with pytest.raises(ValueError, match="out of memory on the longest micro-batch"):
            train.make_micro_step(run)
        return
    train.make_micro_step(run)
    assert run.model.transformer.encoder.recomputed_layers == needed == tried[-1]
    assert run.progress.recomputed_layers == needed

    run.checkpoint, run.progress.recomputed_layers = "checkpoint-2", 4  # a run that is resumed
    train.make_micro_step(run)
    assert tried[-1] == 4
    if needed:
        run.progress.recomputed_layers = needed - 1
        with pytest.raises(ValueError, match="out of memory"):
            train.make_micro_step(run)


def test_the_trial_leaves_gradients_of_zero(monkeypatch):
    """A CUDA graph adds to the gradients that its trial allocated. So they must stay."""

    def forward_backward(model, *rest):
        for param in params:
            param.grad = torch.ones_like(param)

    monkeypatch.setattr(train, "forward_backward", forward_backward)
    for flags in (["--compile"], []):  # without a trial there are gradients of zero, too
        run = new_run(built_in_lora(), *flags)
        params = run.optimizer.param_groups[0]["params"]
        train.make_micro_step(run)
        assert all(not param.grad.any() for param in params)


def test_how_many_blocks_are_checkpointed_is_decided_once_a_run(tmp_path, monkeypatch):
    plain, used = train.make_micro_step, []

    def make_micro_step(run):
        micro_step, encoder = plain(run), run.model.transformer.encoder
        used.append((run.checkpoint and run.checkpoint.name, encoder.recomputed_layers))
        encoder.recomputed_layers = run.progress.recomputed_layers = 3  # as if no fewer had fitted
        return micro_step

    monkeypatch.setattr(train, "make_micro_step", make_micro_step)
    train.main([*SHORT, str(tmp_path / "out")])
    train.main([*SHORT, str(tmp_path / "out"), "--resume", "checkpoint-4"])
    assert used == [(None, 0), ("checkpoint-4", 3)]


# --- on CUDA ----------------------------------------------------------------------------------


@cuda
def test_out_of_memory_is_told_before_anything_is_written(tmp_path, monkeypatch, capsys):
    def forward_backward(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "forward_backward", forward_backward)
    told = refused(capsys, "--output-dir", tmp_path / "out", "--device", "cuda")
    assert "try a smaller --batch-size" in told and not (tmp_path / "out").exists()


@cuda
def test_auto_stores_what_fits(tmp_path, capsys):
    """What the allocator may take is cut down until not all blocks fit, and then not even one.

    Where the trial fits, training fits too. It once needed a little more than the trial.
    """
    records = [{"instruction": f"{'qr'[i % 2]}", "output": "a b c d " * 120} for i in range(64)]
    file = write_jsonl(tmp_path / "d.jsonl", records)
    flags = ["--data", str(file), "--device", "cuda", "--batch-size", "64", "--max-steps", "2"]
    total = torch.cuda.get_device_properties(0).total_memory
    outcomes = []
    try:
        for mebibytes in (8000, *range(1500, 100, -25)):
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(mebibytes * 2**20 / total)
            directory = tmp_path / str(mebibytes)
            try:
                train.main([*flags, "--output-dir", str(directory)])
                told = capsys.readouterr().out
                outcomes.append(int(re.search(r"(\d) of \d blocks checkpointed", told)[1]))
            except SystemExit as stop:
                told = capsys.readouterr().err
                assert stop.code == 2 and "out of memory on the longest micro-batch" in told
                assert not directory.exists()
                break
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert outcomes == sorted(outcomes) and outcomes[0] == 0
    assert outcomes[-1] > 0 and len(outcomes) < 57
