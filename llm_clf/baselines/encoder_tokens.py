"""The one place where a row becomes tokens for an encoder: in training, validation and prediction alike."""

from collections.abc import Sequence
from typing import Any

from llm_clf.engine.tokens import Example, tokenize_text
from llm_clf.prompting.tasks import Task


class RowTokenizer:
    """Turns the inputs of rows into token ids, with the special tokens that the encoder wants around a text.

    The instruction is the same for all rows and is left out.

    Args:
        tokenizer: The encoder's.
        task: Tells where the columns stand in an input.
        pad_id: Stands in for a row without any token.
        max_length: Most tokens of a row, special ones included.
    """

    def __init__(self, tokenizer: Any, task: Task, *, pad_id: int, max_length: int) -> None:
        self.max_length = max_length
        self._tokenizer, self._task, self._pad_id = tokenizer, task, pad_id
        self._head, self._tail = _around(tokenizer)

    def encode(self, texts: Sequence[str]) -> list[Example]:
        """Return inputs as token ids, each at most `max_length` long; none is empty."""
        examples = []
        for text, ids in zip(texts, self._encode(texts), strict=True):
            if len(ids) <= self.max_length:
                examples.append(Example(ids, cut=False))
            else:
                examples.append(Example(self._encode([self._shorten(text)])[0], cut=True))
        return examples

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        # Token types are not asked for: there is one text, and a model without them in its input takes them for zero.
        return [[*self._head, *ids, *self._tail] or [self._pad_id] for ids in tokenize_text(self._tokenizer, texts)]

    def _fits(self, text: str) -> bool:
        return len(self._encode([text])[0]) <= self.max_length

    def _shorten(self, text: str) -> str:
        """Return a text whose longest columns are cut to one length in characters, the largest that fits.

        Where the template alone is too long, the text is cut from its end.
        """
        spans = self._task.column_spans(text)
        if not self._fits(_cut(text, spans, 0)):
            spans = [(0, len(text))]
        # From short to long, so that a field of a megabyte is not tokenised again and again.
        fits, size = 0, self.max_length
        while self._fits(_cut(text, spans, size)):
            fits, size = size, size * 2
        while size - fits > 1:
            middle = (fits + size) // 2
            fits, size = (middle, size) if self._fits(_cut(text, spans, middle)) else (fits, middle)
        return _cut(text, spans, fits)


def _cut(text: str, spans: Sequence[tuple[int, int]], size: int) -> str:
    """Return the text with at most so many characters of each span."""
    kept, before = [], 0
    for start, end in spans:
        kept += [text[before:start], text[start : min(end, start + size)]]
        before = end
    return "".join(kept) + text[before:]


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer puts before and behind any text, such as `[CLS]` and `[SEP]`."""
    whole, plain = tokenizer("x")["input_ids"], tokenizer("x", add_special_tokens=False)["input_ids"]
    start = next(place for place in range(len(whole)) if whole[place : place + len(plain)] == plain)
    return list(whole[:start]), list(whole[start + len(plain) :])
