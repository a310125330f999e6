"""Measures how long data.ConversationDataset takes to read a large file, and how much memory.

    python tests/benchmarks/reading.py --vocabulary tokenizer.model

It writes 500,000 records of some 116 tokens (with ChatGLM3's vocabulary) into a temporary file, and
reads them twice, each time in a process of its own:

- "one at a time": all records are read. Then each conversation is encoded by itself, and becomes
  two tensors. That is what this project did before.
- "packed": as the project does it. Texts are encoded in batches, and stored in flat arrays.

"seconds" is the time to read, "peak GiB" the most memory that the process ever had, with torch and
all libraries. The limits of the project are 25 seconds and 1.5 GiB, on 2 cores.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import data
import model as chatglm
from support.records import RecordReader

WORDS = (
    "今天 天气 很好 我们 一起 去 公园 散步 然后 吃饭 你 知道 这个 问题 比较 复杂 需要 仔细 "
    "分析 数据 结果 显示 learning rate of the model a quick brown fox"
).split()
JOINTS = ["", "，", " ", "。", "\n"]


def write_records(file, count):
    rng = random.Random(0)

    def text(words):
        return "".join(rng.choice(WORDS) + rng.choice(JOINTS) for _ in range(words))

    with open(file, "w", encoding="utf-8") as opened:
        for _ in range(count):
            record = {"instruction": text(20), "input": "", "output": text(40)}
            opened.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_one_at_a_time(file, tokenizer):
    samples = []
    for record in list(RecordReader([file])):
        input_ids, labels = data.encode_conversation(tokenizer, record.messages)
        samples.append((torch.tensor(input_ids[:512]), torch.tensor(labels[:512])))
    return sum(len(input_ids) for input_ids, _ in samples)


def read_packed(file, tokenizer):
    return sum(data.ConversationDataset([file], tokenizer, 512).lengths)


def measure(read, file, vocabulary, results):
    tokenizer = data.ChatGLMTokenizer(vocabulary)
    start = time.perf_counter()
    tokens = read(file, tokenizer)
    seconds = time.perf_counter() - start
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    results.put((tokens, seconds, peak))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--vocabulary", type=Path, help="tokenizer.model (default: the built-in model's)")
    add("--records", type=int, default=500_000)
    add("--data", help="a file of records to be read instead")
    args = parser.parse_args()
    vocabulary = args.vocabulary.parent if args.vocabulary else chatglm.BUILT_IN
    system = f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}"
    print(f"{os.cpu_count()} cores, {system}")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        file = args.data or str(Path(directory, "records.jsonl"))
        if not args.data:
            write_records(file, args.records)
        print("| | tokens | seconds | peak GiB |\n|---|---|---|---|")
        for name, read in (("one at a time", read_one_at_a_time), ("packed", read_packed)):
            results = context.Queue()
            arguments = (read, file, vocabulary, results)
            process = context.Process(target=measure, args=arguments)
            process.start()
            tokens, seconds, peak = results.get()
            process.join()
            print(f"| {name} | {tokens:,} | {seconds:.1f} | {peak:.2f} |", flush=True)


if __name__ == "__main__":
    main()
