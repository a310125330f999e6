"""Files and directories that are written whole or not at all, and locked while one run writes."""

import errno
import hashlib
import json
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = ".train.lock"  # the name of a directory's lock file
LFS_START = b"version https://git-lfs.github.com/spec/"  # a Git LFS pointer begins so
LFS_POINTER = "a Git LFS pointer, not the file; run `git lfs pull`, or download it again"
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP)  # what a file system without locks says


def as_json(value):
    """→ bytes"""
    return json.dumps(value, ensure_ascii=False, indent=2).encode() + b"\n"


def as_bytes(content):
    """A file's content as bytes. A dict of tensors becomes a safetensors file."""
    if isinstance(content, bytes):
        return content
    from safetensors.torch import save  # here, because train.py reads its flags before slow imports

    return save(content, {"format": "pt"})


def sha256(content):
    """The digest of some bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def check_no_lfs_pointer(file):
    """Raises ValueError if Git has put a pointer in the place of this file."""
    with open(file, "rb") as opened:
        if opened.read(len(LFS_START)) == LFS_START:
            raise ValueError(f"{Path(file).name} is {LFS_POINTER}")


def read_json(file):
    """→ the JSON object in `file`. Raises ValueError if there is anything else in it."""
    try:
        value = json.loads(Path(file).read_text("utf-8"))
        if not isinstance(value, dict):
            raise ValueError("not an object")
        return value
    except (OSError, ValueError, RecursionError) as error:
        advice = "copy it again, or train the adapter again"
        raise ValueError(f"{file}: damaged ({error}); {advice}") from error


def nearest_existing(path):
    """→ the path itself, or the nearest of its parents that exists"""
    path = Path(path).absolute()
    return next(each for each in (path, *path.parents) if each.exists())


def write_files(directory, files):
    """Writes {name: content} into `directory`, which it makes if need be."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(as_bytes(content))


def write_new_directory(directory, files):
    """Makes `directory` anew with {name: content}, flushed to the disk. → directory"""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    write_files(directory, files)
    for path in (*(directory / name for name in files), directory):
        flush_to_disk(path)
    return directory


def write_whole(file, content):
    """Writes bytes into `file`, in place of what is there: whole, or not at all."""
    part = file.with_name(f"{file.name}.part")
    part.write_bytes(content)
    os.replace(part, file)


def flush_to_disk(path):
    """Waits until a file, or a directory's list of files, would survive a power cut."""
    try:  # Windows can't flush a file that is open for reading only
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except PermissionError:
        if not path.is_dir():
            raise
        return  # Windows can't open a directory
    os.fsync(descriptor)
    os.close(descriptor)


def delete(path):
    """Deletes a file, a link, or a directory with all that is in it."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path)


def _try_to_delete(file):
    """→ whether it could be deleted"""
    with suppress(OSError):
        Path(file).unlink()
        return True
    return False


@contextmanager
def locked(lock_file, path):
    """Keeps other processes from writing to `path` for as long as the context lasts.

    Raises ValueError if another process has the lock. A process that is killed loses its lock, but
    leaves the empty lock file. A file system without locks is used without one.
    """
    lock = FileLock(lock_file, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        advice = "another process is writing there; wait until it ends"
        raise ValueError(f"{path}: {advice}") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    try:
        yield
    finally:
        was_deleted = _try_to_delete(lock_file)  # before the release: nobody else can hold it yet
        lock.release()
        if not was_deleted:  # on Windows, which deletes no open file: so none that another holds
            _try_to_delete(lock_file)
