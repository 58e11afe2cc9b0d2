"""The report's plots by matplotlib: each as an SVG for the page, which colours it, and as a PNG.

A plot is drawn once, in the colours of a light page. In the SVG each of these becomes a class, so that a style sheet
gives it another colour on a dark page, and no element keeps a style of its own, which a strict Content-Security-Policy
would ignore.
"""

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_clf.evaluation import curves
from llm_clf.evaluation.intervals import Judged
from llm_clf.evaluation.learning import LearningCurves
from llm_clf.evaluation.reliability import BINS as ERROR_BINS
from llm_clf.evaluation.texts import shorten_text, visible

INK, MUTED, GRID = "#1b1f24", "#5b6570", "#d5dae0"
# Told apart by people with any colour vision (Okabe and Ito), and by their dashes.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#aa4499")
DASHES = ("-", "--")
CLASSES = {INK: "ink", MUTED: "muted", GRID: "grid"} | {colour: f"s{i}" for i, colour in enumerate(SERIES, 1)}
MOST_LABELS = len(SERIES) * len(DASHES)
MOST_STRIPS = 20
MOST_LINEAR = 50
"""Rows in a bin up to which counts are drawn on a linear scale."""
NAME_LENGTH = 24
SIZE = (5.0, 3.7)
"""Inches."""
DPI = 144
SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"
FONTS = (
    "DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Microsoft YaHei", "PingFang SC",
    "Arial Unicode MS",
)  # fmt: skip
"""Tried one after the other for each character; those that are not there are left out."""


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot that was drawn, or why it was not."""

    name: str
    """Also of the PNG."""
    title: str
    caption: str
    """What it shows, or why there is none."""
    svg: str | None = None
    png: bytes | None = None


Draw = Callable[[Judged, Any], str]
"""Draws into a figure and returns what there is to say."""


class _CannotDrawError(Exception):
    """There is nothing to draw; the message says why."""


def draw_plots(judged: Judged, learned: LearningCurves | None, why_no_curves: str) -> list[Plot]:
    """Return all plots of the rows that have a gold label, and the learning curves of a run.

    Args:
        judged: May be without rows.
        learned: Of the run that made the predictions.
        why_no_curves: What to say where there are no learning curves.
    """
    drawings: dict[str, tuple[str, Draw]] = {
        "roc": ("ROC curve", _draw_roc),
        "precision-recall": ("Precision and recall", _draw_pr),
        "reliability": ("Reliability", _draw_reliability),
        "risk-coverage": ("Risk and coverage", _draw_risk),
        "probabilities": ("Probabilities by gold label", _draw_histogram),
    }
    with _style():
        plots = [_plot(name, title, draw, judged) for name, (title, draw) in drawings.items()]
        if learned is None:
            return [*plots, Plot("learning", "Learning curves", why_no_curves)]
        return [*plots, _plot("learning", "Learning curves", lambda _, figure: _draw_learning(learned, figure), judged)]


PLOTS = ("roc", "precision-recall", "reliability", "risk-coverage", "probabilities", "learning")


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib
    from matplotlib import font_manager

    there = {font.name for font in font_manager.fontManager.ttflist}
    settings = {
        "font.family": [name for name in FONTS if name in there],
        "font.size": 9,
        "text.parse_math": False,
        "text.color": INK,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.titlesize": 9,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "lines.linewidth": 1.6,
        "patch.linewidth": 0,
        "svg.fonttype": "none",
        "svg.hashsalt": "llm-clf",
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # A label in a script that no font here has: the SVG keeps its characters, the PNG shows boxes.
        warnings.filterwarnings("ignore", r"(?s)Glyph .* missing from font")
        yield


def _plot(name: str, title: str, draw: Draw, judged: Judged) -> Plot:
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    try:
        caption = draw(judged, figure)
    except _CannotDrawError as reason:
        return Plot(name, title, str(reason))
    svg, png = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    figure.savefig(svg, format="svg", transparent=True)
    return Plot(name, title, caption, _for_page(svg.getvalue(), name, f"{title}. {caption}"), png.getvalue())


def _require_probs(judged: Judged, *, both: bool = False) -> None:
    """Refuse rows that give no such plot; with `both`, those too in which all gold labels are the same."""
    if not len(judged.gold):
        raise _CannotDrawError("Not drawn: no row has a gold label.")
    if judged.probs is None:
        raise _CannotDrawError("Not drawn: the file has no probabilities (columns prob_LABEL).")
    if both and not curves.occurring(judged):
        raise _CannotDrawError(f"Not drawn: all gold labels are {visible(judged.labels[judged.gold[0]])}.")


def _draw_roc(judged: Judged, figure: Any) -> str:
    _require_probs(judged, both=True)
    found = curves.roc_curves(judged, curves.drawn_labels(judged, MOST_LABELS))
    axes = _unit_axes(figure, "false positive rate", "true positive rate")
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=":")
    return f"Area under the curve, {_draw_curves(axes, found)}. {_left_out(judged, found)}The dotted line is chance."


def _draw_pr(judged: Judged, figure: Any) -> str:
    _require_probs(judged, both=True)
    found = curves.pr_curves(judged, curves.drawn_labels(judged, MOST_LABELS))
    axes = _unit_axes(figure, "recall", "precision")
    return f"Average precision, {_draw_curves(axes, found, drawstyle='steps-post')}. {_left_out(judged, found)}"


def _draw_curves(axes: Any, found: Sequence[curves.Curve], **style: Any) -> str:
    """Draw one line a label; return their areas in words."""
    for number, curve in enumerate(found):
        axes.plot(curve.x, curve.y, label=f"label {_name(curve.label)}: {curve.area:.3f}", **_look(number), **style)
    if len(found) > 1:
        axes.legend(loc="best")
    return ", ".join(f"label {_name(curve.label)}: {curve.area:.3f}" for curve in found)


def _left_out(judged: Judged, found: Sequence[curves.Curve]) -> str:
    more = len(curves.occurring(judged)) - len(found)
    return f"The {len(found)} most frequent labels; {more} more are not drawn. " if more and len(found) > 1 else ""


def _draw_reliability(judged: Judged, figure: Any) -> str:
    _require_probs(judged)
    found = curves.reliability(judged)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    above.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=":")
    mean, share = (np.array([getattr(one, name) for one in found.bins]) for name in ("mean", "share"))
    ends = np.array([[one.interval.low, one.interval.high] for one in found.bins]).T
    error = np.abs(ends - share)
    above.errorbar(mean, share, yerr=error, color=SERIES[0], fmt="o", markersize=5, elinewidth=1, capsize=2)
    above.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), ylabel=f"share of {_what(found.of)}")
    middle, rows = [(one.low + one.high) / 2 for one in found.bins], [one.rows for one in found.bins]
    below.bar(middle, rows, width=0.9 / curves.BINS, color=SERIES[0], alpha=0.6)
    for x, count in zip(middle, rows, strict=True):
        below.annotate(f"{count:,}", (x, count), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=6.5)
    below.set(xlabel=f"probability of {_what(found.of)}", ylabel="rows", ylim=(0, 1.35 * max(rows)))
    below.grid(visible=False)
    return (
        "Of the rows with a probability near 0.8, 80% should be right: points on the dotted line. Bars are 95% "
        f"intervals, below are the rows of each bin. Expected calibration error {found.error:.3f} (of the most "
        f"probable label, in {ERROR_BINS} bins of as many rows each)."
    )


def _draw_risk(judged: Judged, figure: Any) -> str:
    _require_probs(judged)
    found = curves.risk_coverage(judged)
    axes = figure.subplots()
    axes.plot(
        found.coverage, found.risk, color=SERIES[0], drawstyle="steps-pre", marker="o" if len(found.risk) == 1 else ""
    )
    axes.set(xlim=(-0.02, 1.02), xlabel="coverage: share of rows answered", ylabel="risk: share of errors among them")
    axes.set_ylim(0, max(0.01, 1.08 * found.risk.max()))
    return (
        f"All rows answered: {found.risk[-1]:.1%} errors. With at most 1% errors "
        f"{found.coverage_at(0.01):.1%} of the rows can be answered, the surest first, with at most 5%: "
        f"{found.coverage_at(0.05):.1%}. A row without a label counts with its most probable one. Thresholds read off "
        "these rows look a little better here than on others."
    )


def _draw_histogram(judged: Judged, figure: Any) -> str:
    _require_probs(judged)
    if len(judged.labels) > 2:
        return _draw_strips(judged, figure)
    found = curves.histogram(judged, [label for label in (0, 1) if label in judged.gold])
    axes = figure.subplots()
    for label, rows in found.counts.items():
        look = _look(judged.labels.index(label))
        axes.stairs(rows, found.edges, label=f"gold {_name(label)}", linewidth=1.6, **look)
        axes.stairs(rows, found.edges, fill=True, alpha=0.2, color=look["color"])
    axes.set(xlim=(0, 1), xlabel=f"probability of {_what(found.of)}", ylabel="rows")
    axes.legend(loc="upper center", ncols=2)
    largest = max(rows.max() for rows in found.counts.values())
    if largest <= MOST_LINEAR:
        axes.yaxis.get_major_locator().set_params(integer=True)
        return "Sure mistakes lie at the far end from their label."
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(0, largest * 2)
    axes.set_yticks([0, *(10**power for power in range(8) if 10**power <= largest * 2)])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    return "Sure mistakes lie at the far end from their label. Counts are on a logarithmic scale."


def _draw_strips(judged: Judged, figure: Any) -> str:
    """Draw the gold label's own probability as a strip for each label, darker where more of its rows are."""
    counts = np.bincount(judged.gold, minlength=len(judged.labels))
    shown = sorted(sorted(np.flatnonzero(counts).tolist(), key=lambda label: (-counts[label], label))[:MOST_STRIPS])
    found = curves.histogram(judged, shown)
    axes = figure.subplots()
    width = 1 / curves.HISTOGRAM_BINS
    for place, rows in enumerate(found.counts.values()):
        for left, share in zip(found.edges, rows / rows.sum(), strict=False):
            if share:
                # The root keeps few rows visible beside many.
                axes.barh(place, width, left=left, height=0.8, color=SERIES[0], alpha=float(share**0.5))
    axes.set_yticks(range(len(shown)), [_name(label) for label in found.counts])
    axes.set(xlim=(0, 1), ylim=(len(shown) - 0.4, -0.6), xlabel=f"probability of {_what(found.of)}")
    axes.grid(visible=False, axis="y")
    more = np.count_nonzero(counts) - len(shown)
    left_out = f" The {len(shown)} most frequent labels; {more} more are not drawn." if more else ""
    return (
        f"Each strip holds the rows of a gold label, darker where more of them are; sure mistakes lie near 0.{left_out}"
    )


def _draw_learning(learned: LearningCurves, figure: Any) -> str:
    from matplotlib.ticker import LogFormatter

    above, below = figure.subplots(2, 1, sharex=True)
    steps = [one["step"] for one in learned.evaluations]
    per_epoch = steps[-1] / learned.evaluations[-1]["epoch"]
    epochs = [step / per_epoch for step in steps]
    for number, name in enumerate(("f1", "accuracy")):
        values = [one.get(name, np.nan) for one in learned.evaluations]
        above.plot(epochs, values, marker="o", markersize=3.5, label=name, **_look(number * 3))
    above.set(ylabel="validation rows", ylim=(-0.02, 1.04))
    above.legend(loc="lower right")
    if learned.losses:
        x, y = zip(*learned.losses, strict=True)
        below.plot(np.array(x) / per_epoch, y, label="training loss", color=MUTED, linewidth=0.9)
    losses = [one.get("log_loss", np.nan) for one in learned.evaluations]
    below.plot(epochs, losses, marker="o", markersize=3.5, label="validation log-loss", color=SERIES[1])
    below.set(xlabel="epoch", ylabel="nats an answer", yscale="log")
    below.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    # Between powers of ten there are labels where the axis is short; matplotlib's own are TeX, which an SVG would show.
    below.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
    below.legend(loc="upper right")
    kept = ""
    if learned.best_step is not None:
        for axes in (above, below):
            axes.axvline(learned.best_step / per_epoch, color=MUTED, linewidth=0.8, linestyle=":")
        kept = f" Kept: step {learned.best_step:,} (epoch {learned.best_step / per_epoch:.2f}), the dotted line."
    return f"Metrics of the validation rows and losses while the run was trained.{kept}"


def _unit_axes(figure: Any, x: str, y: str) -> Any:
    axes = figure.subplots()
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.04), xlabel=x, ylabel=y)
    return axes


def _look(number: int) -> dict[str, str]:
    return {"color": SERIES[number % len(SERIES)], "linestyle": DASHES[number // len(SERIES) % len(DASHES)]}


def _name(label: str) -> str:
    return shorten_text(visible(label), NAME_LENGTH)


def _what(of: str) -> str:
    return shorten_text(visible(of), NAME_LENGTH + len("label "))


def _for_page(svg: bytes, name: str, alt: str) -> str:
    """Return an SVG as an element of the page: with classes in place of colours, and ids that no other plot has."""
    ET.register_namespace("", SVG)
    ET.register_namespace("xlink", XLINK)
    root = ET.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                parent.remove(child)
    text = b"".join(ET.tostring(child) for child in root)
    for element in root.iter():
        _keep_id(element, name, text)
        _style_to_attributes(element)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": alt, "class": "plot"}
    return ET.tostring(root, encoding="unicode")


def _keep_id(element: ET.Element, name: str, text: bytes) -> None:
    """Prefix an id that something in the plot refers to, and the reference; remove any other id."""
    own = element.attrib.pop("id", None)
    if own is not None and f"#{own}".encode() in text:
        element.set("id", f"{name}-{own}")
    for key, value in element.attrib.items():
        if "#" in value and key != "style":
            element.set(key, re.sub(r"#(?=[\w-]+\)?$)", f"#{name}-", value))


def _style_to_attributes(element: ET.Element) -> None:
    classes = []
    for declaration in element.attrib.pop("style", "").split(";"):
        prop, _, value = (part.strip() for part in declaration.partition(":"))
        if prop in ("fill", "stroke") and value in CLASSES:
            classes.append(f"{prop}-{CLASSES[value]}")
        elif prop == "font":
            size = re.search(r"([\d.]+)px", value)
            element.set("font-size", size.group(1) if size else "9")
        elif prop:
            element.set(prop, value)
    if classes:
        element.set("class", " ".join(classes))


def write_pngs(plots: Sequence[Plot], folder: Path) -> None:
    """Write each plot's PNG into a folder, and remove one of a plot that was not drawn this time."""
    for plot in plots:
        place = folder / f"{plot.name}.png"
        if plot.png is None:
            place.unlink(missing_ok=True)
        else:
            place.write_bytes(plot.png)
