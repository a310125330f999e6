"""How far a run is: its counts, its metrics, and the bar that shows them."""

import math
import time

import torch
from tqdm import tqdm

from support.commands import bar_options


class Progress:
    """Counts of a run.

    Sums of values on the device are tensors there, because reading them makes the loop wait for the
    device. They are read when a line of metrics or a checkpoint is written.
    """

    SAVED = {  # the keys in training_state.json, and what they hold
        "step": "step",
        "loss": "loss",
        "supervised": "supervised",
        "tokens": "tokens",
        "skipped": "skipped",
        "skipped_in_a_row": "skipped_in_a_row",
        "checkpointed": "recomputed_layers",
    }

    def __init__(self, device):
        self.step = 0  # updates done, the skipped ones included
        self.loss = torch.zeros((), device=device)  # sum over tokens, since the last metrics
        self.supervised = 0  # tokens, since the last metrics
        self.tokens = 0  # all tokens, since the last metrics
        self.skipped = torch.zeros((), dtype=torch.long, device=device)  # updates, of the whole run
        self.skipped_in_a_row = torch.zeros((), dtype=torch.long, device=device)
        self.recomputed_layers = 0  # of gradient checkpointing; a resumed run keeps their number
        self.samples_here = self.tokens_here = 0  # since this process started
        self.tokens_per_second = 0.0  # between the last two lines of metrics
        self.started = self.last_metrics = time.perf_counter()

    def as_dict(self):
        """→ numbers. Waits for the device."""
        values = {key: getattr(self, name) for key, name in self.SAVED.items()}
        return {key: v.item() if torch.is_tensor(v) else v for key, v in values.items()}

    def set(self, values):
        """Takes what as_dict gave. Raises ValueError for counts that can't be."""
        for key, name in self.SAVED.items():
            old, value = getattr(self, name), values[key]
            if name != "loss" and not (isinstance(value, int) and 0 <= value < 2**53):
                raise ValueError(f"training_state.json: {key} is {value!r}")
            if torch.is_tensor(old):
                value = torch.tensor(value, dtype=old.dtype, device=old.device)
            setattr(self, name, value)

    def start_clock(self):
        """Speeds are measured from here on."""
        self.started = self.last_metrics = time.perf_counter()

    def count(self, update, loss, grad_norm):
        """Adds one update (train.Update), its loss and its gradients' norm, on the device."""
        overflow = ~torch.isfinite(grad_norm)  # if there is a GradScaler, it skipped this update
        self.step += 1
        self.loss = self.loss + loss * update.supervised
        self.supervised += update.supervised
        self.tokens += update.tokens
        self.skipped = self.skipped + overflow
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * overflow  # 0 if it was finite
        self.samples_here += update.samples
        self.tokens_here += update.tokens

    def take_metrics(self, epoch, learning_rate, grad_norm, loss_scale):
        """→ a line of metrics.jsonl. It resets the sums since the last line.

        The loss is the mean over all supervised tokens since the last line. A loss or a norm that
        is not finite becomes None, because JSON has no word for it.
        """
        loss, norm = float(self.loss) / self.supervised, float(grad_norm)
        line = {
            "step": self.step,
            "epoch": epoch,
            "loss": loss if math.isfinite(loss) else None,
            "grad_norm": norm if math.isfinite(norm) else None,
            "learning_rate": learning_rate,
            "tokens": self.tokens,
            "loss_scale": loss_scale,
            "skipped": int(self.skipped),
        }
        now = time.perf_counter()
        self.tokens_per_second = self.tokens / (now - self.last_metrics)
        self.loss = torch.zeros_like(self.loss)
        self.supervised = self.tokens = 0
        self.last_metrics = now
        return line


class ProgressBar(tqdm):
    """A bar of updates."""

    def __init__(self, run, is_shown):
        self.progress = run.progress
        done = dict(total=run.total_steps, initial=run.progress.step, unit="update")
        super().__init__(disable=not is_shown, **done, **bar_options())

    def advance(self, is_stopping):
        """One more update is done. Nothing is drawn after a signal: whoever reads stderr may have
        got it too and be gone, and the error would cost this update."""
        self.disable |= bool(is_stopping)
        self.update()

    def show(self, line):
        """Shows a line of metrics beside the bar."""
        shown = {
            "loss": "nan" if line["loss"] is None else f"{line['loss']:.4f}",
            "lr": f"{line['learning_rate']:.2e}",
            "tok/s": f"{self.progress.tokens_per_second:,.0f}",
        }
        if line["skipped"]:
            shown["skipped"] = line["skipped"]
        self.set_postfix(shown)


def check_overflows(run, directory):
    """Raises ValueError if too many updates in a row were not finite: 20 with GradScaler, else 1.

    GradScaler lowers its scale after each of them, until the gradients are finite again. Without
    GradScaler, the first such update has already spoilt the adapter.
    """
    in_a_row = int(run.progress.skipped_in_a_row)
    if in_a_row < (20 if run.scaler.is_enabled() else 1):
        return
    first = run.progress.step - in_a_row
    raise ValueError(
        f"the loss or its gradients have been NaN or infinite since update {first + 1}, of the "
        f"samples at {', '.join(run.places_of_samples(first))}; the last intact checkpoint is "
        f"{directory.last_intact() or 'none'}; look at these samples, or try a lower "
        "--learning-rate"
    )
