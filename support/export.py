"""Exports: base and adapter as a directory or a GGUF file, for other programs.

An export is written whole or not at all. Before it gets its name, another program's own reader
opens it, and what it computes is compared with this project's model: see support/self_check.py.
"""

import importlib.util
import math
import os
import shlex
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from support import layouts, self_check
from support.bases import base_file, check_finite, own_dtype, zero_if_finite
from support.config import DTYPES, dtype_name
from support.errors import one_line
from support.files import as_json, delete, nearest_existing, read_json, write_files
from support.self_check import LIMITS, LlamaCppReader, TransformersReader
from support.tokenizer_files import CHAT_TEMPLATE, tokenizer_files

SHARD = "2GB"  # about the official size
# Code and settings that stand beside the official weights. They are copied, and never run.
OFFICIAL_CODE = (
    "configuration_chatglm.py",
    "modeling_chatglm.py",
    "tokenization_chatglm.py",
    "quantization.py",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


def check_possible(args):
    """Raises ValueError if something is where an export would be, or a package is missing."""
    path = Path(getattr(args, args.export)).absolute()
    for each in (path, modelfile_of(path)) if args.gguf else (path,):
        is_empty = args.merge_to and path.is_dir() and not any(path.iterdir())
        if each.exists() and not is_empty and not args.check:
            raise ValueError(f"{each} exists already; choose another name")
        if (part := part_of(each)).exists():
            raise ValueError(f"{part}: {each.name} would be written there first; remove it")
    if args.check and not path.exists():
        raise ValueError(f"{path}: there is nothing to check")
    if not path.is_dir() and not args.merge_to and importlib.util.find_spec("gguf") is None:
        raise ValueError("GGUF files need gguf: pip install -r requirements-export.txt")


def modelfile_of(file):
    """→ the path of the Modelfile beside a GGUF file"""
    return file.with_name(f"{file.name.removesuffix('.gguf')}.Modelfile")


def part_of(path):
    """→ where an export is written before it gets its name"""
    return path.with_name(f"{path.name}.part")


@contextmanager
def whole(path, size=0):
    """Gives the path to write to. At the end it gets its name; after an error it is deleted.

    size: how many bytes will be written. Raises ValueError if the disk does not take them.
    """
    part = part_of(path)
    free = shutil.disk_usage(nearest_existing(path)).free
    if size > free:
        what = f"it needs {size / 2**30:.1f} GiB, and {free / 2**30:.1f} are free"
        raise ValueError(f"{path}: cannot write: {what}")
    try:
        yield part
        if path.exists():  # it is an empty directory, and Windows replaces none
            path.rmdir()
        os.replace(part, path)
    except BaseException as error:
        if part.exists():
            delete(part)
        if isinstance(error, OSError | SafetensorError):
            raise ValueError(f"{path}: cannot write: {one_line(error)}") from error
        raise


@contextmanager
def progress_bar(size, what):
    """Gives a function that is told of n more bytes."""
    options = dict(unit="B", unit_scale=True, unit_divisor=1024, desc=what, leave=False)
    with tqdm(total=size, disable=None, **options) as bar:
        yield bar.update


class Export:
    """Writes what infer.py's flags ask for, or checks what was written earlier.

    model: a MergedModel; tokenizer: a data.ChatGLMTokenizer; encode_prompt: data.encode_prompt
    """

    def __init__(self, args, model, tokenizer, preamble, encode_prompt):
        self.args, self.model, self.tokenizer = args, model, tokenizer
        self.system, self.start = preamble.system, time.perf_counter()
        self.prompts = []  # of those that the check uses, what fits into the context
        for messages in map(preamble.added_to, self_check.CONVERSATIONS):
            ids = encode_prompt(tokenizer, messages)
            if len(ids) + self_check.NEW_TOKENS <= model.config.seq_length:
                self.prompts.append((messages, ids))

    def run(self):
        """Raises ValueError if base or adapter can't be exported, or an export is not right."""
        check_finite(self.model)
        path = Path(getattr(self.args, self.args.export)).absolute()
        if self.args.merge_to:
            self.write_directory(path)
        elif self.args.gguf:
            self.write_gguf(path)
        elif self.args.gguf_adapter:
            self.write_gguf_adapter(path)
        elif path.is_dir():
            self.check_directory(path)
        else:
            self.check_gguf(path)

    def seconds(self):
        return f"{time.perf_counter() - self.start:.1f} s"

    # --- directories --------------------------------------------------------------------------

    def write_directory(self, path):
        is_glm = self.args.layout == "glm"
        name = own_dtype(self.model.name_or_path) if self.args.dtype == "auto" else self.args.dtype
        dtype = DTYPES["fp32" if name == "auto" else name]
        targets = (layouts.glm_tensors if is_glm else layouts.official_tensors)(self.model)
        size = dtype.itemsize * sum(math.prod(target.shape) for target in targets.values())
        with whole(path, size) as part:
            write_files(part, self.small_files(dtype, is_glm))
            with progress_bar(size, "writing") as progress:
                write_shards(part, targets, dtype, progress)
            for file in part.glob("*.safetensors"):  # they are the owner's alone
                shutil.copymode(part / "config.json", file)
            if not self.args.no_check:
                self.check_directory(part)
        print(f"saved    {path} in {self.seconds()}; try it:")
        if is_glm:
            print(f"         transformers.AutoModelForCausalLM.from_pretrained({str(path)!r})")
        else:
            shown = shlex.quote(self.system) if (self.system or "\n").isprintable() else "…"
            hint = f" --system {shown}" if self.system else ""
            print(f"         python infer.py --no-adapter --model {shlex.quote(str(path))}{hint}")

    def small_files(self, dtype, is_glm):
        """→ {name: bytes} of all files but the weights"""
        base = self.model.name_or_path
        files = tokenizer_files(self.tokenizer, self.model.config.seq_length)
        if is_glm:
            config = layouts.glm_config(self.model.config, dtype, self.tokenizer.stop_ids)
        else:
            with_code = self.args.with_official_code
            config = read_json(base_file(base, "config.json"))
            config = layouts.official_config(self.model.config, config, dtype, with_code)
            for name in ("tokenizer.model", *(OFFICIAL_CODE if with_code else ())):
                if file := base_file(base, name):
                    files[name] = Path(file).read_bytes()
        if file := base_file(base, "MODEL_LICENSE"):
            files["MODEL_LICENSE"] = Path(file).read_bytes()
        return files | {"config.json": as_json(config)}

    def check_directory(self, path):
        dtype, network = own_dtype(path), None
        if dtype == "auto":
            raise ValueError(f"{path}: not an export of infer.py: its config.json has no dtype")
        try:
            if read_json(path / "config.json")["model_type"] == "chatglm":
                kind, stop_ids = type(self.model.model), self.tokenizer.stop_ids
                network = layouts.official_as_glm(path, kind, DTYPES[dtype], stop_ids)
            reader = TransformersReader(path, network)
        except Exception as error:  # whatever a damaged directory makes the readers raise
            raise ValueError(f"{path}: transformers can't open it: {one_line(error)}") from error
        self_check.compare(reader, self.model, self.prompts, LIMITS[dtype])

    # --- GGUF ---------------------------------------------------------------------------------

    def write_gguf(self, path):
        from support import gguf

        file = gguf.ModelFile(self.model, self.tokenizer, CHAT_TEMPLATE, self.args.gguf_type)
        size = sum(file.sizes.values())
        with whole(path, size) as part:
            with progress_bar(size, "writing") as progress:
                file.write(part, progress)
            if not self.args.no_check:
                self.check_gguf(part)
            with whole(modelfile_of(path)) as modelfile:
                modelfile.write_text(gguf.modelfile(path.name, self.system), "utf-8")
        print(f"saved    {path}, and {modelfile_of(path).name}, in {self.seconds()}; try it:")
        print(f"         llama-server --jinja -m {shlex.quote(str(path))}")
        print(f"         ollama create NAME -f {shlex.quote(str(modelfile_of(path)))}")

    def write_gguf_adapter(self, path):
        from support import gguf

        with whole(path) as part:
            gguf.write_adapter(part, self.model)
            if not self.args.no_check:
                self.check_gguf(part)
        print(f"saved    {path}; try it beside a GGUF file of the base:")
        print(f"         llama-server --jinja -m BASE.gguf --lora {shlex.quote(str(path))}")

    def check_gguf(self, path):
        from support import gguf

        file_type = gguf.file_type_of(path)
        if file_type is None:
            gguf.check_adapter(path, self.model)
            print("checked  each matrix that it adds: it is the adapter's")
            return
        file = gguf.ModelFile(self.model, self.tokenizer, CHAT_TEMPLATE, file_type)
        with progress_bar(sum(file.sizes.values()), "checking") as progress:
            file.check(path, progress)
        print(f"checked  {len(file.types)} tensors, the vocabulary and the settings")
        if importlib.util.find_spec("xllamacpp") is None:
            print("         to compare llama.cpp's answers: pip install -r requirements-export.txt")
            print(f"         and then python infer.py --check {shlex.quote(str(path))}")
            return
        reader = LlamaCppReader(path)
        self_check.compare(reader, self.model, self.prompts, LIMITS[file_type])
        reader.close()


def write_shards(directory, targets, dtype, progress):
    """Writes {name: Target} as safetensors files of at most SHARD, with an index if it has several.

    progress(n) is told of n more bytes. Raises ValueError for a number too large for `dtype`.
    """
    empty = {n: torch.empty(t.shape, dtype=dtype, device="meta") for n, t in targets.items()}
    pattern = "model{suffix}.safetensors"
    split = split_torch_state_dict_into_shards(
        empty, max_shard_size=SHARD, filename_pattern=pattern
    )
    for file, names in split.filename_to_tensors.items():
        shard = {}
        for name in names:
            shard[name] = targets[name].read().to(dtype, copy=True).contiguous()
            if zero_if_finite(shard[name]) != 0:
                what = f"{name} has numbers too large for {dtype_name(dtype)}"
                raise ValueError(f"{what}; give --dtype fp32")
            progress(shard[name].nbytes)
        save_file(shard, directory / file, {"format": "pt"})
    if split.is_sharded:
        index = dict(metadata=split.metadata, weight_map=split.tensor_to_filename)
        (directory / "model.safetensors.index.json").write_bytes(as_json(index))
