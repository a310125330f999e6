"""Measures how long exports of a whole model take, and how much memory.

    python tests/benchmarks/random_checkpoint.py DIRECTORY --vocabulary tokenizer.model
    python tests/benchmarks/exporting.py DIRECTORY TARGET_DIRECTORY

Each row is a run of infer.py with a random adapter (r 8 on query_key_value), without and with the
check. The exports are deleted. "memory" is the process's peak, with the pages of the files that it
has mapped; llama.cpp maps the whole file for the check.
"""

import argparse
import datetime
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import infer
import model as chatglm
from support.merging import MergedModel

RUNS = [
    ["--gguf", "f16.gguf", "--gguf-type", "f16"],
    ["--gguf", "q8_0.gguf", "--gguf-type", "q8_0"],
    ["--gguf", "q4_0.gguf", "--gguf-type", "q4_0"],
    ["--merge-to", "official"],
    ["--merge-to", "glm", "--layout", "glm"],
]


def random_adapter(base, directory):
    """Writes an adapter of that base whose B is not zero."""
    empty = MergedModel(base, chatglm.ChatGLMForCausalLM).model
    peft_model = chatglm.add_lora(empty, 8, 32, 0.1, ["query_key_value"])
    with torch.no_grad():
        for name, param in peft_model.named_parameters():
            if "lora_B" in name:
                param.normal_(std=0.01)
    chatglm.save_adapter(peft_model, directory)


def measure(command, directory):
    """Runs infer.py. → (seconds, peak bytes, what it printed)"""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, infer.__file__, *command], cwd=directory, stdout=subprocess.PIPE
    )
    told = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, told
    return time.perf_counter() - start, usage.ru_maxrss * 1024, told


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", help="what random_checkpoint.py has written")
    parser.add_argument("target", type=Path, help="where to write; the exports are deleted")
    parser.add_argument("--only", default="", help="rows whose file or directory is called so")
    args = parser.parse_args()
    base = str(Path(args.base).resolve())
    print(f"{datetime.date.today()}, {os.cpu_count()} cores ({platform.machine()})\n")
    print("| | seconds | memory, GiB | with the check: seconds | memory, GiB | size, GiB |")
    print("|---|---|---|---|---|---|")
    checks = []
    with tempfile.TemporaryDirectory(dir=args.target) as name:
        directory = Path(name)
        random_adapter(base, directory / "adapter")
        common = ["--model", base, "--adapter", "adapter"]
        for flags in RUNS:
            target = directory / flags[1]
            if args.only not in target.name:
                continue
            row = []
            for more in (["--no-check"], []):
                seconds, peak, told = measure([*common, *flags, *more], directory)
                row.append(f"{seconds:.0f} | {peak / 2**30:.1f}")
                files = target.glob("*") if target.is_dir() else [target]
                size = sum(file.stat().st_size for file in files) / 2**30
                for path in directory.glob(f"{target.stem}*"):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            checks.append(told)
            print(f"| {' '.join(flags)} | {' | '.join(row)} | {size:.1f} |", flush=True)
    print("\n" + "\n".join(checks))


if __name__ == "__main__":
    main()
