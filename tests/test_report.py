"""The report: its numbers against scikit-learn and by hand, what it says where little is known, and hostile text."""

import base64
import csv
import hashlib
import json
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Sequence
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import average_precision_score, roc_auc_score
from typer.testing import CliRunner

import llm_clf
from llm_clf.cli import app
from llm_clf.decisions.predictions import PredictionTable, read_predictions
from llm_clf.errors import ConfigError, DataError
from llm_clf.evaluation import curves
from llm_clf.evaluation.intervals import Judged
from llm_clf.evaluation.learning import LearningCurves, learning_curves
from llm_clf.evaluation.mistakes import surest_mistakes
from llm_clf.evaluation.plots import PLOTS, draw_plots
from llm_clf.evaluation.slices import slice_by_column, slice_by_length
from llm_clf.evaluation.texts import read_predicted_rows
from llm_clf.runs import Run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script><!--"
HOSTILE_LABELS = ["$\\frac{", "_<b>bold</b>", f"x\x00{HOSTILE}"]
PNG = b"\x89PNG\r\n\x1a\n"


def judged(gold: Sequence[int], probs: Sequence[Sequence[float]], predicted: Sequence[int] | None = None) -> Judged:
    array = np.array(probs, dtype=np.float64)
    labels = [str(label) for label in range(array.shape[1])]
    given = array.argmax(axis=1) if predicted is None else np.array(predicted)
    return Judged(labels, np.array(gold), given, array)


def two_labels(gold: Sequence[int], ones: Sequence[float]) -> Judged:
    return judged(gold, [[1 - one, one] for one in ones])


def random_judged(labels: int, rows: int = 300, seed: int = 0) -> Judged:
    random = np.random.default_rng(seed)
    probs = random.dirichlet([0.7] * labels, rows)
    return judged([int(random.choice(labels, p=row)) for row in probs], probs)


def write_predictions(
    file: Path,
    labels: Sequence[str],
    rows: int,
    *,
    seed: int = 0,
    gold: Callable[[int], str | None] = lambda _: None,
    status: Callable[[int], str] = lambda _: "ok",
    columns: dict[str, Callable[[int], str]] | None = None,
) -> Path:
    """Write a predictions file of random rows; `gold` gives a row's label, None for a likely one."""
    random = np.random.default_rng(seed)
    with open(file, "w", encoding="utf-8", newline="") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        more = columns or {}
        writer.writerow(["id", "label", *(f"prob_{label}" for label in labels), "status", "cut", "gold", *more])
        for row in range(rows):
            probs = random.dirichlet([0.7] * len(labels))
            own = gold(row)
            own = labels[random.choice(len(labels), p=probs)] if own is None else own
            label = labels[probs.argmax()] if status(row) == "ok" else ""
            cells = [f"r{row}", label, *(f"{prob:.6f}" for prob in probs), status(row), "false", own]
            writer.writerow([*cells, *(make(row) for make in more.values())])
    return file


def table_of(gold: Sequence[str], predicted: Sequence[str], ones: Sequence[float] | None = None) -> PredictionTable:
    probs = None if ones is None else np.array([[1 - one, one] for one in ones])
    rows = range(len(gold))
    return PredictionTable(["0", "1"], [f"r{n}" for n in rows], [*predicted], ["ok" for _ in rows], [*gold], probs)


@pytest.mark.parametrize("labels", [2, 4])
def test_areas_are_those_of_scikit_learn(labels: int) -> None:
    rows = random_judged(labels)
    shown = curves.drawn_labels(rows, 8)
    assert shown == ([1] if labels == 2 else [0, 1, 2, 3])
    roc, pr = curves.roc_curves(rows, shown), curves.pr_curves(rows, shown)
    for number, label in enumerate(shown):
        own, probs = rows.gold == label, rows.probs[:, label]
        assert roc[number].area == pytest.approx(roc_auc_score(own, probs))
        assert pr[number].area == pytest.approx(average_precision_score(own, probs))
        assert np.trapezoid(roc[number].y, roc[number].x) == pytest.approx(roc[number].area)


def test_only_the_most_frequent_labels_get_a_curve() -> None:
    probs = np.full((8, 4), 0.25)
    assert curves.drawn_labels(judged([3, 3, 3, 0, 0, 2, 2, 1], probs), 2) == [0, 3]


def test_reliability_by_hand() -> None:
    found = curves.reliability(two_labels([0, 0, 1, 1, 1, 1], [0.02, 0.08, 0.06, 0.95, 1.0, 0.91]))
    first, last = found.bins
    assert (first.low, first.high, first.rows, first.share) == (0.0, 0.1, 3, pytest.approx(1 / 3))
    assert first.mean == pytest.approx((0.02 + 0.08 + 0.06) / 3)
    assert (last.low, last.high, last.rows, last.share) == (0.9, 1.0, 3, 1.0)
    # As metrics.json has it: of the most probable label, six rows in as many bins.
    assert found.error == pytest.approx((0.02 + 0.08 + 0.94 + 0.05 + 0.0 + 0.09) / 6)
    # Wilson: (1 + 1.96^2 / 3) / (1 + 1.96^2 / 3) is the upper end where all are hits; the lower one is n / (n + 1.96^2).
    assert (last.interval.low, last.interval.high) == pytest.approx((3 / (3 + 1.959964**2), 1.0))


def test_reliability_is_that_of_scikit_learn() -> None:
    rows = random_judged(2, 500)
    share, mean = calibration_curve(rows.gold == 1, rows.probs[:, 1], n_bins=10)
    found = curves.reliability(rows)
    assert [one.share for one in found.bins] == pytest.approx(share)
    assert [one.mean for one in found.bins] == pytest.approx(mean)


def test_reliability_of_many_labels_is_that_of_the_most_probable_one() -> None:
    found = curves.reliability(judged([0, 1, 2], [[0.7, 0.2, 0.1], [0.72, 0.18, 0.1], [0.2, 0.3, 0.5]]))
    assert [(one.low, one.rows, one.share) for one in found.bins] == [(0.5, 1, 1.0), (0.7, 2, 0.5)]


def test_risk_and_coverage_by_hand() -> None:
    # Surest first: right, then a right and a wrong one that are equally sure, then right.
    found = curves.risk_coverage(two_labels([1, 1, 0, 0], [0.99, 0.8, 0.8, 0.4]))
    assert found.coverage == pytest.approx([0.25, 0.75, 1.0])
    assert found.risk == pytest.approx([0.0, 1 / 3, 1 / 4])
    assert (found.coverage_at(0.1), found.coverage_at(0.25), found.coverage_at(-1.0)) == (0.25, 1.0, 0.0)


def test_a_row_without_a_label_is_as_sure_as_its_most_probable_one() -> None:
    label, sure = curves.answered(judged([0, 1], [[0.6, 0.4], [0.3, 0.7]], predicted=[1, 2]))
    assert label.tolist() == [1, 1] and sure == pytest.approx([0.4, 0.7])


def test_histograms_count_every_row_once() -> None:
    for labels in (2, 3):
        rows = random_judged(labels)
        found = curves.histogram(rows, range(labels))
        assert [counts.sum() for counts in found.counts.values()] == np.bincount(rows.gold).tolist()
    edge = curves.histogram(two_labels([1, 0], [1.0, 0.0]), [0, 1])
    assert edge.counts["1"][-1] == 1 and edge.counts["0"][0] == 1


def test_mistakes_come_surest_first() -> None:
    table = table_of(["0", "1", "1", "", "0"], ["1", "1", "", "1", "1"], [0.7, 0.9, 0.2, 0.99, 0.95])
    assert [(one.id, one.gold, one.predicted, one.prob) for one in surest_mistakes(table)] == [
        ("r4", "0", "1", pytest.approx(0.95)),
        ("r2", "1", "", pytest.approx(0.8)),
        ("r0", "0", "1", pytest.approx(0.7)),
    ]
    assert [one.id for one in surest_mistakes(table_of(["0", "1"], ["1", "0"]))] == ["r0", "r1"]


def test_slices_by_hand() -> None:
    table = table_of(["0", "1", "1", "", "0"], ["0", "1", "0", "1", "1"])
    by_city = slice_by_column(table, "city", ["Rome", "", "Rome", "Oslo", "Rome"])
    assert [(one.name, one.rows) for one in by_city.slices] == [("(empty)", 1), ("Rome", 3)]
    rome = by_city.slices[1]
    assert rome.accuracy == pytest.approx(1 / 3) and rome.accuracy in rome.interval
    assert rome.positive == pytest.approx(1 / 3) and rome.f1 == 0.0
    assert by_city.slices[0].f1 == 1.0 and by_city.slices[0].interval.low < 0.3


def test_slices_by_length_are_quarters() -> None:
    table = table_of(["1"] * 8, ["1"] * 8)
    found = slice_by_length(table, ["x" * length for length in (1, 2, 3, 4, 5, 6, 7, 1000)]).slices
    assert [(one.name, one.rows) for one in found] == [("1 to 2", 2), ("3 to 4", 2), ("5 to 6", 2), ("7 to 1,000", 2)]
    same = slice_by_length(table, ["xx"] * 8).slices
    assert [(one.name, one.rows) for one in same] == [("2", 8)]


def test_a_column_of_many_numbers_is_cut_into_quarters_and_one_of_many_names_is_not() -> None:
    table = table_of(["1"] * 40, ["1"] * 40)
    years = slice_by_column(table, "year", [str(1980 + row) for row in range(40)]).slices
    assert [one.rows for one in years] == [10, 10, 10, 10] and years[0].name == "1,980 to 1,989"
    names = slice_by_column(table, "name", [f"name {row:02}" for row in range(40)]).slices
    assert [one.name for one in names[-2:]] == ["name 19", "(20 other values)"] and names[-1].rows == 20


@pytest.mark.parametrize(
    ("name", "id_column", "text"),
    [("uuid", None, "title: T1\nbody: B1"), ("id", None, "title: T1\nbody: B1"), ("number", "number", "T1/B1")],
)
def test_rows_are_found_by_their_ids(name: str, id_column: str | None, text: str, tmp_path: Path) -> None:
    from llm_clf.prompting.tasks import Task

    predictions = write_predictions(tmp_path / "p.csv", ["0", "1"], 3)
    rows = tmp_path / "rows.csv"
    lines = [f"T{n},r{n},B{n},1\n" for n in (5, 2, 1, 0)]
    rows.write_text(f"title,{name},body,label\n" + "".join(lines), encoding="utf-8")
    task = None
    if id_column:
        task = Task(
            instruction="?", input="{title}/{body}", id_column=id_column, label_column="label", labels=["0", "1"]
        )
    found = read_predicted_rows(predictions, rows, task=task)
    assert found.texts is not None and found.texts[1] == text and "T0" in found.texts[0]
    assert found.column("body") == ["B0", "B1", "B2"] and found.column("cut") == ["false"] * 3


def test_a_column_named_text_is_the_rows_own_only_where_it_comes_from_them(tmp_path: Path) -> None:
    generated = write_predictions(tmp_path / "p.csv", ["0", "1"], 2, columns={"text": lambda row: f"answer {row}"})
    assert read_predicted_rows(generated).texts is None
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"id": f"r{n}", "text": f"row {n}"}) + "\n" for n in range(2)))
    assert read_predicted_rows(generated, rows).texts == ["row 0", "row 1"]


def test_rows_that_are_not_there_are_told_of(tmp_path: Path) -> None:
    predictions = write_predictions(tmp_path / "p.csv", ["0", "1"], 3)
    rows = tmp_path / "rows.csv"
    rows.write_text("id,title\nr0,a\nr1,b\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"rows.csv: no column has the ids of all predictions.*'id', 'title'"):
        llm_clf.evaluate(predictions, out=tmp_path / "out", rows=rows)
    assert not (tmp_path / "out").exists()


def test_a_slice_that_is_no_column_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    predictions = write_predictions(tmp_path / "p.csv", ["0", "1"], 3, columns={"city": lambda _: "Rome"})
    with pytest.raises(ConfigError, match=r"--slice town: there is no such column; there are 'city', 'id'"):
        llm_clf.evaluate(predictions, out=tmp_path / "out", slice="town")
    assert not (tmp_path / "out").exists()


def test_what_only_the_report_shows_needs_a_place_for_it(tmp_path: Path) -> None:
    predictions = write_predictions(tmp_path / "p.csv", ["0", "1"], 3)
    with pytest.raises(ConfigError, match=r"--rows, --slice: only the report shows it"):
        llm_clf.evaluate(predictions, rows=predictions, slice=["cut"])


CASES: dict[str, dict[str, Any]] = {
    "two labels": {"labels": ["0", "1"], "rows": 60},
    "hostile labels": {"labels": HOSTILE_LABELS, "rows": 60},
    "forty labels": {"labels": [f"class {n}" for n in range(40)], "rows": 300},
    "one row": {"labels": ["0", "1"], "rows": 1},
    "one gold label": {"labels": ["0", "1"], "rows": 30, "gold": lambda _: "1"},
    "one gold label of three": {"labels": ["a", "b", "c"], "rows": 30, "gold": lambda _: "c"},
    "some without gold": {"labels": ["0", "1"], "rows": 30, "gold": lambda row: "" if row % 3 else None},
    "none with gold": {"labels": ["0", "1"], "rows": 30, "gold": lambda _: ""},
    "unparsed": {"labels": ["0", "1"], "rows": 30, "status": lambda row: "ok" if row % 3 else "unparsed"},
    "all abstained": {"labels": ["a", "b", "c"], "rows": 30, "status": lambda _: "abstained"},
}
ALL = set(PLOTS) - {"learning"}
BOTH = {"roc", "precision-recall"}
DRAWN = {
    "one row": ALL - BOTH,
    "one gold label": ALL - BOTH,
    "one gold label of three": ALL - BOTH,
    "none with gold": set(),
}


@pytest.mark.parametrize("case", CASES)
def test_a_report_of_any_rows(case: str, tmp_path: Path) -> None:
    file = write_predictions(tmp_path / "p.csv", **CASES[case])
    metrics = llm_clf.evaluate(file, out=tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    drawn = {place.stem for place in (tmp_path / "out").glob("*.png")}
    assert drawn == DRAWN.get(case, ALL)
    assert page.count("<svg") == len(drawn)
    assert page.count("Not drawn: ") == len(PLOTS) - len(drawn)
    assert f"{metrics['rows']:,} rows, {metrics['rows_with_gold']:,} with a gold label" in page
    for place in (tmp_path / "out").glob("*.png"):
        content = place.read_bytes()
        assert content.startswith(PNG) and struct.unpack(">II", content[16:24]) > (500, 300)
    for name in ("accuracy", "f1", "log_loss"):
        if name in metrics:
            assert f"<b>{metrics[name]:.3f}</b>" in page


def test_a_report_without_probabilities(tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    file.write_text("id,label,gold\na,1,1\nb,0,1\n", encoding="utf-8")
    llm_clf.evaluate(file, out=tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("Not drawn: the file has no probabilities") == 5 and "All 1" in page
    assert sorted(place.name for place in (tmp_path / "out").iterdir()) == ["metrics.json", "report.html"]


def test_the_same_rows_give_the_same_bytes_and_an_old_plot_goes(tmp_path: Path) -> None:
    file = write_predictions(tmp_path / "p.csv", ["0", "1"], 20)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "learning.png").write_bytes(b"of another run")
    (tmp_path / "two" / "mine.png").write_bytes(b"mine")
    for name in ("one", "two"):
        llm_clf.evaluate(file, out=tmp_path / name)
    ours = sorted(place.name for place in (tmp_path / "one").iterdir())
    assert sorted(place.name for place in (tmp_path / "two").iterdir()) == sorted([*ours, "mine.png"])
    for name in ours:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def hostile_report(folder: Path) -> Path:
    file = write_predictions(
        folder / f"p{'<i>'}.csv",
        HOSTILE_LABELS,
        40,
        columns={"title": lambda row: f"{HOSTILE} {row}", "<b>": lambda row: HOSTILE if row % 2 else "&amp;"},
    )
    llm_clf.evaluate(file, out=folder / "out", slice="<b>")
    return folder / "out" / "report.html"


class Elements(HTMLParser):
    """The elements of a page as `(tag, attributes)`."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_asks_for_nothing_and_holds_no_style_or_script_but_its_own(tmp_path: Path) -> None:
    page = hostile_report(tmp_path).read_text(encoding="utf-8")
    elements = Elements(page).found
    policies = [more["content"] for _, more in elements if more.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    for name in ("style", "script"):
        (content,) = re.findall(rf"<{name}>(.*?)</{name}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in str(policies[0])
    assert str(policies[0]).startswith("default-src 'none';") and "unsafe" not in str(policies[0])
    assert [more for tag, more in elements if tag == "script"] == [{"id": "data", "type": "application/json"}, {}]
    assert not {"img", "link", "iframe", "object", "embed", "b>", "i"} & {tag for tag, _ in elements}
    for _, more in elements:
        assert not [name for name in more if name.startswith("on") or name in ("style", "src", "srcset", "action")]
        assert all(str(more[name]).startswith("#") for name in more if "href" in name)
    ids = [more["id"] for _, more in elements if "id" in more]
    assert len(ids) == len(set(ids))
    assert {str(more[name])[1:] for _, more in elements for name in more if "href" in name} <= set(ids)


def browse(page: Path, profile: Path) -> str:
    """Return the page's elements as Chromium has them after its scripts have run."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--dump-dom",
         page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@needs_chromium
def test_hostile_text_is_text(tmp_path: Path) -> None:
    shown = browse(hostile_report(tmp_path), tmp_path / "profile")
    assert "<title>p&lt;i&gt;.csv: report</title>" in shown
    listed = shown[shown.index("<ol") :]
    assert listed.count("<li>") >= 5 and "<img" not in shown
    assert "title: &lt;/script&gt;&lt;img src=x onerror=" in listed


FILTERING = """
const set = (id, value) => {
  document.getElementById(id).value = value;
  document.getElementById(id).dispatchEvent(new Event("input", {bubbles: true}));
  return [...document.querySelectorAll("#mistakes li")].map((item) => item.querySelector(".id").textContent);
};
const seen = {all: set("sort", "prob"), unsure: set("sort", "unsure"), id: set("sort", "id")};
seen.gold = set("gold", "=1");
seen.both = set("predicted", "=0");
seen.none = set("predicted", "=1");
set("predicted", ""); set("gold", "");
seen.search = set("search", "WORD 3");
document.title = JSON.stringify(seen);
"""


@needs_chromium
def test_mistakes_are_filtered_sorted_and_searched(tmp_path: Path) -> None:
    file = write_predictions(tmp_path / "p.csv", ["0", "1"], 30, columns={"title": lambda row: f"Word {row}"})
    llm_clf.evaluate(file, out=tmp_path / "out")
    page = tmp_path / "out" / "report.html"
    text = page.read_text(encoding="utf-8").replace("</body>", f"<script>{FILTERING}</script></body>")
    page.write_text(re.sub(r"script-src '[^']*'", "script-src 'unsafe-inline'", text), encoding="utf-8")
    title = re.search(r"<title>(.*?)</title>", browse(page, tmp_path / "profile"))
    assert title is not None
    seen = json.loads(unescape(title.group(1)))

    mistakes = surest_mistakes(read_predictions(file))
    assert len(mistakes) >= 5 and {one.gold for one in mistakes} == {"0", "1"}
    ids = [one.id for one in mistakes]
    assert seen["all"] == ids and seen["unsure"] == ids[::-1]
    assert seen["id"] == sorted(ids, key=lambda name: int(name[1:]))
    assert set(seen["gold"]) == set(seen["both"]) == {one.id for one in mistakes if one.gold == "1"}
    assert seen["none"] == []
    assert set(seen["search"]) == {one for one in ids if f"word {one[1:]}".startswith("word 3")}


def run_with_log(folder: Path, facts: dict[str, Any], losses: Sequence[float] = ()) -> Run:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder / "log") as writer:
        for step, loss in enumerate(losses, 1):
            writer.add_scalar("train/loss", loss, step)
    return Run(folder, None, None, facts)  # type: ignore[arg-type]


def test_learning_curves_are_read_from_the_run(tmp_path: Path) -> None:
    evaluations = [{"step": 2, "epoch": 0.5, "f1": 0.2}, {"step": 4, "epoch": 1.0, "f1": 0.6}]
    found = learning_curves(
        run_with_log(tmp_path, {"evaluations": evaluations, "training": {"best_step": 4}}, [3, 2, 1])
    )
    assert found is not None and (found.best_step, found.evaluations) == (4, evaluations)
    assert found.losses == [(1, 3.0), (2, 2.0), (3, 1.0)]
    shutil.rmtree(tmp_path / "log")
    assert learning_curves(Run(tmp_path, None, None, {"evaluations": evaluations})).losses == []  # type: ignore[arg-type, union-attr]
    assert learning_curves(Run(tmp_path, None, None, {})) is None  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_report_of_a_run(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parent.parent
    llm_clf.build_prompts(root / "data" / "papers.csv", task="medical_paper", out=tmp_path / "prompts")
    llm_clf.baseline_encoder(tmp_path / "prompts", out=tmp_path / "run", set=["train.epochs=1"])
    valid, rows = tmp_path / "run" / "predictions-valid.parquet", tmp_path / "prompts" / "valid.jsonl"
    words = [
        "evaluate",
        str(valid),
        "--out",
        str(tmp_path / "out"),
        "--rows",
        str(rows),
        "--run",
        str(tmp_path / "run"),
    ]
    done = CliRunner().invoke(app, [*words, "--slice", "cut", "--slice", "output"])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "out" / "learning.png").is_file() and "Not drawn" not in page
    assert "16 of these rows have ids of validation rows of the run run." in page
    assert "<h3>By length of the text, in characters</h3>" in page and "<h3>By cut</h3>" in page
    assert "<h3>By output</h3>" in page


def test_rows_that_the_run_was_trained_on_are_told_of(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parent.parent
    llm_clf.build_prompts(root / "data" / "papers.csv", task="medical_paper", out=tmp_path / "prompts")
    llm_clf.baseline_tfidf(tmp_path / "prompts", out=tmp_path / "run")
    pages = {}
    for split in ("train", "test"):
        file, rows = tmp_path / f"{split}.csv", tmp_path / "prompts" / f"{split}.jsonl"
        llm_clf.predict(tmp_path / "run", rows, out=file)
        llm_clf.evaluate(file, out=tmp_path / split, rows=rows, run=tmp_path / "run")
        pages[split] = (tmp_path / split / "report.html").read_text(encoding="utf-8")
    assert "The run run was trained on 128 of these rows" in pages["train"]
    assert "of these rows" not in pages["test"] and "this run was not measured while it was trained" in pages["test"]


def test_losses_close_together_are_labelled_in_plain_numbers() -> None:
    evaluations = [{"step": step, "epoch": step / 2, "f1": 0.8, "log_loss": 0.5 - step / 20} for step in (1, 2, 3)]
    learned = LearningCurves(evaluations, [(1, 0.9), (2, 0.5), (3, 0.4)], best_step=3)
    plots = draw_plots(Judged(["0", "1"], np.array([0, 1]), np.array([0, 1]), None), learned, "")
    drawn = next(plot.svg for plot in plots if plot.name == "learning")
    assert drawn is not None and "mathdefault" not in drawn and ">0.4<" in drawn
