"""How probabilities become a label: the most probable one, a threshold, offsets, or the least expected cost."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llm_clf.decisions.decide import Floats as Probs
from llm_clf.decisions.decide import decide
from llm_clf.decisions.folds import Floats, Indices


class Rule(Protocol):
    """A way to choose a label."""

    def choose(self, probs: Probs) -> Indices:
        """Return the index of the chosen label of each row; probabilities have the shape `(rows, labels)`."""

    def facts(self) -> dict[str, Any]:
        """Return what it is, as JSON holds it; `rule_of` reads it."""

    def text(self) -> str:
        """Return in a few words what it does."""


@dataclass(frozen=True, slots=True)
class MostProbable:
    """The most probable label; the first in the task's order where two are level."""

    def choose(self, probs: Probs) -> Indices:
        """Return the most probable label of each row."""
        return decide(probs)

    def facts(self) -> dict[str, Any]:
        """Return its name."""
        return {"rule": "most probable"}

    def text(self) -> str:
        """Return what it does."""
        return "the most probable label"


@dataclass(frozen=True, slots=True)
class Threshold:
    """Of two labels the second, where it has at least so much probability."""

    threshold: float

    def choose(self, probs: Probs) -> Indices:
        """Return 1 where the second label's probability reaches the threshold, else 0."""
        return (probs[:, 1].astype(np.float64) >= self.threshold).astype(np.int64)

    def facts(self) -> dict[str, Any]:
        """Return its name and the threshold."""
        return {"rule": "threshold", "threshold": self.threshold}

    def text(self) -> str:
        """Return what it does."""
        return f"the second label from the probability {self.threshold:.4g} on"


@dataclass(frozen=True, slots=True)
class Offsets:
    """The label whose log-probability with its offset is highest."""

    offsets: tuple[float, ...]
    """In nats, by label."""

    def choose(self, probs: Probs) -> Indices:
        """Return the best label of each row."""
        choices: Indices = (logs_of(probs) + np.array(self.offsets)).argmax(axis=1)
        return choices

    def facts(self) -> dict[str, Any]:
        """Return its name and the offsets."""
        return {"rule": "offsets", "offsets": list(self.offsets)}

    def text(self) -> str:
        """Return what it does."""
        return f"the highest log-probability with offsets {', '.join(f'{one:.3g}' for one in self.offsets)}"


@dataclass(frozen=True, slots=True)
class LeastCost:
    """The label with the least expected cost."""

    costs: tuple[tuple[float, ...], ...]
    """By gold label, then by predicted label."""

    def choose(self, probs: Probs) -> Indices:
        """Return the cheapest label of each row; the first in the task's order where two are level."""
        choices: Indices = (probs.astype(np.float64) @ np.array(self.costs)).argmin(axis=1)
        return choices

    def facts(self) -> dict[str, Any]:
        """Return its name and the costs."""
        return {"rule": "least cost", "costs": [list(row) for row in self.costs]}

    def text(self) -> str:
        """Return what it does."""
        return "the label with the least expected cost"


def logs_of(probs: NDArray[np.floating[Any]]) -> Floats:
    """Return logarithms, finite also of 0."""
    logs: Floats = np.log(np.maximum(probs.astype(np.float64), np.finfo(np.float32).tiny))
    return logs


def rule_of(facts: Mapping[str, Any], labels: int) -> Rule:
    """Return what `facts()` told of.

    Raises:
        ValueError: It is no rule for so many labels; also LookupError and TypeError.
    """
    kind = facts["rule"]
    if kind == "most probable":
        return MostProbable()
    if kind == "threshold" and labels == 2:
        return Threshold(float(facts["threshold"]))
    if kind == "offsets" and len(facts["offsets"]) == labels:
        return Offsets(tuple(float(one) for one in facts["offsets"]))
    if kind == "least cost" and [len(row) for row in facts["costs"]] == [labels] * labels:
        return LeastCost(tuple(tuple(float(one) for one in row) for row in facts["costs"]))
    raise ValueError(f"the rule is {dict(facts)!r}, for {labels} labels")
