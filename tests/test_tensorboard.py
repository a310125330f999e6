"""support/tensorboard.py: the scalars that TensorBoard shows.

python -m pytest -q tests/test_tensorboard.py
"""

import math
import sys

import pytest
from test_curves import EVALUATION, LINE, training_line

from support.tensorboard import TensorBoard, check_tensorboard


def scalars(directory):
    """What TensorBoard shows of a directory: {name: {step: value}}"""
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = module.EventAccumulator(str(directory))
    events.Reload()
    names = events.Tags()["scalars"]
    return {name: {each.step: each.value for each in events.Scalars(name)} for name in names}


@pytest.fixture
def has_tensorboard():
    pytest.importorskip("tensorboard", reason="needs requirements-curves.txt")


def test_each_number_of_a_line_is_a_scalar(tmp_path, has_tensorboard):
    board = TensorBoard(tmp_path / "board", first_step=0)
    board.log(EVALUATION)
    assert scalars(tmp_path / "board")["eval/loss"] == {10: 3.0}  # before it is closed
    board.log(LINE)
    board.log(LINE | {"step": 20, "loss": None})
    board.close()
    shown = scalars(tmp_path / "board")
    assert shown["train/loss"] == {10: 2.5}  # a null is left out
    assert shown["train/grad_norm"] == {10: 1.5, 20: 1.5}
    assert shown["train/learning_rate"][10] == pytest.approx(1e-4)
    assert shown["eval/loss"] == {10: 3.0}
    assert shown["eval/perplexity"][10] == pytest.approx(math.exp(3))
    left = {"train/epoch", "train/tokens", "train/loss_scale", "train/skipped"}
    others = {"train/loss", "train/grad_norm", "train/learning_rate", "eval/loss"}
    assert set(shown) == left | others | {"eval/perplexity"}


def test_a_resumed_run_replaces_what_came_after_the_checkpoint(tmp_path, has_tensorboard):
    for first_step, losses in ((0, {10: 3.0, 20: 2.0, 30: 9.0, 40: 9.0}), (21, {30: 1.0})):
        board = TensorBoard(tmp_path, first_step)
        for step, loss in losses.items():
            board.log(training_line(step, loss))
        board.close()
    assert scalars(tmp_path)["train/loss"] == {10: 3.0, 20: 2.0, 30: 1.0}
    board = TensorBoard(tmp_path, first_step=0)  # a run that starts over
    board.log(training_line(50, 4.0))
    board.close()
    assert scalars(tmp_path)["train/loss"] == {50: 4.0}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_is_told_at_the_line_that_is_lost(tmp_path, has_tensorboard, monkeypatch):
    from tensorboard.summary.writer.record_writer import RecordWriter

    def write(self, record):
        raise OSError(28, "No space left on device")

    board = TensorBoard(tmp_path, first_step=0)
    board.log(LINE)
    monkeypatch.setattr(RecordWriter, "write", write)
    with pytest.raises(OSError, match="No space left"):
        board.log({"step": 20, "eval_loss": 2.0})


def test_without_tensorboard_nothing_is_created(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    hint = "^--tensorboard needs the package tensorboard: pip install -r requirements-curves.txt$"
    with pytest.raises(ValueError, match=hint):
        check_tensorboard()
    with pytest.raises(ValueError, match=hint):
        TensorBoard(tmp_path / "board", first_step=0)
    assert not (tmp_path / "board").exists()
