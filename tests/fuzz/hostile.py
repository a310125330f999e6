"""How the tests of hostile input are run: `hostile` draws inputs, `watched` guards what they do.

Hostile input is whatever files and texts may hold. What comes out is a result or a message. Nothing
crashes or hangs. Nothing is run, fetched, or written where it does not belong.

    python -m pytest -q tests/fuzz                                  # the same inputs every time
    CHATGLM3_FUZZ_SECONDS=3600 python -m pytest -s tests/fuzz       # fresh inputs for that long

With CHATGLM3_FUZZ_SECONDS each test gets an equal share of the time. Each prints how many inputs it
tried. The strategies that draw inputs are in hostile_inputs.py.
"""

import contextlib
import faulthandler
import functools
import gc
import inspect
import os
import re
import resource
import secrets
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import peft
import torch
from hypothesis import HealthCheck, given, seed, settings

SECONDS = float(os.environ.get("CHATGLM3_FUZZ_SECONDS", 0))
AT_A_TIME = 25  # fresh inputs, before a test looks whether its share of the time is over
IDS = torch.arange(3, 9)[None]  # a prompt for every network


def hostile(examples, **strategies):
    """A test of that many seeded inputs, or with CHATGLM3_FUZZ_SECONDS of fresh ones."""
    profile = settings(
        max_examples=min(examples, AT_A_TIME) if SECONDS else examples,
        derandomize=not SECONDS,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )

    def decorate(check):
        parameters = inspect.signature(check).parameters
        fixtures = [p for name, p in parameters.items() if name not in strategies]

        @functools.wraps(check)
        def run(request, **kwargs):
            tried, end = 0, time.monotonic() + SECONDS / request.session.testscollected

            @functools.wraps(check)
            def count_and_check(**arguments):
                nonlocal tried
                tried += 1
                check(**arguments)

            try:
                while not tried or time.monotonic() < end:
                    test = profile(given(**strategies)(count_and_check))
                    if SECONDS:
                        test = seed(secrets.randbits(64))(test)
                    test(**kwargs)
            finally:
                print(f"\n{check.__name__}: {tried:,} inputs tried")

        request = inspect.Parameter("request", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        run.__signature__ = inspect.Signature([request, *fixtures])
        return run

    return decorate


# --- nothing happens but reading --------------------------------------------------------------

FORBIDDEN = (
    r"socket\.(connect|getaddrinfo)|subprocess\.|os\.(system|exec|spawn|posix_spawn|fork|kill)"
)
CHANGES = r"os\.(mkdir|remove|rename|rmdir|link|symlink|truncate|chmod)|shutil\."
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
happened, allowed = None, None  # what the audit hook saw; the path that may be written


def audit(event, args):
    if happened is None:
        return
    if event == "import":
        is_bad = "evil" in str(args[0])
    elif event == "open":
        is_bad = isinstance(args[2], int) and args[2] & WRITES and not may_be_written(args[0])
    elif event in ("os.remove", "os.rmdir") and args[1] != -1:
        is_bad = False  # shutil.rmtree does it, whose own event came before
    elif re.match(CHANGES, event):
        changed = args[1:2] if event.startswith("shutil.copy") else args[:2]
        paths = [path for path in changed if isinstance(path, str | bytes | os.PathLike)]
        is_bad = not all(map(may_be_written, paths))
    else:
        is_bad = re.match(FORBIDDEN, event)
    if is_bad:
        happened.append((event, args))


def may_be_written(path):
    path = path if isinstance(path, int) else os.path.abspath(os.fsdecode(path))
    is_output = allowed and Path(str(path)).is_relative_to(allowed)
    return path == os.devnull or "__pycache__" in str(path) or is_output


sys.addaudithook(audit)


class TooLong(BaseException):
    """No `except Exception` stops it."""


def stop(*_):
    raise TooLong


@contextlib.contextmanager
def watched(output=None):
    """Inside, only `output` and what is below it is written. Nothing is run, imported or fetched.
    It takes neither a minute nor 8 GiB."""
    global happened, allowed
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, stop)
    happened, allowed = [], output
    signal.alarm(60)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**33, limits[1]))
    try:
        yield
    except TooLong:
        raise AssertionError("it takes too long") from None
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)
        seen, happened = happened, None
        assert not seen, seen


# --- what the tests share ---------------------------------------------------------------------


def fresh(directory):
    """Makes `directory`, empty."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    return directory


def one_clear_line(error):
    """The message is a line without terminal codes. It does not tell of memory that ran out."""
    text = str(error)
    assert text.isprintable() and 0 < len(text) < 2000, text
    assert "allocat" not in text and "MemoryError" not in text, (
        f"it tried to take all memory: {text}"
    )


def loads_or_refuses(load):
    """The model that load() gives computes logits, merged too. Otherwise ValueError says in one
    line why there is none."""
    try:
        with watched(), torch.no_grad():
            model = load()
            assert model(input_ids=IDS).logits.shape == (1, 6, 512), "other logits"
            if isinstance(model, peft.PeftModel):
                merged = model.merge_and_unload()
                assert merged(IDS).logits.shape == (1, 6, 512), "other logits, once merged"
    except ValueError as error:
        one_clear_line(error)


BESIDE_THE_ERROR = ("built-in tiny model", "(see its SHA256SUMS): skipped", "%|")


def runs_or_refuses(main, arguments, capsys, output=None):
    """The command ends well, or with exit code 2 and lines that begin with its name. → those, or
    None"""
    capsys.readouterr()
    try:
        with watched(output):
            main([str(argument) for argument in arguments])
    except SystemExit as ended:
        assert ended.code == 2
        lines = capsys.readouterr().err.split("\n")
        lines = [line for line in lines if not any(text in line for text in BESIDE_THE_ERROR)]
        assert lines and lines.pop() == ""
        begins = r"(train|infer)\.py: error: ."
        assert all(re.match(begins, line) and line.isprintable() for line in lines)
        return lines
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def in_a_child(check, *arguments):
    """check(*arguments), in a process of its own: a library in C++ may end it without an error."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        gc.disable()  # it would touch, and so copy, all memory
        trouble = b"the check did not end"
        faulthandler.dump_traceback_later(120, exit=True)  # no signal stops a loop in C++
        try:
            check(*arguments)
            trouble = b""
        except BaseException:
            trouble = traceback.format_exc().encode("utf-8", "backslashreplace")
        finally:
            os.write(writing, trouble[-8000:])
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        trouble = pipe.read().decode("utf-8", "replace")
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, f"the process ended with {status}"
    assert not trouble, trouble
