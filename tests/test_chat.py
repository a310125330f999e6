"""support/chat.py: the chat, in a terminal, over a pipe, and with scripted answers.

python -m pytest -q tests/test_chat.py
"""

import contextlib
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ANSWER, QUESTION, ROOT
from safetensors.torch import load_file, save_file

import data
import infer
import model as chatglm
from support.chat import chat
from support.config import ChatGLMConfig
from support.preamble import Preamble

# --- in a terminal, and over a pipe -----------------------------------------------------------


class Terminal:
    """infer.py in a terminal of its own, as a user has it."""

    def __init__(self, *arguments):
        self.raw, self.screen, self.seen = b"", "", 0
        self.pid, self.master = pty.fork()
        if not self.pid:
            os.environ.update(TERM="xterm", LANG="C.UTF-8")
            command = [sys.executable, str(ROOT / "infer.py"), *map(str, arguments)]
            os.execv(sys.executable, command)

    def type(self, text):
        if text == "\x03":
            # Between its prompt and its wait for keys, readline would keep it for the next key.
            time.sleep(0.3)
        left = text.encode()
        while left:
            left = left[os.write(self.master, left[:500]) :]
            self.read(0.02)

    def read(self, seconds):
        if select.select([self.master], [], [], seconds)[0]:
            with contextlib.suppress(OSError):  # the other side has ended
                self.raw += os.read(self.master, 65536)
                text = self.raw.decode("utf-8", "replace")
                self.screen = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]|\r", "", text)

    def expect(self, text, seconds=60):
        """Waits for `text` after what was waited for last."""
        end = time.monotonic() + seconds
        while text not in self.screen[self.seen :]:
            left = self.screen[self.seen :]
            assert time.monotonic() < end, f"{text!r} did not come: {left!r}"
            self.read(0.1)
        self.seen = self.screen.index(text, self.seen) + len(text)

    def exit_code(self):
        for _ in range(600):
            self.read(0.05)
            time.sleep(0.05)  # at the end of the output, reading does not wait
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self.master)
                return os.waitstatus_to_exitcode(status)
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError(f"it did not end: {self.screen!r}")


def test_a_chat_in_a_terminal(trained, tokenizer):
    adapter, device = trained
    terminal = Terminal("--adapter", adapter, "--device", device, "--greedy")
    terminal.expect("Ctrl-C stops an answer.\n> ")
    terminal.type(f"{QUESTION}\n")
    terminal.expect(f"\n{ANSWER}\n> ")
    terminal.type("\n")
    terminal.expect("> ")
    terminal.type("/what\n")
    terminal.expect("(not a command here")
    terminal.expect("> ")
    long = "甄" * 2000  # 6,000 bytes: more than a line that the terminal itself would edit
    terminal.type(long + "\n")
    count = len(data.encode_prompt(tokenizer, [{"role": "user", "content": long}]))
    terminal.expect(f"(the prompt has {count} tokens; this model takes 1024)")
    terminal.expect("> ")
    terminal.type("\x03")
    terminal.expect("(Ctrl-C again, Ctrl-D or /exit leaves)")
    terminal.expect("> ")
    terminal.type("/reset\n")
    terminal.expect("(a new conversation)")
    terminal.expect("> ")
    terminal.type("你好👋🏳️‍🌈\n")
    terminal.expect("\n> ")
    terminal.type("\x03")
    terminal.expect("leaves)")
    terminal.expect("> ")
    terminal.type("\x03")
    assert terminal.exit_code() == 0
    assert "Traceback" not in terminal.screen and "\ufffd" not in terminal.screen


def test_ctrl_c_stops_the_answer_and_not_the_chat(tmp_path, tokenizer):
    """The model is the built-in one, but it never ends by itself and has much room."""
    base = tmp_path / "m"
    shutil.copytree(chatglm.BUILT_IN, base, ignore=shutil.ignore_patterns("*.safetensors"))
    weights = load_file(chatglm.built_in_model() + "/model.safetensors")
    stop_ids = list(tokenizer.stop_ids)
    weights["transformer.output_layer.weight"][stop_ids] = 0  # never the likeliest
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    config = base / "config.json"
    config.write_text(config.read_text().replace('"seq_length": 1024', '"seq_length": 65536'))
    flags = ["--no-adapter", "--model", base, "--device", "cpu", "--greedy"]
    terminal = Terminal(*flags, "--max-new-tokens", 60000)
    terminal.expect("Ctrl-C stops an answer.\n> ")
    for _ in range(2):
        terminal.type("hello\n")
        terminal.expect("hello\n")
        time.sleep(0.5)
        terminal.type("\x03")
        terminal.expect("(stopped", seconds=20)
        terminal.expect("\n> ")
    terminal.type("\x04")
    assert terminal.exit_code() == 0 and "Traceback" not in terminal.screen


def test_a_chat_over_a_pipe(trained):
    adapter, device = trained
    question = QUESTION.encode()
    lines = [question, b"", b"\xff\xfe", b"x" * 2000, question + "👋".encode(), b"/reset", question]
    command = [sys.executable, str(ROOT / "infer.py")]
    command += ["--adapter", str(adapter), "--device", device, "--greedy"]
    done = subprocess.run(command, input=b"\n".join(lines), capture_output=True, timeout=300)
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 0 and "Traceback" not in err
    assert err.count("is not valid UTF-8") == 1
    assert out.count("> ") == len(lines) + 1
    assert out.startswith(f"> {ANSWER}\n> > > ")
    assert out.endswith(f"> {ANSWER}\n> \n")  # the last line has no newline


# --- with scripted answers --------------------------------------------------------------------


class Scripted:
    """A decoder that says what it is told to, and keeps the prompts that it gets.

    The character § in an answer stands for a Ctrl-C at this place.
    """

    def __init__(self, tokenizer, answers, seq_length):
        self.model = type("Model", (), {"config": ChatGLMConfig(seq_length=seq_length)})
        self.tokenizer, self.answers, self.prompts = tokenizer, iter(answers), []

    def generate(self, prompts, max_new_tokens, stop_ids):
        self.prompts.append(self.tokenizer.decode(prompts[0]))
        room = min(max_new_tokens, self.model.config.seq_length - len(prompts[0]))
        for id in self.tokenizer.encode(next(self.answers))[:room]:
            if id == self.tokenizer.encode("§")[-1]:
                signal.raise_signal(signal.SIGINT)
            yield 0, id
        yield 0, None


@pytest.fixture
def talk(tokenizer, monkeypatch, capsys):
    """A chat of typed lines and scripted answers → (prompts, stdout, stderr)"""
    before = signal.getsignal(signal.SIGINT)

    def talk(lines, answers, max_new_tokens=128, seq_length=1024, system=None):
        answers = [text if "\n" in text else f"\n{text}" for text in answers]  # no metadata
        decoder = Scripted(tokenizer, answers, seq_length)
        left = iter(lines)

        def typed(prompt):
            line = next(left, EOFError)
            if line is KeyboardInterrupt:
                signal.raise_signal(signal.SIGINT)
            if line is EOFError:
                raise line
            return line

        with open(os.devnull) as stdin, monkeypatch.context() as patch:
            patch.setattr("builtins.input", typed)
            patch.setattr(sys, "stdin", stdin)
            chat(infer.Assistant(decoder, tokenizer, Preamble(system), max_new_tokens))
        return decoder.prompts, *capsys.readouterr()

    yield talk
    signal.signal(signal.SIGINT, before)


def test_turns_are_kept_in_the_official_format(talk):
    lines = ["q1", " ", "q2", "/system be brief", "q3", "/system", "/reset", "/system "]
    prompts, out, err = talk([*lines, "/exit", "q4"], ["a1", "a2", "a3"], system="s")
    first = "[gMASK]sop<|system|>\n s<|user|>\n q1<|assistant|>"
    assert prompts == [
        first,
        f"{first}\n a1<|user|>\n q2<|assistant|>",
        "[gMASK]sop<|system|>\n be brief<|user|>\n q3<|assistant|>",
    ]
    assert out == "a1\na2\na3\n"
    assert err.count("(system message: be brief; a new conversation)") == 1
    assert err.count("(system message: be brief)") == 2


def test_a_tool_is_called_and_its_result_observed(talk):
    lines = ["/observation 1", "weather?", "/observation 22", "/exit"]
    prompts, out, err = talk(lines, ["get_weather\ncall(city='北京')", "Warm."])
    assert prompts[1] == (
        "[gMASK]sop<|user|>\n weather?<|assistant|>get_weather\n call(city='北京')"
        "<|observation|>\n 22<|assistant|>"
    )
    assert out == "get_weather\ncall(city='北京')\nWarm.\n"
    assert err.count("(/observation TEXT gives the result of the tool") == 1


def test_what_was_said_before_ctrl_c_stays(talk):
    prompts, out, err = talk(["q1", "q2", "q3"], ["so far § and on", "§", "a3"])
    assert prompts[1].endswith("<|assistant|>\n so far <|user|>\n q2<|assistant|>")
    # The second question got no answer at all.
    assert prompts[2].endswith("<|assistant|>\n so far <|user|>\n q3<|assistant|>")
    assert "what was said stays" in err and "the turn is dropped" in err


def test_ctrl_c_at_the_prompt_leaves_the_second_time(talk):
    lines = [KeyboardInterrupt, "q", KeyboardInterrupt, "q", EOFError]
    _, _, err = talk(lines, ["a", "a"])
    assert err.count("(Ctrl-C again") == 2
    prompts, _, err = talk(["q", KeyboardInterrupt, KeyboardInterrupt, "q"], ["a", "a"])
    assert err.count("(Ctrl-C again") == 1 and len(prompts) == 1


def test_the_oldest_turns_are_forgotten_when_the_context_is_full(talk):
    lines = [f"question {i} " + "x " * 20 for i in range(6)]
    sizes = dict(max_new_tokens=20, seq_length=160)
    prompts, out, err = talk([*lines, "y " * 300, "z"], ["answer"] * 7, system="s", **sizes)
    for i, prompt in enumerate(prompts[:6]):
        kept = [f"question {j} " in prompt for j in range(6)]
        first = kept.index(True)
        assert prompt.startswith("[gMASK]sop<|system|>\n s<|user|>\n question")
        assert kept == [first <= j <= i for j in range(6)]  # the newest, whole
    assert "question 0" in prompts[1] and "question 0" not in prompts[5]
    assert "question 4" in prompts[5]
    # The message that was too long was refused, and nothing was forgotten for it.
    assert len(prompts) == 7 and "question 5" in prompts[6] and err.count("(the prompt has") == 1
    assert err.count("(the context is full: forgot the oldest") >= 2


def test_an_answer_that_is_cut_is_said_to_be(talk):
    _, _, err = talk(["q"], ["a long answer"], max_new_tokens=3)
    assert "(cut at --max-new-tokens 3)" in err
    _, _, err = talk(["q"], ["a long answer " * 200], max_new_tokens=5000, seq_length=64)
    assert "tokens: the context is full)" in err


def test_a_short_context_is_not_all_kept_for_the_answer(talk):
    prompts, _, err = talk(["q1", "q2"], ["a1", "a2"], max_new_tokens=5000, seq_length=160)
    assert "q1" in prompts[1] and "forgot the" not in err.split("Ctrl-C")[1]


def test_a_message_may_start_with_a_space(talk):
    prompts, _, _ = talk([" /exit", "/exit now", "q"], ["a"])
    assert len(prompts) == 1 and "/exit" in prompts[0]
