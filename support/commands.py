"""What both commands share: types of arguments, help, quiet libraries, and the last error line."""

import argparse
import logging
import os
import re
import signal
import sys
import warnings
from contextlib import contextmanager, suppress

from support.defaults import DTYPE_NAMES
from support.errors import escaped, one_a_line, one_line, printable
from support.fields import closest
from support.formats import RECORD_KEYS


def number(low, high=10**9):
    """A type for argparse: a number from `low` to `high`, a whole one if `low` is an int."""

    def parse(text):
        try:
            value = type(low)(text)
        except ValueError:
            kind = "whole number" if isinstance(low, int) else "number"
            raise argparse.ArgumentTypeError(f"invalid {kind} value: {text!r}") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be between {low} and {high}, not {text}")
        return value

    return parse


def not_empty(text):
    """A type for argparse: any text but the empty one, which a shell gives for an unset variable"""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return text


def directory(text):
    """A type for argparse: a path, in one form, so that out and out/ are the same"""
    return os.path.normpath(not_empty(text))


def number_or_share(text):
    """A type for argparse: a whole number, or a share below 1 such as 0.03."""
    with suppress(argparse.ArgumentTypeError):
        return number(0)(text)
    with suppress(ValueError):
        if 0 < float(text) < 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a whole number, or a share below 1, not {text!r}")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each default that is a value: not those of flags that are off."""

    def _get_help_string(self, action):
        has_value = action.default is not None and action.default is not False
        return super()._get_help_string(action) if has_value else action.help


class ArgumentParser(argparse.ArgumentParser):
    """Its messages are printable and short, whatever the command line holds."""

    def parse_args(self, args=None, namespace=None):
        """Tells a flag that is misspelt with the one that it may mean."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = tuple(self._option_string_actions)
            meant = [closest(word.partition("=")[0], flags) for word in unknown if word[:2] == "--"]
            hint = f"; did you mean {' '.join(filter(None, meant))}?" if any(meant) else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return parsed

    def error(self, message):
        super().error(one_a_line([escaped(message)]))


def number_of_blocks(text):
    """A type for argparse: all, off, auto, or a whole number."""
    if text in ("all", "off", "auto"):
        return text
    try:
        return number(0)(text)
    except argparse.ArgumentTypeError:
        what = f"must be all, off, auto, or a number of blocks, not {text!r}"
        raise argparse.ArgumentTypeError(what) from None


def new_parser(description, **options):
    """A parser for argparse. It takes no shortened flags, and its help shows defaults."""
    options |= dict(allow_abbrev=False, formatter_class=HelpFormatter)
    return ArgumentParser(description=description, **options)


def add_device_flags(add, dtype="of the base and autocast; auto: fp16 on CUDA, else fp32"):
    devices = "cpu, cuda, or another that torch has here, such as mps; auto: cuda if there is one"
    add("--device", type=not_empty, default="auto", help=devices)
    add("--dtype", choices=("auto", *DTYPE_NAMES), default="auto", help=dtype)


def add_load_in_flag(add):
    kinds = "4bit with bitsandbytes; fp8 on cards of compute capability 8.9 or more, slow on a CPU"
    add("--load-in", choices=("4bit", "fp8"), help=f"quantise the base: {kinds}")


def add_checkpointing_flag(add):
    recompute = "blocks to recompute in backward, to save memory; auto: as few as possible"
    options = dict(type=number_of_blocks, default="auto", metavar="all|off|N|auto")
    add("--gradient-checkpointing", **options, help=recompute)


def add_keys_flag(add):
    options = dict(nargs="+", type=renamed_key, metavar="OLD=NEW")
    add("--keys", **options, help="rename keys of the records: --keys content=instruction")


def renamed_key(text):
    """A type for argparse: OLD=NEW → (OLD, NEW), of which NEW is a key that is read."""
    old, _, new = text.rpartition("=")
    if not old or new not in RECORD_KEYS:
        what = f"must be OLD=NEW, and NEW one of {', '.join(sorted(RECORD_KEYS))}"
        raise argparse.ArgumentTypeError(f"{what}; not {text!r}")
    return old, new


def check_utf8(parser, *texts):
    """Calls parser.error if one of the texts has bytes that are not UTF-8."""
    for text in texts:
        if text and re.search("[\ud800-\udfff]", text):
            parser.error(f"{printable(text)} is not valid UTF-8")


def prepare_terminal():
    """Keeps libraries quiet. A character that the terminal lacks becomes a question mark.

    Lines are written at once, also into a pipe. Ctrl-C raises KeyboardInterrupt from now on.
    """
    quiet_libraries()
    sys.stdout.reconfigure(errors="replace", line_buffering=True)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # train.py and infer.py began with it
        signal.signal(signal.SIGINT, signal.default_int_handler)


def quiet_libraries():
    """Keeps the progress bars, retries and hints of libraries off the terminal."""
    import transformers  # here, because train.py reads its flags before slow imports

    modules = "transformers|peft|bitsandbytes|torch._weights_only_unpickler|torch._utils"
    warnings.filterwarnings("ignore", module=modules)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def bar_options():
    """→ options of tqdm: a bar is drawn ten times a second on a terminal, else every ten seconds"""
    interval = 0.1 if sys.stderr.isatty() else 10
    return dict(dynamic_ncols=True, mininterval=interval, file=ErrorOutput())


class ErrorOutput:
    """sys.stderr, but no error if whoever read it has gone. Ctrl-C may have ended them too, and
    the error would cost the update that is to be saved."""

    def __getattr__(self, name):
        return getattr(sys.stderr, name)

    def flush(self):
        self.write("")

    def write(self, text):
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except OSError:
            discard_output(sys.stderr)


def discard_output(stream):
    """Sends stdout or stderr nowhere from now on, because whoever read it has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def exit_with(error, program, out_of_memory):
    """Prints `error` for the user, on stderr, and ends the program with exit code 2.

    An error that a user can't mend is a bug of this project: it is raised again. out_of_memory:
    the advice for torch.OutOfMemoryError.
    """
    import torch  # here, because train.py reads its flags before slow imports

    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        text = out_of_memory
    elif type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
        text = f"--compile: {one_line(error)}; leave it out, or mend what it needs"
    elif isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    elif not isinstance(error, ValueError | OSError):
        raise error
    for line in text.splitlines():
        ErrorOutput().write(f"{program}: error: {escaped(line)}\n")
    sys.exit(2)


@contextmanager
def errors_for_user(program, out_of_memory, on_error=exit_with):
    """A command runs inside this context. An error ends the program: see exit_with.

    Ctrl-C ends it without a word. So does a reader of stdout that has gone, such as head.
    """
    was_default = signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    prepare_terminal()
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        discard_output(sys.stdout)
        sys.exit(128 + 13)  # 13: SIGPIPE, which Windows lacks
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        on_error(error, program, out_of_memory)
    finally:
        if was_default:  # Python's end shows no traceback either
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def announce_built_in_model(file=None):
    """Tells a user who gave no --model what is used."""
    real = "train.py --model DIR_OR_HUB_ID --data FILE"
    print(f"The built-in tiny model, random weights. For the real job: {real}", file=file)
