"""From scores to probabilities and labels: stored in a run, applied alike in validation, prediction and chat."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_clf.decisions.calibration import Calibration
from llm_clf.decisions.decide import Floats as Probs
from llm_clf.decisions.decide import decide, probabilities
from llm_clf.decisions.folds import Floats, Indices
from llm_clf.decisions.rules import MostProbable, Rule, rule_of
from llm_clf.errors import ArtifactError
from llm_clf.files import read_json, write_json

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Decided:
    """What decisions make of some rows."""

    probs: Probs
    """fp32, shape `(rows, labels)`."""
    choices: Indices
    """Index of each row's label, also of those that are not answered."""
    answered: NDArray[np.bool_]
    """Whether a row gets its label."""
    sets: NDArray[np.bool_] | None
    """Which labels each row's set holds, shape `(rows, labels)`; None without label sets."""

    @property
    def confidence(self) -> Floats:
        """Return the probability of each row's label."""
        found: Floats = self.probs[np.arange(len(self.choices)), self.choices].astype(np.float64)
        return found


@dataclass(frozen=True, slots=True)
class Decisions:
    """How scores become probabilities and labels."""

    labels: tuple[str, ...]
    calibration: Calibration
    rule: Rule = field(default_factory=MostProbable)
    shift: tuple[float, ...] | None = None
    """By label, in nats: the logarithm of its share where the run is used over that in training."""
    smallest: float | None = None
    """Probability below which no label is given."""
    in_set: float | None = None
    """Probability from which on a label belongs to a row's set; None: no label sets."""
    rows: tuple[int, int] = (0, 0)
    """Labelled validation rows by which the above was chosen, and those apart from them for label sets."""
    notes: tuple[str, ...] = ()
    """What a person should know of it."""

    @classmethod
    def bare(cls, labels: Sequence[str]) -> "Decisions":
        """Return those that fit nothing: bare probabilities and the most probable label."""
        return cls(tuple(labels), Calibration.off(len(labels), "nothing was fitted"))

    @property
    def fitted(self) -> bool:
        """Whether anything in it was fitted to validation rows."""
        return self.rows != (0, 0)

    @property
    def plain(self) -> bool:
        """Whether it gives what comes without decisions: bare probabilities and the most probable label."""
        found = (self.calibration.method, self.rule, self.shift, self.smallest, self.in_set)
        return found == ("none", MostProbable(), None, None, None)

    def calibrated(self, scores: NDArray[np.floating[Any]]) -> Probs:
        """Return probabilities for a base rate like that of training, fp32, shape `(rows, labels)`."""
        if self.calibration.method == "none":
            return probabilities(scores.astype(np.float32))
        found: Probs = np.exp(self.calibration.log_probs(scores)).astype(np.float32)
        return found

    def apply(self, scores: NDArray[np.floating[Any]]) -> Decided:
        """Decide rows by their scores: log-probabilities in nats, fp32, shape `(rows, labels)`."""
        probs = self.calibrated(scores)
        if self.shift is not None:
            probs = probabilities((self.calibration.log_probs(scores) + np.array(self.shift)).astype(np.float32))
        if self.in_set is not None:
            sets = probs.astype(np.float64) >= self.in_set
            return Decided(probs, decide(probs), sets.sum(axis=1) == 1, sets)
        choices = self.rule.choose(probs)
        decided = Decided(probs, choices, np.ones(len(choices), dtype=bool), None)
        if self.smallest is None:
            return decided
        return Decided(probs, choices, decided.confidence >= self.smallest, None)

    def facts(self) -> dict[str, Any]:
        """Return what decisions.json holds."""
        return {
            "format": FORMAT,
            "labels": list(self.labels),
            "calibration": {
                "method": self.calibration.method,
                "factors": list(self.calibration.factors),
                "biases": list(self.calibration.biases),
                "reason": self.calibration.reason,
            },
            **self.rule.facts(),
            "shift": list(self.shift) if self.shift is not None else None,
            "smallest_probability": self.smallest,
            "set_probability": self.in_set,
            "rows": {"fitted": self.rows[0], "label_sets": self.rows[1]},
            "notes": list(self.notes),
        }

    def save(self, file: Path) -> None:
        """Write decisions.json."""
        write_json(file, self.facts())

    def text(self) -> str:
        """Return what was chosen, a line each."""
        lines = [f"Calibration: {self.calibration.text()}."]
        if not isinstance(self.rule, MostProbable):
            lines.append(f"Label: {self.rule.text()}.")
        return "\n".join([*lines, *self.notes])


def load_decisions(file: Path, labels: Sequence[str]) -> Decisions:
    """Return what `Decisions.save` wrote.

    Raises:
        ArtifactError: It is damaged, of a newer version, or for other labels.
    """
    facts = read_json(file)
    try:
        if facts["format"] > FORMAT:
            raise ArtifactError(f"{file}: was written by a newer llm-clf (format {facts['format']}). Upgrade.")
        calibration, rows, count = facts["calibration"], facts["rows"], len(labels)
        if list(facts["labels"]) != list(labels):
            raise ValueError(f"it is for the labels {', '.join(facts['labels'])}")
        found = Decisions(
            labels=tuple(labels),
            calibration=Calibration(
                calibration["method"],
                _numbers(calibration["factors"], count),
                _numbers(calibration["biases"], count),
                str(calibration["reason"]),
            ),
            rule=rule_of(facts, count),
            shift=_numbers(facts["shift"], count) if facts["shift"] is not None else None,
            smallest=facts["smallest_probability"],
            in_set=facts["set_probability"],
            rows=(rows["fitted"], rows["label_sets"]),
            notes=tuple(map(str, facts["notes"])),
        )
    except (LookupError, TypeError, ValueError) as error:
        raise ArtifactError(f"{file}: is damaged: {error}. Copy the whole run again, or train again.") from error
    return found


def _numbers(values: Any, count: int) -> tuple[float, ...]:
    found = tuple(float(value) for value in values)
    if len(found) != count or not np.isfinite(found).all():
        raise ValueError(f"found {json.dumps(values)} where {count} numbers belong")
    return found
