"""Damaged files, drawn at random: build-prompts, tasks and predictions end well or in an error that says why."""

import gzip
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROWS, SHORT_TASK
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import llm_clf
from llm_clf.errors import LlmClfError
from llm_clf.prompting.tasks import load_task

fuzz = settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

PREDICTIONS = [
    {"id": "a", "label": "1", "prob_0": 0.25, "prob_1": 0.75, "status": "ok", "cut": False, "gold": "1"},
    {"id": "b", "label": None, "prob_0": 0.5, "prob_1": 0.5, "status": "unparsed", "cut": True, "gold": "0"},
    {"id": "c", "label": "0", "prob_0": 1.0, "prob_1": 0.0, "status": "ok", "cut": False, "gold": None},
    {"id": "d", "label": "0", "prob_0": 0.9, "prob_1": 0.1, "status": "ok", "cut": False, "gold": "0"},
]


def csv_bytes(records: list[dict[str, object]]) -> bytes:
    lines = [",".join(records[0])] + [",".join(f'"{value}"' for value in record.values()) for record in records]
    return "\n".join(lines).encode()


def parquet_bytes(records: list[dict[str, object]]) -> bytes:
    opened = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), opened)
    return opened.getvalue()


WRITERS: dict[str, Callable[[list[dict[str, object]]], bytes]] = {
    ".csv": csv_bytes,
    ".tsv": lambda records: csv_bytes(records).replace(b'","', b'"\t"').replace(b",", b"\t"),
    ".jsonl": lambda records: "".join(json.dumps(record) + "\n" for record in records).encode(),
    ".json": lambda records: json.dumps(records).encode(),
    ".parquet": parquet_bytes,
    ".csv.gz": lambda records: gzip.compress(csv_bytes(records), mtime=0),
}


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Return a file after up to four accidents: bytes changed, lost, put in, or the end cut off."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        what = draw(st.sampled_from(["change", "lose", "insert", "cut", "repeat"]))
        length = draw(st.integers(1, 40))
        if what == "change" and start < len(content):
            content[start] = draw(st.integers(0, 255))
        elif what == "lose":
            del content[start : start + length]
        elif what == "insert":
            content[start:start] = draw(st.one_of(st.binary(max_size=12), st.text(max_size=8).map(str.encode)))
        elif what == "repeat":
            content[start:start] = content[start : start + length]
        elif what == "cut":
            del content[start:]
    return bytes(content)


def files(records: list[dict[str, object]], suffix: str) -> st.SearchStrategy[bytes]:
    return st.one_of(damaged(WRITERS[suffix](records)), st.binary(max_size=200))


@pytest.mark.parametrize("suffix", WRITERS)
def test_build_prompts_from_damaged_rows(suffix: str) -> None:
    @fuzz
    @given(content=files(ROWS, suffix), encoding=st.sampled_from(["utf-8", "utf-8", "utf-16", "gb18030"]))
    def check(content: bytes, encoding: str) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / f"rows{suffix}").write_bytes(content)
            (folder / "task.yaml").write_text(SHORT_TASK)
            out = folder / "prompts"
            try:
                llm_clf.build_prompts([folder / f"rows{suffix}"], task=folder / "task.yaml", out=out, encoding=encoding)
            except LlmClfError as error:
                assert str(error)
                assert {place.name for place in folder.iterdir()} == {f"rows{suffix}", "task.yaml"}
            else:
                assert sorted(place.suffix for place in out.iterdir()) == [".json", *[".jsonl"] * 3, ".yaml"]

    check()


TASK_WORDS = st.sampled_from(
    [
        "instruction:", "input:", "labels:", "cut:", "id_column:", "label_column:", "words:", "meaning:", "{title}",
        "{abstract", "}}", "{}", "{0}", "{a!r}", "{a:>9}", "&a ", "*a", "- ", "[", "]", "{", "}", "'", '"', "|\n", "? ",
        "!!python/object:os.system", "!!binary x", "\n", "\n  ", "\t", "null", "~", "yes", "\x00", "\ud7ff", "：", "１", "#",
        "---\n", "<<: *a", "%YAML 9\n",
    ]
)  # fmt: skip


@fuzz
@given(content=st.one_of(damaged(SHORT_TASK.encode()), st.lists(TASK_WORDS).map(lambda words: "".join(words).encode())))
def test_damaged_tasks(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "task.yaml"
    file.write_bytes(content)
    try:
        task = load_task(file)
    except LlmClfError as error:
        assert str(file) in str(error)
    else:
        assert task.columns and len(task.names) >= 2
        task.save(tmp_path / "again.yaml")
        assert load_task(tmp_path / "again.yaml") == task


@fuzz
@given(
    words=st.lists(TASK_WORDS, min_size=1, max_size=4).map("".join),
    key=st.sampled_from(["instruction", "input", "labels", "cut", "id_column", "label_column"]),
)
def test_tasks_with_one_odd_value(words: str, key: str, tmp_path: Path) -> None:
    file = tmp_path / "task.yaml"
    lines = [line for line in SHORT_TASK.splitlines() if not line.startswith(f"{key}:")]
    file.write_text("\n".join([*lines, f"{key}: {words}"]))
    try:
        assert load_task(file).render({"title": "a", "abstract": "b"} | dict.fromkeys(load_task(file).columns, "c"))
    except LlmClfError as error:
        assert str(file) in str(error)


@pytest.mark.parametrize("suffix", WRITERS)
def test_evaluate_damaged_predictions(suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Drawing takes a second and sees numbers only.
    monkeypatch.setattr("llm_clf.evaluation.plots.draw_plots", lambda *_: [])

    @fuzz
    @given(content=files(PREDICTIONS, suffix))
    def check(content: bytes) -> None:
        from llm_clf.evaluation.tables import metrics_text

        with tempfile.TemporaryDirectory() as name:
            file = Path(name) / f"predictions{suffix}"
            file.write_bytes(content)
            try:
                metrics = llm_clf.evaluate(file, out=Path(name) / "scores")
            except LlmClfError as error:
                assert str(error)
                assert list(Path(name).iterdir()) == [file]
            else:
                assert metrics_text(metrics) and json.loads((Path(name) / "scores" / "metrics.json").read_text())

    check()


CELL = st.one_of(
    st.sampled_from(["0", "1", "2", "", "ok", "unparsed", "0.5", "1e-400", "nan", "inf", "-0", "１", "0.5 ", "1_0"]),
    st.text(max_size=5),
    st.floats(),
    st.integers(),
    st.none(),
    st.booleans(),
    st.lists(st.integers(), max_size=2),
)
COLUMNS = st.sampled_from(["id", "label", "gold", "status", "cut", "text", "prob_0", "prob_1", "prob_2", "prob_", "x"])


@fuzz
@given(
    records=st.lists(
        st.dictionaries(COLUMNS, CELL).map(lambda record: {"label": "1", "gold": "1", **record}), min_size=1, max_size=6
    )
)
def test_evaluate_odd_cells(records: list[dict[str, object]], tmp_path: Path) -> None:
    from llm_clf.evaluation.tables import metrics_text

    file = tmp_path / "predictions.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    try:
        metrics = llm_clf.evaluate(file)
    except LlmClfError as error:
        assert str(file) in str(error)
    else:
        assert metrics_text(metrics) and metrics["rows"] == len(records)
