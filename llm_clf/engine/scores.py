"""What all that scores prompts has in common, whatever model is behind it."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np

from llm_clf.prompting.prompts import Prompt


@dataclass(frozen=True, slots=True)
class Scored:
    """What the model made of some rows."""

    rows: list[int]
    """Numbers of the rows in the input."""
    scores: np.ndarray
    """Log-probabilities in nats, fp32, shape `(rows, labels)`."""
    cut: list[bool]
    """Whether a row was cut to fit."""
    texts: list[str] | None
    """Generated answers, None where none were asked for."""


@dataclass(frozen=True, slots=True)
class AllScored:
    """What the model made of all rows, in input order."""

    scores: np.ndarray
    """Log-probabilities in nats, fp32, shape `(rows, labels)`."""
    cut: np.ndarray
    """Whether a row was cut to fit, shape `(rows,)`."""
    texts: Mapping[int, str]
    """Generated answers by row; empty where none were asked for."""


class Scorer(Protocol):
    """Something that scores the labels of a task for prompts."""

    def score(
        self,
        prompts: Iterable[Prompt],
        done: Callable[[Scored], None],
        finished: Collection[int] = (),
        *,
        fits: int | None = None,
        found: Callable[[int], None] = ...,
    ) -> int | None:
        """Score prompts batch by batch, reading them as it goes.

        The plan of batches depends on the prompts and the settings alone; batches that are finished are left out.

        Args:
            prompts: Rows in input order.
            done: Takes each batch.
            finished: Numbers of rows that need no scores; whole batches, as `done` got them.
            fits: Most tokens of a part of a batch that are known to fit into memory; None: whole batches.
            found: Is told how many are tried next where memory ran out. Parts round otherwise than the whole batch, so
                a job that is to go on to the same result begins with the last of these.

        Returns:
            How many tokens at once fit into memory; None where the model has no such budget.
        """


def windows(prompts: Iterable[Prompt], size: int) -> Iterator[list[Prompt]]:
    """Yield lists of `size` prompts; the last one may be shorter."""
    source = iter(prompts)
    while window := list(islice(source, size)):
        yield window
