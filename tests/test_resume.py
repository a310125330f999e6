"""A run that is stopped in whatever way continues as if nothing had happened; several processes make the run of one."""

import contextlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, run, write_jsonl

import train

RUN = (
    "--max-steps 30 --save-steps 2 --logging-steps 3 --batch-size 3 --gradient-accumulation-steps 2 --lora-dropout 0.1"
    # 119 samples: the second epoch begins at update 21
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
CUDA = [pytest.param("cuda", graphs, marks=needs_cuda) for graphs in ("--no-cuda-graphs", "--cuda-graphs")]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(*arguments, **environment) → a process that runs train.py, forked from one that has imported it, and writes
    what it prints to the file .log"""
    # peft imports bitsandbytes where it is installed, and that starts CUDA, after which no process can be forked.
    forks = not (torch.cuda.is_available() and importlib.util.find_spec("bitsandbytes"))
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload(["train"])
    os.environ["PYTHONPATH"] = str(ROOT)
    logs, numbers = tmp_path_factory.mktemp("logs"), itertools.count()

    def start(*arguments, **environment):
        log = logs / str(next(numbers))
        process = context.Process(target=main, args=([str(a) for a in arguments], environment, log))
        process.log = log
        process.start()
        return process

    return start


def main(arguments, environment, log):
    os.environ.update(environment)
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    train.main(arguments)


def finish(process, code=0):
    process.join(120)
    assert process.exitcode == code, process.log.read_text()
    return process.log.read_text()


def outcome(directory):
    """What has to be equal bit for bit: adapter, AdamW's moments, counters, metrics."""
    last = train.checkpoints(directory)[0]
    files = [directory / "adapter_model.safetensors", directory / "metrics.jsonl"]
    return [file.read_bytes() for file in [*files, *(last / name for name in train.STATE)]]


@pytest.mark.parametrize("device, graphs", [("cpu", "--no-cuda-graphs"), *CUDA])
def test_a_run_killed_at_any_moment_goes_on_bit_for_bit(tmp_path, start, device, graphs):
    arguments = [*RUN.split(), "--device", device, graphs, "--output-dir"]
    finish(start(*arguments, tmp_path / "warm-up"))
    directory = tmp_path / "undisturbed"
    began = time.perf_counter()
    process = start(*arguments, directory)
    wait_for(lambda: train.checkpoints(directory), process)
    until_first = time.perf_counter() - began
    finish(process)
    rest = time.perf_counter() - began - until_first
    wanted = outcome(directory)
    moments = random.Random(0)
    resumed = in_saving = 0
    for kill in range(20 if device == "cpu" else 8):
        directory = tmp_path / str(kill)
        process = start(*arguments, directory)
        if kill % 4 == 0:  # at any time
            time.sleep(moments.uniform(0, until_first + 0.9 * rest))
        elif kill % 2:  # while a checkpoint is written
            wait_for(lambda: list(directory.glob("*.part")), process)  # noqa: B023
            time.sleep(moments.uniform(0, 0.02) if kill % 4 == 1 else 0)
        else:
            wait_for(lambda: train.checkpoints(directory), process)  # noqa: B023
            time.sleep(moments.uniform(0, 0.9 * rest))
        process.kill()
        process.join()
        in_saving += any(directory.glob("*.part"))
        resumed += any(map(train.is_intact, train.checkpoints(directory)))
        finish(start(*arguments, directory, "--resume"))
        assert outcome(directory) == wanted
        assert not list(directory.glob("*.part"))
        shutil.rmtree(directory)
    assert resumed >= 4 and in_saving


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None if isinstance(process, subprocess.Popen) else process.is_alive()
        time.sleep(0.001)


def begun(directory):
    """The first line of metrics is there."""
    file = directory / "metrics.jsonl"
    return file.exists() and file.stat().st_size


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_update_and_saves(tmp_path, start, number):
    arguments = [*RUN.split(), "--save-steps", 1000, "--output-dir"]
    finish(start(*arguments, tmp_path / "undisturbed"))
    process = start(*arguments, tmp_path / "out")
    wait_for(lambda: begun(tmp_path / "out"), process)
    os.kill(process.pid, number)
    told = finish(process, 128 + number)
    step = int(re.search(r"stopped  after update (\d+); --resume continues from", told)[1])
    assert [p.name for p in train.checkpoints(tmp_path / "out")] == [f"checkpoint-{step}"]
    told = finish(start(*arguments, tmp_path / "out", "--resume"))
    assert f"checkpoint-{step}, {step} of 30 updates done" in told
    assert outcome(tmp_path / "out") == outcome(tmp_path / "undisturbed")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(tmp_path, start, number):
    size = ["--batch-size", 1, "--gradient-accumulation-steps", 10**6]  # an update that takes minutes
    file = write_jsonl(tmp_path / "d.jsonl", [{"instruction": "q", "output": "a"}] * 10_000)
    process = start(*RUN.split(), *size, "--data", file, "--output-dir", tmp_path / "out")
    wait_for((tmp_path / "out" / "metrics.jsonl").exists, process)
    time.sleep(1)
    os.kill(process.pid, number)
    wait_for(lambda: "stopping after this update; again to stop at once" in process.log.read_text(), process)
    os.kill(process.pid, number)
    process.join(10)
    assert process.exitcode == -number and not train.checkpoints(tmp_path / "out")


# --- what --resume takes ----------------------------------------------------------------------------------------------

SHORT = "--max-steps 6 --save-steps 2 --logging-steps 1 --device cpu --output-dir".split()


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The output directory of a run of six updates, a checkpoint after every second."""
    directory = tmp_path_factory.mktemp("done") / "out"
    train.main([*SHORT, str(directory)])
    return directory


@pytest.fixture
def cut(tmp_path, done):
    """A copy of it as if it had been killed after update 4."""
    shutil.copytree(done, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-6")
    for name in train.ADAPTER:
        (tmp_path / "cut" / name).unlink()
    return tmp_path / "cut"


def refused(capsys, *arguments):
    """The one line that says why."""
    with pytest.raises(SystemExit) as stop:
        train.main([str(a) for a in arguments])
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert stop.value.code == 2 and len(errors) == 1
    return errors[0]


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_two_runs_never_write_to_one_directory(done, tmp_path, capsys, flag):
    out = shutil.copytree(done, tmp_path / "out")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with train.alone(out):
        assert "out: another process is writing there" in refused(capsys, *SHORT, out, flag)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_directory_with_a_run_is_not_written_to_unasked(done, tmp_path, capsys):
    assert "has a run; --resume continues it, --overwrite starts over" in refused(capsys, *SHORT, done)
    assert "leave one of the two out" in refused(capsys, *SHORT, done, "--resume", "--overwrite")
    shutil.copytree(done, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("the user's own")
    train.main([*SHORT, str(tmp_path / "out"), "--overwrite", "--max-steps", "2"])
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == sorted([*train.ADAPTER, "metrics.jsonl", "checkpoint-2", "notes.txt"])


def test_a_finished_run_says_so_and_stays(done, capsys):
    before = {p: p.read_bytes() for p in done.rglob("*") if p.is_file()}
    train.main([*SHORT, str(done), "--resume"])
    assert "there was nothing left to do" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in done.rglob("*") if p.is_file()} == before


def test_only_the_newest_checkpoints_are_kept(tmp_path, monkeypatch):
    train.main([*SHORT, str(tmp_path / "out"), "--keep-checkpoints", "2"])
    assert [p.name for p in train.checkpoints(tmp_path / "out")] == ["checkpoint-6", "checkpoint-4"]
    (tmp_path / "out" / "checkpoint-6" / "SHA256SUMS").write_text("damaged")
    keep_one = ["--resume", "--keep-checkpoints", "1", "--save-steps", "1"]
    written = []  # after each checkpoint, those that are whole
    plain = train.write_checkpoint

    def write_checkpoint(*arguments):
        plain(*arguments)
        written.append([p.name for p in train.checkpoints(tmp_path / "out") if train.is_intact(p)])

    monkeypatch.setattr(train, "write_checkpoint", write_checkpoint)
    train.main([*SHORT, str(tmp_path / "out"), *keep_one])
    assert written == [["checkpoint-5"], ["checkpoint-6"]]


def test_how_many_blocks_are_checkpointed_is_decided_once_a_run(tmp_path, monkeypatch):
    plain, asked = train.make_step, []

    def make_step(args, model, scaler, optimizer, dataset, decided=None):
        asked.append(decided)
        step = plain(args, model, scaler, optimizer, dataset, decided)
        model.transformer.encoder.checkpointed_layers = 3  # as if no fewer had fitted
        return step

    monkeypatch.setattr(train, "make_step", make_step)
    train.main([*SHORT, str(tmp_path / "out")])
    train.main([*SHORT, str(tmp_path / "out"), "--resume", "checkpoint-4"])
    assert asked == [None, 3]


def test_a_named_checkpoint_and_another_split_of_the_update(cut, done, capsys):
    for name in (str(cut / "checkpoint-2"), "checkpoint-2"):
        train.main([*SHORT, str(cut), "--resume", name])
        assert "checkpoint-2, 2 of 6 updates done" in capsys.readouterr().out
        assert outcome(cut) == outcome(done)
    shutil.rmtree(cut / "checkpoint-6")
    train.main([*SHORT, str(cut), "--resume", "--batch-size", "2", "--gradient-accumulation-steps", "4"])
    losses = [[json.loads(line)["loss"] for line in (d / "metrics.jsonl").open()] for d in (cut, done)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_whole_modules_in_half_precision_go_on_bit_for_bit(tmp_path, dtype):
    flags = ["--dtype", dtype, "--modules-to-save", "output_layer", "--batch-size", "1"]
    train.main([*SHORT, str(tmp_path / "done"), *flags])
    shutil.copytree(tmp_path / "done", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-6")
    train.main([*SHORT, str(tmp_path / "cut"), "--resume", *flags])
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "done")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_ctrl_c_under_a_pipe_whose_reader_it_ends_too(tmp_path, unbuffered):
    command = [sys.executable, ROOT / "train.py", *RUN.split(), "--device", "cpu", "--output-dir", tmp_path / "out"]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    for stderr in (subprocess.PIPE, subprocess.STDOUT):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, env=environment, text=True)
        wait_for(lambda: begun(tmp_path / "out"), process)
        process.stdout.close()
        process.send_signal(signal.SIGINT)
        told = process.stderr.read() if process.stderr else ""
        assert process.wait() == 130 and "error" not in told and "Broken" not in told, told
        assert train.is_intact(train.checkpoints(tmp_path / "out")[0])
        shutil.rmtree(tmp_path / "out")


def test_a_signal_saves_nothing_that_is_not_finite(tmp_path, monkeypatch, capsys):
    plain, calls = train.chatglm.ChatGLMForCausalLM.summed_loss, []

    def spoilt(*args):
        calls.append(0)
        if len(calls) == 12:  # the sixth update
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args) * (torch.nan if len(calls) > 8 else 1)

    monkeypatch.setattr(train.chatglm.ChatGLMForCausalLM, "summed_loss", spoilt)
    flags = ["--max-steps", "9", "--save-steps", "4", "--logging-steps", "9", "--device", "cpu"]
    told = refused(capsys, *flags, "--keep-checkpoints", "1", "--output-dir", tmp_path / "out")
    assert "since update 5" in told and f"last intact checkpoint is {tmp_path}/out/checkpoint-4;" in told


def test_another_program_s_run_is_not_touched(tmp_path, capsys):
    own = tmp_path / "out" / "checkpoint-2"
    own.mkdir(parents=True)
    (own / "optimizer.pt").write_text("another program's")
    for flags in ([], ["--overwrite"], ["--resume"]):
        told = refused(capsys, *SHORT, tmp_path / "out", *flags)
        assert told.endswith("out is not empty, and has no run of train.py; choose another --output-dir")
    (tmp_path / "out" / "metrics.jsonl").write_text("")
    for flag in ("--overwrite", "--resume"):
        told = refused(capsys, *SHORT, tmp_path / "out", flag)
        assert "checkpoint-2 is not a checkpoint of train.py; move it away" in told
    own.rename(tmp_path / "out" / "results")
    assert "has no intact checkpoint to resume from" in refused(capsys, *SHORT, tmp_path / "out", "--resume")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["metrics.jsonl", "results"]


def test_a_checkpoint_that_was_being_removed_is_gone(cut, monkeypatch, capsys):
    """Killed at any point of it, a checkpoint is either there or among what the next run removes."""
    with monkeypatch.context() as patch:
        patch.setattr(train.shutil, "rmtree", lambda path, **_: None)
        train.remove(cut / "checkpoint-4")
    assert [p.name for p in train.checkpoints(cut)] == ["checkpoint-2"] and len(train.unfinished(cut)) == 1
    train.main([*SHORT, str(cut), "--resume"])
    assert "checkpoint-2, 2 of 6 updates done" in capsys.readouterr().out and not train.unfinished(cut)


def test_a_linked_checkpoint_that_was_being_removed(cut, done, tmp_path):
    (cut / "checkpoint-4.old.part").symlink_to(done)
    (cut / "adapter.part").write_text("a file")
    train.main([*SHORT, str(cut), "--resume"])
    assert not train.unfinished(cut) and outcome(cut) == outcome(done)


def test_another_run_s_checkpoint_is_refused_by_name(cut, tmp_path, capsys):
    before = {p: p.read_bytes() for p in cut.rglob("*") if p.is_file()}
    other = write_jsonl(tmp_path / "d.jsonl", [{"instruction": "q", "output": "a"}] * 20)
    for flags, told in (
        (["--learning-rate", 1e-5], "--learning-rate was 0.003, is 1e-05"),
        (["--max-steps", 7], "--max-steps was 6, is 7"),
        (["--batch-size", 8], "--batch-size × --gradient-accumulation-steps × processes was 8, is 16"),
        (["--seed", 1, "--lora-dropout", 0.5], "--seed was 42, is 1; --lora-dropout was 0.0, is 0.5"),
        (["--dtype", "bf16"], "--dtype was float32, is bfloat16"),
        (["--data", other], "other settings: --data;"),
    ):
        assert told in refused(capsys, *SHORT, cut, "--resume", *flags)
    assert {p: p.read_bytes() for p in cut.rglob("*") if p.is_file()} == before
    told = refused(capsys, *SHORT, cut, "--resume", cut / "checkpoint-3")
    assert f"no intact checkpoint of {cut}; these are: checkpoint-4, checkpoint-2" in told
    elsewhere = refused(capsys, *SHORT, tmp_path / "new", "--resume", cut / "checkpoint-2")
    assert f"no intact checkpoint of {tmp_path}/new" in elsewhere


def test_another_base_is_refused(cut, tmp_path, capsys):
    shutil.copytree(train.chatglm.TINY, tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2**20] = bytes(
        b ^ 0x80 for b in content[middle : middle + 2**20]
    )  # the signs, among others
    file.write_bytes(content)
    preset = " ".join(f"--{k} {v}" for k, v in (("learning-rate", 3e-3), ("epochs", 50), ("lora-r", 16))).split()
    preset += ["--lora-dropout", "0", "--target-modules", *train.TINY_PRESET["target_modules"]]
    told = refused(capsys, *SHORT, cut, "--resume", "--model", tmp_path / "base", *preset)
    assert told.endswith("other settings: --model; give those, or --overwrite starts over")


@pytest.mark.parametrize("name", [*train.ADAPTER, *train.STATE, "SHA256SUMS"])
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
        train.main([*SHORT, str(cut), "--resume"])
        told = capsys.readouterr()
        assert (
            "checkpoint-6 is damaged (see its SHA256SUMS): skipped" in told.err
            and "checkpoint-4, 4 of 6 updates done" in told.out
        )
        assert outcome(cut) == outcome(done)


def test_nothing_whole_to_resume_from(cut, tmp_path, capsys):
    for checkpoint in train.checkpoints(cut):
        (checkpoint / "SHA256SUMS").unlink()
    assert "has no intact checkpoint to resume from; --overwrite starts over" in refused(
        capsys, *SHORT, cut, "--resume"
    )
    train.main([*SHORT, str(tmp_path / "new"), "--resume"])
    assert "has no checkpoint yet: from the start" in capsys.readouterr().out


# --- faults -----------------------------------------------------------------------------------------------------------


def mounted(directory, options):
    """A small file system of its own there, or a skip."""
    directory.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", directory], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    return directory


def test_a_full_disk_ends_the_run_and_spares_the_last_checkpoint(tmp_path, capsys, done):
    disk = mounted(tmp_path / "disk", "size=8m")  # a checkpoint has 3 MB
    try:
        told = refused(capsys, *SHORT, disk / "out")
        assert "No space left on device" in told
        assert f"{disk}/out/checkpoint-4, which is intact" in told
        assert sorted(p.name for p in (disk / "out").iterdir()) == ["checkpoint-2", "checkpoint-4", "metrics.jsonl"]
        shutil.rmtree(disk / "out" / "checkpoint-2")  # the user makes room
        train.main([*SHORT, str(disk / "out"), "--resume", "--keep-checkpoints", "1"])
        assert outcome(disk / "out") == outcome(done)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_disk_that_is_full_when_a_run_is_resumed(tmp_path, capsys, done):
    """What little room there is takes a part of the metrics: no part of them may pass for all."""
    disk = mounted(tmp_path / "disk", "size=8m")
    try:
        shutil.copytree(done, disk / "out", ignore=shutil.ignore_patterns("checkpoint-2", "checkpoint-6"))
        metrics = disk / "out" / "checkpoint-4" / "metrics.jsonl"
        with metrics.open("ab") as file:  # more than the 4 KiB that the disk will have
            file.write(b" " * 10_000 + b"\n")
        sums = metrics.with_name("SHA256SUMS")
        sums.write_text("".join(f"{train.sha256((metrics.parent / n).read_bytes())}  {n}\n" for n in train.WHOLE))
        (disk / "out" / "metrics.jsonl").unlink()
        (disk / "filler").write_bytes(b"x")
        with contextlib.suppress(OSError), open(disk / "filler", "ab", buffering=0) as file:
            while file.write(b"x" * 4096) == 4096:
                pass
        os.truncate(disk / "filler", (disk / "filler").stat().st_size - 4096)
        told = refused(capsys, *SHORT, disk / "out", "--resume")
        assert "cannot write: No space left on device; once that is mended, --resume continues from" in told
        (disk / "filler").unlink()
        train.main([*SHORT, str(disk / "out"), "--resume"])
        assert len((disk / "out" / "metrics.jsonl").read_bytes()) > 10_000
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_limit_on_the_size_of_files(tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000))

    result = run("train.py", *SHORT, tmp_path / "out", preexec_fn=limit)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "cannot write: File too large; there is no checkpoint yet" in result.stderr
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["metrics.jsonl"]


def test_a_read_only_directory_is_told_before_training(tmp_path, capsys):
    disk = mounted(tmp_path / "disk", "ro")
    try:
        assert "cannot write there; choose another" in refused(capsys, *SHORT, disk / "out")
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_loss_that_stays_infinite_in_fp16_names_update_samples_and_checkpoint(
    tmp_path, monkeypatch, capsys, tokenizer
):
    plain = train.chatglm.ChatGLMForCausalLM.summed_loss
    calls = []

    def spoilt(*args):
        calls.append(0)
        return plain(*args) * (torch.inf if len(calls) > 14 else 1)  # two micro-batches an update: from the eighth on

    monkeypatch.setattr(train.chatglm.ChatGLMForCausalLM, "summed_loss", spoilt)
    flags = ["--max-steps", "60", "--save-steps", "5", "--logging-steps", "1", "--dtype", "fp16", "--device", "cpu"]
    flags += ["--batch-size", "1", "--gradient-accumulation-steps", "2"]
    told = refused(capsys, *flags, "--output-dir", tmp_path / "out")
    dataset = train.data.ConversationDataset([train.data.SAMPLE], tokenizer, 512)
    batch = train.data.batch_order(dataset.lengths, 2, 42, 0)[7]
    assert "NaN or infinite since update 8, of the samples at " in told
    assert f"{', '.join(dataset.places[i] for i in batch)}; the last intact checkpoint is " in told
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").open()]
    assert (lines[-1]["step"], lines[-1]["skipped"]) == (26, 19) and lines[6]["skipped"] == 0


# --- several processes ------------------------------------------------------------------------------------------------


def start_several(start, count, *arguments):
    """As torchrun would, but forked."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(count), "TORCHELASTIC_RUN_ID": "test"}
    return [start(*arguments, RANK=str(i), LOCAL_RANK=str(i), **common) for i in range(count)]


def losses_and_norms(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").open()]
    return torch.tensor([[line["loss"], line["grad_norm"]] for line in lines], dtype=torch.float64)


def test_several_processes_make_the_updates_of_one(tmp_path, start):
    """21 samples, 8 an update, so that the last of an epoch has 5, unevenly long: with 4 processes some get 2, some 1."""
    texts = [("a " * (i % 7 * 5 + 1), "b " * (i % 5 * 9 + 1)) for i in range(21)]
    file = write_jsonl(tmp_path / "d.jsonl", [{"instruction": q, "output": a} for q, a in texts])
    common = f"--data {file} --max-steps 20 --logging-steps 1 --save-steps 10 --device cpu --output-dir".split()
    size = ["--batch-size", 2, "--gradient-accumulation-steps"]
    finish(start(*common, tmp_path / "1", *size, 4))
    for count in (2, 4):
        for process in start_several(start, count, *common, tmp_path / str(count), *size, 4 // count):
            finish(process)
        assert losses_and_norms(tmp_path / str(count)).shape == (20, 2)
        torch.testing.assert_close(
            losses_and_norms(tmp_path / str(count)), losses_and_norms(tmp_path / "1"), rtol=0, atol=1e-6
        )
    # The run of four continues as one of two.
    shutil.rmtree(tmp_path / "4" / "checkpoint-20")
    for process in start_several(start, 2, *common, tmp_path / "4", *size, 2, "--resume"):
        finish(process)
    torch.testing.assert_close(losses_and_norms(tmp_path / "4"), losses_and_norms(tmp_path / "1"), rtol=0, atol=1e-6)


def test_processes_stop_together(tmp_path, start):
    arguments = [*RUN.split(), "--max-steps", 10**6, "--save-steps", 10**6, "--output-dir", tmp_path]
    processes = start_several(start, 2, *arguments)
    wait_for(lambda: begun(tmp_path), processes[0])
    os.kill(processes[1].pid, signal.SIGTERM)
    told = [finish(process, 143) for process in processes]
    assert len(train.checkpoints(tmp_path)) == 1
    assert "stopped  after update" in told[0] and "stopped  after update" not in told[1]


def torchrun(directory, *command):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run([*launcher, *command], capture_output=True, encoding="utf-8", timeout=300, cwd=directory)


def test_torchrun_and_a_mistake_that_all_its_processes_find(tmp_path):
    first = torchrun(tmp_path, str(ROOT / "train.py"), *SHORT, "out")
    assert first.returncode == 0 and first.stdout.count("updates  6, each of") == 1, first.stderr
    again = torchrun(tmp_path, str(ROOT / "train.py"), *SHORT, "out")
    assert again.returncode != 0 and again.stderr.count("train.py: ") == 1, again.stderr
    assert "train.py: error: out has a run; --resume" in again.stderr


def test_a_process_that_fails_alone_ends_the_others_with_its_message(tmp_path):
    write_jsonl(tmp_path / "0.jsonl", [{"instruction": "q", "output": "a"}])
    command = f"exec {sys.executable} {ROOT / 'train.py'} {' '.join(SHORT)} out --data $LOCAL_RANK.jsonl"
    result = torchrun(tmp_path, "--no-python", "bash", "-c", command)
    assert result.returncode != 0 and not (tmp_path / "out").exists()
    assert result.stderr.count("train.py: ") == 1, result.stderr
    assert "train.py: process 1: error: 1.jsonl: No such file or directory" in result.stderr
