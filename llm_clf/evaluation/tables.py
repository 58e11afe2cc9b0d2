"""Metrics as text tables."""

from typing import Any

from llm_clf.console import table

HEADLINES = ("accuracy", "precision", "recall", "f1", "macro_f1", "weighted_f1", "roc_auc", "log_loss")


def metrics_text(metrics: dict[str, Any]) -> str:
    """Return what `evaluate` shows: headline, per-label figures, confusion matrix, counts by status."""
    if not metrics["rows_with_gold"]:
        return f"{metrics['rows']:,} rows, none with a gold label: nothing to measure."
    numbers = [[name, _number(metrics[name])] for name in HEADLINES if name in metrics]
    per_label = [
        [label, *(_number(figures[name]) for name in ("precision", "recall", "f1")), figures["support"]]
        for label, figures in metrics["per_label"].items()
    ]
    confusion = metrics["confusion_matrix"]
    columns = list(next(iter(confusion.values())))
    status = ", ".join(f"{count:,} {name}" for name, count in metrics.get("status", {}).items())
    parts = [
        f"{metrics['rows']:,} rows, {metrics['rows_with_gold']:,} with a gold label; {status}",
        table(["metric", "value"], numbers),
        table(["label", "precision", "recall", "f1", "support"], per_label),
        table(["gold \\ predicted", *columns], [[label, *row.values()] for label, row in confusion.items()]),
    ]
    without = sum(count for name, count in metrics.get("status", {}).items() if name != "ok")
    if without:
        parts.append(f"Rows without a label ({without:,}) count as wrong.")
    return "\n\n".join(parts)


def changes_text(before: dict[str, Any], after: dict[str, Any], names: tuple[str, str]) -> str:
    """Return the headline metrics of the same rows measured twice, with their change; `names` head the two columns."""
    rows = []
    for name in HEADLINES:
        if name in before and name in after:
            one, other = before[name], after[name]
            change = "-" if one is None or other is None else f"{other - one:+.4f}"
            rows.append([name, _number(one), _number(other), change])
    return table(["metric", *names, "change"], rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
