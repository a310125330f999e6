"""The directory of a run, --output-dir: metrics.jsonl, checkpoint-N/, and at the end the adapter.

Only the first process writes there. One run at a time has the directory's lock.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from support.checkpoints import (
    ADAPTER,
    BEST,
    BEST_MODEL,
    TENSORBOARD,
    checkpoint_files,
    discard,
    list_checkpoints,
    list_unfinished,
    newest_intact,
    replace_directory,
    result_files,
    write_checkpoint,
)
from support.files import (
    LOCK,
    as_bytes,
    delete,
    flush_to_disk,
    locked,
    nearest_existing,
    write_new_directory,
    write_whole,
)
from support.processes import rank_and_count
from support.run_args import RUN_ARGS
from support.tensorboard import TensorBoard, check_tensorboard


def check_output_dir(args):
    """Raises ValueError if a run may not write to --output-dir, before anything is written."""
    path, resume, overwrite = args.output_dir, args.resume, args.overwrite
    directory = Path(path)
    existing = nearest_existing(directory)
    if not path or not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"--output-dir {path}: cannot write there; choose another")
    if resume is not None and overwrite:
        what = "--resume continues a run, --overwrite starts it over"
        raise ValueError(f"{what}: leave one of the two out")
    if args.init_adapter and (overwrite or not list_checkpoints(directory)):
        start = Path(args.init_adapter).resolve()
        if directory.resolve() in (start, *start.parents):
            what = f"this run would delete the adapter of --init-adapter, {args.init_adapter}"
            raise ValueError(f"{what}; choose another --output-dir")
    if args.tensorboard:
        check_tensorboard()
    ours = list_checkpoints(directory)
    may_be_there = [LOCK]  # also what a run leaves that was killed while it wrote its first files
    may_be_there += [RUN_ARGS, f"{RUN_ARGS}.part", "metrics.jsonl.part"]
    if directory.exists() and any(file.name not in may_be_there for file in directory.iterdir()):
        if not (directory / "metrics.jsonl").exists() and not ours:
            what = "is not empty, and has no run of train.py"
            raise ValueError(f"{directory} {what}; choose another --output-dir")
        if resume is None and not overwrite and not args.dry_run:
            what = "--resume continues it, --overwrite starts over"
            raise ValueError(f"{directory} has a run; {what}")
    others = {*directory.glob("checkpoint-*")} - {*ours, *list_unfinished(directory)}
    others |= {file for file in directory.glob(f"{BEST}/*") if file.name not in ADAPTER}
    events = {*directory.glob(f"{TENSORBOARD}/events.out.tfevents.*")}
    others |= {*directory.glob(f"{TENSORBOARD}/*")} - events
    if others:
        what = "was not written by train.py"
        raise ValueError(f"{min(others)} {what}; move it away, or choose another --output-dir")


class RunDirectory:
    """Writes what a run produces. Of several processes, only the first one does.

    run_args: the bytes of run.args; metrics: those of metrics.jsonl so far; best_model: those of
    the adapter in best/, or None
    """

    def __init__(self, args, run_args):
        self.path, self.keep = Path(args.output_dir), args.keep_checkpoints
        self.is_writer = rank_and_count()[0] == 0
        self.run_args, self.metrics, self.best_model = run_args, b"", None
        self.tensorboard = None  # a TensorBoard
        self.wants_tensorboard = args.tensorboard and self.is_writer
        self.writer = ThreadPoolExecutor(1)  # writes a checkpoint while training continues
        self.being_written = self.saved = None  # saved: the name of the last checkpoint

    @contextmanager
    def opened(self, checkpoint):
        """Makes and locks the directory, and prepares it for a run that continues `checkpoint`.

        Without a checkpoint, it removes what an earlier run left. Raises ValueError if another run
        writes there, and OSError that names the checkpoint to resume from if the disk fails.
        """
        try:
            if self.is_writer:
                self.path.mkdir(parents=True, exist_ok=True)
            lock = locked(self.path / LOCK, self.path) if self.is_writer else nullcontext()
            with lock:
                if self.is_writer:
                    self._prepare(checkpoint)
                try:
                    yield
                finally:  # whatever ends the run, its last checkpoint is written whole
                    self.writer.shutdown()
                if self.tensorboard:
                    self.tensorboard.close()
        except OSError as error:
            intact = self.last_intact()
            for part in list_unfinished(self.path) if self.is_writer else ():
                with suppress(OSError):
                    delete(part)
            advice = "there is no checkpoint yet"
            if intact:
                continues = f"--resume continues from {intact}, which is intact"
                advice = f"once that is mended, {continues}"
            what = f"cannot write: {error.strerror or error}"
            raise OSError(f"{self.path}: {what}; {advice}") from error

    def _prepare(self, checkpoint):
        self.saved = checkpoint and checkpoint.name
        for part in list_unfinished(self.path):
            delete(part)
        if checkpoint:
            self.metrics = (checkpoint / "metrics.jsonl").read_bytes()
        else:
            for old in list_checkpoints(self.path):
                discard(old)
            for name in ADAPTER:
                (self.path / name).unlink(missing_ok=True)
            if (self.path / TENSORBOARD).exists():
                discard(self.path / TENSORBOARD)
        self._restore_best(checkpoint)
        write_whole(self.path / "metrics.jsonl", self.metrics)
        write_whole(self.path / RUN_ARGS, self.run_args)
        if self.wants_tensorboard:
            lines = self.metrics.splitlines()
            first_step = json.loads(lines[-1])["step"] + 1 if lines else 0
            self.tensorboard = TensorBoard(self.path / TENSORBOARD, first_step)

    def _restore_best(self, checkpoint):
        """Puts into best/ what was there at the checkpoint, which may be older than best/ is."""
        best = self.path / BEST
        file = checkpoint and checkpoint / BEST_MODEL
        if file and file.exists():
            self.best_model = file.read_bytes()
            there = best / ADAPTER[0]
            if not there.exists() or there.read_bytes() != self.best_model:
                others = {name: (checkpoint / name).read_bytes() for name in ADAPTER[1:]}
                replace_directory(best, {ADAPTER[0]: self.best_model} | others)
        elif best.exists():
            discard(best)

    def log(self, metrics):
        """Adds a dict to metrics.jsonl, as one line."""
        line = json.dumps(metrics, allow_nan=False).encode() + b"\n"
        self.metrics += line
        if self.is_writer:
            with open(self.path / "metrics.jsonl", "ab") as file:
                file.write(line)
        if self.tensorboard:
            self.tensorboard.log(metrics)

    def save_checkpoint(self, run, wait):
        """Writes a checkpoint of a train.Run in the background, or waits until it is there.

        Raises OSError if this one or the one before could not be written.
        """
        if not self.is_writer:
            return
        files = checkpoint_files(run, self.metrics, self.best_model)
        if self.being_written:
            self.being_written.result()
        self.saved = f"checkpoint-{run.progress.step}"
        directory = self.path / self.saved
        self.being_written = self.writer.submit(write_checkpoint, directory, files, self.keep)
        if wait:
            self.being_written.result()

    def save_best(self, run):
        """Puts the adapter into best/, whole, in place of what is there."""
        if self.is_writer:
            files = result_files(run)
            self.best_model = as_bytes(files[ADAPTER[0]])
            replace_directory(self.path / BEST, files | {ADAPTER[0]: self.best_model})

    def save_result(self, run):
        """Puts the adapter into the directory, each file whole or not at all."""
        if self.saved != f"checkpoint-{run.progress.step}":  # it stopped early
            self.save_checkpoint(run, wait=True)
        if not self.is_writer:
            return
        files = result_files(run)
        part = write_new_directory(self.path / "adapter.part", files)
        for name in files:
            os.replace(part / name, self.path / name)
        part.rmdir()
        flush_to_disk(self.path)

    def last_intact(self):
        """Waits for the checkpoint that is being written. → the newest intact one, or None"""
        self.writer.shutdown()
        return newest_intact(self.path)
