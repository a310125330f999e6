"""The curves of runs: one picture of metrics.jsonl.

    python -m support.curves output/first output/second --output curves.png

matplotlib is optional, so it is imported where it is needed.
"""

import json
import logging
import math
import os
import re
import warnings
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from support import commands
from support.errors import escaped

PROGRAM = "python -m support.curves"
DRAWN = ("loss", "eval_loss", "learning_rate", "grad_norm")  # the keys that the picture shows
CJK_FONT = "CJK|Noto Sans SC|Source Han Sans|WenQuanYi|YaHei|SimHei|PingFang|Hiragino Sans GB"


class Curves(NamedTuple):
    """What is drawn of a run."""

    label: str  # in the picture
    name: str
    metrics: list  # the lines of metrics.jsonl

    def updates(self):
        return max(line["step"] for line in self.metrics)

    def points(self, key):
        """→ (steps, values) of one key. A null is a NaN: a gap in the line."""
        lines = [line for line in self.metrics if key in line]
        values = [math.nan if line[key] is None else line[key] for line in lines]
        return [line["step"] for line in lines], values

    def lowest_evaluation(self):
        """→ the line of metrics that has it, or None"""
        lines = [line for line in self.metrics if line.get("eval_loss") is not None]
        return min(lines, key=lambda line: line["eval_loss"], default=None)


def read_metrics(directory):
    """→ the lines of a run's metrics.jsonl, as dicts. Raises ValueError with the file and the line.

    A last line without a line break is ignored if it is not whole: a run is writing it.
    """
    file = Path(directory) / "metrics.jsonl"
    place = escaped(str(file))
    if not file.is_file():
        raise ValueError(f"{place}: no such file; name the --output-dir of a run of train.py")
    *lines, last = file.read_bytes().split(b"\n")
    metrics = [parse_metrics(line, f"{place}:{number}") for number, line in enumerate(lines, 1)]
    with suppress(ValueError):
        metrics.append(parse_metrics(last, place))
    if not any("loss" in line or "eval_loss" in line for line in metrics):
        raise ValueError(f"{place}: no loss yet; wait until train.py has written a line of metrics")
    return metrics


def parse_metrics(line, place):
    """One line of metrics.jsonl → dict. Raises ValueError that begins with `place`."""
    metrics = None
    with suppress(ValueError, RecursionError):
        metrics = json.loads(line)
    if not isinstance(metrics, dict):
        fault = "not a JSON object"
    elif type(metrics.get("step")) is not int or not 0 <= metrics["step"] < 2**53:
        fault = "step is missing, or is not a number of updates"
    elif wrong := [key for key in DRAWN if not is_number_or_null(metrics.get(key))]:
        fault = f"{wrong[0]} is neither a finite number nor null"
    else:
        return metrics
    raise ValueError(f"{place}: {fault}; mend or delete this line")


def is_number_or_null(value):
    return value is None or isinstance(value, int | float) and abs(value) < 1e300


def shortest_name(path, paths):
    """The last parts of a path: as few as no other one of `paths` ends with"""
    parts = Path(path).parts
    for count in range(1, len(parts) + 1):
        if sum(Path(other).parts[-count:] == parts[-count:] for other in paths) == 1:
            return escaped(str(Path(*parts[-count:])))


def installed_fonts():
    """→ the names of fonts for the picture: matplotlib's own, and the CJK fonts it has found"""
    from matplotlib.font_manager import fontManager

    found = {font.name for font in fontManager.ttflist}
    return ["DejaVu Sans", *sorted(name for name in found if re.search(CJK_FONT, name))]


def label_of(number, name, fonts):
    """What the picture calls a run. It gets a number if no font has its name, or that is long."""
    from matplotlib.font_manager import findfont, get_font

    faces = [get_font(findfont(font)) for font in fonts]
    if not all(any(face.get_char_index(ord(each)) for face in faces) for each in name):
        return f"run {number}"
    most = 50 if name.isascii() else 25  # Chinese characters are wide
    return name if len(name) <= most else f"run {number} …{name[10 - most :]}"


def draw(runs, fonts, file):
    """Draws [Curves] into a PNG file, 1,600 pixels wide."""
    import matplotlib.style
    from matplotlib.figure import Figure

    style = {"font.family": fonts, "font.size": 12, "axes.grid": True, "grid.alpha": 0.3}
    with warnings.catch_warnings(), matplotlib.style.context(["default", style]):
        warnings.simplefilter("ignore")
        size = (16, 10 + 0.25 * max(0, len(runs) - 4))  # the panels keep their size
        figure = Figure(figsize=size, dpi=100, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1)  # inches
        panels = figure.subplot_mosaic([["loss"] * 2, ["rate", "norm"]], height_ratios=[2.2, 1])
        many = matplotlib.colormaps["turbo"].resampled(len(runs))(range(len(runs)))
        colours = matplotlib.color_sequences["petroff10"] if len(runs) <= 10 else many
        handles = []
        for run, colour in zip(runs, colours, strict=False):
            handles.append(draw_line(panels["loss"], run.points("loss"), colour))
            handles.append(draw_evaluations(panels["loss"], run, colour))
            draw_line(panels["rate"], run.points("learning_rate"), colour)
            draw_line(panels["norm"], run.points("grad_norm"), colour)
        set_scales(panels, runs)
        add_legend(figure, runs, handles)
        figure.savefig(file, format="png")


def draw_line(panel, points, colour):
    """Draws a solid line. A point between two gaps is no line: it gets a dot. → the line"""
    gaps = [math.isnan(value) for value in (math.nan, *points[1], math.nan)]
    lone = [i for i in range(len(gaps) - 2) if gaps[i] and gaps[i + 2]]
    panel.plot(*([values[i] for i in lone] for values in points), ".", color=colour)
    (line,) = panel.plot(*points, color=colour, linewidth=1.6 if len(gaps) < 1000 else 1)
    return line


def draw_evaluations(panel, run, colour):
    """Draws a dashed line, and a star at the lowest evaluation loss. → the dashed line"""
    steps, losses = run.points("eval_loss")
    size = max(2, min(6, 300 / max(1, len(steps))))
    style = dict(color=colour, linestyle="--", linewidth=1.8, marker="o", markersize=size)
    (line,) = panel.plot(steps, losses, **style, zorder=3, visible=bool(steps))
    if lowest := run.lowest_evaluation():
        star = dict(marker="*", markersize=20, markeredgecolor="black", zorder=4)
        panel.plot(lowest["step"], lowest["eval_loss"], color=colour, **star)
    return line


def set_scales(panels, runs):
    """Labels the axes, and makes those logarithmic on which small values would not be seen."""
    lengths = [run.updates() for run in runs]
    longest = max(1, *lengths)
    for panel in panels.values():
        panel.set(xlabel="updates", xlim=(-0.01 * longest, 1.01 * longest))
        panel.xaxis.get_major_locator().set_params(integer=True)
        if longest > 10 * min(lengths):
            panel.set_xscale("symlog", linthresh=10)  # linear up to update 10
            panel.set(xlabel="updates (logarithmic)", xlim=(-0.5, 1.2 * longest))
        panel.xaxis.set_major_formatter("{x:,.0f}")
    loss, rate, norm = panels["loss"], panels["rate"], panels["norm"]
    loss.set(ylabel="loss (nats per supervised token)", ylim=(max(0, loss.get_ylim()[0]), None))
    if loss.get_ylim()[1] < 13:  # below that, exp(loss) has few digits
        perplexity = loss.secondary_yaxis("right")
        perplexity.set_ylabel("perplexity = exp(loss)", labelpad=10)
        perplexity.yaxis.set_major_formatter(lambda value, _: f"{math.exp(value):.3g}")
    rate.set_ylabel("learning rate")
    rate.yaxis.set_major_formatter(lambda value, _: f"{value:.6g}")
    if are_far_apart([max(run.points("learning_rate")[1], default=0) for run in runs], 20):
        rate.set_yscale("log")
    norm.set_ylabel("gradient norm\nbefore clipping")
    if are_far_apart([norm for run in runs for norm in run.points("grad_norm")[1]], 50):
        norm.set_yscale("log")


def are_far_apart(values, ratio):
    """Whether the largest of the positive values is more than `ratio` times the smallest."""
    positive = [value for value in values if value > 0]
    return bool(positive) and max(positive) > ratio * min(positive)


def add_legend(figure, runs, handles):
    """Above the panels: a row for each run, with its training line and its evaluation line."""
    texts = [run.label for run in runs]
    texts += [f"{run.label}, ★ {told}" if (told := evaluation_of(run)) else "" for run in runs]
    place = dict(loc="outside upper left", ncols=2, frameon=False, handlelength=3)
    legend = figure.legend([*handles[::2], *handles[1::2]], [""] * len(texts), **place)
    for text, shown in zip(legend.get_texts(), texts, strict=True):
        text.set_parse_math(False)  # a name may have a $
        text.set_text(shown)


def evaluation_of(run):
    """The lowest evaluation loss in words, or "" for a run without evaluations"""
    if lowest := run.lowest_evaluation():
        return f"lowest evaluation loss {lowest['eval_loss']:.5g} at update {lowest['step']:,}"
    return "no finite evaluation loss" if run.points("eval_loss")[0] else ""


def summary(run):
    """A run in words."""
    name = run.name if run.label in run.name else f"{run.label} ({run.name})"
    told = [f"{name}: {run.updates():,} updates"]
    for loss in run.points("loss")[1][-1:]:
        told.append("last loss not finite" if math.isnan(loss) else f"last loss {loss:.5g}")
    return ", ".join(filter(None, [*told, evaluation_of(run)]))


def draw_runs(directories, output):
    """Writes the picture, whole or not at all. → a line that tells of it"""
    if output.is_dir() or output.suffix.lower() != ".png":
        raise ValueError(f"--output {output}: name a file that ends in .png, and no directory")
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of its cache of fonts
    try:
        fonts = installed_fonts()
    except ImportError as error:
        raise ValueError(
            "curves need matplotlib: pip install -r requirements-curves.txt"
        ) from error
    paths = list(dict.fromkeys(os.path.abspath(directory) for directory in directories))
    runs = []
    for path in paths:
        name = shortest_name(path, paths)
        runs.append(Curves(label_of(len(runs) + 1, name, fonts), name, read_metrics(path)))
    part = output.with_name(f"{output.name}.part")
    try:
        draw(runs, fonts, part)
        os.replace(part, output)
    except OSError as error:
        what = f"cannot write: {error.strerror or error}"
        raise OSError(f"--output {output}: {what}; choose another file") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return f"{output}: {'; '.join(map(summary, runs))}"


def main(argv=None):
    parser = commands.new_parser("Draws the curves of runs of train.py.", prog=PROGRAM)
    parser.add_argument("directories", nargs="+", metavar="DIR", help="--output-dir of a run")
    parser.add_argument("--output", type=Path, default="curves.png", help="the picture, a PNG")
    args = parser.parse_args(argv)
    commands.check_utf8(parser, str(args.output), *args.directories)
    with commands.errors_for_user(PROGRAM, "out of memory"):
        print(draw_runs(args.directories, args.output))


if __name__ == "__main__":
    main()
