"""Going on: --init-adapter, what --resume refuses, stderr that has gone, and --tensorboard.

python -m pytest -q tests/test_going_on.py
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import (
    LONG,
    ROOT,
    SHORT,
    SMALL_BASE,
    contents,
    finish,
    has_metrics,
    metrics_of,
    outcome,
    refused,
    train_main,
    wait_for,
    with_random_lora,
)
from safetensors.torch import load_file
from test_tensorboard import scalars

import model as chatglm
from support.checkpoints import ADAPTER, CONTENTS, is_intact, list_checkpoints
from support.files import sha256
from support.progress import Progress
from support.tensorboard import TensorBoard

KIND = "--lora-r 4 --lora-alpha 6 --lora-dropout 0.25 --target-modules dense query_key_value"
KIND = [*KIND.split(), "--dora", "--rslora", "--modules-to-save", "final_layernorm"]
STILL = ["--learning-rate", 0]  # nothing changes then


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The directory of a run of three updates, with LoRA of a kind of its own."""
    directory = tmp_path_factory.mktemp("first") / "out"
    train_main(*SHORT, directory, *KIND, "--max-steps", 3, "--system", "甲")
    return directory


@pytest.fixture(scope="module")
def second(first, tmp_path_factory):
    """The directory of a run that started from it."""
    directory = tmp_path_factory.mktemp("second") / "out"
    train_main(*SHORT, directory, "--init-adapter", first, "--warmup-steps", 2)
    return directory


@pytest.fixture
def cut(tmp_path, second):
    """A copy of it, as if the run had been killed after update 4."""
    return shutil.copytree(second, tmp_path / "cut", ignore=shutil.ignore_patterns("*-6"))


def assert_same_tensors(*directories):
    tensors, others = (load_file(each / ADAPTER[0]) for each in directories)
    assert tensors.keys() == others.keys() and len(tensors) > 4
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)


# --- --init-adapter: the start ----------------------------------------------------------------


@pytest.mark.parametrize("name", [".", "checkpoint-2"])
def test_a_run_starts_from_exactly_that_adapter(first, tmp_path, capsys, name):
    train_main(*SHORT, tmp_path / "out", "--init-adapter", first / name, *STILL)
    assert_same_tensors(tmp_path / "out", first / name)
    note = f"starting from {first / name}; it was trained with the system message '甲'"
    assert note in capsys.readouterr().out
    adapters = {(each / ADAPTER[0]).read_bytes() for each in (first, first / name)}
    assert len(adapters) == (1 if name == "." else 2)  # so the two names mean different ones


def test_optimiser_schedule_and_steps_are_new(first, second, tmp_path):
    lines = metrics_of(second)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and lines[0]["epoch"] == 0
    rates = [round(line["learning_rate"] / 3e-3, 3) for line in lines]
    assert rates == [0.333, 0.667, 1.0, 0.75, 0.5, 0.25]
    flags = ["--init-adapter", first, "--max-steps", 1, "--adam-beta1", 0.5, "--adam-beta2", 0.75]
    train_main(*SHORT, tmp_path / "out", *flags)
    state = load_file(tmp_path / "out" / "checkpoint-1" / "training_state.safetensors")
    for i in range(len(state) // 3):  # (1 - β₁) g and (1 - β₂) g², of one gradient g
        torch.testing.assert_close(state[f"{i}.exp_avg_sq"], state[f"{i}.exp_avg"] ** 2)


def test_the_adapter_decides_the_flags_of_lora(first, second):
    configs = [json.loads((run / "adapter_config.json").read_text()) for run in (first, second)]
    wanted = dict(r=4, lora_alpha=6, lora_dropout=0.25, use_dora=True, use_rslora=True)
    assert configs[0] == configs[1] and configs[1].items() >= wanted.items()
    arguments = json.loads((second / "training_args.json").read_text())
    wanted = dict(lora_r=4, lora_alpha=6, lora_dropout=0.25, dora=True, rslora=True)
    wanted |= dict(target_modules=["dense", "query_key_value"], modules_to_save=["final_layernorm"])
    assert arguments.items() >= (wanted | {"init_adapter": str(first)}).items()


OF_LORA = (
    "--lora-r 8, --lora-alpha 16, --lora-alpha 0, --lora-dropout 0.1, --lora-dropout 0, "
    "--target-modules all, --modules-to-save output_layer, --rslora, --dora"
).split(", ")


@pytest.mark.parametrize("given", OF_LORA)
def test_flags_of_lora_beside_it_are_refused(first, tmp_path, capsys, given):
    flags = given.split()
    told = refused(capsys, *SHORT, tmp_path / "out", "--init-adapter", first, *flags)
    assert f"{flags[0]}: the adapter of --init-adapter has its own; leave it out" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("names_targets", [True, False])
def test_an_adapter_of_peft_itself(tmp_path, names_targets):
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    model = chatglm.load_model(SMALL_BASE, "cpu")
    peft_model = with_random_lora(model, r=3, target_modules=["dense"])
    peft_model.save_pretrained(adapter, save_embedding_layers=False)
    if not names_targets:  # the names of the tensors say which they are
        config = json.loads((adapter / "adapter_config.json").read_text())
        del config["target_modules"]
        (adapter / "adapter_config.json").write_text(json.dumps(config))
    train_main(*SHORT, out, "--init-adapter", adapter, *STILL, "--system", "乙")
    assert_same_tensors(out, adapter)
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 3


# --- --init-adapter: what is refused ----------------------------------------------------------


def test_what_is_no_adapter_is_told_in_one_line(first, tmp_path, capsys):
    for name in ("none", "", "."):
        told = refused(capsys, *SHORT, tmp_path / "out", "--init-adapter", name)
        assert "adapter" in told and not (tmp_path / "out").exists()
    adapter = shutil.copytree(first, tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").write_bytes(b"damaged")
    told = refused(capsys, *SHORT, tmp_path / "out", "--init-adapter", adapter)
    assert f"{adapter}: cannot read this adapter" in told and not (tmp_path / "out").exists()


def test_an_adapter_of_another_base_is_refused_by_name(first, tmp_path, capsys):
    base = shutil.copytree(SMALL_BASE, tmp_path / "base")
    weights = (base / "model.safetensors").read_bytes()
    end = bytes(byte ^ 0x80 for byte in weights[-(2**18) :])  # the signs, among others
    (base / "model.safetensors").write_bytes(weights[: -(2**18)] + end)
    before = contents(tmp_path)
    told = refused(capsys, *SHORT, tmp_path / "out", "--model", base, "--init-adapter", first)
    assert f"{base}: {first} was trained on a base with other weights" in told
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", [".", "checkpoint-2", "checkpoint-4", "link"])
def test_the_adapter_is_not_deleted_by_overwrite(second, tmp_path, monkeypatch, capsys, name):
    out = shutil.copytree(second, tmp_path / "out")
    (tmp_path / "link").symlink_to(out / "checkpoint-2")
    before = contents(tmp_path)
    monkeypatch.chdir(out)
    adapter = tmp_path / name if name == "link" else name
    told = refused(capsys, *SHORT, out, "--overwrite", "--init-adapter", adapter)
    assert f"would delete the adapter of --init-adapter, {adapter}; choose another" in told
    assert contents(tmp_path) == before


def test_the_adapter_is_not_deleted_by_a_run_without_a_checkpoint(second, tmp_path, capsys):
    out = tmp_path / "out"  # as a run leaves it that was killed before its first checkpoint
    shutil.copytree(second, out / "best", ignore=lambda path, names: {*names} - {*ADAPTER})
    (out / "metrics.jsonl").write_text("")
    before = contents(out)
    told = refused(capsys, *SHORT, out, "--resume", "--init-adapter", out / "best")
    assert "--init-adapter" in told and contents(out) == before


# --- resuming ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_a_run_that_began_with_an_adapter_ends_and_is_resumed(first, tmp_path, start, number, code):
    flags = [*LONG, "--device", "cpu", "--init-adapter", first, "--output-dir"]
    finish(start(*flags, tmp_path / "done"))
    out = tmp_path / "out"
    process = start(*flags, out)
    wait_for(lambda: list_checkpoints(out), process)
    os.kill(process.pid, number)
    finish(process, code)
    assert not (out / "adapter_model.safetensors").exists()
    finish(start(f"@{out}/run.args", "--resume"))
    assert outcome(out) == outcome(tmp_path / "done")


def test_another_adapter_or_none_is_refused_by_name(first, cut, capsys):
    flags = [*SHORT, cut, "--warmup-steps", 2, "--resume"]
    before = contents(cut)
    told = refused(capsys, *flags, "--init-adapter", first / "checkpoint-2")
    assert f"other settings: --init-adapter was {first}, is {first}/checkpoint-2;" in told
    told = refused(capsys, *flags, *KIND)
    assert "--init-adapter" in told.partition("; give those")[0]
    assert contents(cut) == before


def test_the_adapter_is_not_needed_to_go_on(first, tmp_path):
    adapter, out = shutil.copytree(first, tmp_path / "adapter"), tmp_path / "out"
    train_main(*SHORT, out, "--init-adapter", adapter)
    wanted = outcome(out)
    for directory in (out / "checkpoint-6", adapter):
        shutil.rmtree(directory)
    train_main(f"@{out}/run.args", "--resume")
    assert outcome(out) == wanted


def test_the_refusal_names_a_way_on_that_works(first, tmp_path, capsys):
    flags = [*SHORT, first, *KIND, "--system", "甲", "--resume", "--max-steps", 2, "--seed", 1]
    told = refused(capsys, *flags)
    assert "--seed was 42, is 1" in told and "--max-steps was 3, is 2" in told
    advice = re.search(r"--init-adapter (.+), another --output-dir", told)[1]
    assert advice == str(first / "checkpoint-3")
    train_main(*SHORT, tmp_path / "out", "--init-adapter", advice, "--max-steps", 2, "--seed", 1)
    assert len(metrics_of(tmp_path / "out")) == 2


NEW_FLAGS = "rslora dora adam-beta1 adam-beta2 eval-data eval-split eval-steps init-adapter"


def make_older(checkpoint):
    """Takes out of a checkpoint what was not in it before there were these flags."""
    file = checkpoint / "training_state.json"
    state = json.loads(file.read_text())
    for name in NEW_FLAGS.split():
        del state["run"][f"--{name}"]
    for key in Progress.NO_EVALUATIONS:
        del state["progress"][key]
    file.write_text(json.dumps(state))
    sums = [f"{sha256((checkpoint / name).read_bytes())}  {name}\n" for name in CONTENTS]
    (checkpoint / "SHA256SUMS").write_text("".join(sums))


def test_a_checkpoint_from_before_these_flags(tmp_path, capsys):
    done, out = tmp_path / "done", tmp_path / "out"
    train_main(*SHORT, done)
    shutil.copytree(done, out, ignore=shutil.ignore_patterns("*-6"))
    make_older(out / "checkpoint-4")
    before = contents(out)
    for flag, *value in (["--rslora"], ["--dora"], ["--adam-beta1", 0.5], ["--eval-split", 0.1]):
        told = refused(capsys, *SHORT, out, "--resume", flag, *value)
        assert f"{flag} was " in told and contents(out) == before
    train_main(*SHORT, out, "--resume")
    assert outcome(out) == outcome(done)


# --- stderr that has gone, and --tensorboard --------------------------------------------------


@pytest.mark.parametrize("number, code", [(0, 0), (signal.SIGINT, 130)])
def test_a_run_whose_stderr_is_read_no_longer(tmp_path, number, code):
    out = tmp_path / "out"
    steps = 30 if number else 4
    flags = [*LONG, "--max-steps", str(steps), "--logging-steps", "1", "--device", "cpu"]
    flags += ["--output-dir", out]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *flags], **pipes)
    assert process.stderr.read(1)
    process.stderr.close()
    wait_for(lambda: has_metrics(out), process)
    process.send_signal(number)
    told = process.stdout.read().decode()
    assert process.wait(60) == code and all(map(is_intact, list_checkpoints(out)))
    step = int(list_checkpoints(out)[0].name.partition("-")[2])
    assert f"stopped  after update {step}" in told if number else step == steps
    assert (out / ADAPTER[0]).exists() is ("saved" in told) is not bool(number)


def test_tensorboard_shows_the_run_that_is_there(tmp_path):
    out, board = tmp_path / "out", tmp_path / "out" / "tensorboard"
    train_main(*SHORT, out, "--tensorboard")
    losses = {line["step"]: pytest.approx(line["loss"]) for line in metrics_of(out)}
    assert scalars(board)["train/loss"] == losses and len(losses) == 6
    TensorBoard(board, 7).log({"step": 7, "loss": 9.0})  # as if the run had gone on
    old = contents(board)
    shutil.rmtree(out / "checkpoint-6")
    train_main(*SHORT, out, "--tensorboard", "--resume")
    assert scalars(board)["train/loss"] == losses
    train_main(*SHORT, out, "--tensorboard", "--overwrite", "--max-steps", 2)
    assert len(scalars(board)["train/loss"]) == 2 and not old.keys() & contents(board).keys()
    train_main(*SHORT, out, "--overwrite", "--max-steps", 2)
    assert not board.exists()


def test_without_its_package_tensorboard_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    told = refused(capsys, *SHORT, tmp_path / "out", "--tensorboard")
    assert "--tensorboard needs the package tensorboard: pip install" in told
    assert not (tmp_path / "out").exists()
