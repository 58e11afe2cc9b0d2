"""A conversation with a base or a fine-tuned model; reading and writing are handed in."""

import json
from collections.abc import Callable
from typing import Any, Protocol

from llm_clf.errors import LlmClfError
from llm_clf.files import path_of, replacing

HELP = """\
/clear            forget the conversation
/base             switch the adapter off and on, to compare
/classify TEXT    probability of each label; TEXT may be JSON with the task's columns
/save FILE        write the conversation as JSON
/help             this list
/exit             leave (so does Ctrl-D); Ctrl-C stops an answer"""

Read = Callable[[], str]
Write = Callable[[str], None]


class Model(Protocol):
    """What a conversation needs of a model."""

    has_adapter: bool
    """Whether there is an adapter that can be switched off."""
    adapter_on: bool
    """Whether answers and probabilities come from the adapter."""

    def answer(self, messages: list[dict[str, str]], write: Write) -> str:
        """Return the next answer, and write its pieces as they come."""

    def classify(self, text: str) -> tuple[str | None, list[tuple[str, float]]]:
        """Return the label, None where none is given, and the probability of each label in the task's order."""


class Conversation:
    """The turns so far, and what can be done with them."""

    def __init__(self, model: Model, write: Write) -> None:
        self._model = model
        self._write = write
        self.messages: list[dict[str, str]] = []

    def take(self, line: str) -> bool:
        """Act on one line of the user; return whether to go on."""
        text = line.strip()
        if not text:
            return True
        word, _, rest = text.partition(" ")
        actions: dict[str, Callable[[str], Any]] = {
            "/clear": self._clear,
            "/base": self._switch,
            "/classify": self._classify,
            "/save": self._save,
            "/help": lambda _: self._write(HELP + "\n"),
        }
        if word in ("/exit", "/quit"):
            return False
        try:
            if word in actions:
                actions[word](rest.strip())
            elif word.startswith("/"):
                self._write(f"There is no {word}.\n{HELP}\n")
            else:
                self.say(text)
        except LlmClfError as error:
            self._write(f"{error}\n")
        return True

    def say(self, text: str) -> str:
        """Add a turn of the user and return the answer."""
        self.messages.append({"role": "user", "content": text})
        try:
            answer = self._model.answer(self.messages, self._write)
        except LlmClfError:
            # A turn that got no answer is forgotten, or the next one would stand in the same trouble.
            self.messages.pop()
            raise
        self._write("\n")
        self.messages.append({"role": "assistant", "content": answer})
        return answer

    def _clear(self, _: str) -> None:
        self.messages.clear()
        self._write("The conversation is forgotten.\n")

    def _switch(self, _: str) -> None:
        if not self._model.has_adapter:
            self._write("There is no adapter: this is the base already.\n")
            return
        self._model.adapter_on = not self._model.adapter_on
        self._write(f"The adapter is {'on' if self._model.adapter_on else 'off: this is the base'}.\n")

    def _classify(self, text: str) -> None:
        if not text:
            self._write("Give a text: /classify TEXT\n")
            return
        chosen, probs = self._model.classify(text)
        for label, prob in probs:
            self._write(f"{'>' if label == chosen else ' '} {label}  {prob:.4f}\n")
        if chosen is None:
            self._write("No label is given: this is too uncertain (decide.abstain).\n")

    def _save(self, name: str) -> None:
        place = path_of(name)
        if not name or place.exists():
            self._write(f"{name} is already there; give another name.\n" if name else "Give a file: /save FILE\n")
            return
        with replacing(place) as temporary:
            temporary.write_text(json.dumps(self.messages, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        self._write(f"{len(self.messages)} messages are in {name}.\n")


def converse(model: Model, read: Read, write: Write) -> None:
    """Talk until the input ends. Ctrl-C while nothing is being answered only starts a new line."""
    conversation = Conversation(model, write)
    while True:
        try:
            line = read()
        except EOFError:
            return
        except KeyboardInterrupt:
            write("\n")
            continue
        if not conversation.take(line):
            return
