"""Exports: base and adapter as a directory or a GGUF file, for other programs.

An export is written whole or not at all. Before it gets its name, another program's own reader
opens it, and what it computes is compared with this project's model: see support/self_check.py.
"""

import contextlib
import importlib.util
import math
import os
import shlex
import shutil
import time
import traceback
from pathlib import Path

from safetensors import SafetensorError
from tqdm import tqdm

from support import layouts, self_check
from support.bases import base_file, check_finite, own_dtype
from support.config import DTYPES
from support.errors import one_line
from support.files import as_json, delete, nearest_existing, read_json, write_files
from support.merging import MergedModel
from support.ollama import modelfile_text
from support.self_check import LIMITS, LlamaCppReader, TransformersReader
from support.tokenizer_files import CHAT_TEMPLATE, tokenizer_files

# The file's own template; and an answer is a text: llama.cpp can't parse ChatGLM3's calls.
LLAMA_FLAGS = "--jinja --skip-chat-parsing"
# The code that stands beside the official weights. It is copied, and never run.
OFFICIAL_CODE = (
    "configuration_chatglm.py",
    "modeling_chatglm.py",
    "tokenization_chatglm.py",
    "quantization.py",
)


def target_of(args):
    """→ the absolute path of the export that the flags mean"""
    return Path(getattr(args, args.export)).absolute()


def check_target(args):
    """Raises ValueError if something is where an export would be, or a package is missing."""
    path = target_of(args)
    if args.check and not path.exists():
        raise ValueError(f"{path}: there is nothing to check")
    targets = [] if args.check else [path]
    if args.gguf:
        targets.append(modelfile_path(path))
    for each in targets:
        is_empty = args.merge_to and path.is_dir() and not any(path.iterdir())
        if each.exists() and not is_empty:
            raise ValueError(f"{each} exists already; choose another name")
        if (part := part_of(each)).exists():
            what = "it is left of an export that was stopped, or something else is called so"
            raise ValueError(f"{part}: {what}; remove it")
    is_gguf = args.gguf or args.gguf_adapter or (args.check and path.is_file())
    if is_gguf and importlib.util.find_spec("gguf") is None:
        raise ValueError("GGUF files need gguf: pip install -r requirements-export.txt")


def modelfile_path(file):
    """→ the path of the Modelfile beside a GGUF file"""
    return file.with_name(f"{file.name.removesuffix('.gguf')}.Modelfile")


def part_of(path):
    """→ where an export is written before it gets its name"""
    return path.with_name(f"{path.name}.part")


@contextlib.contextmanager
def written_whole(path, size=0, is_directory=False):
    """Gives the path to write to. On success it is renamed to `path`; after an error it is deleted.

    size: how many bytes will be written. Raises ValueError if the disk does not take them.
    """
    part = part_of(path)
    free = shutil.disk_usage(nearest_existing(path)).free
    if size > free:
        what = f"it needs {size / 2**30:.1f} GiB, and {free / 2**30:.1f} are free"
        raise ValueError(f"{path}: cannot write: {what}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir() if is_directory else part.touch(exist_ok=False)  # no other export has it
    except OSError as error:
        raise ValueError(f"{path}: cannot write: {one_line(error)}") from error
    try:
        yield part
        if path.exists():  # an empty directory, which os.replace does not replace on Windows
            path.rmdir()
        os.replace(part, path)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # closes what the check has opened, for Windows
        with contextlib.suppress(OSError):
            delete(part)
        if isinstance(error, OSError | SafetensorError):
            raise ValueError(f"{path}: cannot write: {one_line(error)}") from error
        raise


@contextlib.contextmanager
def progress_bar(size, what):
    """Gives progress(n), to be called after n more bytes."""
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
        conversations = map(preamble.added_to, self_check.CONVERSATIONS)
        prompts = [(messages, encode_prompt(tokenizer, messages)) for messages in conversations]
        room = model.config.seq_length - self_check.NEW_TOKENS
        self.prompts = [(messages, ids) for messages, ids in prompts if len(ids) <= room]

    def run(self):
        """Raises ValueError if base or adapter can't be exported, or an export is not right."""
        check_finite(self.model)
        path = target_of(self.args)
        if self.args.merge_to:
            self.write_directory(path)
        elif self.args.gguf:
            self.write_gguf(path)
        elif self.args.gguf_adapter:
            self.write_gguf_adapter(path)
        elif path.is_dir():
            self.check_directory(path)
        else:
            self.check_gguf(path, path)

    def seconds(self):
        return f"{time.perf_counter() - self.start:.1f} s"

    # --- directories --------------------------------------------------------------------------

    def write_directory(self, path):
        is_glm = self.args.layout == "glm"
        name = own_dtype(self.model.name_or_path) if self.args.dtype == "auto" else self.args.dtype
        dtype = DTYPES["fp32" if name == "auto" else name]
        targets, size = self.targets(dtype, is_glm)
        with written_whole(path, size, is_directory=True) as part:
            write_files(part, self.small_files(dtype, is_glm, self.args.with_official_code))
            with progress_bar(size, "writing") as progress:
                layouts.write_shards(part, targets, dtype, progress)
            for file in part.glob("*.safetensors"):  # which only the owner may read
                shutil.copymode(part / "config.json", file)
            if not self.args.no_check:
                self.check_directory(part)
        print(f"saved    {path} in {self.seconds()}; try it:")
        if is_glm:
            print(f"         transformers.AutoModelForCausalLM.from_pretrained({str(path)!r})")
        else:
            hint = f"--no-adapter --model {shlex.quote(str(path))}"
            if self.system:
                shown = shlex.quote(self.system) if self.system.isprintable() else "…"
                hint += f" --system {shown}"
            print(f"         python infer.py {hint}")

    def targets(self, dtype, is_glm):
        """→ ({name: Target}, their size in bytes)"""
        targets = (layouts.glm_tensors if is_glm else layouts.official_tensors)(self.model)
        return targets, dtype.itemsize * sum(math.prod(each.shape) for each in targets.values())

    def small_files(self, dtype, is_glm, with_code):
        """→ {name: bytes} of all files but the weights"""
        base = self.model.name_or_path
        files = tokenizer_files(self.tokenizer, self.model.config.seq_length)
        if is_glm:
            config = layouts.glm_config(self.model.config, dtype, self.tokenizer.stop_ids)
        else:
            config = read_json(base_file(base, "config.json"))
            for name in ("tokenizer.model", *(OFFICIAL_CODE if with_code else ())):
                if file := base_file(base, name):
                    files[name] = Path(file).read_bytes()
            has_code = "modeling_chatglm.py" in files
            config = layouts.official_config(self.model.config, config, dtype, has_code)
        if file := base_file(base, "MODEL_LICENSE"):
            files["MODEL_LICENSE"] = Path(file).read_bytes()
        return files | {"config.json": as_json(config)}

    def check_directory(self, path):
        dtype, network = own_dtype(path), None
        if dtype == "auto":
            raise ValueError(f"{path}: not an export of infer.py: its config.json has no dtype")
        try:
            if read_json(path / "config.json")["model_type"] == "chatglm":
                written = MergedModel(str(path), type(self.model.model))
                network = layouts.as_glm(written, DTYPES[dtype])
            reader = TransformersReader(path, network)
        except Exception as error:  # whatever a damaged directory makes the readers raise
            raise ValueError(f"{path}: transformers can't open it: {one_line(error)}") from error
        self.compare(reader, LIMITS[dtype])
        self.check_files(path, DTYPES[dtype], is_glm=network is None)

    def check_files(self, path, dtype, is_glm):
        """Raises ValueError if a file or a tensor of the directory is not what it should be."""
        has_code = any((path / name).exists() for name in OFFICIAL_CODE)
        for name, content in self.small_files(dtype, is_glm, has_code).items():
            if not (path / name).exists() or (path / name).read_bytes() != content:
                raise ValueError(f"{path}: {name} is not what base and adapter give")
        targets, size = self.targets(dtype, is_glm)
        with progress_bar(size, "checking") as progress:
            layouts.compare_tensors(path, targets, dtype, progress)
        print(f"checked  {len(targets)} tensors, the vocabulary and the settings")

    def compare(self, reader, limit):
        if not self.prompts:
            what = "no prompt of the check fits into the context, with the system message"
            raise ValueError(f"{what}; give --no-check")
        try:
            self_check.compare(reader, self.model, self.prompts, limit)
        except ValueError:
            raise
        except Exception as error:  # whatever a wrong export makes the reader raise
            raise ValueError(f"{reader.name}: {one_line(error)}") from error

    # --- GGUF: support/gguf.py needs the package gguf, which is optional ----------------------

    def write_gguf(self, path):
        from support import gguf

        context = self.model.config.seq_length
        tokenizer_files(self.tokenizer, context)  # refuses a vocabulary that llama.cpp can't hold
        file = gguf.ModelFile(self.model, self.tokenizer, CHAT_TEMPLATE, self.args.gguf_type)
        size = sum(file.sizes.values())
        with written_whole(path, size) as part:
            with progress_bar(size, "writing") as progress:
                file.write(part, progress)
            if not self.args.no_check:
                self.check_gguf(part, path)
            with written_whole(modelfile_path(path)) as modelfile:
                modelfile.write_text(modelfile_text(path.name, self.system, context), "utf-8")
        print(f"saved    {path}, and {modelfile_path(path).name}, in {self.seconds()}; try it:")
        print(f"         llama-server {LLAMA_FLAGS} -m {shlex.quote(str(path))}")
        print(f"         ollama create NAME -f {shlex.quote(str(modelfile_path(path)))}")

    def check_gguf(self, file, path):
        """file: where it is now; path: its name in the end"""
        from support import gguf

        try:
            file_type = gguf.file_type_of(file)
            if file_type is None:
                gguf.check_adapter(file, self.model)
                print("checked  what the file adds to each matrix: it is what the adapter adds")
                return
            wanted = gguf.ModelFile(self.model, self.tokenizer, CHAT_TEMPLATE, file_type)
            with progress_bar(sum(wanted.sizes.values()), "checking") as progress:
                wanted.check(file, progress)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        print(f"checked  {len(wanted.types)} tensors, the vocabulary and the settings")
        if importlib.util.find_spec("xllamacpp") is None:
            print("         to compare llama.cpp's answers: pip install -r requirements-export.txt")
            print(f"         and then the same command with --check {shlex.quote(str(path))}")
            return
        longest = max((len(ids) for _, ids in self.prompts), default=0)
        context = longest + self_check.NEW_TOKENS
        with contextlib.closing(LlamaCppReader(file, context=context)) as reader:
            self.compare(reader, LIMITS[file_type])

    def write_gguf_adapter(self, path):
        from support import gguf

        with written_whole(path) as part:
            gguf.write_adapter(part, self.model)
            if not self.args.no_check:
                self.check_gguf(part, path)
        print(f"saved    {path}; try it beside a GGUF file of the base:")
        print(f"         llama-server {LLAMA_FLAGS} -m BASE.gguf --lora {shlex.quote(str(path))}")
