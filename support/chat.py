"""The chat in the terminal."""

import contextlib
import itertools
import signal
import sys

COMMANDS = (
    "/reset forgets the conversation, /system TEXT sets the system message, "
    "/observation TEXT gives a tool's result, /exit"
)


def say(text):
    """Tells the user something that is not a part of an answer."""
    print(text, file=sys.stderr, flush=True)


def reply(assistant, prompt):
    """Prints the answer to a user's message, as it comes."""
    prompt_ids, ids = assistant.encode([{"role": "user", "content": prompt}]), []
    for text in assistant.stream(assistant.answer(prompt_ids), ids):
        print(text, end="", flush=True)
    print()
    if reason := assistant.why_cut(prompt_ids, ids):
        say(f"({reason})")


def chat(assistant):
    """The terminal's lines and the model's answers: see Chat. assistant: an infer.Assistant."""
    with contextlib.suppress(ImportError):
        # input() then edits lines. A terminal alone would cut them at 4,095 bytes.
        import readline  # noqa: F401
    # What is not UTF-8 comes through, and is refused where it is encoded.
    sys.stdin.reconfigure(errors="surrogateescape")
    Chat(assistant).run()


class Chat:
    """Ends at /exit, at the end of input, and at a second Ctrl-C. A first Ctrl-C stops an answer.

    turns: lists of messages, each a user's message and what followed it.
    """

    def __init__(self, assistant):
        self.assistant = assistant
        self.turns = []
        self.is_asking = False  # whether a line is being read
        self.was_interrupted = False

    def run(self):
        signal.signal(signal.SIGINT, self.interrupt)
        say(f"{COMMANDS}. Ctrl-C stops an answer.")
        while (line := self.read_line()) is not None:
            if line.partition(" ")[0] == "/exit":
                return
            try:
                asked = self.understand(line)
                prepared = self.prepare(asked) if asked else None
            except ValueError as error:
                say(f"({error})")
                continue
            if prepared:
                self.answer(*prepared)
        print()

    def interrupt(self, number, frame):
        self.was_interrupted = True
        if self.is_asking:
            raise KeyboardInterrupt

    def read_line(self):
        """→ the next line; None at the end of input, and at a second Ctrl-C in a row"""
        is_second = False
        while True:
            self.was_interrupted = False
            try:
                self.is_asking = True
                line = input("> ")
                self.is_asking = False
                return line
            except EOFError:
                return None
            except KeyboardInterrupt:
                if is_second:
                    return None
                is_second = True
                say("\n(Ctrl-C again, Ctrl-D or /exit leaves)")

    def understand(self, line):
        """→ the turns to be answered, or None for a command. Raises ValueError for a mistake."""
        command, _, text = line.partition(" ")
        if not line.strip():
            return None
        if command == "/reset":
            self.turns = []
            say("(a new conversation)")
            return None
        if command == "/system":
            self.set_system(text)
            return None
        if command == "/observation":
            if not text.strip() or not self.turns:
                what = "/observation TEXT gives the result of the tool that an answer called"
                raise ValueError(what)
            result = {"role": "observation", "content": text}
            return [*self.turns[:-1], [*self.turns[-1], result]]
        if line.startswith("/"):
            raise ValueError(f"not a command here; {COMMANDS}; a message may start with a space")
        return [*self.turns, [{"role": "user", "content": line}]]

    def set_system(self, text):
        """A new system message begins a new conversation. Without text, it is shown."""
        self.assistant.tokenizer.encode(text)  # raises ValueError for what is not UTF-8
        is_new = bool(text.strip())
        if is_new:
            self.turns, self.assistant.preamble.system = [], text
        told = "; a new conversation" if is_new else ""
        say(f"(system message: {self.assistant.preamble.system or 'none'}{told})")

    def prepare(self, asked):
        """→ (the turns of `asked` that have room, the ids of their prompt). Raises ValueError."""
        kept = self.turns_with_room(asked)
        prompt_ids = self.assistant.encode(sum(kept, []))  # if this raises, no turn is forgotten
        if len(kept) < len(asked):
            say(f"(the context is full: forgot the oldest {len(asked) - len(kept)} turns)")
        return kept, prompt_ids

    def answer(self, asked, prompt_ids):
        """Prints the answer to `asked`, and keeps both as the conversation."""
        assistant, ids = self.assistant, []
        new_ids = itertools.takewhile(
            lambda _: not self.was_interrupted, assistant.answer(prompt_ids)
        )
        for piece in assistant.stream(new_ids, ids):
            print(piece, end="", flush=True)
        print()
        metadata, content = assistant.split(ids)
        if self.was_interrupted:
            kept = "what was said stays in the conversation"
            say(f"(stopped; {kept})" if content else "(stopped; the turn is dropped)")
        elif reason := assistant.why_cut(prompt_ids, ids):
            say(f"({reason})")
        if content or not self.was_interrupted:
            message = {"role": "assistant", "metadata": metadata, "content": content}
            self.turns = [*asked[:-1], [*asked[-1], message]]

    def turns_with_room(self, asked):
        """→ the newest turns of `asked`, as many as leave room for an answer, and at least one"""
        assistant = self.assistant
        room_for_answer = min(assistant.max_new_tokens, assistant.context // 2)
        room = assistant.context - room_for_answer
        while len(asked) > 1 and len(assistant.encode(sum(asked, []), check_room=False)) > room:
            asked = asked[1:]
        return asked
