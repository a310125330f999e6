"""support/files.py: files that are written whole or not at all, and locks.

python -m pytest -q tests/test_files.py
"""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, ROOT, refused_by_infer
from safetensors.torch import load

import model as chatglm
from support import files
from support.files import locked


def test_content_becomes_bytes():
    assert files.as_bytes(b"as it is") == b"as it is"
    tensor = torch.arange(3.0)
    assert torch.equal(load(files.as_bytes({"a": tensor}))["a"], tensor)
    assert json.loads(files.as_json({"system": "甄嬛"})) == {"system": "甄嬛"}
    assert "甄嬛".encode() in files.as_json({"system": "甄嬛"})


@pytest.mark.parametrize("text", ["", "{", "[]", "1", '"a"', '{"r":' * 100_000])
def test_damaged_json_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text('{"r": 8}')
    assert files.read_json(tmp_path / "a.json") == {"r": 8}
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match="a.json: damaged .*; copy it again, or train"):
        files.read_json(tmp_path / "a.json")


def test_json_that_is_not_there_or_not_text_is_refused(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xff")
    for name in ("a.json", "b.json"):
        with pytest.raises(ValueError, match=f"{name}: damaged"):
            files.read_json(tmp_path / name)


def test_a_directory_is_written_anew(tmp_path):
    directory = tmp_path / "checkpoint-2.part"
    directory.mkdir()
    (directory / "old").write_text("left by a run that was killed")
    content = {"a.json": b"{}", "a.safetensors": {"w": torch.ones(2)}}
    assert files.write_new_directory(directory, content) == directory
    assert sorted(path.name for path in directory.iterdir()) == sorted(content)
    assert (directory / "a.json").read_bytes() == b"{}"
    assert torch.equal(load((directory / "a.safetensors").read_bytes())["w"], torch.ones(2))


def test_deleting_a_link_spares_what_it_points_to(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "file").write_text("")
    (tmp_path / "directory" / "inner").mkdir(parents=True)
    for name in ("link", "file", "directory"):
        files.delete(tmp_path / name)
    assert [path.name for path in tmp_path.rglob("*")] == ["kept", "file"]


def test_flushing_opens_files_for_writing_and_directories_for_reading(tmp_path, monkeypatch):
    """Windows flushes nothing else."""
    opened, flushed = {}, []
    real_open = os.open

    def open_and_note(path, flags):
        descriptor = real_open(path, flags)
        opened[descriptor] = (path, flags & (os.O_RDONLY | os.O_RDWR | os.O_WRONLY))
        return descriptor

    monkeypatch.setattr(os, "open", open_and_note)
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(opened[descriptor]))
    (tmp_path / "file").write_text("kept")
    files.flush_to_disk(tmp_path / "file")
    files.flush_to_disk(tmp_path)
    assert flushed == [(tmp_path / "file", os.O_RDWR), (tmp_path, os.O_RDONLY)]
    assert (tmp_path / "file").read_text() == "kept"
    for descriptor in opened:
        with pytest.raises(OSError):  # they are closed
            os.fstat(descriptor)


def test_a_directory_that_cannot_be_opened_is_not_flushed(tmp_path, monkeypatch):
    """Windows opens none. But every file must be flushed."""

    def refuse(path, flags):
        raise PermissionError(errno.EACCES, "denied", str(path))

    (tmp_path / "file").write_text("")
    monkeypatch.setattr(os, "open", refuse)
    files.flush_to_disk(tmp_path)
    with pytest.raises(PermissionError):
        files.flush_to_disk(tmp_path / "file")


# --- locks ------------------------------------------------------------------------------------

HOLD = """
import sys, time
from support.files import locked
with locked(sys.argv[1], "out"):
    print("locked", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def lock(tmp_path):
    """The path of a lock file."""
    return tmp_path / ".lock"


@pytest.fixture
def holder(lock):
    """Another process, which holds the lock until it is killed."""
    command = [sys.executable, "-c", HOLD, lock]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_one_process_at_a_time_has_a_lock(lock, holder):
    for _ in range(2):  # being refused does not break the lock
        with pytest.raises(ValueError, match="^some/out: another process is writing there; wait"):
            with locked(lock, "some/out"):
                pytest.fail("two processes write")
        assert lock.exists()
    holder.kill()
    holder.wait()
    assert lock.exists()  # a killed process leaves its file, which hinders nobody
    with locked(lock, "some/out"):
        assert lock.exists()
    assert not lock.exists()


def test_a_lock_leaves_nothing_behind(lock):
    for _ in range(2):
        with locked(lock, "out"):
            assert lock.exists()
            with pytest.raises(ValueError, match="another process is writing there"):
                with locked(lock, "out"):
                    pytest.fail("two write")
        assert not lock.exists()
    with pytest.raises(KeyError), locked(lock, "out"):
        raise KeyError
    assert list(lock.parent.iterdir()) == []


def test_a_lock_that_is_deleted_only_when_nobody_holds_it(lock, monkeypatch):
    """Windows deletes no file that is open."""
    unlink, held = Path.unlink, []

    def refuse_once(path, *rest, **options):
        if not held:
            with pytest.raises(ValueError), locked(path, "out"):  # it is not released yet
                pytest.fail("two write")
            held.append(path)
            raise PermissionError(errno.EACCES, "it is open", str(path))
        return unlink(path, *rest, **options)

    with locked(lock, "out"):
        monkeypatch.setattr(Path, "unlink", refuse_once)
    assert held == [lock] and not lock.exists()
    with locked(lock, "out"):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
@pytest.mark.parametrize("left", [False, True])
def test_a_file_system_without_locks_is_used_without_one(lock, monkeypatch, number, left):
    """A lock file that a killed process left hinders nobody there either."""

    def flock(*_):
        raise OSError(number, "this file system has no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    if left:
        lock.write_text("")
    with locked(lock, "out"):
        (lock.parent / "written").write_text("")
    assert not lock.exists()


# --- Git LFS pointers -------------------------------------------------------------------------

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
POINTERS = ["tokenizer.model", "config.json", "model.safetensors", "adapter_model.safetensors"]


@pytest.mark.parametrize("name", POINTERS)
def test_a_pointer_in_the_place_of_a_file_is_recognised(checkpoint, capsys, name):
    """Git leaves pointers where LFS is not installed: in data, vocabularies, bases and adapters."""
    adapter = shutil.copytree(FIXTURES / "tiny" / "adapter", checkpoint / "adapter")
    shutil.copy(chatglm.BUILT_IN / "tokenizer.model", checkpoint)
    is_of_adapter = name.startswith("adapter")
    (adapter / name if is_of_adapter else checkpoint / name).write_text(POINTER)
    base = chatglm.built_in_model() if is_of_adapter else checkpoint
    flags = ["--model", base, "--adapter", adapter, "--prompt", "q", "--device", "cpu"]
    told = refused_by_infer(capsys, *flags)
    assert f"{name} is a Git LFS pointer, not the file; run `git lfs pull`, or download" in told
