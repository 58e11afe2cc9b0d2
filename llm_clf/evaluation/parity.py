"""Whether two predictions of the same rows are the same, to the last row and the last bit."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_clf.decisions.predictions import PredictionTable
from llm_clf.errors import ArtifactError

# Largest change of a probability that other hardware or versions may make by rounding, in fp32 and in 16 bits. A number
# between 8 and 16 is rounded to bf16 by up to 0.03; two such logits move a probability near one half by 0.016.
ROUNDING = {"fp32": 1e-3, "bf16": 2e-2}


@dataclass(frozen=True, slots=True)
class Parity:
    """How far two predictions of the same rows are apart."""

    rows: int
    rows_differ: int
    """In any bit of any probability, or in label or status."""
    labels_changed: int
    largest_probability_change: float

    @property
    def equal(self) -> bool:
        """Whether every row is the same, bit for bit."""
        return self.rows_differ == 0

    def within(self, tolerance: float) -> bool:
        """Whether all labels are the same, and no probability moves by more than `tolerance`."""
        return self.labels_changed == 0 and self.largest_probability_change <= tolerance

    def facts(self) -> dict[str, Any]:
        """Return it as plain values, fit for JSON."""
        return asdict(self)

    def text(self) -> str:
        """Return how far they are apart, in words."""
        return (
            f"{self.rows_differ:,} of {self.rows:,} rows differ, {self.labels_changed:,} in their label; the largest "
            f"change of a probability is {self.largest_probability_change:.2g}"
        )


def compare_probabilities(one: NDArray[np.floating[Any]], other: NDArray[np.floating[Any]]) -> Parity:
    """Return how far probabilities of the same rows are apart; both of shape `(rows, labels)`.

    The label of a row is its most probable one.
    """
    changes = np.abs(other.astype(np.float64) - one.astype(np.float64))
    return Parity(
        rows=len(one),
        rows_differ=int(changes.any(axis=1).sum()),
        labels_changed=int((one.argmax(axis=1) != other.argmax(axis=1)).sum()),
        largest_probability_change=float(changes.max(initial=0.0)),
    )


def compare_predictions(stored: PredictionTable, fresh: PredictionTable, where: object) -> Parity:
    """Return how far two predictions files are apart; their labels and statuses are those that the files hold.

    Args:
        stored: What is to be repeated.
        fresh: The same rows, predicted anew.
        where: The file of the stored ones, for the message.

    Raises:
        ArtifactError: They are not of the same rows in the same order, or lack probabilities.
    """
    same = all(getattr(stored, name) == getattr(fresh, name) for name in ("ids", "gold", "labels"))
    if not same or stored.probs is None or fresh.probs is None:
        raise ArtifactError(
            f"{where}: holds other rows, gold labels or labels than the validation rows, so the run did not write it. "
            "Copy the whole run again, or train again."
        )
    found = compare_probabilities(stored.probs, fresh.probs)
    labels = np.array([one != other for one, other in zip(stored.predicted, fresh.predicted, strict=True)])
    others = np.array([one != other for one, other in zip(stored.status, fresh.status, strict=True)])
    changed = (stored.probs != fresh.probs).any(axis=1) | labels | others
    return Parity(found.rows, int(changed.sum()), int(labels.sum()), found.largest_probability_change)
