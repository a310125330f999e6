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
    checkpoint_files,
    discard,
    list_checkpoints,
    list_unfinished,
    newest_intact,
    result_files,
    write_checkpoint,
)
from support.files import LOCK, delete, flush_to_disk, locked, write_new_directory


def check_output_dir(path, resume, overwrite):
    """Raises ValueError if a run may not write to `path`, before anything is written."""
    directory = Path(path)
    parents = (directory.absolute(), *directory.absolute().parents)
    existing = next(parent for parent in parents if parent.exists())
    if not path or not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"--output-dir {path}: cannot write there; choose another")
    if resume is not None and overwrite:
        what = "--resume continues a run, --overwrite starts it over"
        raise ValueError(f"{what}: leave one of the two out")
    ours = list_checkpoints(directory)
    if directory.exists() and any(file.name != LOCK for file in directory.iterdir()):
        if not (directory / "metrics.jsonl").exists() and not ours:
            what = "is not empty, and has no run of train.py"
            raise ValueError(f"{directory} {what}; choose another --output-dir")
        if resume is None and not overwrite:
            what = "--resume continues it, --overwrite starts over"
            raise ValueError(f"{directory} has a run; {what}")
    others = {*directory.glob("checkpoint-*")} - {*ours, *list_unfinished(directory)}
    if others:
        what = "is not a checkpoint of train.py"
        raise ValueError(f"{min(others)} {what}; move it away, or choose another --output-dir")


class RunDirectory:
    """Writes what a run produces. All processes but the first have is_writer=False: they write
    nothing.

    metrics: the bytes of metrics.jsonl so far
    """

    def __init__(self, path, keep_checkpoints, is_writer):
        self.path, self.keep, self.is_writer = Path(path), keep_checkpoints, is_writer
        self.metrics = b""
        self.writer = ThreadPoolExecutor(1)  # writes a checkpoint while training continues
        self.being_written = None

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
                yield
                self.writer.shutdown()
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
        for part in list_unfinished(self.path):
            delete(part)
        if checkpoint:
            self.metrics = (checkpoint / "metrics.jsonl").read_bytes()
        else:
            for old in list_checkpoints(self.path):
                discard(old)
            for name in ADAPTER:
                (self.path / name).unlink(missing_ok=True)
        (self.path / "metrics.jsonl").write_bytes(self.metrics)

    def log(self, metrics):
        """Adds a dict to metrics.jsonl, as one line."""
        line = json.dumps(metrics, allow_nan=False).encode() + b"\n"
        self.metrics += line
        if self.is_writer:
            with open(self.path / "metrics.jsonl", "ab") as file:
                file.write(line)

    def save_checkpoint(self, run, wait):
        """Writes a checkpoint of a train.Run in the background, or waits until it is there.

        Raises OSError if this one or the one before could not be written.
        """
        if not self.is_writer:
            return
        files = checkpoint_files(run, self.metrics)
        if self.being_written:
            self.being_written.result()
        directory = self.path / f"checkpoint-{run.progress.step}"
        self.being_written = self.writer.submit(write_checkpoint, directory, files, self.keep)
        if wait:
            self.being_written.result()

    def save_result(self, run):
        """Puts the adapter into the directory, each file whole or not at all."""
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
