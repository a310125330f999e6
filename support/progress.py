"""How far a run is: its counts, its metrics, and the bar that shows them."""

import math
import time
from contextlib import contextmanager

import torch
from tqdm import tqdm

from support.commands import bar_options
from support.processes import rank_and_count


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
        "eval_loss": "eval_loss",
        "best_loss": "best_loss",
        "best_step": "best_step",
        "evaluated_step": "evaluated_step",
        "evaluations_since_best": "evaluations_since_best",
    }
    # What a checkpoint of an older version lacks.
    NO_EVALUATIONS = {"eval_loss": None, "best_loss": None, "best_step": 0}
    NO_EVALUATIONS |= {"evaluated_step": 0, "evaluations_since_best": 0}

    def __init__(self, device):
        self.step = 0  # updates done, the skipped ones included
        self.loss = torch.zeros((), device=device)  # sum over tokens, since the last metrics
        self.supervised = 0  # tokens, since the last metrics
        self.tokens = 0  # all tokens, since the last metrics
        self.skipped = torch.zeros((), dtype=torch.long, device=device)  # updates, of the whole run
        self.skipped_in_a_row = torch.zeros((), dtype=torch.long, device=device)
        self.recomputed_layers = 0  # of gradient checkpointing; a resumed run keeps their number
        self.eval_loss = None  # of the last evaluation; None before the first one
        self.evaluated_step = 0  # after which update that was
        self.best_loss, self.best_step = None, 0  # the same of the lowest loss
        self.evaluations_since_best = 0
        self.samples_here = self.tokens_here = 0  # since this process started
        self.tokens_per_second = 0.0  # between the last two lines of metrics
        self.started = self.last_metrics = time.perf_counter()
        self.evaluating = 0.0  # seconds

    def as_dict(self):
        """→ numbers. Waits for the device."""
        values = {key: getattr(self, name) for key, name in self.SAVED.items()}
        return {key: v.item() if torch.is_tensor(v) else v for key, v in values.items()}

    def set(self, values):
        """Takes what as_dict gave. Raises ValueError for counts that can't be."""
        for key, name in self.SAVED.items():
            old, value = getattr(self, name), (self.NO_EVALUATIONS | values)[key]
            if key.endswith("_loss"):
                is_right = isinstance(value, float | None)
            else:
                is_right = key == "loss" or (isinstance(value, int) and 0 <= value < 2**53)
            if not is_right:
                raise ValueError(f"training_state.json: {key} is {value!r}")
            if torch.is_tensor(old):
                value = torch.tensor(value, dtype=old.dtype, device=old.device)
            setattr(self, name, value)

    def start_clock(self):
        """Speeds are measured from here on."""
        self.started = self.last_metrics = time.perf_counter()

    def count(self, update, loss, grad_norm):
        """Adds one update (data.Update), its loss and its gradients' norm, on the device."""
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

        The loss is the mean over all supervised tokens since the last line.
        """
        line = {
            "step": self.step,
            "epoch": epoch,
            "loss": finite(float(self.loss) / self.supervised),
            "grad_norm": finite(float(grad_norm)),
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

    @contextmanager
    def clock_stopped(self):
        """The speeds of training leave out what happens in this context: evaluations."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self.evaluating += seconds
        self.started += seconds
        self.last_metrics += seconds

    def count_evaluation(self, updates_per_epoch, loss):
        """→ a line of metrics.jsonl for the loss that was measured now"""
        self.eval_loss, self.evaluated_step = finite(loss), self.step
        self.evaluations_since_best += 1
        if self.eval_loss is not None and (self.best_loss is None or loss < self.best_loss):
            self.best_loss, self.best_step = loss, self.step
            self.evaluations_since_best = 0
        perplexity = finite(perplexity_of(loss))
        epoch = (self.step - 1) // updates_per_epoch
        line = {"step": self.step, "epoch": epoch, "eval_loss": self.eval_loss}
        return line | {"eval_perplexity": perplexity}

    def is_best(self):
        """Whether the loss that was measured last is the lowest so far."""
        return self.best_loss is not None and self.evaluations_since_best == 0

    def is_out_of_patience(self, patience):
        """Whether so many evaluations came after the best one. patience: None for no limit"""
        return patience is not None and self.evaluations_since_best >= patience


def finite(number):
    """→ the number, or None if it is not finite, because JSON has no word for it"""
    return number if math.isfinite(number) else None


def perplexity_of(loss):
    """→ exp(loss), or infinity"""
    return math.exp(loss) if loss < 700 else math.inf


class ProgressBar(tqdm):
    """A bar of updates."""

    def __init__(self, run):
        self.progress, self.shown = run.progress, {}
        done = dict(total=run.total_steps, initial=run.progress.step, unit="update")
        is_first = rank_and_count()[0] == 0
        super().__init__(disable=not is_first, **done, **bar_options())

    def show(self, line):
        """Shows a line of metrics beside the bar: of training, or of an evaluation."""
        for key, name in (("loss", "loss"), ("eval_loss", "eval")):
            if key in line:
                self.shown[name] = "nan" if line[key] is None else f"{line[key]:.4f}"
        if "learning_rate" in line:
            self.shown["lr"] = f"{line['learning_rate']:.2e}"
            self.shown["tok/s"] = f"{self.progress.tokens_per_second:,.0f}"
        if line.get("skipped"):
            self.shown["skipped"] = line["skipped"]
        self.set_postfix(self.shown)


def eval_bar(batches):
    """→ the same micro-batches, with a bar if they take more than two seconds"""
    options = dict(desc="evaluation", delay=2, leave=False, disable=rank_and_count()[0] > 0)
    return tqdm(batches, **options, **bar_options())


def check_overflows(run, directory):
    """Raises ValueError if too many updates in a row were not finite: 20 with GradScaler, else 1.

    GradScaler lowers its scale after each of them, until the gradients are finite again. Without
    GradScaler, the first such update has already spoilt the adapter.
    """
    in_a_row = int(run.progress.skipped_in_a_row)
    if in_a_row < (20 if run.scaler.is_enabled() else 1):
        return
    first = run.progress.step - in_a_row
    epoch, number = divmod(first, run.updates_per_epoch)
    places = [run.dataset.places[i] for i in run.order_of_epoch(epoch)[number]]
    raise ValueError(
        f"the loss or its gradients have been NaN or infinite since update {first + 1}, of the "
        f"samples at {', '.join(places)}; the last intact checkpoint is "
        f"{directory.last_intact() or 'none'}; look at these samples, or try a lower "
        "--learning-rate"
    )
