"""The only place where a row becomes tokens: for training, validation, prediction and chat alike."""

import json
import re
from array import array
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_clf.engine.packing import common_beginning
from llm_clf.errors import ConfigError, LabelError
from llm_clf.prompting import tasks
from llm_clf.prompting.prompts import Prompt
from llm_clf.prompting.tasks import Task

if TYPE_CHECKING:
    from llm_clf.engine.token_cache import TokenCache

# Stands for the message while the chat template is rendered; nothing that a template would change or strip.
_PLACE = "llm-clf-message-goes-here"
# Texts that begin with kinds of characters which tokenizers join differently with what stands before them.
PROBES = ("", "a", "Z", "1", "(", " x", "中", "é", "\n")
# Rows that are tokenised in one call: enough for all cores, and what a tokenizer notes beside the tokens stays small.
ROWS = 1024
# Fewest characters of rows whose tokens are kept: fewer are tokenised before a large tokenizer is told from others.
WORTHWHILE = 2**20


@dataclass(frozen=True, slots=True)
class Example:
    """A tokenised prompt."""

    ids: Sequence[int]
    """Token ids up to where the answer begins, an array: 4 bytes a token, where a list takes 36."""
    cut: bool
    """Whether the row's text was cut to fit."""


@dataclass(frozen=True, slots=True)
class TrainingExample:
    """A prompt with the answer that it should get."""

    ids: Sequence[int]
    """Token ids of the prompt."""
    answer: list[int]
    """What should follow, the last item predicted and never read: the token ids of the label's words with the end
    token; for a linear head the number of the label alone."""
    weight: float
    """Share in the loss, by its label's class weight."""


class PromptTokenizer:
    """Turns prompts into token ids, and labels into the token sequences of their words with the end token.

    Args:
        tokenizer: The base's tokenizer.
        task: Gives the instruction, the template and the labels.
        max_length: Most tokens of a prompt with its longest answer.
        cut: The column that gives way in a longer row; None: the end of the input.
        words: Whether labels are told by their words; else these are not tokenised, and no room is kept for them.
        cache: Where the tokens of many rows are kept and found again; None: nowhere.

    Raises:
        LabelError: Two labels have the same tokens.
        ConfigError: The instruction alone leaves no room for any text.
    """

    def __init__(
        self,
        tokenizer: Any,
        task: Task,
        *,
        max_length: int,
        cut: str | None = None,
        words: bool = True,
        cache: "TokenCache | None" = None,
    ) -> None:
        if cut is not None and cut not in task.columns:
            raise ConfigError(f"data.cut {cut!r}: is no column of the task; these are {', '.join(task.columns)}.")
        self.task = task
        self.pad_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self._tokenizer = tokenizer
        self._cut = cut or task.cut
        # A tokenizer in Python does not tell what it is made of.
        self._cache = cache if getattr(tokenizer, "is_fast", False) else None
        self._head, self._before, self._after, self._tail = _frame(tokenizer)
        self.answers = self._tokenize_labels() if words else []
        """Token sequences by label, then by word, each with the end token."""
        self.max_prompt = max_length - max((len(word) for words in self.answers for word in words), default=0)
        shortest = len(self._encode_inputs([""])[0])
        if shortest >= self.max_prompt:
            raise ConfigError(
                f"data.max_length {max_length}: the instruction, the template and the answer alone take "
                f"{shortest + max_length - self.max_prompt} tokens. Raise it, or shorten the instruction."
            )

    def encode(self, prompts: Sequence[Prompt]) -> list[Example]:
        """Return the prompts as token ids, each at most `max_prompt` long."""
        inputs = [prompt.input for prompt in prompts]
        if self._cache is None or sum(map(len, inputs)) < WORTHWHILE:
            return self._encode_all(inputs)
        return self._cache.get([self._maker, *inputs], lambda: self._encode_all(inputs))

    def _encode_all(self, inputs: Sequence[str]) -> list[Example]:
        return [example for at in range(0, len(inputs), ROWS) for example in self._encode_rows(inputs[at : at + ROWS])]

    def shared(self) -> list[int]:
        """Return the tokens that a prompt of this task begins with, whatever its text.

        They are found by trying texts that begin in different ways; whether a prompt has them is looked at again.
        """
        texts = [self.task.render(dict.fromkeys(self.task.columns, text)) for text in PROBES]
        return common_beginning(self._encode_inputs(texts))

    def _encode_rows(self, inputs: Sequence[str]) -> list[Example]:
        rows = self._encode_inputs(inputs)
        cuts = {number: self._search_cut(inputs[number], ids) for number, ids in enumerate(rows) if self._exceeds(ids)}
        # All searches go on side by side: one call tokenises the next try of each.
        tries = {number: next(cut) for number, cut in cuts.items()}
        while tries:
            for number, ids in zip(list(tries), self._encode_inputs(list(tries.values())), strict=True):
                try:
                    tries[number] = cuts[number].send(ids)
                except StopIteration as end:
                    rows[number] = end.value
                    del tries[number]
        return [Example(array("i", ids), number in cuts) for number, ids in enumerate(rows)]

    def _search_cut(self, text: str, whole: Sequence[int]) -> Generator[str, list[int], list[int]]:
        """Return the tokens with as much of the cut column as fits; if even none of it fits, the rest is cut too.

        With one character more they would not fit.

        Args:
            text: Input of a row that is too long.
            whole: Its tokens.

        Yields:
            A text to try; its tokens are to be sent back.
        """
        start, end = self.task.cut_span(text, self._cut)
        rest = text[end:]
        kept = yield text[:start] + rest
        if self._exceeds(kept):
            text, whole, start, end, rest = text[:start] + rest, kept, 0, start + len(rest), ""
            kept = yield ""
        fits, too_long, tries = 0, end - start, 0
        while too_long - fits > 1:
            # Where the limit is if all tokens are equally long. As they are not, every third try halves what is left.
            tries += 1
            share = (self.max_prompt + 0.5 - len(kept)) / (len(whole) - len(kept)) if tries % 3 else 0.5
            size = min(max(fits + round(share * (too_long - fits)), fits + 1), too_long - 1)
            ids = yield text[: start + size] + rest
            if self._exceeds(ids):
                too_long, whole = size, ids
            else:
                fits, kept = size, ids
        return kept

    @cached_property
    def _maker(self) -> str:
        """All that the tokens of an input depend on beside it."""
        import tokenizers
        import transformers

        # The code itself stands for how rows are cut: nobody has to remember to raise a version.
        code = [Path(file).read_text(encoding="utf-8") for file in (__file__, tasks.__file__)]
        versions = [type(self._tokenizer).__qualname__, transformers.__version__, tokenizers.__version__]
        frame = [self._head, self._before, self._after, self._tail]
        task = [self.task.instruction, self.task.input, self._cut, self.max_prompt]
        return json.dumps([code, versions, self._tokenizer.backend_tokenizer.to_str(), frame, task])

    def _encode_inputs(self, inputs: Sequence[str]) -> list[list[int]]:
        texts = [f"{self._before}{self.task.instruction}\n{text}{self._after}" for text in inputs]
        return [[*self._head, *ids, *self._tail] for ids in tokenize_text(self._tokenizer, texts)]

    def _exceeds(self, ids: Sequence[int]) -> bool:
        return len(ids) > self.max_prompt

    def _tokenize_labels(self) -> list[list[list[int]]]:
        end = self._tokenizer.eos_token_id
        answers = [[[*ids, end] for ids in tokenize_text(self._tokenizer, label.words)] for label in self.task.labels]
        owners: dict[tuple[int, ...], str] = {}
        for label, words in zip(self.task.labels, answers, strict=True):
            for word, ids in zip(label.words, words, strict=True):
                other = owners.setdefault(tuple(ids), f"{word!r} of label {label.label!r}")
                if other != f"{word!r} of label {label.label!r}":
                    raise LabelError(
                        f"{word!r} of label {label.label!r} and {other} are the same tokens {ids[:-1]} for this base, "
                        "so they cannot be told apart. Give the labels other words."
                    )
        return answers


def encode_messages(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Return the tokens of a conversation up to where the next answer begins.

    Args:
        tokenizer: The base's tokenizer; its chat template is used where it has one.
        messages: `{"role": "user" or "assistant", "content": text}` in order.
    """
    # An empty message stays empty: a template may treat it in its own way.
    places = {f"{_PLACE}{n}.": message["content"] for n, message in enumerate(messages) if message["content"]}
    held = [{**message, "content": f"{_PLACE}{n}." if message["content"] else ""} for n, message in enumerate(messages)]
    find_places = re.compile("|".join(map(re.escape, places)) or "(?!)")
    ids: list[int] = []
    for segment in _segments(tokenizer, held):
        if isinstance(segment, int):
            ids.append(segment)
        else:
            ids += tokenize_text(tokenizer, [find_places.sub(lambda found: places[found.group()], segment)])[0]
    return ids


def tokenize_text(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of plain texts: what looks like a special token in them stays text.

    A vocabulary of pieces with probabilities (Unigram, as XLM-RoBERTa and T5 have) holds `</s>` as a piece like any
    other and finds it although special tokens are split: the unknown token stands instead, nothing where there is none.
    """
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ids: list[list[int]] = encoded["input_ids"]
    unknown = tokenizer.unk_token_id
    special = set(tokenizer.all_special_ids) - {unknown}
    instead = [] if unknown is None else [unknown]
    return [
        row if special.isdisjoint(row) else [i for token in row for i in (instead if token in special else [token])]
        for row in ids
    ]


def _frame(tokenizer: Any) -> tuple[list[int], str, str, list[int]]:
    """Return what stands around one user message: head ids, text before it, text after it, tail ids.

    The plain text of the template next to the message is tokenised together with it, as the template's own text is.
    """
    segments = _segments(tokenizer, [{"role": "user", "content": _PLACE}])
    place = next(i for i, segment in enumerate(segments) if isinstance(segment, str) and _PLACE in segment)

    def ids(around: Sequence[int | str]) -> list[int]:
        return [
            i for part in around for i in ([part] if isinstance(part, int) else tokenize_text(tokenizer, [part])[0])
        ]

    before, _, after = str(segments[place]).partition(_PLACE)
    return ids(segments[:place]), before, after, ids(segments[place + 1 :])


def _segments(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int | str]:
    """Return a rendered conversation as the ids of the template's special tokens and the texts between them."""
    if tokenizer.chat_template is None:
        return [*_prefix(tokenizer), "".join(message["content"] + "\n" for message in messages)]
    rendered: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    specials = {token.content: (number, token) for number, token in tokenizer.added_tokens_decoder.items()}
    longest_first = sorted(specials, key=len, reverse=True)
    parts = re.split("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")", rendered)
    segments: list[int | str] = []
    for number, part in enumerate(parts):
        if part in specials:
            segments.append(specials[part][0])
            continue
        # A special token may swallow the white space next to it; so it does in the template's own tokens.
        if number > 0 and specials[parts[number - 1]][1].rstrip:
            part = part.lstrip()
        if number + 1 < len(parts) and specials[parts[number + 1]][1].lstrip:
            part = part.rstrip()
        if part:
            segments.append(part)
    if tokenizer.split_special_tokens and not any(isinstance(segment, int) for segment in segments):
        # Plain text, for a tokenizer that takes special tokens in a text for text: it puts its prefix there itself.
        return [*_prefix(tokenizer), *segments]
    return segments


def _prefix(tokenizer: Any) -> list[int]:
    """Return the ids that a tokenizer puts before any text, such as a begin token."""
    whole = tokenizer("x")["input_ids"]
    plain = tokenizer("x", add_special_tokens=False)["input_ids"]
    starts = [i for i in range(len(whole)) if whole[i : i + len(plain)] == plain]
    return list(whole[: starts[0]]) if starts else []
