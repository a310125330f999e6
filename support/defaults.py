"""Defaults that several modules share."""

from pathlib import Path

SAMPLE = Path(__file__).parents[1] / "dataset" / "sample.jsonl"  # what is trained without --data
SAMPLING = dict(temperature=0.8, top_p=0.8)  # infer.py's defaults; exports carry them along
ADAPTER_DIR = "output/ChatGLM"  # where train.py writes and infer.py looks
