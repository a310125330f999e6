"""support/curves.py: the picture of runs, and what is told of bad files.

python -m pytest -q tests/test_curves.py
"""

import json
import math
import subprocess
import sys

import numpy
import pytest
from conftest import ROOT, write_jsonl

from support import curves

LINE = {"step": 10, "epoch": 0, "loss": 2.5, "grad_norm": 1.5, "learning_rate": 1e-4}
LINE |= {"tokens": 640, "loss_scale": 65536.0, "skipped": 0}
EVALUATION = {"step": 10, "epoch": 0, "eval_loss": 3.0, "eval_perplexity": math.exp(3)}


def training_line(step, loss, **others):
    return LINE | {"step": step, "loss": loss} | others


def evaluation_line(step, loss):
    perplexity = None if loss is None else math.exp(loss)
    return EVALUATION | {"step": step, "eval_loss": loss, "eval_perplexity": perplexity}


@pytest.fixture
def new_run(tmp_path):
    """new_run(name, lines) → the directory of a run that has written these lines"""

    def make(name, lines):
        directory = tmp_path / name
        directory.mkdir(parents=True)
        write_jsonl(directory / "metrics.jsonl", lines)
        return directory

    return make


def told_of(capsys, *arguments):
    """Runs the command. → the line that it prints"""
    curves.main([str(argument) for argument in arguments])
    told = capsys.readouterr()
    assert told.err == "" and told.out.count("\n") == 1
    return told.out


def fault_told(capsys, *arguments):
    """Runs the command, which must end with one line of error. → that line"""
    with pytest.raises(SystemExit) as stop:
        curves.main([str(argument) for argument in arguments])
    told = capsys.readouterr()
    assert stop.value.code == 2 and told.out == "" and told.err.count("\n") == 1, told
    return told.err


def pixels(picture):
    """→ the colours of a PNG: [height, width, 3], from 0 to 255"""
    image = pytest.importorskip("matplotlib.image").imread(picture)
    return (image[:, :, :3] * 255).round().astype(int)


def count_pixels(picture, number):
    """→ how many pixels of a PNG have the colour of this run, counted from 0"""
    return int(has_colour(picture, number).sum())


def has_colour(picture, number):
    """→ [height, width] bool: which pixels of a PNG have the colour of this run"""
    import matplotlib
    from matplotlib.colors import to_rgb

    colour = numpy.array(to_rgb(matplotlib.color_sequences["petroff10"][number])) * 255
    return abs(pixels(picture) - colour).max(axis=2) < 2


# --- metrics.jsonl ----------------------------------------------------------------------------


def test_a_null_is_a_gap_and_evaluations_are_curves_of_their_own(new_run):
    lines = [training_line(1, 2.0), evaluation_line(1, 4.0), training_line(2, None)]
    lines += [evaluation_line(2, 3.0), evaluation_line(3, None)]
    run = curves.Curves("a", "a", curves.read_metrics(new_run("a", lines)))
    steps, losses = run.points("loss")
    assert steps == [1, 2] and losses[0] == 2.0 and math.isnan(losses[1])
    assert run.points("eval_loss")[0] == [1, 2, 3]
    assert run.lowest_evaluation()["step"] == 2
    assert run.updates() == 3


@pytest.mark.parametrize("length", range(1, len(json.dumps(LINE)) + 1, 7))
def test_a_last_line_that_is_being_written_is_ignored(new_run, length):
    directory = new_run("a", [LINE])
    with open(directory / "metrics.jsonl", "a") as file:
        file.write(json.dumps(LINE | {"step": 20})[:length])
    assert curves.read_metrics(directory) == [LINE]


@pytest.mark.parametrize(
    "line, fault",
    [
        (b'{"step": 20, "lo', "not a JSON object"),
        (b"[20, 2.5]", "not a JSON object"),
        (b"", "not a JSON object"),
        (b"\xff\xfe", "not a JSON object"),
        (b"[" * 10**5, "not a JSON object"),
        (b'{"loss": 2.5}', "step is missing"),
        (b'{"step": "20", "loss": 2.5}', "step is missing, or is not a number"),
        (b'{"step": -1, "loss": 2.5}', "step is missing, or is not a number"),
        (b'{"step": 20, "loss": "low"}', "loss is neither"),
        (b'{"step": 20, "loss": NaN}', "loss is neither"),
        (b'{"step": 20, "loss": 2.5, "grad_norm": 1e999}', "grad_norm is neither"),
    ],
)
def test_a_bad_line_is_told_with_file_and_line(new_run, capsys, tmp_path, line, fault):
    directory, picture = new_run("a", [LINE]), tmp_path / "curves.png"
    good = (directory / "metrics.jsonl").read_bytes()
    (directory / "metrics.jsonl").write_bytes(good + line + b"\n" + good)
    told = fault_told(capsys, directory, "--output", picture)
    assert f"error: {directory}/metrics.jsonl:2: {fault}" in told and "mend or delete" in told
    assert not list(tmp_path.glob("curves.png*"))


@pytest.mark.parametrize("content", [b"", b'{"step": 10, "los', b'{"step": 10}\n'])
def test_a_run_without_a_loss_is_told(new_run, capsys, tmp_path, content):
    directory = new_run("a", [])
    (directory / "metrics.jsonl").write_bytes(content)
    told = fault_told(capsys, directory, "--output", tmp_path / "curves.png")
    assert f"error: {directory}/metrics.jsonl: no loss yet; wait" in told


def test_a_directory_without_a_run_is_told(new_run, capsys, tmp_path):
    good = new_run("a", [LINE])
    for bad in (tmp_path, tmp_path / "none", good / "metrics.jsonl"):
        told = fault_told(capsys, good, bad, "--output", tmp_path / "curves.png")
        assert f"error: {bad}/metrics.jsonl: no such file; name the --output-dir" in told


# --- the picture ------------------------------------------------------------------------------


def test_the_picture_has_a_line_for_each_run_and_what_is_told_is_right(new_run, capsys, tmp_path):
    first = [training_line(n, 4 - n / 100) for n in range(10, 301, 10)]
    first += [evaluation_line(n, 3 + abs(n - 120) / 100) for n in range(20, 301, 20)]
    second = [training_line(n, None if n == 400 else 5 - n / 200) for n in range(10, 701, 10)]
    first, second = new_run("first", first), new_run("second", second)
    alone, both = tmp_path / "alone.png", tmp_path / "both.png"
    told = told_of(capsys, first, "--output", alone)
    lowest = "lowest evaluation loss 3 at update 120"
    assert told == f"{alone}: first: 300 updates, last loss 1, {lowest}\n"
    told = told_of(capsys, first, second, first, "--output", both)  # the same run once only
    assert told.endswith(f"{lowest}; second: 700 updates, last loss 1.5\n")
    assert pixels(alone).shape == pixels(both).shape == (1000, 1600, 3)
    assert count_pixels(alone, 0) > 2000 and count_pixels(alone, 1) == 0
    assert count_pixels(both, 0) > 2000 and count_pixels(both, 1) > 2000
    assert not list(tmp_path.glob("*.part"))


def test_a_number_between_two_nulls_is_seen(new_run, capsys, tmp_path):
    nulls = LINE | {"grad_norm": None, "learning_rate": 0.0}
    counts = []
    for loss in (None, 2.0):
        lines = [nulls | {"step": n, "loss": loss if n == 20 else None} for n in (10, 20, 30)]
        told_of(capsys, new_run(f"run-{loss}", lines), "--output", tmp_path / "curves.png")
        counts.append(count_pixels(tmp_path / "curves.png", 0))
    assert counts[0] < counts[1]


def test_a_star_marks_the_lowest_evaluation(new_run, capsys, tmp_path):
    nulls = dict(grad_norm=None, learning_rate=0.0)
    lines = [training_line(n, None, **nulls) for n in (10, 20, 30)]
    run = new_run("a", [*lines, evaluation_line(15, None), evaluation_line(15, 2.0)])
    told_of(capsys, run, "--output", tmp_path / "curves.png")
    panel = has_colour(tmp_path / "curves.png", 0)[100:600]
    columns = panel.any(axis=0).nonzero()[0]
    assert 750 < columns.mean() < 850  # update 15 of 30 is in the middle
    assert 15 < columns.max() - columns.min() < 30  # other evaluations are 8 pixels wide


def test_runs_of_very_different_lengths_are_both_wide(new_run, capsys, tmp_path):
    flat = dict(grad_norm=None, learning_rate=0.0)
    short = [training_line(n, 1.0, **flat) for n in range(1, 31)]
    long = [training_line(n, 2.0, **flat) for n in range(10, 30001, 10)]
    told_of(capsys, new_run("s", short), new_run("l", long), "--output", tmp_path / "curves.png")
    # On a linear axis the short run would be 2 pixels wide. The legend's line has about 50.
    assert count_pixels(tmp_path / "curves.png", 0) > 500


def test_names_are_as_short_as_they_can_be(new_run, capsys, tmp_path):
    runs = [new_run(name, [LINE]) for name in ("x/lora", "y/lora", "x/y/lora", "y/other")]
    told = told_of(capsys, *runs, "--output", tmp_path / "curves.png")
    names = [part.split(": ")[-2] for part in told.strip().split("; ")]
    assert names == ["x/lora", f"{tmp_path.name}/y/lora", "x/y/lora", "other"]


def test_the_command_draws(new_run, tmp_path):
    pytest.importorskip("matplotlib")
    directory = new_run("甄嬛传", [LINE, EVALUATION])
    command = [sys.executable, "-X", "utf8", "-m", "support.curves", str(directory)]
    command += ["--output", str(tmp_path / "曲线.png")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1 and "甄嬛传" in done.stdout
    assert pixels(tmp_path / "曲线.png").min() < 100


@pytest.mark.parametrize("name", ["甄嬛传", "_$x_$^{", "a" * 120, "line\nbreak", "🙂"])
def test_any_name_of_a_directory_can_be_drawn(new_run, tmp_path, capsys, name):
    pytest.importorskip("matplotlib")
    directory = new_run(name, [LINE, EVALUATION])
    told = told_of(capsys, directory, "--output", tmp_path / "曲线.png")
    assert name.replace("\n", "\\n") in told
    assert pixels(tmp_path / "曲线.png").min() < 100


def test_names_that_no_font_has_or_that_are_long_get_numbers(
    new_run, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(curves, "installed_fonts", lambda: ["DejaVu Sans"])
    runs = [new_run(name, [LINE]) for name in ("甄嬛", "孙悟空", "b" * 120, "lora")]
    told = told_of(capsys, *runs, "--output", tmp_path / "curves.png")
    names = [part.partition(": 10 updates")[0] for part in told.split("; ")]
    assert names[0].endswith("run 1 (甄嬛)") and names[1] == "run 2 (孙悟空)"
    assert names[2] == f"run 3 …{'b' * 40} ({'b' * 120})" and names[3] == "lora"


def test_more_runs_than_colours_leave_the_panels_their_size(new_run, capsys, tmp_path):
    runs = [new_run(f"run-{n}", [training_line(10, n), training_line(20, n)]) for n in range(14)]
    told_of(capsys, *runs, "--output", tmp_path / "curves.png")
    assert pixels(tmp_path / "curves.png").shape == (1250, 1600, 3)


def test_an_output_that_cannot_be_written_is_told(new_run, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    directory = new_run("a", [LINE])
    (tmp_path / "directory.png").mkdir()
    for name in ("directory.png", "curves.pdf", ""):
        told = fault_told(capsys, directory, "--output", tmp_path / name)
        assert f"error: --output {tmp_path / name}: name a file that ends in .png" in told
    for name in ("none/curves.png", "a/metrics.jsonl/curves.png", f"{'a' * 251}.png"):
        told = fault_told(capsys, directory, "--output", tmp_path / name)
        assert f"error: --output {tmp_path / name}: cannot write: " in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "directory.png"]


def test_a_disk_that_fails_leaves_the_old_picture(new_run, capsys, tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure
    picture = tmp_path / "curves.png"
    picture.write_text("old")

    def savefig(self, file, format):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", savefig)
    told = fault_told(capsys, new_run("a", [LINE]), "--output", picture)
    assert "cannot write: No space left on device; choose another file" in told
    assert picture.read_text() == "old" and not list(tmp_path.glob("*.part"))


def test_without_matplotlib_the_command_says_how_to_install_it(new_run, capsys, monkeypatch):
    for name in ("matplotlib", "matplotlib.font_manager"):
        monkeypatch.setitem(sys.modules, name, None)
    told = fault_told(capsys, new_run("a", [LINE]))
    install = "pip install -r requirements-curves.txt"
    assert told.endswith(f"error: curves need matplotlib: {install}\n")
    assert (ROOT / "requirements-curves.txt").read_text().count("==") == 2
