"""Evaluation: its loss is right, training stays as it was, best/ and --patience keep their word.

python -m pytest -q tests/test_evaluation.py
"""

import math
import os
import random
import shutil
import signal
import time
from collections import Counter

import pytest
import torch
from conftest import (
    SMALL_BASE,
    adapter_of,
    contents,
    finish,
    metrics_of,
    outcome,
    refused,
    start_several,
    train_main,
    wait_for,
)
from safetensors.torch import load_file

import data
import infer
import model as chatglm
import train
from support import checkpoints
from support.checkpoints import ADAPTER, list_checkpoints
from support.config import IGNORE
from support.defaults import SAMPLE

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SYSTEM = "Be brief, and kind to all who ask."
# With these flags the evaluation loss falls until update 12. Then it rises.
FLAGS = (
    "--batch-size 3 --gradient-accumulation-steps 1 --learning-rate 0.003 --lr-schedule constant "
    "--lora-dropout 0.1 --logging-steps 1 --save-steps 5 --data train.jsonl --device cpu"
).split()
EVALUATION = "--eval-data eval.jsonl --eval-steps 2".split()
PATIENT = [*FLAGS, *EVALUATION, "--max-steps", 40, "--patience"]
EVAL_ONLY = "--eval-only --eval-data eval.jsonl --device cpu".split()


@pytest.fixture(scope="module", autouse=True)
def files(tmp_path_factory):
    """The working directory of all these tests, with their data"""
    directory = tmp_path_factory.mktemp("files")
    lines = SAMPLE.read_text("utf-8").splitlines(keepends=True)
    (directory / "train.jsonl").write_text("".join(lines[:12]), "utf-8")
    (directory / "eval.jsonl").write_text("".join(lines[60:68]), "utf-8")
    (directory / "long.csv").write_text(f"prompt,response\n{'q ' * 50},a\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        yield directory


@pytest.fixture(scope="module")
def early(tmp_path_factory, start):
    """(the directory of a run that stopped early, what it printed)"""
    directory = tmp_path_factory.mktemp("early") / "out"
    return directory, finish(start(*PATIENT, 3, "--output-dir", directory))


@pytest.fixture
def measured(monkeypatch):
    """→ a list, to which each evaluation adds (loss, dataset, eval_step)"""
    plain, found = train.evaluate, []

    def evaluate(model, dataset, size, step):
        found.append((plain(model, dataset, size, step), dataset, step))
        return found[-1][0]

    monkeypatch.setattr(train, "evaluate", evaluate)
    return found


def evaluations(directory):
    """→ {update: evaluation loss}"""
    return {m["step"]: m["eval_loss"] for m in metrics_of(directory) if "eval_loss" in m}


def weights_of(directory):
    return (directory / "adapter_model.safetensors").read_bytes()


# --- the loss, and training -------------------------------------------------------------------


def near_direct_loss(adapter, system=None, most=512):
    """→ what the loss on eval.jsonl must be near to, computed sample by sample"""
    model = chatglm.load_model(chatglm.built_in_model(), "cpu")
    tokenizer = data.ChatGLMTokenizer(chatglm.BUILT_IN)
    model = chatglm.load_adapter(model, adapter).get_base_model() if adapter else model
    total = count = 0
    for ids, labels in data.ConversationDataset(["eval.jsonl"], tokenizer, most, system):
        supervised = int((labels[1:] != IGNORE).sum())
        with torch.no_grad():
            mean = model(ids[None], labels=labels[None]).loss
        total, count = total + mean.double().item() * supervised, count + supervised
    return pytest.approx(total / count, rel=0, abs=1e-6)


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("system, most", [("", 512), ("", 24), (SYSTEM, 48)])
def test_the_loss_is_the_mean_over_supervised_tokens(tmp_path, measured, size, system, most):
    flags = ["--batch-size", size, "--system", system, "--max-length", most, "--max-steps", 3]
    train_main(*FLAGS, *EVALUATION, *flags, "--output-dir", tmp_path)
    line, dataset = metrics_of(tmp_path)[-1], measured[-1][1]
    assert line["step"] == 3 and line["eval_loss"] == near_direct_loss(tmp_path, system, most)
    assert line["eval_perplexity"] == math.exp(line["eval_loss"])
    assert (dataset.prefix_length > 0) == bool(system) and len({*dataset.supervised}) > 3
    assert (0 < dataset.cut < 8) == (most < 512) and not dataset.dropped


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_share_an_evaluation(tmp_path, start, count):
    """Of four processes, one gets none of the three micro-batches."""
    flags = [*FLAGS, *EVALUATION, "--output-dir", tmp_path, "--max-steps", 2]
    for process in start_several(start, count, *flags):
        finish(process)
    loss = evaluations(tmp_path)[2]
    assert loss == near_direct_loss(tmp_path)
    assert weights_of(tmp_path / "best") == weights_of(tmp_path)
    flags = [*EVAL_ONLY, "--batch-size", 3, "--adapter", tmp_path]
    told = [finish(process) for process in start_several(start, count, *flags)]
    assert f"loss {loss:.4f} per supervised token" in told[0] and "loss" not in told[1]


def test_eval_only_measures_the_base_or_an_adapter(files, tmp_path, measured, capsys):
    """An adapter is measured with its own system message, if no other is given."""
    train_main(*FLAGS, "--system", SYSTEM, "--max-steps", 8, "--output-dir", tmp_path)
    before = [contents(path) for path in (files, tmp_path, chatglm.BUILT_IN)]
    own, other = ["--adapter", tmp_path], ["--adapter", tmp_path, "--system", "q"]
    cases = [([], None, None), (own, tmp_path, SYSTEM), (other, tmp_path, "q")]
    for flags, adapter, system in cases:
        capsys.readouterr()
        train_main(*EVAL_ONLY, "--batch-size", 3, "--output-dir", "out", *flags)
        loss, *_ = measured[-1]
        assert loss == near_direct_loss(adapter, system)
        what = f"loss {loss:.4f} per supervised token, perplexity {math.exp(loss):,.4g}"
        assert what in capsys.readouterr().out
    assert len({round(loss, 2) for loss, *_ in measured}) == 3
    assert [contents(path) for path in (files, tmp_path, chatglm.BUILT_IN)] == before


def training_of(directory):
    """What a run has trained, as bytes: the adapter, AdamW's moments, its lines of metrics."""
    moments = (list_checkpoints(directory)[0] / "training_state.safetensors").read_bytes()
    lines = (directory / "metrics.jsonl").read_bytes().splitlines()
    return weights_of(directory), moments, [line for line in lines if b"eval_loss" not in line]


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_an_evaluation_does_not_change_training(tmp_path, dtype):
    flags = [*FLAGS, "--model", SMALL_BASE, "--dtype", dtype, "--max-steps", 5]
    flags += ["--logging-steps", 3, "--output-dir"]
    train_main(*flags, tmp_path / "without")
    train_main(*flags, tmp_path / "with", "--eval-data", "eval.jsonl", "--eval-steps", 1)
    assert training_of(tmp_path / "with") == training_of(tmp_path / "without")
    assert [*evaluations(tmp_path / "with")] == [1, 2, 3, 4, 5]


def test_what_is_split_off_is_never_trained_on(tmp_path, tokenizer, measured, monkeypatch):
    """Of 12 and 8 samples, 6 are split off, whole. How often a file counts is for the others."""
    plain, trained = data.make_update, Counter()

    def contents_of(samples):
        return [(*ids.tolist(), *labels.tolist()) for ids, labels in samples]

    def make_update(epoch, batch_size, prefix_length, samples):
        trained.update(contents_of(samples))
        return plain(epoch, batch_size, prefix_length, samples)

    monkeypatch.setattr(data, "make_update", make_update)
    flags = ["--data", "train.jsonl:2", "eval.jsonl:3", "--eval-split", 0.3, "--epochs", 2]
    train_main(*FLAGS, *flags, "--output-dir", tmp_path)
    whole = data.ConversationDataset(["train.jsonl", "eval.jsonl"], tokenizer, 512)
    place_of = dict(zip(contents_of(whole), whole.places, strict=True))
    evaluated = [place_of[sample] for sample in contents_of(measured[-1][1])]
    assert len({*evaluated}) == 6 and measured[-1][1].places == evaluated
    rest = [place for place in whole.places if place not in evaluated]
    wanted = {place: 4 if "train" in place else 6 for place in rest}
    assert {place_of[sample]: count for sample, count in trained.items()} == wanted
    assert [*evaluations(tmp_path)] == [11, 22]  # the ends of the epochs


# --- best/ and --patience ---------------------------------------------------------------------


def test_best_is_the_adapter_of_the_lowest_loss(early, tmp_path, capsys):
    losses, best = evaluations(early[0]), early[0] / "best"
    lowest = min(losses, key=losses.get)
    assert min(losses) < lowest < max(losses) and losses[lowest] == near_direct_loss(best)
    infer.main(
        ["--adapter", str(best), "--prompt", "q", "--max-new-tokens", "5", "--device", "cpu"]
    )
    assert capsys.readouterr().out.strip()
    train_main(*FLAGS, "--max-steps", lowest, "--output-dir", tmp_path)
    assert weights_of(best) == weights_of(tmp_path)


def script(monkeypatch, directory, losses):
    """Evaluations measure these losses. → a list that gets best/ as it was before each of them"""
    losses, before = iter(losses), []

    def evaluate(*_):
        best = directory / "best"
        before.append(weights_of(best) if best.exists() else None)
        return next(losses)

    monkeypatch.setattr(train, "evaluate", evaluate)
    return before


def test_only_a_lower_finite_loss_is_best_and_restores_patience(tmp_path, monkeypatch, capsys):
    losses = [math.nan, 3.0, 3.5, math.inf, 2.0, 2.0, -math.inf, 2.5, 1.0]
    before = script(monkeypatch, tmp_path, losses)
    flags = ["--eval-steps", 1, "--save-steps", 1, "--output-dir", tmp_path]
    train_main(*PATIENT, 3, *flags)
    second, fifth = (weights_of(tmp_path / f"checkpoint-{step}") for step in (2, 5))
    assert before == [None, None, second, second, second, fifth, fifth, fifth]
    assert weights_of(tmp_path / "best") == fifth
    assert [*evaluations(tmp_path).values()] == [None, 3.0, 3.5, None, 2.0, 2.0, None, 2.5]
    assert "stopped  early, no lower loss in 3 evaluations: 8" in capsys.readouterr().out
    # With less patience, the run of checkpoint-4 ends before the fifth. best/ is older then.
    script(monkeypatch, tmp_path, [math.inf])
    train_main(*PATIENT, 2, *flags, "--resume", "checkpoint-4")
    assert weights_of(tmp_path / "best") == second


def test_an_adapter_that_is_not_finite_is_an_error_not_an_early_stop(tmp_path, capsys):
    flags = "--learning-rate 1000 --weight-decay 1e6 --max-grad-norm 0 --logging-steps 99".split()
    told = refused(capsys, *PATIENT, 2, *flags, "--eval-steps", 1, "--output-dir", tmp_path)
    assert "NaN or infinite since update" in told and not list_checkpoints(tmp_path)


def test_a_run_out_of_patience_has_nothing_left_to_do(early, capsys):
    directory, told = early
    losses, before = evaluations(directory), contents(directory)
    last = min(losses, key=losses.get) + 3 * 2
    what = f"stopped  early, no lower loss in 3 evaluations: {last} of 40 updates"
    assert max(losses) == metrics_of(directory)[-1]["step"] == last and what in told
    arguments = [*PATIENT, 3, "--output-dir", directory, "--resume"]
    train_main(*arguments)
    told = capsys.readouterr().out
    assert "there was nothing left to do" in told and what in told
    told = refused(capsys, *arguments, "--eval-data", "train.jsonl", "--eval-steps", 3)
    assert "with other settings: --eval-steps was 2, is 3; --eval-data has other content;" in told
    assert contents(directory) == before


def test_more_patience_goes_on(early, tmp_path, monkeypatch):
    """With --keep-checkpoints 1, there is a checkpoint at any time. A run may be killed then."""
    out, undisturbed = shutil.copytree(early[0], tmp_path / "out"), tmp_path / "undisturbed"
    train_main(*PATIENT, 5, "--output-dir", out, "--resume")
    plain = checkpoints.discard

    def discard(directory):
        plain(directory)
        assert directory.name == "best" or list_checkpoints(undisturbed)

    monkeypatch.setattr(checkpoints, "discard", discard)
    train_main(*PATIENT, 5, "--output-dir", undisturbed, "--keep-checkpoints", 1)
    assert outcome(out) == outcome(undisturbed) != outcome(early[0])
    assert weights_of(out / "best") == weights_of(undisturbed / "best")


# --- runs that are killed or refused ----------------------------------------------------------


def result_of(directory):
    """What two runs must have in common bit for bit: that of `outcome`, and best/"""
    best = contents(directory / "best")
    return outcome(directory), {path.name: content for path, content in best.items()}


def last_line(directory):
    """→ the last line of metrics so far; one of update 0 if there is none"""
    has_lines = (directory / "metrics.jsonl").exists() and metrics_of(directory)
    return has_lines[-1] if has_lines else {"step": 0}


def is_evaluating(directory):
    line = last_line(directory)
    return "loss" in line and line["step"] % 2 == 0


def is_saving_best(directory):
    return any(directory.glob("best*.part"))


def test_a_run_killed_at_any_moment_goes_on_bit_for_bit(tmp_path, start):
    """Six kills, and up to twelve more, until enough of them hit an evaluation and best/."""
    arguments = [*PATIENT, 3, "--output-dir"]
    finish(start(*arguments, tmp_path / "undisturbed"))
    wanted, in_time = result_of(tmp_path / "undisturbed"), Counter()
    moments = [is_evaluating, is_saving_best, os.path.exists]

    def are_enough():
        return in_time[is_evaluating] >= 2 and in_time[is_saving_best] >= 1

    for kill, is_moment in enumerate(moments * 6):
        if kill >= 6 and are_enough():
            break
        out, step = tmp_path / str(kill), random.randrange(1, 9)
        process = start(*arguments, out)
        # Update 14 comes after the last of these moments.
        wait_for(lambda: last_line(out)["step"] >= (step if is_moment(out) else 14), process)  # noqa: B023
        time.sleep(random.uniform(0, 0.4) if is_moment == os.path.exists else 0)
        process.kill()
        process.join()
        in_time[is_moment] += is_moment(out)
        if (out / "best").exists():
            assert {path.name for path in (out / "best").iterdir()} == {*ADAPTER}
            assert load_file(out / "best" / "adapter_model.safetensors")
        finish(start(*arguments, out, "--resume"))
        assert result_of(out) == wanted and not list(out.glob("*.part"))
    assert are_enough(), in_time


def test_a_signal_during_an_evaluation_lets_it_end_and_saves(tmp_path, start):
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    flags = ["--eval-data", *["eval.jsonl"] * 10, "--eval-steps", 2, "--save-steps", 1000]
    arguments = [*FLAGS, *flags, "--max-steps", 6, "--output-dir"]
    finish(start(*arguments, undisturbed))
    process = start(*arguments, out)
    wait_for(lambda: is_evaluating(out), process)
    time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    told = finish(process, 143)
    last = max(evaluations(out)) + 1  # one more update is made
    assert f"stopped  after update {last}" in told
    assert f"{last} of 6 updates done" in finish(start(*arguments, out, "--resume"))
    assert result_of(out) == result_of(undisturbed)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--patience 2", "--patience needs --eval-data or --eval-split"),
        ("--eval-steps 2", "--eval-steps needs --eval-data or --eval-split"),
        ("--eval-only", "--eval-only needs --eval-data"),
        ("--eval-data eval.jsonl --adapter a", "--adapter needs --eval-only"),
        ("--eval-data a --eval-split 0.1", "--eval-data and --eval-split: give one of them"),
        ("--eval-data none.jsonl", "none.jsonl: No such file or directory"),
        ("--eval-data eval.jsonl:x", "argument --eval-data: eval.jsonl:x: 'x' is no number"),
        ("--eval-data eval.jsonl:0", "argument --eval-data: eval.jsonl:0: the number must be more"),
        (f"--eval-data {'x' * 5000}:2", "argument --eval-data: [Errno 36] File name too"),
        ("--eval-data eval.jsonl:2", "eval.jsonl:2: each file is evaluated once; leave :N out"),
        ("--eval-data long.csv --max-length 40", "no sample has a token to learn within 40"),
        ("--eval-split 0.99", "--eval-split 0.99 leaves no sample to train on"),
        ("--eval-only --eval-data eval.jsonl --adapter other", "a base with other weights"),
    ],
)
def test_refusals(files, tmp_path, capsys, flags, message):
    adapter_of(files / "other", fixed="0" * 64)
    assert message in refused(capsys, *FLAGS, "--output-dir", tmp_path, *flags.split())
    assert not list(tmp_path.iterdir())


# --- the fast paths on CUDA -------------------------------------------------------------------


@cuda
def test_graphs_and_compiled_evaluations_follow_plain_launches(early, measured):
    flags = [*EVAL_ONLY, "--device", "cuda", "--dtype", "fp16", "--batch-size", 1]
    for kind in (["--no-cuda-graphs"], ["--cuda-graphs"], ["--compile", "--cuda-graphs"]):
        train_main(*flags, "--adapter", early[0], *kind)
    for loss, _, eval_step in measured[1:]:
        assert loss == pytest.approx(measured[0][0], rel=1e-3) and eval_step.graphs


@cuda
def test_evaluations_between_replays_do_not_change_training_on_cuda(tmp_path, measured):
    flags = [*FLAGS, "--device", "cuda", "--cuda-graphs", "--max-steps", 20, "--system", SYSTEM]
    train_main(*flags, "--output-dir", tmp_path / "without")
    train_main(*flags, *EVALUATION, "--output-dir", tmp_path / "with")
    assert training_of(tmp_path / "with") == training_of(tmp_path / "without")
    assert len(measured) == 10 and measured[-1][2].graphs


def test_evaluation_samples_that_are_also_trained_on_are_counted(files, tmp_path, capsys):
    flags = [*FLAGS, "--max-steps", 1, "--output-dir"]
    train_main(*flags, tmp_path / "same", "--eval-data", "train.jsonl", "eval.jsonl")
    trained = len(
        data.ConversationDataset(["train.jsonl"], data.ChatGLMTokenizer(chatglm.BUILT_IN), 512)
    )
    assert f"warning: {trained} of these samples are also trained on" in capsys.readouterr().out
    train_main(*flags, tmp_path / "other", "--eval-data", "eval.jsonl")
    assert "also trained on" not in capsys.readouterr().out
