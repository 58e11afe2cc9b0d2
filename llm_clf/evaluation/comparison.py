"""Two predictions of the same rows: is one really better?

Each metric's difference gets an interval from a paired bootstrap, in which the same rows are drawn for both. McNemar's
exact test asks of the rows that only one of the two has right whether they fall to either side by chance.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from scipy.stats import binomtest

from llm_clf.decisions.predictions import PredictionTable
from llm_clf.errors import ConfigError, DataError
from llm_clf.evaluation.intervals import LEVEL, Interval, Judged, interval_of, resample
from llm_clf.evaluation.metrics import HEADLINES, NO_LABEL, compute_metrics

LOWER_IS_BETTER = ("log_loss",)
SHOWN = 3

Side = Literal["a", "b"]


@dataclass(frozen=True, slots=True)
class Difference:
    """A metric of both predictions."""

    a: float | None
    b: float | None
    """None where the metric has no value."""
    interval: Interval | None
    """Of `b - a`."""

    @property
    def value(self) -> float | None:
        """Return `b - a`."""
        return None if self.a is None or self.b is None else self.b - self.a


@dataclass(frozen=True, slots=True)
class Flip:
    """A row with a gold label to which the two give different labels."""

    id: str
    gold: str
    a: str
    b: str
    """Empty text where no label was given."""
    right: Side | None
    """Which of the two has the gold label."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What two predictions of the same rows have in common, and what not."""

    rows: int
    rows_with_gold: int
    without_label: dict[Side, int]
    """Rows with a gold label that were given none: they count as wrong."""
    differences: dict[str, Difference]
    """By metric; empty where no row has a gold label."""
    flips: list[Flip]
    p: float
    """Of McNemar's exact test, two-sided: 1 where as many rows are right in `a` only as in `b` only."""

    def right_only_in(self, side: Side | None) -> int:
        """Return how many flipped rows only one of the two has right; None: neither."""
        return sum(flip.right == side for flip in self.flips)

    def better(self, metric: str) -> Side | None:
        """Return which of the two is really better in a metric: the interval of the difference leaves out 0.

        Raises:
            ConfigError: The metric needs probabilities, and these files lack them.
        """
        if self.rows_with_gold and metric not in self.differences:
            raise ConfigError(
                f"--metric {metric}: needs the probabilities of both predictions; without there are "
                f"{', '.join(self.differences)}."
            )
        interval = self.differences[metric].interval if self.rows_with_gold else None
        if interval is None or 0 in interval:
            return None
        return "b" if (interval.low > 0) != (metric in LOWER_IS_BETTER) else "a"


def compare_tables(a: PredictionTable, b: PredictionTable, names: tuple[str, str]) -> Comparison:
    """Compare two predictions of the same rows; rows of `b` may stand in another order.

    Rows without a gold label are left out, and rows without a predicted one count as wrong, as in `compute_metrics`.

    Args:
        a: The one.
        b: The other.
        names: What messages call them.

    Raises:
        DataError: The rows, their gold labels or the labels that there are differ.
    """
    a, b = _with_same_labels(a, b, names)
    b = _in_order(a, b, names)
    known = [row for row, label in enumerate(a.gold) if label != NO_LABEL]
    flips = [_flip(a, b, row) for row in known if a.predicted[row] != b.predicted[row]]
    only = {side: sum(flip.right == side for flip in flips) for side in ("a", "b")}
    return Comparison(
        rows=len(a.ids),
        rows_with_gold=len(known),
        without_label={
            "a": sum(a.predicted[row] == NO_LABEL for row in known),
            "b": sum(b.predicted[row] == NO_LABEL for row in known),
        },
        differences=_differences(a, b) if known else {},
        flips=flips,
        p=float(binomtest(only["a"], only["a"] + only["b"]).pvalue) if only["a"] + only["b"] else 1.0,
    )


def _with_same_labels(
    a: PredictionTable, b: PredictionTable, names: tuple[str, str]
) -> tuple[PredictionTable, PredictionTable]:
    """Return both with the same labels; a file without probabilities knows those only that occur in it.

    Raises:
        DataError: Both have probabilities, of other labels or in another order.
    """
    if a.probs is not None and b.probs is not None:
        if a.labels != b.labels:
            raise DataError(
                f"{names[0]} has the labels {', '.join(a.labels)}, {names[1]} has {', '.join(b.labels)}. Compare "
                "predictions of one task."
            )
        return a, b
    whole = [table.labels for table in (a, b) if table.probs is not None]
    labels = whole[0] if whole else sorted({*a.labels, *b.labels})
    strangers = sorted({*a.labels, *b.labels} - {*labels})
    if strangers:
        raise DataError(
            f"{names[0]}, {names[1]}: one has the label {strangers[0]!r}, the other's labels are {', '.join(labels)}. "
            "Compare predictions of one task."
        )
    return replace(a, labels=labels, probs=None), replace(b, labels=labels, probs=None)


def _in_order(a: PredictionTable, b: PredictionTable, names: tuple[str, str]) -> PredictionTable:
    """Return `b` with its rows in the order of `a`.

    Raises:
        DataError: An id is repeated, or rows or gold labels differ.
    """
    _places(a, names[0])
    places = _places(b, names[1])
    if a.ids != b.ids:
        _require_same_ids(a.ids, b.ids, names)
        order = [places[row_id] for row_id in a.ids]
        b = PredictionTable(
            labels=b.labels,
            ids=a.ids,
            predicted=[b.predicted[row] for row in order],
            status=[b.status[row] for row in order],
            gold=[b.gold[row] for row in order],
            probs=b.probs[order] if b.probs is not None else None,
        )
    other = [
        f"{row_id!r}: {one!r} and {two!r}" for row_id, one, two in zip(a.ids, a.gold, b.gold, strict=True) if one != two
    ]
    if other:
        raise DataError(
            f"{names[0]}, {names[1]}: {len(other):,} of {len(a.ids):,} rows have another gold label, first "
            f"{_first(other)}. Compare predictions of the same rows."
        )
    return b


def _places(table: PredictionTable, name: str) -> dict[str, int]:
    """Return the row of each id."""
    places = {row_id: row for row, row_id in enumerate(table.ids)}
    if len(places) < len(table.ids):
        repeated = next(row_id for row, row_id in enumerate(table.ids) if places[row_id] != row)
        raise DataError(f"{name}: the id {repeated!r} stands twice. Ids tell rows apart; make them unique.")
    return places


def _require_same_ids(a: Sequence[str], b: Sequence[str], names: tuple[str, str]) -> None:
    missing = []
    for own, other, name, elsewhere in ((a, b, *names), (b, a, *reversed(names))):
        known = set(other)
        absent = [repr(row_id) for row_id in own if row_id not in known]
        if absent:
            missing.append(
                f"{len(absent):,} of the {len(own):,} rows of {name} are not in {elsewhere}: {_first(absent)}"
            )
    if missing:
        raise DataError(f"{'; '.join(missing)}. Compare predictions of the same rows.")


def _first(found: Sequence[str]) -> str:
    return ", ".join(found[:SHOWN]) + (", …" if len(found) > SHOWN else "")


def _flip(a: PredictionTable, b: PredictionTable, row: int) -> Flip:
    gold, one, two = a.gold[row], a.predicted[row], b.predicted[row]
    return Flip(a.ids[row], gold, one, two, "a" if one == gold else "b" if two == gold else None)


def _differences(a: PredictionTable, b: PredictionTable) -> dict[str, Difference]:
    one, two = (compute_metrics(table.gold, table.predicted, table.probs, table.labels) for table in (a, b))
    drawn_a, drawn_b = resample([Judged.of(a), Judged.of(b)])
    return {
        name: Difference(one[name], two[name], interval_of(drawn_b[name] - drawn_a[name]))
        for name in HEADLINES
        if name in one
    }


def verdict(compared: Comparison, metric: str, names: tuple[str, str] = ("A", "B")) -> str:
    """Return one plain sentence: which of the two is better in a metric, or that neither really is.

    Raises:
        ConfigError: The metric needs probabilities, and these files lack them.
    """
    better = compared.better(metric)
    if not compared.rows_with_gold:
        return "No row has a gold label: nothing to compare."
    found = compared.differences[metric]
    if found.value is None or found.interval is None:
        return f"Nothing can be said: {metric} has no value for these rows."
    figures = (
        f"{names[0]} {found.a:.4f}, {names[1]} {found.b:.4f}; {names[1]} - {names[0]} is {found.value:+.4f}, "
        f"{LEVEL:.0%} interval {found.interval.low:+.4f} to {found.interval.high:+.4f}"
    )
    if better is None:
        return f"No real difference in {metric}: {figures}."
    doubt = f" McNemar's test, which looks at accuracy, does not confirm it (p {compared.p:.2g})."
    found_better = f"{names[0] if better == 'a' else names[1]} is better in {metric}: {figures}."
    return found_better + (doubt if compared.p > 1 - LEVEL else "")


def comparison_facts(compared: Comparison, metric: str) -> dict[str, Any]:
    """Return a comparison as plain values, fit for JSON; the flipped rows only as counts."""
    return {
        "rows": compared.rows,
        "rows_with_gold": compared.rows_with_gold,
        "without_label": dict(compared.without_label),
        "metrics": {
            name: {
                "a": found.a,
                "b": found.b,
                "difference": found.value,
                "interval": [found.interval.low, found.interval.high] if found.interval is not None else None,
            }
            for name, found in compared.differences.items()
        },
        "flips": {
            "rows": len(compared.flips),
            "right_only_in_a": compared.right_only_in("a"),
            "right_only_in_b": compared.right_only_in("b"),
            "right_in_neither": compared.right_only_in(None),
        },
        "mcnemar_p": compared.p,
        "metric": metric,
        "better": compared.better(metric),
        "verdict": verdict(compared, metric),
    }
