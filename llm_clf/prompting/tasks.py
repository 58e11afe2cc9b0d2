"""A task: the instruction, the template over a row's columns, and the labels with the words that stand for them."""

import re
import string
import unicodedata
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from llm_clf.errors import LabelError, TemplateError
from llm_clf.files import path_of, write_yaml

NonEmpty = Annotated[str, Field(min_length=1)]


class Label(BaseModel):
    """A class name with the words that stand for it in an answer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    label: NonEmpty
    words: Annotated[tuple[NonEmpty, ...], Field(min_length=1)]
    """Answers that mean this label; the first one is what the model is trained to say."""
    meaning: str = ""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        """Accept a bare name: `labels: [yes, no]`."""
        if isinstance(value, str):
            return {"label": value, "words": [value]}
        if isinstance(value, Mapping) and "words" not in value and "label" in value:
            return {**value, "words": [value["label"]]}
        return value


class Task(BaseModel):
    """What is asked about a row, and what may be answered."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    instruction: NonEmpty
    input: NonEmpty
    """Template over the row's columns, such as `title:{title},abstract:{abstract}`; `{{` stands for a brace."""
    label_column: NonEmpty
    id_column: str | None = None
    cut: str | None = None
    """The column that gives way in a row that is too long; none: the end of the input."""
    labels: Annotated[tuple[Label, ...], Field(min_length=2)]

    @field_validator("id_column", "cut", mode="before")
    @classmethod
    def _absent(cls, value: Any) -> Any:
        return None if value in ("", "null", "~") else value

    @model_validator(mode="after")
    def _consistent(self) -> "Task":
        if not self.columns:
            raise ValueError("input: names no column; write {column} where a cell's text goes")
        repeated = {name for name in self.columns if self._parts.count((None, name)) > 1}
        if self.cut is not None and (self.cut not in self.columns or self.cut in repeated):
            raise ValueError(f"cut: {self.cut!r} must stand once in input; its columns are {', '.join(self.columns)}")
        if self.label_column in self.columns:
            raise ValueError(f"input: {{{self.label_column}}} is the label column, so the prompt would hold the answer")
        owners: dict[str, str] = {}
        for label in self.labels:
            for name in {canonical(text) for text in (label.label, *label.words)}:
                if not name:
                    raise ValueError(f"labels: {label.label!r} has a label or word without any letter or digit")
                if owners.setdefault(name, label.label) != label.label or self.names.count(label.label) > 1:
                    raise ValueError(f"labels: {name!r} stands for both {owners[name]!r} and {label.label!r}")
        return self

    @cached_property
    def _parts(self) -> list[tuple[str | None, str | None]]:
        """The template as literals `(text, None)` and columns `(None, name)`, in order."""
        parts: list[tuple[str | None, str | None]] = []
        try:
            for literal, name, spec, conversion in string.Formatter().parse(self.input):
                if literal:
                    parts.append((literal, None))
                if name is not None:
                    if not name or spec or conversion:
                        raise ValueError(f"input: found {{{name}}} with a format; allowed is {{column}} alone")
                    parts.append((None, name))
        except ValueError as error:
            raise ValueError(f"input: {self.input!r} is no template: {error}") from error
        return parts

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns in the template, each once, in order."""
        return tuple(dict.fromkeys(name for _, name in self._parts if name is not None))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the labels in the task's order."""
        return tuple(label.label for label in self.labels)

    @cached_property
    def _label_of_name(self) -> dict[str, str]:
        return {canonical(text): label.label for label in self.labels for text in (label.label, *label.words)}

    def render(self, cells: Mapping[str, str]) -> str:
        """Return the input text of a row; `cells` must hold the template's columns."""
        return "".join(literal if name is None else cells[name] for literal, name in self._parts)  # type: ignore[misc]

    def cut_span(self, text: str, column: str | None) -> tuple[int, int]:
        """Return where `column` stands in a rendered input, as `(start, end)` characters.

        The text is read back through the template, so a prompts file and a table are cut alike. A text that
        does not follow the template, or no column, gives way from its end: the span is the whole text.
        """
        if column is None:
            return 0, len(text)
        match = self._pattern(column).fullmatch(text)
        return match.span(1) if match else (0, len(text))

    def column_spans(self, text: str) -> list[tuple[int, int]]:
        """Return where the columns stand in a rendered input, in its order, as `(start, end)` characters.

        A text that does not follow the template is one span, the whole of it.
        """
        pieces = ["(.*?)" if literal is None else re.escape(literal) for literal, _ in self._parts]
        match = re.fullmatch("".join(pieces), text, re.DOTALL)
        return [match.span(number) for number in range(1, match.re.groups + 1)] if match else [(0, len(text))]

    def follows_template(self, text: str) -> bool:
        """Whether a text is what `render` could have made of some row."""
        return self._pattern(None).fullmatch(text) is not None

    def _pattern(self, column: str | None) -> re.Pattern[str]:
        pieces = [
            re.escape(literal) if literal is not None else "(.*)" if name is not None and name == column else "(?:.*?)"
            for literal, name in self._parts
        ]
        return re.compile("".join(pieces), re.DOTALL)

    def label_of(self, text: str) -> str | None:
        """Return the label that a cell means, None where it is empty.

        Raises:
            LabelError: The text is none of the task's labels or words.
        """
        if not text.strip():
            return None
        label = self._label_of_name.get(canonical(text))
        if label is None:
            raise LabelError(f"{text!r} is no label; the labels are {', '.join(self.names)}")
        return label

    def answer(self, label: str) -> str:
        """Return the word that the model is trained to say for a label."""
        return self.labels[self.names.index(label)].words[0]

    def save(self, file: Path) -> None:
        """Write the task as YAML."""
        write_yaml(file, self.model_dump(mode="json", exclude_none=True))


def canonical(text: str) -> str:
    """Return the one form of a label: `1`, `1.0`, ` 1 `, `"1"` and full-width `１` are one."""
    text = unicodedata.normalize("NFKC", text).strip()
    text = text.strip("\"'“”‘’").strip()
    number = re.fullmatch(r"([+-]?\d+)\.0*", text)
    return number.group(1) if number else text


def load_task(name: str | Path) -> Task:
    """Return the task in a file, or the one that ships under a name.

    Raises:
        TemplateError: There is no such task, or the file does not describe one.
    """
    file = _find(name)
    try:
        # Everything in a task is text. BaseLoader keeps it as written: `yes` is no boolean, `01` no number.
        tree = yaml.load(file.read_text(encoding="utf-8-sig"), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise TemplateError(f"{file}: is not YAML: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(f"{file}: cannot be read: {error}.") from error
    if not isinstance(tree, dict):
        raise TemplateError(f"{file}: expected the keys {', '.join(Task.model_fields)}, found {type(tree).__name__}.")
    try:
        return Task.model_validate(tree)
    except ValidationError as error:
        faults = "\n".join(f"  {_fault(fault)}" for fault in error.errors())
        raise TemplateError(f"{file}: the task is wrong:\n{faults}") from error


def shipped_tasks() -> dict[str, Path]:
    """Return the tasks that ship with the package, name to file."""
    package = Path(__file__).resolve().parent.parent
    # The wheel carries prompts/ inside the package; in a checkout it stands beside it.
    folder = next((place for place in (package / "prompts", package.parent / "prompts") if place.is_dir()), None)
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))} if folder else {}


def _find(name: str | Path) -> Path:
    file, shipped = path_of(name), shipped_tasks()
    if file.is_file():
        return file
    if str(name) in shipped:
        return shipped[str(name)]
    raise TemplateError(f"--task {str(name)!r}: is no file and no task that ships; these ship: {', '.join(shipped)}.")


def _fault(fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        known = Task.model_fields if len(fault["loc"]) == 1 else Label.model_fields
        return f"{key}: there is no such key; known are {', '.join(known)}."
    message = fault["msg"].removeprefix("Value error, ")
    return f"{key}: {message}." if key else f"{message}."
