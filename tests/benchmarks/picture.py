"""Draws docs/pictures/memory.png: speed against memory, the numbers of README's table of cards.

pip install -r requirements-curves.txt
python tests/benchmarks/picture.py
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| \d+ GB.*? \| `(--.*?)` \| ([\d.]+) \| (\d+) \|$", re.M)
SHORT = {"--load-in ": "", "--gradient-checkpointing all": "checkpointing"}
SHORT |= {"--batch-size 8 --gradient-accumulation-steps 1": "8 × 1"}
COLOURS = {"4bit": "tab:red", "fp8": "tab:blue"}  # fp16 is black


def points():
    """→ [(flags in short, GiB, samples/s)] of README's table

    Where fp8 has two rows with the same flags, the larger one stores each matrix twice.
    """
    found = []
    for flags, memory, speed in ROW.findall((ROOT / "README.md").read_text("utf-8")):
        for long, short in SHORT.items():
            flags = flags.replace(long, short)
        kind = "" if flags.startswith(tuple(COLOURS)) else "fp16 "
        size = "" if "8 × 1" in flags else " 4 × 2"
        found.append((kind + flags + size, float(memory), int(speed)))
    names = [name for name, _, _ in found]
    largest = {name: memory for name, memory, _ in sorted(found, key=lambda point: point[1])}
    for i, (name, memory, speed) in enumerate(found):
        if names.count(name) == 2:
            stored = "stored twice" if memory == largest[name] else "stored once"
            found[i] = (f"{name}, {stored}", memory, speed)
    return found


def main():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, memory, speed in points():
        colour = COLOURS.get(name.split()[0], "black")
        axes.plot(memory, speed, "o", color=colour)
        is_left = colour == COLOURS["fp8"]  # else labels would overlap
        place = dict(ha="right" if is_left else "left", va="center", color=colour)
        offset = dict(xytext=(-7 if is_left else 7, 0), textcoords="offset points")
        axes.annotate(name, (memory, speed), **offset, **place)
    axes.set(xlim=(2, 20), ylim=(0, 450), xlabel="GiB", ylabel="samples/s on one H200, --compile")
    axes.grid(alpha=0.3)
    figure.savefig(ROOT / "docs" / "pictures" / "memory.png", dpi=130)


if __name__ == "__main__":
    main()
