"""Shared fixtures and helpers.

Files that are not this project's to copy (the official vocabulary, the tutorial's data set, the
real checkpoint) are read from where the user has them. Without them their tests skip, and say so.
"""

import contextlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the network
# Nearly all models of the tests are too small to gain from threads. Child processes inherit this.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from safetensors.torch import load_file

import data
import infer
import model as chatglm
import train
from support import bases, layouts
from support.checkpoints import STATE, list_checkpoints
from support.defaults import SAMPLE
from support.files import as_json, read_json, write_files
from support.merging import MergedModel
from support.records import RecordReader

ROOT = Path(__file__).parent.parent
FIXTURES = Path(__file__).parent / "fixtures"
REFERENCE = Path(os.environ.get("CHATGLM3_REFERENCE", ROOT.parent / "shared"))
PERSONA = "现在你要扮演皇帝身边的女人--甄嬛"
KILLS = int(os.environ.get("CHATGLM3_KILLS", "0"))  # how many a test makes; 0: a few
slow = pytest.mark.skipif(
    not os.environ.get("CHATGLM3_SLOW"), reason="takes a minute; CHATGLM3_SLOW=1 runs it"
)
with contextlib.suppress(ValueError):  # some runners import this in another thread
    # A shell ignores SIGINT in what it runs with "&", and nohup ignores SIGHUP.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items):
    """Slow files come first: a worker runs a whole file, and the others wait for the last one."""
    slow_ones = ("test_recomputation", "test_restarts", "test_walkthrough", "test_windows")
    items.sort(key=lambda item: item.path.stem not in slow_ones)


def reference(name):
    """A file of the reference data, or a skip."""
    if not (REFERENCE / name).exists():
        pytest.skip(f"needs {name}, in the directory that CHATGLM3_REFERENCE names")
    return REFERENCE / name


@pytest.fixture(params=["tiny", "tiny-32k"])
def golden(request):
    """(checkpoint directory, what the official implementation computed with it)"""
    return FIXTURES / request.param, load_file(FIXTURES / request.param / "expected.safetensors")


@pytest.fixture
def base():
    """The smallest checkpoint, fresh."""
    return chatglm.load_model(FIXTURES / "tiny", "cpu")


@pytest.fixture(scope="session")
def tokenizer():
    """The built-in model's vocabulary."""
    return data.ChatGLMTokenizer(chatglm.BUILT_IN)


@pytest.fixture(scope="session")
def official_tokenizer():
    return data.ChatGLMTokenizer(reference("golden/tokenizer.model").parent)


def run(script, *args, **kwargs):
    """`python script args`, as a user would."""
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=600, **kwargs)


def random_samples(lengths, vocab_size, seed=0):
    """Samples of data.ConversationDataset's form, the first third of each not learnt."""
    torch.manual_seed(seed)
    samples = []
    for n in lengths:
        ids = torch.randint(3, vocab_size, (n,))
        labels = ids.clone()
        labels[: n // 3 + 1] = data.IGNORE
        samples.append((ids, labels))
    return samples


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    return path


def read_conversations(files):
    """→ [(place, messages)] of all records"""
    return [(record.place, record.messages) for record in RecordReader(files)]


# --- models and adapters ----------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the smallest checkpoint, to be damaged."""
    left_out = shutil.ignore_patterns("adapter", "expected*")
    return shutil.copytree(FIXTURES / "tiny", tmp_path / "base", ignore=left_out)


class Marker:
    """Unpickling this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


# The four matrices of a block
LINEAR = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]


def merged_model(base, adapter=None):
    """→ the MergedModel of a directory, and the directory of an adapter"""
    return MergedModel(str(base), chatglm.ChatGLMForCausalLM, chatglm.load_adapter, adapter)


def write_layout(directory, base, adapter=None, layout="official", dtype=torch.float32):
    """Writes config.json and the weights of an export. → its MergedModel"""
    model = merged_model(base, adapter)
    if layout == "glm":
        targets, config = layouts.glm_tensors(model), layouts.glm_config(model.config, dtype, [2])
    else:
        given = read_json(Path(base, "config.json"))
        targets = layouts.official_tensors(model)
        config = layouts.official_config(model.config, given, dtype)
    write_files(directory, {"config.json": as_json(config)})
    layouts.write_shards(directory, targets, dtype, lambda count: None)
    return model


def with_random_lora(model, **options):
    """LoRA whose B is not zero, as it is at first: then a test of it would always pass."""
    targets = ["query_key_value", "dense_4h_to_h"]
    options = dict(r=4, alpha=8, dropout=0.0, target_modules=targets) | options
    torch.manual_seed(1)
    peft_model = chatglm.add_lora(model, **options)
    with torch.no_grad():
        for name, param in peft_model.named_parameters():
            if "lora_B" in name:
                param.normal_(std=0.1)
    return peft_model


def trained_parameters(peft_model):
    """→ {name: parameter} of all that is trained, under the names that adapter files use"""
    params = peft_model.named_parameters()
    return {n.replace(".default", ""): param for n, param in params if param.requires_grad}


# --- runs of train.py -------------------------------------------------------------------------

# A model with the built-in model's vocabulary and a twelfth of its weights. It is for tests that
# train, and do not look at answers.
SMALL_BASE = FIXTURES / "small"
ON_SMALL_BASE = ["--model", str(SMALL_BASE), "--learning-rate", "0.003"]
# LoRA is then on all linear layers, without dropout, as for the built-in model
LIKE_BUILT_IN = [*ON_SMALL_BASE, "--target-modules", "all", "--lora-dropout", "0"]
# --output-dir stands last: the directory comes next.
SIX_UPDATES = "--max-steps 6 --save-steps 2 --logging-steps 1 --device cpu --output-dir".split()
SHORT = [*ON_SMALL_BASE, *SIX_UPDATES]
# Of the sample's 119 records 6 make an update, so that the second epoch begins at update 21. With
# --model, dropout is on: a resumed run must repeat its masks.
LONG = "--max-steps 30 --save-steps 2 --logging-steps 3".split()
LONG += [*ON_SMALL_BASE, "--batch-size", "3", "--gradient-accumulation-steps", "2"]


@pytest.fixture(autouse=True, scope="session")
def small_base():
    """Makes the weights of SMALL_BASE. They are not in the repository."""
    bases.make_random_weights(SMALL_BASE, chatglm.ChatGLMForCausalLM, chatglm.ChatGLMConfig)


def new_run(peft_model, *flags, dataset=None, checkpoint=None):
    """A train.Run of `peft_model`, with these flags of train.py, on the sample or `dataset`."""
    if dataset is None:
        tokenizer = data.ChatGLMTokenizer(chatglm.BUILT_IN)
        dataset = data.ConversationDataset([SAMPLE], tokenizer, 512)
    return train.Run(train.parse_args(list(flags)), peft_model, dataset, checkpoint)


def train_main(*arguments):
    """train.main, for arguments of any type"""
    train.main([str(argument) for argument in arguments])


def metrics_of(directory):
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def outcome(directory):
    """What two runs must have in common bit for bit: adapter, AdamW's moments, metrics, counts."""
    last = list_checkpoints(directory)[0]
    files = [directory / "adapter_model.safetensors", directory / "metrics.jsonl"]
    return [file.read_bytes() for file in [*files, *(last / name for name in STATE)]]


def contents(directory):
    """→ {path: bytes} of all files below `directory`"""
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def refused(capsys, *arguments):
    """Runs train.py, which must end with one line of error. → that line"""
    with pytest.raises(SystemExit) as stop:
        train.main([str(argument) for argument in arguments])
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert stop.value.code == 2 and len(errors) == 1, errors
    return errors[0]


@pytest.fixture(scope="session")
def fork(tmp_path_factory):
    """fork(function, *arguments) → a process that calls it, and prints to the file process.log.

    It is forked from a process that has imported train.py and infer.py.
    """
    # peft imports bitsandbytes, which starts CUDA, and then no process can be forked.
    can_fork = not (torch.cuda.is_available() and importlib.util.find_spec("bitsandbytes"))
    context = multiprocessing.get_context("forkserver" if can_fork else "spawn")
    if can_fork:
        context.set_forkserver_preload(["train", "infer"])
    os.environ["PYTHONPATH"] = str(ROOT)
    logs, numbers = tmp_path_factory.mktemp("logs"), itertools.count()

    def fork(function, *arguments):
        log = logs / str(next(numbers))
        process = context.Process(target=call_and_log, args=(log, function, *arguments))
        process.log = log
        process.start()
        return process

    return fork


def call_and_log(log, function, *arguments):
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    function(*arguments)


@pytest.fixture(scope="session")
def start(fork):
    """start(*arguments, **environment) → a process that runs train.py: see fork"""
    return lambda *arguments, **environment: fork(
        train_in_this_process, [str(argument) for argument in arguments], environment
    )


def train_in_this_process(arguments, environment):
    os.environ.update(environment)
    train.main(arguments)


def start_several(start, count, *arguments, each=None):
    """Starts processes as torchrun would, but forked. each: more arguments of each, or None"""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    common = dict(MASTER_ADDR="localhost", MASTER_PORT=port, WORLD_SIZE=str(count))
    common["TORCHELASTIC_RUN_ID"] = "test"
    own = each or [[]] * count
    return [
        start(*arguments, *more, RANK=str(rank), LOCAL_RANK=str(rank), **common)
        for rank, more in enumerate(own)
    ]


def finish(process, code=0):
    """Waits until a process of `start` ends, with this exit code. → what it printed"""
    process.join(120)
    assert process.exitcode == code, process.log.read_text()
    return process.log.read_text()


def wait_for(condition, process):
    """Waits until condition() is true. Fails if the process ends before."""
    while not condition():
        is_popen = isinstance(process, subprocess.Popen)
        assert process.poll() is None if is_popen else process.is_alive()
        time.sleep(0.001)


def has_metrics(directory):
    """Whether a run has written its first line of metrics."""
    file = directory / "metrics.jsonl"
    return file.exists() and file.stat().st_size > 0


# --- what infer.py answers with ---------------------------------------------------------------

QUESTION, ANSWER = "你是谁？", "我是小砚，一个在随机权重上练出来的小模型。"  # of the sample


@pytest.fixture(scope="session", params=["cpu", "cuda"])
def trained(request, tmp_path_factory):
    """(adapter directory, device) after `python train.py`: fp32 on the CPU, fp16 on CUDA.

    CHATGLM3_TRAINED names the directory of such a run on a CPU that has just been made.
    """
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if request.param == "cpu" and (made := os.environ.get("CHATGLM3_TRAINED")):
        return Path(made).resolve(), "cpu"
    directory = tmp_path_factory.mktemp("trained")
    done = run("train.py", "--output-dir", directory, "--device", request.param)
    assert done.returncode == 0, done.stderr
    return directory, request.param


def adapter_of(directory, system=None, **base):
    """An adapter of the built-in model that has learnt nothing, with what it says of its base."""
    model = chatglm.load_model(chatglm.built_in_model(), "cpu")
    found = bases.fingerprint(model, data.ChatGLMTokenizer(chatglm.BUILT_IN).digest)
    chatglm.save_adapter(chatglm.add_lora(model, 4, 8, 0.0, ["query_key_value"]), directory)
    arguments = {"system": system, "base": found | base}
    (directory / "training_args.json").write_text(json.dumps(arguments))
    return directory


def refused_by_infer(capsys, *arguments):
    """Runs infer.py, which must end with one line of error and no answer. → that line"""
    with pytest.raises(SystemExit) as stop:
        infer.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if "error: " in line]
    assert stop.value.code == 2 and len(errors) == 1 and out == "", (out, err)
    return errors[0]
