"""Talk to a base, a bare adapter or a run: a look at what the model says, and at what its labels are."""

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_clf.config import Settings
from llm_clf.config_loading import load_settings, require_sections
from llm_clf.console import say
from llm_clf.conversation import Conversation, Write, converse
from llm_clf.decisions.decisions import Decisions
from llm_clf.errors import ConfigError, DataError
from llm_clf.prompting.prompts import Prompt
from llm_clf.prompting.tasks import Task, load_task
from llm_clf.runs import Run, is_run
from llm_clf.sources import LoraSource, find_source, head_of_adapter

MAX_NEW_TOKENS = 512


def chat(
    source: str | Path | None = None,
    *,
    model: str | None = None,
    task: str | Path | None = None,
    set: Sequence[str] = (),
    once: str | None = None,
) -> str | None:
    """Talk on the terminal, or answer one text and return the answer.

    Args:
        source: A run or a bare adapter; None: the base alone.
        model: The base; needed for a bare adapter, glm-nano where there is no source.
        task: For a bare adapter or a base: the task of `/classify`.
        set: Settings of the sections model, predict, decide and speed as `section.key=value`.
        once: A text to answer; None: talk until the input ends.

    Raises:
        LlmClfError: Source, base or task are wrong.
    """
    loaded = _load(source, model, task, set)
    say(loaded.description + ("" if once is not None else " /help lists the commands."))
    write = _to_stdout
    if once is not None:
        return Conversation(loaded, write).say(once)
    prompt = "> " if sys.stdin.isatty() else ""
    if prompt:
        # Importing it gives input() line editing and a history.
        import readline  # noqa: F401
    converse(loaded, lambda: input(prompt), write)
    return None


class LoadedModel:
    """A model with its tokenizer and, where it has a task, its label scores."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        classifier: Any,
        task: Task | None,
        description: str,
        decisions: Decisions | None = None,
    ) -> None:
        from llm_clf.engine.generation import TextGenerator
        from llm_clf.engine.parts import unwrapped
        from llm_clf.models.bases import context_length
        from llm_clf.models.heads import has_linear_head

        self.description = description
        self.has_adapter = self.adapter_on = hasattr(model, "disable_adapter")
        self._model, self._tokenizer, self._classifier, self._task = model, tokenizer, classifier, task
        self._decisions = decisions
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self._limit = context_length(model.config)
        room = min(MAX_NEW_TOKENS, self._limit // 2) if self._limit else MAX_NEW_TOKENS
        self._room = room
        self._generator = None
        if not has_linear_head(unwrapped(model)):
            self._generator = TextGenerator(model, tokenizer, pad_id=pad, max_new_tokens=room)

    def answer(self, messages: list[dict[str, str]], write: Write) -> str:
        """Return the next answer, written piece by piece; the oldest turns give way when all are too long.

        Raises:
            ConfigError: A linear head stands where the words would come from.
            DataError: One message alone is too long.
        """
        from llm_clf.engine.tokens import encode_messages

        if self._generator is None:
            raise ConfigError(
                "This model has a linear head for labels and writes no words. Ask it with /classify TEXT."
            )
        first = 0
        ids = encode_messages(self._tokenizer, messages)
        while self._limit and len(ids) + self._room > self._limit:
            if first + 2 >= len(messages):
                raise DataError(f"The message has {len(ids)} tokens; this base reads {self._limit} with its answer.")
            first += 2
            ids = encode_messages(self._tokenizer, messages[first:])
        if first:
            say(f"(The first {first} messages no longer fit and were left out.)")
        with self._chosen():
            return self._generator.stream(ids, write)

    def classify(self, text: str) -> tuple[str | None, list[tuple[str, float]]]:
        """Return the label, None where none is given, and the probability of each label in the task's order.

        With the adapter they are those of `predict`; what was fitted for it does not fit the base alone.

        Raises:
            ConfigError: There is no task, or the adapter that has the linear head is switched off.
        """
        if self._classifier is None or self._task is None:
            raise ConfigError("There is no task here. Start with a run, or with --task TASK.")
        if self._generator is None and self.has_adapter and not self.adapter_on:
            raise ConfigError("The linear head is part of the adapter: the base alone knows no labels. See /base.")
        prompt = Prompt("0", _input_of(text, self._task), None, {})
        with self._chosen():
            scores = self._classifier.score_all([prompt])
        own = self._decisions if self.adapter_on else None
        decided = (own or Decisions.bare(self._task.names)).apply(scores)
        label = self._task.names[decided.choices[0]] if decided.answered[0] else None
        return label, list(zip(self._task.names, map(float, decided.probs[0]), strict=True))

    def _chosen(self) -> Any:
        return self._model.disable_adapter() if self.has_adapter and not self.adapter_on else nullcontext()


def _load(
    source: str | Path | None, model: str | None, task: str | Path | None, overrides: Sequence[str]
) -> LoadedModel:
    from llm_clf.engine.classifier import Classifier, prompt_tokenizer, require_same_base
    from llm_clf.engine.heads import make_head
    from llm_clf.models.adapters import attach_adapter
    from llm_clf.models.bases import load_model, load_tokenizer, prepare_libraries
    from llm_clf.models.devices import choose_device, choose_dtype, describe

    prepare_libraries()
    found = _find(source, model, task, overrides)
    if found.run is not None:
        require_same_base(found.run)
    settings = found.settings
    device = choose_device()
    dtype = choose_dtype(settings.model.dtype, device)
    tokenizer = load_tokenizer(settings.model)
    labels = found.task.names if found.task is not None else ()
    complete = found.adapter is None
    loaded = load_model(settings.model, dtype=dtype, device=device, labels=labels, complete=complete)
    classifier = None
    tokens = prompt_tokenizer(tokenizer, loaded, found.task, settings) if found.task is not None else None
    if found.adapter is not None:
        # Never merged here: /base switches the adapter off and on.
        loaded = attach_adapter(loaded, found.adapter, merge=False, tokenizer=tokenizer)
    if tokens is not None:
        head, budget = make_head(settings.model, tokens), settings.predict.batch_tokens
        classifier = Classifier(loaded, tokens, head, batch_tokens=budget, speed=settings.speed)
    words = f" with the adapter of {source}" if source is not None else ""
    description = f"{settings.model.name}{words}, {dtype} on {describe(device)}."
    return LoadedModel(loaded, tokenizer, classifier, found.task, description, found.decisions)


@dataclass(frozen=True, slots=True)
class _Found:
    """What to talk to."""

    adapter: Path | None
    task: Task | None
    settings: Settings
    run: Run | None
    decisions: Decisions | None = None


def _find(source: str | Path | None, model: str | None, task: str | Path | None, overrides: Sequence[str]) -> _Found:
    folder = Path(source) if source is not None else None
    if folder is not None and (is_run(folder) or not (folder / "adapter_config.json").is_file() or task is not None):
        found = find_source(folder, task, model, overrides)
        if not isinstance(found, LoraSource):
            raise ConfigError(
                f"{folder}: is no language model, so there is nobody to talk to. Its labels come from `llm-clf predict "
                f"{folder} ROWS --out FILE`; for a row at hand ROWS and FILE can be -, standard input and output."
            )
        return _Found(found.adapter, found.task, found.settings, found.run, found.decisions)
    if folder is not None and model is None:
        raise ConfigError(f"{folder}: is a bare adapter; tell its base: --model BASE.")
    require_sections(overrides, ("model", "predict", "speed"), "a conversation")
    changes = [*overrides, *([f"model.name={json.dumps(model)}"] if model is not None else [])]
    settings = load_settings(overrides=[*([head_of_adapter(folder)] if folder is not None else []), *changes])
    if settings.model.head == "linear" and task is None:
        raise ConfigError("A linear head tells the labels of a task apart; tell which: --task TASK.")
    return _Found(folder, load_task(task) if task is not None else None, settings, None)


def _input_of(text: str, task: Task) -> str:
    """Return the input that a typed text means: JSON with the task's columns, a rendered input, or the main column."""
    try:
        record = json.loads(text) if text.startswith("{") else None
    except json.JSONDecodeError as error:
        raise DataError(f"That is not JSON: {error}.") from error
    if isinstance(record, Mapping):
        missing = [column for column in task.columns if column not in record]
        if missing:
            raise DataError(f"The task needs the columns {', '.join(map(repr, missing))} too.")
        return task.render({column: str(record[column]) for column in task.columns})
    main = task.cut or task.columns[-1]
    if task.follows_template(text):
        return text
    return task.render({column: text if column == main else "" for column in task.columns})


def _to_stdout(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
