"""Metrics as text tables."""

from collections.abc import Sequence
from typing import Any

from llm_clf.console import table
from llm_clf.evaluation.metrics import HEADLINES


def metrics_text(metrics: dict[str, Any]) -> str:
    """Return what `evaluate` shows: headline, per-label figures, confusion matrix, counts by status."""
    if not metrics["rows_with_gold"]:
        return f"{metrics['rows']:,} rows, none with a gold label: nothing to measure."
    per_label = [
        [label, *(_number(figures[name]) for name in ("precision", "recall", "f1")), figures["support"]]
        for label, figures in metrics["per_label"].items()
    ]
    confusion = metrics["confusion_matrix"]
    columns = list(next(iter(confusion.values())))
    status = ", ".join(f"{count:,} {name}" for name, count in metrics.get("status", {}).items())
    parts = [
        f"{metrics['rows']:,} rows, {metrics['rows_with_gold']:,} with a gold label; {status}",
        _headline(metrics),
        table(["label", "precision", "recall", "f1", "support"], per_label),
        table(["gold \\ predicted", *columns], [[label, *row.values()] for label, row in confusion.items()]),
    ]
    without = sum(count for name, count in metrics.get("status", {}).items() if name != "ok")
    if without:
        parts.append(f"Rows without a label ({without:,}) count as wrong.")
    if "answered" in metrics:
        parts.append(_answered(metrics["answered"]))
    if "label_sets" in metrics:
        found = metrics["label_sets"]
        sizes = ", ".join(f"{count:,} of {size}" for size, count in found["sizes"].items())
        parts.append(f"Label sets hold the gold label of {found['coverage']:.1%} of rows; sets by size: {sizes}.")
    intervals = metrics.get("intervals", {})
    for name, count in intervals.get("left_out", {}).items():
        parts.append(f"{name} has no value in {count:,} of {intervals['resamples']:,} resamples; they are left out.")
    return "\n\n".join(parts)


def _answered(answered: dict[str, Any]) -> str:
    head = f"Of the rows with a gold label {answered['coverage']:.1%} are answered ({answered['rows']:,})"
    return f"{head}; of these alone:\n" + _headline(answered) if answered["rows"] else head + "."


def calibration_text(found: dict[str, Any]) -> str:
    """Return whether probabilities hold, before and after calibration."""
    before, after = found["before"], found["after_cross_fitted"]
    head = ["probabilities", "as scored"] + ([f"calibrated ({found['method']}), cross-fitted"] if after else [])
    rows = [
        [name, _number(before[name]), *([_number(after[name])] if after else [])]
        for name in ("ece", "brier", "log_loss")
    ]
    return table(head, rows)


def interval_text(interval: Sequence[float] | None, digits: int = 4, *, sign: str = "") -> str:
    """Return an interval as tables show it; with `sign` "+" as one of differences."""
    return "-" if interval is None else "[" + ", ".join(f"{end:{sign}.{digits}f}" for end in interval) + "]"


def figure_text(metrics: dict[str, Any], name: str) -> str:
    """Return a metric with its interval, in three digits, as tables of several runs show it."""
    value = metrics.get(name)
    if value is None:
        return "-"
    return f"{value:.3f} {interval_text(metrics['intervals']['metrics'].get(name), 3)}"


def _headline(metrics: dict[str, Any]) -> str:
    names = [name for name in HEADLINES if name in metrics]
    intervals = metrics.get("intervals")
    if intervals is None:
        return table(["metric", "value"], [[name, _number(metrics[name])] for name in names])
    rows = [[name, _number(metrics[name]), interval_text(intervals["metrics"][name])] for name in names]
    return table(["metric", "value", f"{intervals['level']:.0%} interval"], rows)


def changes_text(before: dict[str, Any], after: dict[str, Any], names: tuple[str, str]) -> str:
    """Return the headline metrics of the same rows measured twice, with their change; `names` head the two columns."""
    rows = []
    for name in HEADLINES:
        if name in before and name in after:
            one, other = before[name], after[name]
            change = "-" if one is None or other is None else f"{other - one:+.4f}"
            rows.append([name, _number(one), _number(other), change])
    return table(["metric", *names, "change"], rows)


def comparison_text(facts: dict[str, Any], level: float = 0.95) -> str:
    """Return what `compare` shows of `comparison_facts`: metrics with their differences, flips, the verdict."""
    if not facts["rows_with_gold"]:
        return f"{facts['rows']:,} rows. {facts['verdict']}"
    rows = []
    for name, found in facts["metrics"].items():
        change = "-" if found["difference"] is None else f"{found['difference']:+.4f}"
        shown = interval_text(found["interval"], sign="+")
        rows.append([name, _number(found["a"]), _number(found["b"]), change, shown])
    flips, without = facts["flips"], facts["without_label"]
    parts = [
        f"{facts['rows']:,} rows, {facts['rows_with_gold']:,} with a gold label",
        table(["metric", "A", "B", "B - A", f"{level:.0%} interval"], rows),
        f"{flips['rows']:,} rows have another label in B: {flips['right_only_in_a']:,} right in A only, "
        f"{flips['right_only_in_b']:,} right in B only, {flips['right_in_neither']:,} in neither. "
        f"McNemar's exact test: p {facts['mcnemar_p']:.2g}.",
    ]
    if any(without.values()):
        parts.append(f"Rows without a label count as wrong: {without['a']:,} in A, {without['b']:,} in B.")
    return "\n\n".join([*parts, facts["verdict"]])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
