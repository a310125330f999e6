"""Defaults and names that several modules share. They need no slow import."""

from pathlib import Path

SAMPLE = Path(__file__).parents[1] / "dataset" / "sample.jsonl"  # the data, if there is no --data
SAMPLING = dict(temperature=0.8, top_p=0.8)  # infer.py's defaults; exports carry them along
ADAPTER_DIR = "output/ChatGLM"  # where train.py writes and infer.py looks, without flags
DTYPE_NAMES = ("fp16", "bf16", "fp32")
