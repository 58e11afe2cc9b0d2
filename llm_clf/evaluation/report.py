"""The report: one HTML file that holds all it needs, and asks for nothing from anywhere.

Its Content-Security-Policy lets only the one style sheet and the one script in it run, by their hashes. All text of
rows and labels is escaped, or lies as data in a block that is no script, from where the script takes it as text.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from llm_clf.decisions.predictions import PredictionTable
from llm_clf.evaluation.metrics import HEADLINES
from llm_clf.evaluation.mistakes import Mistake, label_names, surest_mistakes
from llm_clf.evaluation.plots import Plot
from llm_clf.evaluation.slices import SMALL, Slicing
from llm_clf.evaluation.tables import interval_text
from llm_clf.evaluation.texts import PredictedRows, shorten_text, visible
from llm_clf.runs import package_versions

HERE = Path(__file__).parent
MOST_MISTAKES = 500
MOST_CHARACTERS = 4_000
"""Of a text in the browser of mistakes."""
MATRIX_LABELS = 25
BESIDE = 3
"""Labels up to which two tables fit beside each other."""
MOST_PAIRS = 50
NO_NAME = "(none)"
TITLES = {
    "accuracy": "Accuracy",
    "precision": "Precision",
    "recall": "Recall",
    "f1": "F1",
    "macro_f1": "Macro F1",
    "weighted_f1": "Weighted F1",
    "roc_auc": "ROC-AUC",
    "log_loss": "Log-loss (nats)",
}


@dataclass(frozen=True, slots=True)
class Report:
    """All that the page shows."""

    source: str
    """What was measured, by name."""
    table: PredictionTable
    metrics: dict[str, Any]
    """With intervals, as `measure` returns them."""
    plots: Sequence[Plot]
    slicings: Sequence[Slicing]
    rows: PredictedRows
    notes: Sequence[str]
    """What a reader must know of these rows."""


def report_html(report: Report) -> str:
    """Return the page."""
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    version = package_versions(["llm-clf"])["llm-clf"]
    body = "\n".join(
        [
            _header(report),
            _headline(report.metrics),
            _counts(report.metrics),
            _plots(report.plots),
            _slices(report),
            _mistakes(report),
        ]
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{_text(report.source)}: report</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
<footer>Made by llm-clf {version}. Figures in full: metrics.json beside this file.</footer>
<script>{script}</script>
</body>
</html>
"""


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _text(value: object) -> str:
    """Return a value as text of the page, whatever is in it."""
    return escape(visible(str(value)))


def _label(name: str) -> str:
    """Return a label as an element that keeps its own direction of writing."""
    return f"<bdi>{_text(name or NO_NAME)}</bdi>"


def _header(report: Report) -> str:
    metrics = report.metrics
    status = ", ".join(f"{count:,} {_text(name)}" for name, count in metrics.get("status", {}).items())
    rows = f"{metrics['rows']:,} rows, {metrics['rows_with_gold']:,} with a gold label; {status}"
    notes = list(report.notes)
    without = sum(count for name, count in metrics.get("status", {}).items() if name != "ok")
    if without and metrics["rows_with_gold"]:
        notes.append(f"Rows without a predicted label ({without:,}) count as wrong where they have a gold label.")
    if not metrics["rows_with_gold"]:
        notes.append("No row has a gold label: nothing to measure.")
    listed = "".join(f"<p class=note>{_text(note)}</p>" for note in notes)
    return f"<header><h1>{_text(report.source)}</h1><p>{rows}</p>{listed}</header>"


def _section(title: str, content: str, about: str = "") -> str:
    return f"<section><h2>{title}</h2>{about and f'<p class=about>{about}</p>'}\n{content}\n</section>"


def _headline(metrics: dict[str, Any]) -> str:
    names = [name for name in HEADLINES if name in metrics]
    if not names:
        return ""
    intervals = metrics["intervals"]
    tiles = "".join(
        f"<div class=tile><dt>{TITLES.get(name, name)}</dt><dd><b>{_number(metrics[name])}</b> "
        f"<span>{interval_text(intervals['metrics'].get(name), 3)}</span></dd></div>"
        for name in names
    )
    of = (
        f"Precision, recall and F1 are those of label {_label(metrics['labels'][1])}. "
        if len(metrics["labels"]) == 2
        else "Precision, recall and F1 are means over the labels. "
    )
    about = f"{of}In brackets: {intervals['level']:.0%} intervals, of {intervals['resamples']:,} resamples of the rows."
    for name, count in intervals.get("left_out", {}).items():
        about += f" {TITLES.get(name, name)} has no value in {count:,} of them."
    return _section("Headline", f"<dl class=tiles>{tiles}</dl>", about)


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _grid(header: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "") -> str:
    """Return a table of cells that are HTML already; a cell may begin with its own `<td`."""
    head = "".join(f"<th scope=col>{cell}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(_cell(number, cell) for number, cell in enumerate(row))}</tr>\n" for row in rows)
    return (
        f"<div class=wide tabindex=0><table class='{kind}'><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(number: int, cell: str) -> str:
    if cell.startswith("<td"):
        return cell
    return f"<th scope=row>{cell}</th>" if number == 0 else f"<td>{cell}</td>"


def _counts(metrics: dict[str, Any]) -> str:
    if not metrics["rows_with_gold"]:
        return ""
    both = f"{_confusion(metrics)}{_per_label(metrics)}"
    return f"<div class=plots>{both}</div>" if len(metrics["labels"]) <= BESIDE else both


def _confusion(metrics: dict[str, Any]) -> str:
    counts: dict[str, dict[str, int]] = metrics["confusion_matrix"]
    if len(counts) > MATRIX_LABELS:
        return _confused_pairs(counts)
    columns = list(next(iter(counts.values())))
    rows = []
    for gold, row in counts.items():
        total = sum(row.values())
        cells = [_shaded(count, total, gold == predicted) for predicted, count in row.items()]
        rows.append([_label(gold), *cells, f"{total:,}"])
    header = ["gold \\ predicted", *map(_label, columns), "rows"]
    about = "Counts, and shares of the rows with that gold label: blue where they are right, orange where wrong."
    return _section("Confusion matrix", _grid(header, rows, "matrix"), about)


def _shaded(count: int, total: int, right: bool) -> str:
    share = count / total if total else 0.0
    # Any row that is there shows.
    depth = max(round(10 * share), 1 if count else 0)
    return f"<td class='{'right' if right else 'wrong'} d{depth}'><b>{count:,}</b> <small>{share:.1%}</small></td>"


def _confused_pairs(counts: dict[str, dict[str, int]]) -> str:
    pairs = [
        (count, gold, predicted)
        for gold, row in counts.items()
        for predicted, count in row.items()
        if count and gold != predicted
    ]
    rows = [
        [
            _label(gold),
            f"<td class=name>{_label(predicted)}</td>",
            f"{count:,}",
            f"{count / sum(counts[gold].values()):.1%}",
        ]
        for count, gold, predicted in sorted(pairs, key=lambda pair: -pair[0])[:MOST_PAIRS]
    ]
    about = (
        f"More than {MATRIX_LABELS} labels make a matrix that no eye can read: these are its {len(rows)} most "
        f"frequent mistakes of {len(pairs):,} kinds; metrics.json has all of it."
    )
    return _section("Confusions", _grid(["gold", "predicted", "rows", "share of the gold label"], rows), about)


def _per_label(metrics: dict[str, Any]) -> str:
    rows = [
        [_label(label), *(_number(one[name]) for name in ("precision", "recall", "f1")), f"{one['support']:,}"]
        for label, one in metrics["per_label"].items()
    ]
    return _section("Labels", _grid(["label", "precision", "recall", "F1", "rows"], rows))


def _plots(plots: Sequence[Plot]) -> str:
    figures = "".join(
        f"<figure id={plot.name}><h3>{plot.title}</h3>{plot.svg or ''}"
        f"<figcaption>{_text(plot.caption)}</figcaption></figure>\n"
        for plot in plots
    )
    return _section("Curves", f"<div class=plots>{figures}</div>")


def _slices(report: Report) -> str:
    if not report.slicings or not report.metrics["rows_with_gold"]:
        return ""
    tables = "".join(
        f"<h3>By {_text(slicing.by)}</h3>{_slicing(slicing, report.table.labels)}" for slicing in report.slicings
    )
    about = (
        f"In brackets: 95% intervals (Wilson). Slices of fewer than {SMALL} rows are marked: they say little. Among "
        "many slices one looks bad by chance alone."
    )
    return _section("Slices", tables, about)


def _slicing(slicing: Slicing, labels: Sequence[str]) -> str:
    two = len(labels) == 2
    header = ["slice", "rows", "accuracy", *(["F1", f"gold {_label(labels[1])}"] if two else [])]
    rows = []
    for one in slicing.slices:
        small = " <mark>few rows</mark>" if one.rows < SMALL else ""
        accuracy = f"<b>{one.accuracy:.3f}</b> {interval_text([one.interval.low, one.interval.high], 3)}"
        more = [_number(one.f1), f"{one.positive:.1%}"] if two and one.positive is not None else []
        rows.append([f"{_label(one.name)}{small}", f"{one.rows:,}", accuracy, *more])
    return _grid(header, rows)


def _mistakes(report: Report) -> str:
    if not report.metrics["rows_with_gold"]:
        return ""
    mistakes = surest_mistakes(report.table)
    if not mistakes:
        return _section("Mistakes", "<p>None.</p>")
    shown = mistakes[:MOST_MISTAKES]
    which = f"The {len(shown):,} surest of {len(mistakes):,}" if len(shown) < len(mistakes) else f"All {len(shown):,}"
    about = f"{which}, by the probability of the label that was given."
    if report.rows.texts is None:
        about += " Give the rows with --rows to see their texts."
    data = json.dumps([_record(one, report.rows) for one in shown]).replace("<", "\\u003c")
    gold, predicted = label_names(shown, report.table.labels)
    controls = (
        f"<label>Gold <select id=gold>{_options(gold)}</select></label>"
        f"<label>Predicted <select id=predicted>{_options(predicted)}</select></label>"
        "<label>Sort <select id=sort><option value=prob>surest first<option value=unsure>unsure first"
        "<option value=id>id<option value=long>longest text<option value=short>shortest text</select></label>"
        "<label class=grow>Text or id <input id=search type=search></label>"
    )
    return _section(
        "Mistakes",
        f"<form id=controls hidden>{controls}</form><p id=count role=status></p><ol id=mistakes></ol>"
        "<button id=more type=button hidden>Show more</button>"
        "<noscript><p class=note>Listing the mistakes takes JavaScript, which is off here.</p></noscript>"
        f'<script id=data type="application/json">{data}</script>',
        about,
    )


def _options(names: Sequence[str]) -> str:
    listed = "".join(f'<option value="={_text(name)}">{_text(name or NO_NAME)}</option>' for name in names)
    return f"<option value=''>all</option>{listed}"


def _record(mistake: Mistake, rows: PredictedRows) -> dict[str, Any]:
    """Return what the browser of mistakes knows of one."""
    return {
        "id": visible(mistake.id),
        "gold": visible(mistake.gold),
        "predicted": visible(mistake.predicted),
        "status": visible(mistake.status),
        "prob": None if mistake.prob is None else round(mistake.prob, 6),
        "text": "" if rows.texts is None else shorten_text(visible(rows.texts[mistake.row]), MOST_CHARACTERS),
        "answer": shorten_text(visible(rows.predictions[mistake.row].get("text", "")), MOST_CHARACTERS),
    }
