"""support/processes.py: signals, and several processes, which together make the run of one.

python -m pytest -q tests/test_processes.py
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import (
    LIKE_BUILT_IN,
    LONG,
    ROOT,
    SHORT,
    finish,
    has_metrics,
    metrics_of,
    outcome,
    refused,
    start_several,
    train_main,
    wait_for,
    write_jsonl,
)

import model as chatglm
from support import processes
from support.checkpoints import is_intact, list_checkpoints

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


# --- signals ----------------------------------------------------------------------------------

SAVES_LITTLE = [*LONG, "--save-steps", 1000]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed") / "out"
    train_main(*SAVES_LITTLE, "--device", "cpu", "--output-dir", directory)
    return outcome(directory)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_run_after_its_update_and_saves(tmp_path, start, undisturbed, number):
    out, arguments = tmp_path / "out", [*SAVES_LITTLE, "--output-dir"]
    process = start(*arguments, out)
    wait_for(lambda: has_metrics(out), process)
    os.kill(process.pid, number)
    told = finish(process, 128 + number)
    step = int(re.search(r"stopped  after update (\d+); --resume continues from", told)[1])
    assert [path.name for path in list_checkpoints(out)] == [f"checkpoint-{step}"]
    told = finish(start(*arguments, out, "--resume"))
    assert f"checkpoint-{step}, {step} of 30 updates done" in told
    assert outcome(out) == undisturbed


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_ends_at_once(tmp_path, start, number):
    out = tmp_path / "out"
    size = ["--batch-size", 1, "--gradient-accumulation-steps", 10**6]  # a long update
    file = write_jsonl(tmp_path / "d.jsonl", [{"instruction": "q", "output": "a"}] * 10_000)
    process = start(*LONG, *size, "--data", file, "--output-dir", out)
    wait_for((out / "metrics.jsonl").exists, process)
    time.sleep(1)
    os.kill(process.pid, number)
    told = "(or after this evaluation and one update); a second signal stops at once"
    wait_for(lambda: told in process.log.read_text(), process)
    os.kill(process.pid, number)
    process.join(10)
    assert process.exitcode == -number and not list_checkpoints(out)


def test_sigusr1_saves_and_goes_on(tmp_path, start, undisturbed):
    """Slurm can send it before the time of a job is over."""
    out, arguments = tmp_path / "out", [*SAVES_LITTLE, "--output-dir"]
    process = start(*arguments, out)
    wait_for(lambda: has_metrics(out), process)
    os.kill(process.pid, signal.SIGUSR1)
    wait_for(lambda: list_checkpoints(out), process)
    saved = list_checkpoints(out)[0]
    assert "stopped" not in finish(process) and outcome(out) == undisturbed
    assert is_intact(saved) and saved.name != "checkpoint-30"


def in_a_terminal_that_is_closed(out, *wrapper):
    """Starts a run in a pseudo-terminal, closes that, and waits for the end. → the exit code"""
    shown, terminal = os.openpty()
    command = [*wrapper, sys.executable, ROOT / "train.py", *SAVES_LITTLE]
    options = dict(stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True)
    make_it_control = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    make_it_control += "os.execvp(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", make_it_control, *map(str, command)]
    process = subprocess.Popen([*command, "--device", "cpu", "--output-dir", out], **options)
    os.close(terminal)
    os.set_blocking(shown, False)

    def has_begun():
        with contextlib.suppress(OSError):  # nothing to read, or nohup has left the terminal
            os.read(shown, 4096)  # else the terminal fills, and the run waits for its reader
        return has_metrics(out)

    wait_for(has_begun, process)
    os.close(shown)
    return process.wait(60)


def test_closing_the_terminal_saves_and_stops(tmp_path, start, undisturbed):
    out, arguments = tmp_path / "out", [*SAVES_LITTLE, "--output-dir"]
    assert in_a_terminal_that_is_closed(out) == 128 + signal.SIGHUP
    assert is_intact(list_checkpoints(out)[0])
    finish(start(*arguments, out, "--resume"))
    assert outcome(out) == undisturbed


def test_nohup_goes_on_when_the_terminal_is_closed(tmp_path, monkeypatch):
    """nohup ignores SIGHUP for the command that it starts."""
    monkeypatch.chdir(tmp_path)  # where nohup.out goes
    assert in_a_terminal_that_is_closed(tmp_path / "out", "nohup") == 0
    assert list_checkpoints(tmp_path / "out")[-1].name == "checkpoint-30"


@pytest.mark.parametrize("stderr", [subprocess.PIPE, subprocess.STDOUT])
def test_ctrl_c_under_a_pipe_whose_reader_it_ends_too(tmp_path, stderr):
    out = tmp_path / "out"
    command = [sys.executable, ROOT / "train.py", *LONG, "--device", "cpu", "--output-dir", out]
    options = dict(stdout=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, stderr=stderr, **options)
    wait_for(lambda: has_metrics(out), process)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    told = process.stderr.read() if process.stderr else ""
    assert process.wait() == 130 and "error" not in told and "Broken" not in told, told
    assert is_intact(list_checkpoints(out)[0])


def test_a_signal_saves_nothing_that_is_not_finite(tmp_path, monkeypatch, capsys):
    plain, calls = chatglm.ChatGLMForCausalLM.summed_loss, []

    def spoilt(*args):
        calls.append(0)
        if len(calls) == 12:  # the sixth update
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args) * (torch.nan if len(calls) > 8 else 1)

    monkeypatch.setattr(chatglm.ChatGLMForCausalLM, "summed_loss", spoilt)
    flags = "--max-steps 9 --save-steps 4 --logging-steps 9 --device cpu".split()
    flags += ["--keep-checkpoints", "1", "--output-dir", tmp_path / "out"]
    told = refused(capsys, *flags)
    assert "since update 5" in told
    assert f"last intact checkpoint is {tmp_path}/out/checkpoint-4;" in told


# --- several processes ------------------------------------------------------------------------


def losses_and_norms(directory):
    lines = [[line["loss"], line["grad_norm"]] for line in metrics_of(directory)]
    return torch.tensor(lines, dtype=torch.float64)


def test_several_processes_make_the_updates_of_one(tmp_path, start):
    """21 samples, 8 an update: the last update of an epoch has 5 samples, of uneven lengths.

    Of these, some of four processes get two samples, and some only one. After four epochs, the
    weights differ by so many roundings that a norm above 1 may differ by more than 1e-6.
    """
    texts = [("a " * (i % 7 * 5 + 1), "b " * (i % 5 * 9 + 1)) for i in range(21)]
    records = [{"instruction": question, "output": answer} for question, answer in texts]
    file = write_jsonl(tmp_path / "d.jsonl", records)
    flags = "--max-steps 12 --logging-steps 1 --save-steps 6 --device cpu --batch-size 2".split()
    common = [*LIKE_BUILT_IN, "--data", file, *flags, "--gradient-accumulation-steps"]

    def run_of(count, directory, *more):
        arguments = [*common, 4 // count, "--output-dir", directory, *more]
        for process in start_several(start, count, *arguments):
            finish(process)
        found = losses_and_norms(directory)
        assert found.shape == (12, 2)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)

    one = tmp_path / "1"
    finish(start(*common, 4, "--output-dir", one))
    wanted = losses_and_norms(one)
    run_of(2, tmp_path / "2")
    run_of(4, tmp_path / "4")
    shutil.rmtree(tmp_path / "4" / "checkpoint-12")
    run_of(2, tmp_path / "4", "--resume")  # the run of four continues as one of two


def test_processes_stop_together(tmp_path, start):
    never = ["--max-steps", 10**6, "--save-steps", 10**6]
    processes = start_several(start, 2, *LONG, *never, "--output-dir", tmp_path)
    wait_for(lambda: has_metrics(tmp_path), processes[0])
    os.kill(processes[1].pid, signal.SIGTERM)
    told = [finish(process, 143) for process in processes]
    assert len(list_checkpoints(tmp_path)) == 1
    assert "stopped  after update" in told[0] and "stopped  after update" not in told[1]


def torchrun(directory, *command):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", "2"]
    options = dict(capture_output=True, encoding="utf-8", timeout=300, cwd=directory)
    return subprocess.run([*launcher, *command], **options)


def test_torchrun_and_a_mistake_that_all_its_processes_find(tmp_path):
    train_main(*SHORT, tmp_path / "out")
    again = torchrun(tmp_path, ROOT / "train.py", *SHORT, "out")
    assert again.returncode != 0 and again.stderr.count("train.py: ") == 1, again.stderr
    assert "train.py: error: out has a run; --resume" in again.stderr


def test_a_process_that_fails_alone_tells_of_it(tmp_path, start):
    """The others wait for it, and are silent. torchrun would end them."""
    write_jsonl(tmp_path / "0.jsonl", [{"instruction": "q", "output": "a"}])
    data = [["--data", tmp_path / f"{rank}.jsonl"] for rank in range(2)]
    processes = start_several(start, 2, *SHORT, tmp_path / "out", each=data)
    told = finish(processes[1], 2)
    assert told.count("train.py: ") == 1, told
    assert f"train.py: process 1: error: {tmp_path / '1.jsonl'}: No such file" in told
    processes[0].kill()
    processes[0].join()
    assert "error" not in processes[0].log.read_text() and not (tmp_path / "out").exists()


# --- attempts, which share a store ------------------------------------------------------------


@pytest.fixture
def store():
    """What processes write into; here threads do."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=30))
    return store


def make_attempt(store, number, first_ranks, late_ranks):
    """All processes of an attempt get their store. They must have that of the same attempt."""
    count = len(first_ranks) + len(late_ranks)

    def join(rank):
        return processes.store_of_attempt(store, rank, count, 30)

    with ThreadPoolExecutor(count) as pool:
        waiting = [pool.submit(join, rank) for rank in first_ranks]
        time.sleep(0.3)  # the others have then tried a name of the attempt before
        assert not any(each.done() for each in waiting)
        joined = [each.result() for each in [*waiting, *(pool.submit(join, r) for r in late_ranks)]]
    joined[0].set("attempt of the store", str(number))
    assert [each.get("attempt of the store") for each in joined] == [b"%d" % number] * count


@pytest.mark.parametrize("late", [[0], [2, 1], [0, 1]])
def test_each_attempt_has_a_store_of_its_own(store, late):
    """Whoever comes late, and whatever the attempts before have left."""
    first = [rank for rank in range(3) if rank not in late]
    for number in range(3):
        make_attempt(store, number, first, late)


def test_an_attempt_that_died_early_misleads_nobody(store):
    """Its first process answered one of the others, and was then killed."""
    store.set("attempt", "dead")
    for key in ("token 1", "echo 1", "token 2"):
        store.set(f"dead {key}", "of a process that is dead")
    make_attempt(store, 1, [1, 2], [0])


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("left", [[], ["attempt"]])
def test_a_process_that_never_comes_is_not_waited_for_any_longer(store, rank, left):
    for key in left:
        store.set(key, "the name of an attempt before")
    store.set_timeout(timedelta(seconds=0.5))
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"process {1 - rank} has not started within 0.5 s; read"):
        processes.store_of_attempt(store, rank, 2, 0.5)
    assert 0.4 < time.monotonic() - start < 10


# --- what each of several processes has -------------------------------------------------------


def test_one_process_agrees_with_itself():
    value = ["found", 3]
    assert processes.gather(value) == [value]
    processes.check_same_everywhere(value)
    processes.check_shared("out", "no checkpoint")


def test_processes_that_differ_are_told(monkeypatch):
    monkeypatch.setattr(processes, "gather", lambda value: ["no checkpoint"] * 2 + [value])
    processes.check_shared("out", "no checkpoint")
    processes.check_same_everywhere("no checkpoint")
    with pytest.raises(ValueError) as told:
        processes.check_shared("out", "checkpoint-4")
    what = "process 0 finds no checkpoint there, process 2 checkpoint-4"
    advice = "the directory must be on a disk that all machines share"
    assert str(told.value) == f"--output-dir out: {what}; {advice}"
    with pytest.raises(ValueError, match="^the processes differ in arguments, data, weights or"):
        processes.check_same_everywhere("checkpoint-4")


# --- how they fail ----------------------------------------------------------------------------


class ExitNow(BaseException):
    """os._exit was called."""

    def __init__(self, code):
        self.code = code


@pytest.fixture
def pretend(monkeypatch):
    """pretend(rank, count): this is one of several processes. → a list of what it then does"""
    done = []

    def exit_now(code):  # not SystemExit, which sys.exit raises
        raise ExitNow(code)

    def pretend(rank, count):
        monkeypatch.setattr(processes, "rank_and_count", lambda: (rank, count))
        monkeypatch.setattr(processes.Links, "stopped", 0)
        monkeypatch.setattr(signal, "signal", lambda *arguments: done.append(arguments))
        monkeypatch.setattr(time, "sleep", lambda seconds: done.append(seconds))
        monkeypatch.setattr(os, "_exit", exit_now)
        return done

    return pretend


WAITS = [(signal.SIGTERM, signal.SIG_DFL), 10]  # until torchrun ends it


def last_line(capsys, error, ends=SystemExit):
    """→ the one line that is told of an error. The exit code is 2."""
    with pytest.raises(ends) as stop:
        processes.exit_together(error, "train.py", "take less")
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    return line


def test_the_first_of_several_processes_tells_of_an_error_before_the_others(pretend, capsys):
    for count in (1, 3):
        done = pretend(0, count)
        assert last_line(capsys, ValueError("no data")) == "train.py: error: no data"
        assert done == []
    done = pretend(2, 3)
    assert last_line(capsys, ValueError("no data")) == "train.py: process 2: error: no data"
    assert done == WAITS


LOST = "[../pair.cc:534] Connection closed by peer [127.0.0.1]:2187"


@pytest.mark.parametrize("rank, name", [(0, "train.py"), (1, "train.py: process 1")])
def test_a_lost_connection_is_told_in_one_line_if_nobody_else_tells(pretend, capsys, rank, name):
    done = pretend(rank, 2)
    what = "lost the connection to another process, which failed first"
    assert last_line(capsys, RuntimeError(LOST), ExitNow) == f"{name}: error: {what}"
    assert done == WAITS


@pytest.mark.parametrize("count, text, waits", [(1, LOST, []), (2, "a wrong shape", WAITS)])
def test_a_bug_in_processes_is_raised_again(pretend, count, text, waits):
    done, bug = pretend(0, count), RuntimeError(text)
    with pytest.raises(RuntimeError) as error:
        processes.exit_together(bug, "train.py", "")
    assert error.value is bug and done == waits


def test_an_error_of_the_user_s_is_no_lost_connection(pretend, capsys):
    done = pretend(0, 2)
    for text in ("connection.jsonl: no key", "timed out.jsonl: no key"):
        assert last_line(capsys, ValueError(text)) == f"train.py: error: {text}"
    assert done == []


LATE = "[../unbound_buffer.cc:84] Timed out waiting 5000ms for recv operation to complete"


@pytest.fixture
def late(pretend, monkeypatch, store):
    """late(entered, waiting) → what process 1 of 3, whose message timed out, then does

    entered: how many messages each process has entered; waiting: who else has noticed
    """

    def late(entered, waiting):
        monkeypatch.setattr(processes, "Links", SimpleNamespace(store=store, timeout=60, stopped=0))
        for rank, count in enumerate(entered):
            if count:
                store.set(f"entered {rank}", f"{count} {time.time()}")
        for rank in waiting:
            store.set(f"waits {rank}", "")
        return pretend(1, 3)

    return late


@pytest.mark.parametrize(
    "entered, waiting, silent",
    [
        ([5, 5, 4], [], "2"),
        ([0, 5, 4], [], "0, 2"),
        ([5, 5, 6], [0], "2"),  # it hangs inside the message
        ([5, 5, 5], [0], "2"),
        ([5, 5, 5], [0, 2], None),
    ],
)
def test_the_first_process_that_notices_names_those_that_hang(
    late, capsys, entered, waiting, silent
):
    done = late(entered, waiting)
    with pytest.raises(ExitNow) as stop:
        processes.exit_together(RuntimeError(LATE), "train.py", "")
    told = capsys.readouterr().err
    what = f"no answer from process {silent} for 60 s"
    what = what if silent else "the processes have waited for one another for 60 s"
    assert stop.value.code == 2 and told.count("\n") == 2
    assert told.startswith(f"\ntrain.py: error: {what}; --resume continues from")
    assert done == [] if min(entered) < 5 else 59 < done[0] <= 60  # until the others notice


def test_the_other_processes_that_notice_are_silent_until_they_are_ended(late, capsys, store):
    done = late([5, 5, 4], [0])
    store.add("told", 1)  # another one did
    what = "lost the connection to another process, which failed first"
    told = last_line(capsys, RuntimeError(LATE), ExitNow)
    assert told == f"train.py: process 1: error: {what}"
    assert done == WAITS and store.check(["waits 1"])


def test_a_store_that_has_gone_hides_no_lost_connection(late, monkeypatch, capsys):
    late([5, 5, 4], [])
    monkeypatch.setattr(processes, "name_who_hangs", mock.Mock(side_effect=dist.DistNetworkError))
    assert "lost the connection" in last_line(capsys, RuntimeError(LATE), ExitNow)


@pytest.fixture
def connect(pretend, monkeypatch):
    """connect(add_up) calls connect_gpus, in process 0 of 2. → an event: the program was ended"""

    def connect(add_up):
        pretend(0, 2)
        ended = threading.Event()
        monkeypatch.setattr(os, "_exit", lambda code: ended.set())
        monkeypatch.setattr(processes, "Links", SimpleNamespace(timeout=0.2))
        order = mock.Mock()
        monkeypatch.setattr(processes, "meet", order.meet)
        monkeypatch.setattr(processes.dist, "new_group", order.new_group)
        monkeypatch.setattr(processes, "add_up", lambda tensor: add_up(ended))
        monkeypatch.setattr(processes, "torch", mock.MagicMock())  # instead of tensors on a GPU
        monkeypatch.setenv("NCCL_RUNTIME_CONNECT", "")
        monkeypatch.delenv("NCCL_RUNTIME_CONNECT")
        with contextlib.suppress(dist.DistBackendError):
            processes.connect_gpus()
        assert os.environ["NCCL_RUNTIME_CONNECT"] == "0"
        assert [call[0] for call in order.mock_calls] == ["meet", "new_group"]
        return ended

    return connect


def test_gpus_that_never_get_connected_are_told_of(connect, capsys):
    """NCCL waits for ever then, and no error is raised."""
    assert connect(lambda ended: ended.wait(20)).is_set()
    told = capsys.readouterr().err
    assert told.startswith("train.py: error: process 0 could not connect the GPUs within 0.2 s; ")


def test_gpus_that_are_connected_are_no_longer_waited_for(connect, capsys):
    assert not connect(lambda ended: None).wait(1)


def test_an_error_while_gpus_are_connected_ends_the_waiting(connect, capsys):
    assert not connect(mock.Mock(side_effect=dist.DistBackendError)).wait(1)


@pytest.mark.parametrize("is_cuda", [True, False])
def test_processes_meet_after_each_sum_on_gpus(monkeypatch, is_cuda):
    """CUDA may block a process while NCCL's sum waits for another one. Gloo's wait has a limit."""
    found = []
    monkeypatch.setattr(processes, "Links", SimpleNamespace(nccl_group="nccl"))
    monkeypatch.setattr(processes.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(processes, "enter", lambda: found.append("enter"))
    monkeypatch.setattr(
        processes.dist, "all_reduce", lambda tensor, *_, group=None: found.append(group or "gloo")
    )
    processes.add_up(SimpleNamespace(is_cuda=is_cuda))
    assert found == (["enter", "nccl", "enter", "gloo"] if is_cuda else ["enter", "gloo"])


def test_a_process_that_torchrun_ends_is_silent(late, capsys):
    """Another one died. torchrun has sent SIGTERM already, which the loop remembered."""
    done = late([5, 5, 5], [])
    processes.Links.stopped = signal.SIGTERM
    with pytest.raises(ExitNow) as stop:
        processes.exit_together(RuntimeError(LOST), "train.py", "")
    assert stop.value.code == 143 and capsys.readouterr().err == "" and done == []


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), RuntimeError("a bug")])
def test_a_stop_signal_hides_no_error_of_the_process_itself(late, capsys, error):
    late([5, 5, 5], [])
    processes.Links.stopped = signal.SIGTERM
    with pytest.raises((SystemExit, RuntimeError)) as stop:
        processes.exit_together(error, "train.py", "take less")
    is_told = "train.py: process 1: error: take less" in capsys.readouterr().err
    assert is_told if stop.type is SystemExit else stop.value is error
