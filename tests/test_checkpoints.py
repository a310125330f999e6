"""support/checkpoints.py and support/run_directory.py: a run that ended in any way goes on.

python -m pytest -q tests/test_checkpoints.py
"""

import contextlib
import math
import os
import random
import resource
import shutil
import subprocess
import time

import pytest
import torch
from conftest import (
    KILLS,
    LONG,
    SHORT,
    SMALL_BASE,
    contents,
    finish,
    metrics_of,
    outcome,
    refused,
    train_main,
    wait_for,
    write_jsonl,
)

import train
from support import run_directory
from support.checkpoints import (
    ADAPTER,
    CONTENTS,
    STATE,
    discard,
    is_intact,
    list_checkpoints,
    list_unfinished,
)
from support.files import LOCK, locked, sha256

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = [
    pytest.param("cuda", graphs, marks=cuda) for graphs in ("--no-cuda-graphs", "--cuda-graphs")
]


def names(paths):
    return [path.name for path in paths]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The directory of a run of six updates, with a checkpoint after every second one."""
    directory = tmp_path_factory.mktemp("done") / "out"
    train_main(*SHORT, directory)
    return directory


@pytest.fixture
def cut(tmp_path, done):
    """A copy of it, as if the run had been killed after update 4."""
    shutil.copytree(done, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-6")
    for name in ADAPTER:
        (tmp_path / "cut" / name).unlink()
    return tmp_path / "cut"


# --- runs that are killed ---------------------------------------------------------------------


@pytest.mark.parametrize("device, graphs", [("cpu", "--no-cuda-graphs"), *CUDA])
def test_a_run_killed_at_any_moment_goes_on_bit_for_bit(tmp_path, start, device, graphs):
    """CHATGLM3_KILLS=100 makes as many kills."""
    arguments = [*LONG, "--target-modules", "all", "--device", device, graphs, "--output-dir"]
    assert train.parse_args([*arguments, "x"]).lora_dropout > 0  # a resumed run repeats its masks
    finish(start(*arguments, tmp_path / "warm-up"))
    directory = tmp_path / "undisturbed"
    began = time.perf_counter()
    process = start(*arguments, directory)
    wait_for(lambda: list_checkpoints(directory), process)
    until_first = time.perf_counter() - began
    finish(process)
    rest = time.perf_counter() - began - until_first
    wanted = outcome(directory)
    moments = random.Random(0)
    resumed = in_saving = 0
    for kill in range(KILLS or 4):
        directory = tmp_path / str(kill)
        process = start(*arguments, directory)
        if kill % 4 == 0:  # at any time
            time.sleep(moments.uniform(0, until_first + 0.9 * rest))
        elif kill % 2:  # while the first checkpoint is written, or a later one
            wait_for(lambda: kill % 4 == 1 or list_checkpoints(directory), process)  # noqa: B023
            wait_for(lambda: list(directory.glob("checkpoint-*.part")), process)  # noqa: B023
            time.sleep(moments.uniform(0, 0.003) if kill % 4 == 3 else 0)
        else:
            wait_for(lambda: list_checkpoints(directory), process)  # noqa: B023
            time.sleep(moments.uniform(0, 0.9 * rest))
        process.kill()
        process.join()
        in_saving += any(directory.glob("*.part"))
        resumed += any(map(is_intact, list_checkpoints(directory)))
        finish(start(*arguments, directory, "--resume"))
        assert outcome(directory) == wanted
        assert not list(directory.glob("*.part")) and not (directory / LOCK).exists()
        shutil.rmtree(directory)
    assert resumed >= min(4, (KILLS or 4) // 2) and in_saving


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_whole_modules_in_half_precision_go_on_bit_for_bit(tmp_path, dtype):
    flags = ["--dtype", dtype, "--modules-to-save", "output_layer", "--batch-size", "1"]
    train_main(*SHORT, tmp_path / "done", *flags)
    shutil.copytree(tmp_path / "done", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-6")
    train_main(*SHORT, tmp_path / "cut", "--resume", *flags)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "done")


def test_a_checkpoint_that_was_being_removed_is_gone(cut, monkeypatch, capsys):
    """It is there, or among what the next run removes, at whatever point the run was killed."""
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **_: None)
        discard(cut / "checkpoint-4")
    assert names(list_checkpoints(cut)) == ["checkpoint-2"] and len(list_unfinished(cut)) == 1
    train_main(*SHORT, cut, "--resume")
    assert "checkpoint-2, 2 of 6 updates done" in capsys.readouterr().out
    assert not list_unfinished(cut)


def test_a_linked_checkpoint_that_was_being_removed(cut, done):
    before = contents(done)
    (cut / "checkpoint-4.old.part").symlink_to(done)
    (cut / "adapter.part").write_text("a file")
    train_main(*SHORT, cut, "--resume")
    assert not list_unfinished(cut) and outcome(cut) == outcome(done)
    assert contents(done) == before  # only the link was removed


# --- which directory is written to ------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_two_runs_never_write_to_one_directory(done, tmp_path, capsys, flag):
    out = shutil.copytree(done, tmp_path / "out")
    before = contents(out)
    with locked(out / LOCK, out):
        told = refused(capsys, *SHORT, out, flag)
        assert "out: another process is writing there" in told
    assert contents(out) == before


def test_a_directory_with_a_run_is_not_written_to_unasked(done, tmp_path, capsys):
    told = refused(capsys, *SHORT, done)
    assert "has a run; --resume continues it, --overwrite starts over" in told
    assert "leave one of the two out" in refused(capsys, *SHORT, done, "--resume", "--overwrite")
    out = shutil.copytree(done, tmp_path / "out")
    (out / "notes.txt").write_text("the user's own")
    train_main(*SHORT, out, "--overwrite", "--max-steps", 2)
    left = sorted(names(out.iterdir()))
    assert left == sorted([*ADAPTER, "metrics.jsonl", "run.args", "checkpoint-2", "notes.txt"])


def test_another_program_s_run_is_not_touched(tmp_path, capsys):
    out = tmp_path / "out"
    own = out / "checkpoint-2"
    own.mkdir(parents=True)
    (own / "optimizer.pt").write_text("another program's")
    for flags in ([], ["--overwrite"], ["--resume"]):
        told = refused(capsys, *SHORT, out, *flags)
        what = "out is not empty, and has no run of train.py; choose another --output-dir"
        assert told.endswith(what)
    (out / "metrics.jsonl").write_text("")
    for flag in ("--overwrite", "--resume"):
        told = refused(capsys, *SHORT, out, flag)
        assert "checkpoint-2 was not written by train.py; move it away" in told
    own.rename(out / "results")
    told = refused(capsys, *SHORT, out, "--resume")
    assert "has no intact checkpoint to resume from" in told
    assert sorted(names(out.iterdir())) == ["metrics.jsonl", "results"]
    assert (out / "results" / "optimizer.pt").read_text() == "another program's"


def test_a_finished_run_says_so_and_stays(done, capsys):
    before = contents(done)
    train_main(*SHORT, done, "--resume")
    assert "there was nothing left to do" in capsys.readouterr().out
    assert contents(done) == before


def test_only_the_newest_checkpoints_are_kept(tmp_path, monkeypatch):
    out = tmp_path / "out"
    train_main(*SHORT, out, "--keep-checkpoints", 2)
    assert names(list_checkpoints(out)) == ["checkpoint-6", "checkpoint-4"]
    (out / "checkpoint-6" / "SHA256SUMS").write_text("damaged")
    plain, intact = run_directory.write_checkpoint, []  # after each checkpoint

    def write_checkpoint(*arguments):
        plain(*arguments)
        intact.append(names(filter(is_intact, list_checkpoints(out))))

    monkeypatch.setattr(run_directory, "write_checkpoint", write_checkpoint)
    train_main(*SHORT, out, "--resume", "--keep-checkpoints", 1, "--save-steps", 1)
    assert intact == [["checkpoint-5"], ["checkpoint-6"]]


def test_a_run_that_fails_still_finishes_its_last_checkpoint(tmp_path, monkeypatch):
    """When another process dies, os._exit ends this one, which waits for no thread."""
    out, plain, seed = tmp_path / "out", run_directory.write_checkpoint, train.seed_dropout

    def write_slowly(*arguments):
        time.sleep(0.5)
        assert (out / LOCK).exists()
        plain(*arguments)

    def fail_later(run_seed, step):
        if step == 2:
            raise RuntimeError("a bug")
        seed(run_seed, step)

    monkeypatch.setattr(run_directory, "write_checkpoint", write_slowly)
    monkeypatch.setattr(train, "seed_dropout", fail_later)
    with pytest.raises(RuntimeError, match="a bug"):
        train_main(*SHORT, out)
    assert names(list_checkpoints(out)) == ["checkpoint-2"] and not (out / LOCK).exists()


# --- what --resume takes ----------------------------------------------------------------------


def test_a_named_checkpoint(cut, done, capsys):
    for name in (cut / "checkpoint-2", "checkpoint-2"):
        train_main(*SHORT, cut, "--resume", name)
        assert "checkpoint-2, 2 of 6 updates done" in capsys.readouterr().out
        assert outcome(cut) == outcome(done)


def test_another_split_of_the_update(tmp_path):
    """Dropout is off, because its masks depend on the split."""
    flags, losses = [*SHORT, tmp_path / "out", "--lora-dropout", 0], []
    train_main(*flags)
    losses.append([line["loss"] for line in metrics_of(tmp_path / "out")])
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    train_main(*flags, "--resume", "--batch-size", 2, "--gradient-accumulation-steps", 4)
    losses.append([line["loss"] for line in metrics_of(tmp_path / "out")])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--learning-rate", 1e-5], "--learning-rate was 0.003, is 1e-05"),
        (["--max-steps", 7], "--max-steps was 6, is 7"),
        (
            ["--batch-size", 8],
            "--batch-size × --gradient-accumulation-steps × processes was 8, is 16",
        ),
        (
            ["--seed", 1, "--lora-dropout", 0.5],
            "--seed was 42, is 1; --lora-dropout was 0.1, is 0.5",
        ),
        (["--dtype", "bf16"], "--dtype was float32, is bfloat16"),
        (["--data", "other.jsonl"], "other settings: --data has other content;"),
    ],
)
def test_a_run_with_other_settings_is_refused(cut, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(cut.parent)
    write_jsonl(cut.parent / "other.jsonl", [{"instruction": "q", "output": "a"}] * 20)
    before = contents(cut)
    told = refused(capsys, *SHORT, cut, "--resume", *flags)
    assert (
        message in told and "; give those, or --overwrite starts over; a new run can start" in told
    )
    assert contents(cut) == before


def test_a_checkpoint_that_is_not_there_is_refused_by_name(cut, tmp_path, capsys):
    before = contents(cut)
    told = refused(capsys, *SHORT, cut, "--resume", cut / "checkpoint-3")
    assert f"no intact checkpoint of {cut}; these are: checkpoint-4, checkpoint-2" in told
    told = refused(capsys, *SHORT, tmp_path / "new", "--resume", cut / "checkpoint-2")
    assert f"no intact checkpoint of {tmp_path}/new" in told
    assert contents(cut) == before


def test_another_base_is_refused(cut, tmp_path, capsys):
    base = shutil.copytree(SMALL_BASE, tmp_path / "base")
    content = bytearray((base / "model.safetensors").read_bytes())
    part = slice(len(content) // 2, len(content) // 2 + 2**18)
    content[part] = bytes(byte ^ 0x80 for byte in content[part])  # the signs, among others
    (base / "model.safetensors").write_bytes(content)
    told = refused(capsys, *SHORT, cut, "--resume", "--model", base)
    assert (
        "other settings: --model has other content; give those, or --overwrite starts over" in told
    )


@pytest.mark.parametrize("name", [*ADAPTER, *STATE, "SHA256SUMS"])
def test_a_damaged_checkpoint_is_passed_over(cut, done, capsys, name):
    for damage in ("flip", "cut", "remove"):
        shutil.rmtree(cut)
        shutil.copytree(done, cut)
        file = cut / "checkpoint-6" / name
        content = bytearray(file.read_bytes())
        content[len(content) // 3] ^= 1
        file.write_bytes(content if damage == "flip" else content[: len(content) // 2])
        if damage == "remove":
            file.unlink()
        train_main(*SHORT, cut, "--resume")
        told = capsys.readouterr()
        assert "checkpoint-6 is damaged (see its SHA256SUMS): skipped" in told.err
        assert "checkpoint-4, 4 of 6 updates done" in told.out
        assert outcome(cut) == outcome(done)


def test_nothing_whole_to_resume_from(cut, tmp_path, capsys):
    for checkpoint in list_checkpoints(cut):
        (checkpoint / "SHA256SUMS").unlink()
    told = refused(capsys, *SHORT, cut, "--resume")
    assert "has no intact checkpoint to resume from; --overwrite starts over" in told


def test_a_run_that_ended_before_its_first_checkpoint_starts_again(tmp_path, capsys):
    killed = tmp_path / "killed"  # as a run leaves it that was killed early
    (killed / "checkpoint-2.part").mkdir(parents=True)
    for name in (LOCK, "metrics.jsonl"):
        (killed / name).write_text("")
    for directory in (tmp_path / "new", killed):
        train_main(*SHORT, directory, "--resume", "--max-steps", 2)
        assert "has no checkpoint yet: from the start" in capsys.readouterr().out
        left = sorted(names(directory.iterdir()))
        assert left == sorted([*ADAPTER, "metrics.jsonl", "run.args", "checkpoint-2"])


@pytest.mark.parametrize(
    "files", [[], ["metrics.jsonl.part"], ["metrics.jsonl", "run.args.part"], ["run.args"]]
)
def test_a_run_that_was_killed_before_its_first_update_starts_again(tmp_path, files):
    """It had written its first files only, perhaps not wholly."""
    for name in (LOCK, *files):
        (tmp_path / name).write_text("")
    train_main(*SHORT, tmp_path, "--resume", "--max-steps", 2)
    left = sorted(names(tmp_path.iterdir()))
    assert left == sorted([*ADAPTER, "metrics.jsonl", "run.args", "checkpoint-2"])


# --- disks ------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """disk(options) → the directory of a small file system of its own, or a skip"""
    directory = tmp_path / "disk"
    directory.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", directory]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs the right to mount a file system")
        return directory

    yield mount
    if os.path.ismount(directory):
        subprocess.run(["umount", "--lazy", directory], check=True)


def test_a_full_disk_ends_the_run_and_spares_the_last_checkpoint(disk, capsys, done):
    page = resource.getpagesize()  # there is room for two checkpoints, and most of a third
    files = (done / "checkpoint-2").iterdir()
    pages = sum(math.ceil(file.stat().st_size / page) for file in files)
    out = disk(f"size={round(2.9 * pages) * page}") / "out"
    told = refused(capsys, *SHORT, out)
    assert "No space left on device" in told and f"{out}/checkpoint-4, which is intact" in told
    written = ["checkpoint-2", "checkpoint-4", "metrics.jsonl", "run.args"]
    assert sorted(names(out.iterdir())) == written
    shutil.rmtree(out / "checkpoint-2")  # the user makes room
    train_main(*SHORT, out, "--resume", "--keep-checkpoints", 1)
    assert outcome(out) == outcome(done)


def fill(directory, leave):
    """Fills a file system with a file, but for `leave` bytes. → the file"""
    file = directory / "filler"
    with contextlib.suppress(OSError), open(file, "wb", buffering=0) as raw:
        while raw.write(b"x" * 4096) == 4096:
            pass
    os.truncate(file, file.stat().st_size - leave)
    return file


def test_a_disk_that_is_full_when_a_run_is_resumed(disk, capsys, done):
    """It has room for a part of the metrics. That part must not pass for all of them."""
    out = disk("size=8m") / "out"
    left_out = shutil.ignore_patterns("checkpoint-2", "checkpoint-6")
    shutil.copytree(done, out, ignore=left_out)
    checkpoint = out / "checkpoint-4"
    with (checkpoint / "metrics.jsonl").open("ab") as file:
        file.write(b" " * 10_000 + b"\n")  # more than the disk will have room for
    sums = [f"{sha256((checkpoint / name).read_bytes())}  {name}\n" for name in CONTENTS]
    (checkpoint / "SHA256SUMS").write_text("".join(sums))
    (out / "metrics.jsonl").unlink()
    filler = fill(out.parent, leave=4096)
    told = refused(capsys, *SHORT, out, "--resume")
    what = "cannot write: No space left on device; once that is mended, --resume continues from"
    assert what in told
    filler.unlink()
    train_main(*SHORT, out, "--resume")
    assert len((out / "metrics.jsonl").read_bytes()) > 10_000


def train_with_a_limit(size, arguments):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    train_main(*arguments)


def test_a_limit_on_the_size_of_files(tmp_path, fork, done):
    size = (done / "adapter_model.safetensors").stat().st_size  # AdamW's moments need more
    told = finish(fork(train_with_a_limit, size, [*SHORT, tmp_path / "out"]), 2)
    assert "Traceback" not in told
    assert "cannot write: File too large; there is no checkpoint yet" in told
    assert sorted(names((tmp_path / "out").iterdir())) == ["metrics.jsonl", "run.args"]


def test_a_read_only_directory_is_told_before_training(disk, capsys):
    told = refused(capsys, *SHORT, disk("ro") / "out")
    assert "cannot write there; choose another" in told
