import io
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_clf.decisions.decide import decide, probabilities
from llm_clf.decisions.predictions import (
    Prediction,
    check_format,
    choose_columns,
    prediction_columns,
    read_predictions,
    write_predictions,
)
from llm_clf.engine.journal import Journal
from llm_clf.engine.scores import Scored
from llm_clf.errors import ArtifactError, ConfigError, DataError
from llm_clf.prompting.rows import read_rows

SUFFIXES = (".csv", ".jsonl", ".parquet")
LABELS = ["0", "1"]
OWN = prediction_columns(LABELS)
KEY = "rows and run and settings"


def a_prediction(row_id: str = "1", label: str | None = "1", **changes: Any) -> Prediction:
    known: dict[str, Any] = {"probs": [0.25, 0.75], "cut": False, "gold": "1", "text": None, "cells": {}}
    status = "ok" if label is not None else "abstained"
    return Prediction(**{"id": row_id, "label": label, "status": status, **known, **changes})


def some_predictions() -> list[Prediction]:
    probs = probabilities(np.array([[-0.1, -3.0], [-2.0, -0.3], [-1.0, -1.1]], dtype=np.float32))
    cells = {"uuid": "007", "title": 'A "title", with\nlines'}
    return [
        a_prediction("007", "0", probs=probs[0], cells=cells),
        a_prediction("7", "1", probs=probs[1], cut=True, cells={"uuid": "7", "title": "心"}),
        a_prediction("x,y", None, probs=probs[2], gold=None, cells={"uuid": "x,y", "title": ""}),
    ]


def write(file: Path, predictions: list[Prediction], columns: list[str] | None = None) -> Path:
    write_predictions(file, iter(predictions), labels=LABELS, columns=columns or prediction_columns(LABELS))
    return file


def put(folder: Path, text: str, name: str = "predictions.csv") -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def journal(file: Path | None, *, key: str = KEY, resume: bool = True, rows: int = 6) -> Journal:
    return Journal(file, key=key, rows=rows, labels=2, resume=resume)


def some_batches(*, texts: bool = False) -> list[Scored]:
    scores = -np.random.default_rng(0).random((6, 2), dtype=np.float32) * 20
    return [
        Scored(rows, scores[rows], [bool(rows[0] % 2), False], [f"answer\n{row} 心" for row in rows] if texts else None)
        for rows in ([5, 0], [2, 3], [1, 4])
    ]


def record_all(file: Path | None) -> Journal:
    with journal(file, resume=False) as made:
        for batch in some_batches():
            made.record(batch)
    return made


def same_state(one: Journal, other: Journal) -> bool:
    return (
        one.finished == other.finished
        and one.texts == other.texts
        and np.array_equal(one.scores, other.scores)
        and np.array_equal(one.cut, other.cut)
    )


def test_probabilities_are_the_softmax_in_the_order_of_the_labels() -> None:
    scores = np.log(np.array([[0.2, 0.6], [0.03, 0.01]], dtype=np.float32))
    probs = probabilities(scores)
    assert probs.dtype == np.float32
    np.testing.assert_allclose(probs, [[0.25, 0.75], [0.75, 0.25]], rtol=1e-6)


@pytest.mark.parametrize("shift", [0.0, -1000.0, -1e6])
def test_probabilities_of_very_unlikely_labels_are_finite_and_add_up(shift: float) -> None:
    probs = probabilities(np.array([[shift, shift - 1, shift - 200]], dtype=np.float32))
    np.testing.assert_allclose(probs, [[1 / (1 + math.exp(-1)), 1 / (1 + math.e), 0]], rtol=1e-6)


def test_an_impossible_label_has_probability_0() -> None:
    assert probabilities(np.array([[0.0, -np.inf]], dtype=np.float32)).tolist() == [[1, 0]]


def test_one_row_at_a_time_gives_the_same_probabilities() -> None:
    scores = -np.random.default_rng(0).random((20, 5), dtype=np.float32) * 10
    one_by_one = np.concatenate([probabilities(row[None]) for row in scores])
    assert np.array_equal(probabilities(scores), one_by_one)


def test_the_most_probable_label_is_decided_and_the_first_of_two_that_are_level() -> None:
    probs = np.array([[0.2, 0.5, 0.3], [0.4, 0.4, 0.2], [0.1, 0.1, 0.8], [0.3, 0.35, 0.35]], dtype=np.float32)
    assert decide(probs).tolist() == [1, 0, 2, 1]


def test_the_columns_of_a_predictions_file() -> None:
    columns = ["id", "label", "prob_b", "prob_a", "status", "cut", "gold"]
    assert prediction_columns(["b", "a"]) == columns
    assert prediction_columns(["b", "a"], text=True) == [*columns, "text"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_predictions_are_read_as_they_were_written(tmp_path: Path, suffix: str) -> None:
    predictions = some_predictions()
    table = read_predictions(write(tmp_path / f"predictions{suffix}", predictions))
    assert table.labels == LABELS
    assert table.ids == ["007", "7", "x,y"]
    assert table.predicted == ["0", "1", ""]
    assert table.status == ["ok", "ok", "abstained"]
    assert table.gold == ["1", "1", ""]
    assert table.probs is not None
    assert np.array_equal(table.probs.astype(np.float32), np.array([p.probs for p in predictions]))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_labels_keep_the_order_of_the_task(tmp_path: Path, suffix: str) -> None:
    labels, file = ["z", "a", "m"], tmp_path / f"predictions{suffix}"
    prediction = a_prediction(label="a", probs=np.array([0.25, 0.5, 0.25], dtype=np.float32), gold="z")
    write_predictions(file, iter([prediction]), labels=labels, columns=prediction_columns(labels))
    table = read_predictions(file)
    assert table.labels == labels and table.probs is not None
    assert table.probs.tolist() == [[0.25, 0.5, 0.25]]


def test_a_csv_is_written_to_the_letter(tmp_path: Path) -> None:
    predictions = [
        a_prediction("1", "1", probs=np.array([0.1, 0.9], dtype=np.float32), cut=True, gold=None),
        a_prediction("2", None, probs=np.array([0.5, 0.5], dtype=np.float32), gold="0"),
    ]
    assert write(tmp_path / "p.csv", predictions).read_bytes() == (
        b"id,label,prob_0,prob_1,status,cut,gold\n1,1,0.1,0.9,ok,true,\n2,,0.5,0.5,abstained,false,0\n"
    )


def test_jsonl_is_written_to_the_letter(tmp_path: Path) -> None:
    prediction = a_prediction("心", None, probs=np.array([0.1, 0.9], dtype=np.float32), gold="0")
    assert write(tmp_path / "p.jsonl", [prediction]).read_text(encoding="utf-8") == (
        '{"id": "心", "label": null, "prob_0": 0.1, "prob_1": 0.9, "status": "abstained", "cut": false, "gold": "0"}\n'
    )


def test_parquet_has_typed_columns(tmp_path: Path) -> None:
    table = pq.read_table(write(tmp_path / "p.parquet", some_predictions()))
    assert table.schema.names == prediction_columns(LABELS)
    assert [str(kind) for kind in table.schema.types] == [
        "string",
        "string",
        "float",
        "float",
        "string",
        "bool",
        "string",
    ]
    assert table["label"].to_pylist() == ["0", "1", None]
    assert table["cut"].to_pylist() == [False, True, False]


def test_parquet_of_many_rows_keeps_all_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_clf.decisions.predictions.ROW_GROUP", 4)
    for count in (1, 4, 9):
        predictions = [a_prediction(str(number)) for number in range(count)]
        table = read_predictions(write(tmp_path / "p.parquet", predictions))
        assert table.ids == [str(number) for number in range(count)]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_wanted_columns_are_written_in_their_order_with_the_rows_own(tmp_path: Path, suffix: str) -> None:
    columns = choose_columns(["title", "label", "prob_1", "uuid"], OWN, ["uuid", "title", "label"])
    file = write(tmp_path / f"p{suffix}", some_predictions(), columns)
    if suffix == ".parquet":
        records = pq.read_table(file).to_pylist()
    elif suffix == ".jsonl":
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    else:
        assert file.read_text(encoding="utf-8").startswith('title,label,prob_1,uuid\n"A ""title"", with\nlines",0,')
        return
    assert [list(record) for record in records] == [columns] * 3
    assert [record["title"] for record in records] == ['A "title", with\nlines', "心", ""]
    assert [record["label"] for record in records] == ["0", "1", None]
    assert [record["uuid"] for record in records] == ["007", "7", "x,y"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_generated_answer_is_written_beside_the_label(tmp_path: Path, suffix: str) -> None:
    predictions = [a_prediction("a", text='It is "1",\nI think.'), a_prediction("b", None, status="unparsed", text="")]
    file = write(tmp_path / f"p{suffix}", predictions, prediction_columns(LABELS, text=True))
    assert [row.cells["text"] for row in read_rows([file])] == ['It is "1",\nI think.', ""]
    table = read_predictions(file)
    assert (table.predicted, table.status) == (["1", ""], ["ok", "unparsed"])


def test_a_column_of_the_rows_named_text_is_theirs_where_nothing_was_generated(tmp_path: Path) -> None:
    file = write(tmp_path / "p.csv", [a_prediction(cells={"text": "theirs"})], choose_columns(["text"], OWN, ["text"]))
    assert [row.cells for row in read_rows([file])] == [{"text": "theirs"}]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("text", ["a\rb", "a\r\nb", "a\nb", '"', "a,b", "\t", "'"])
def test_cells_of_the_rows_come_back_as_they_were(tmp_path: Path, suffix: str, text: str) -> None:
    columns = [*prediction_columns(LABELS), "note"]
    predictions = [
        a_prediction(text, cells={"note": text}),
        a_prediction("next", cells={"note": "x"}),
    ]
    table = read_predictions(write(tmp_path / f"p{suffix}", predictions, columns))
    assert table.ids == [text, "next"]


def test_without_a_wish_the_columns_are_those_of_a_predictions_file() -> None:
    assert choose_columns(None, OWN, ["title"]) == prediction_columns(LABELS)


@pytest.mark.parametrize(
    ("wanted", "unknown"), [(["id", "author"], "'author'"), (["prob_2"], "'prob_2'"), ([""], "''"), ([], "''")]
)
def test_an_unknown_column_is_refused_with_those_that_are_there(wanted: list[str], unknown: str) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_columns(wanted, OWN, ["uuid", "title"])
    assert f"there is no column {unknown};" in str(caught.value)
    assert all(name in str(caught.value) for name in (*prediction_columns(LABELS), "'uuid', 'title'"))


def test_a_column_that_is_wanted_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="'id'"):
        choose_columns(["id", "label", "id"], OWN, ["uuid"])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_fill_stands_where_a_row_has_nothing_and_what_it_has_is_kept(tmp_path: Path, suffix: str) -> None:
    columns = choose_columns(["uuid", "Keywords", "label"], OWN, ["uuid"], {"Keywords": "tmp"})
    rows = [{"uuid": "1"}, {"uuid": "2", "Keywords": ""}, {"uuid": "3", "Keywords": "steel"}]
    predictions = [a_prediction(row["uuid"], cells=row) for row in rows]
    file = tmp_path / f"p{suffix}"
    write_predictions(file, iter(predictions), labels=LABELS, columns=columns, fill={"Keywords": "tmp"})
    written = [list(row.cells.items()) for row in read_rows([file])]
    assert written == [
        [("uuid", number), ("Keywords", word), ("label", "1")]
        for number, word in (("1", "tmp"), ("2", "tmp"), ("3", "steel"))
    ]


def test_a_fill_of_a_column_that_is_not_written_or_is_a_predictions_own_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--fill Keywords: is not among the columns"):
        choose_columns(["uuid", "label"], OWN, ["uuid"], {"Keywords": "tmp"})
    with pytest.raises(ConfigError, match=r"--fill Keywords: is not among the columns"):
        choose_columns(None, OWN, ["uuid"], {"Keywords": "tmp"})
    with pytest.raises(ConfigError, match=r"--fill label: is a column of predictions"):
        choose_columns(["uuid", "label"], OWN, ["uuid"], {"label": "1"})


def test_a_column_of_the_rows_is_text_even_if_its_name_starts_like_a_probability(tmp_path: Path) -> None:
    prediction = a_prediction(cells={"prob_old": "0.10"})
    file = write(tmp_path / "p.parquet", [prediction], ["id", "prob_1", "prob_old"])
    assert pq.read_table(file).to_pylist() == [{"id": "1", "prob_1": 0.75, "prob_old": "0.10"}]


@pytest.mark.parametrize("name", ["p.csv", "p.jsonl", "p.parquet", "P.CSV", "-", "a.b.jsonl"])
def test_the_formats_of_predictions_are_known(name: str) -> None:
    check_format(Path(name))


@pytest.mark.parametrize("name", ["p.txt", "p", "p.tsv", "p.json", "p.csv.gz", "p.xlsx"])
def test_another_ending_is_refused_with_those_that_are_allowed(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_format(Path(name))
    assert f"{Path(name).suffix!r}" in str(caught.value)
    assert all(suffix in str(caught.value) for suffix in SUFFIXES)


def test_a_dash_writes_jsonl_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    write(Path("-"), some_predictions())
    shown = capsys.readouterr()
    records = [json.loads(line) for line in shown.out.splitlines()]
    assert [record["id"] for record in records] == ["007", "7", "x,y"]
    assert list(records[0]) == prediction_columns(LABELS)
    assert shown.err == ""
    assert not Path("-").exists()


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_half_written(tmp_path: Path, suffix: str, there: bool, error: type[BaseException]) -> None:
    file = tmp_path / f"p{suffix}"
    if there:
        file.write_bytes(b"what was there")

    def broken() -> Iterator[Prediction]:
        yield from some_predictions()
        raise error

    with pytest.raises(error):
        write_predictions(file, broken(), labels=LABELS, columns=prediction_columns(LABELS))
    assert list(tmp_path.iterdir()) == ([file] if there else [])
    assert not there or file.read_bytes() == b"what was there"


def test_a_file_takes_its_name_when_it_is_complete(tmp_path: Path) -> None:
    file = tmp_path / "new" / "p.csv"

    def watched() -> Iterator[Prediction]:
        for prediction in some_predictions():
            assert not file.exists()
            yield prediction

    write_predictions(file, watched(), labels=LABELS, columns=prediction_columns(LABELS))
    assert list(file.parent.iterdir()) == [file]


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "x", "file")
    with pytest.raises(DataError, match="cannot be written"):
        write(tmp_path / "file" / "p.csv", some_predictions())


def test_predictions_without_probabilities_are_read(tmp_path: Path) -> None:
    table = read_predictions(put(tmp_path, "label,gold\nb,a\n,c\nb,\n"))
    assert table.labels == ["a", "b", "c"]
    assert table.probs is None
    assert table.ids == ["0", "1", "2"]
    assert table.status == ["ok", "unparsed", "ok"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("id,label\n1,a\n", ["needs the column 'gold'", "'id', 'label'"]),
        ("id,title\n1,a\n", ["needs the column 'label', 'gold'", "'id', 'title'"]),
        ("id,label,gold\n", ["holds no predictions"]),
        ("label,gold,prob_a,prob_b\na,a,0.5,0.5\nb,a,0.5,much\n", ["predictions.csv:3", "prob_b is 'much'"]),
        ("label,gold,prob_a,prob_b\na,a,,0.5\n", ["predictions.csv:2", "prob_a is ''"]),
        ("label,gold,prob_a,prob_b\na,a,1.5,0\n", ["predictions.csv:2", "prob_a is '1.5'", "from 0 to 1"]),
        ("label,gold,prob_a,prob_b\na,a,-0.1,0\n", ["prob_a is '-0.1'"]),
        ("label,gold,prob_a,prob_b\na,a,0,inf\n", ["prob_b is 'inf'"]),
        ("label,gold,prob_a,prob_b\na,b,0.5,0.5\na,c,0.5,0.5\n", ["predictions.csv:3", "a, b"]),
        ("label,gold,prob_a,prob_b\na,b,0.5,0.5\nc,a,0.5,0.5\n", ["predictions.csv:3", "a, b"]),
    ],
)
def test_what_is_no_predictions_file_is_refused(tmp_path: Path, text: str, told: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        read_predictions(put(tmp_path, text))
    assert all(part in str(caught.value) for part in told)


def test_parquet_that_is_no_predictions_file_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["1"]}), tmp_path / "p.parquet")
    with pytest.raises(DataError, match="needs the column 'label', 'gold'"):
        read_predictions(tmp_path / "p.parquet")


def test_a_journal_keeps_each_row_where_it_belongs(tmp_path: Path) -> None:
    with journal(tmp_path / "journal") as made:
        made.record(Scored([4, 1], np.array([[-1, -2], [-3, -4]], dtype=np.float32), [True, False], None))
    assert made.finished == {1, 4}
    assert made.scores.tolist() == [[0, 0], [-3, -4], [0, 0], [0, 0], [-1, -2], [0, 0]]
    assert made.cut.tolist() == [False, False, False, False, True, False]


def test_a_journal_is_resumed_with_the_same_numbers(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "journal"
    whole = record_all(file)
    before = file.read_bytes()
    with journal(file) as resumed:
        assert same_state(resumed, whole)
        assert resumed.finished == set(range(6))
    assert file.read_bytes() == before


def test_a_batch_is_on_disk_when_it_is_recorded(tmp_path: Path) -> None:
    file = tmp_path / "journal"
    with journal(file) as made:
        for done, batch in enumerate(some_batches(), start=1):
            made.record(batch)
            assert len(file.read_bytes().splitlines()) == done + 1
            copy = tmp_path / f"copy{done}"
            copy.write_bytes(file.read_bytes())
            with journal(copy) as resumed:
                assert same_state(resumed, made)


def test_a_journal_cut_anywhere_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    whole = record_all(tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    ends = [number + 1 for number, byte in enumerate(content) if byte == ord("\n")]
    file = tmp_path / "cut"
    for size in {*range(0, len(content), 7), *ends, *(end - 1 for end in ends)}:
        file.write_bytes(content[:size])
        with journal(file) as resumed:
            lines = max(0, sum(end <= size for end in ends) - 1)
            assert resumed.finished == {row for batch in some_batches()[:lines] for row in batch.rows}
            for batch in some_batches()[lines:]:
                resumed.record(batch)
        assert same_state(resumed, whole)
        assert file.read_bytes() == content


def test_rows_of_a_line_that_was_cut_are_not_finished(tmp_path: Path) -> None:
    file = tmp_path / "journal"
    record_all(file)
    file.write_bytes(file.read_bytes()[:-3])
    with journal(file) as resumed:
        assert resumed.finished == {0, 2, 3, 5}
        assert resumed.scores[[1, 4]].tolist() == [[0, 0], [0, 0]]


def test_what_was_cut_is_gone_from_the_file_before_anything_is_recorded(tmp_path: Path) -> None:
    file = tmp_path / "journal"
    record_all(file)
    whole_lines = file.read_bytes().splitlines(keepends=True)[:-1]
    file.write_bytes(file.read_bytes()[:-3])
    with journal(file):
        assert file.read_bytes() == b"".join(whole_lines)


def test_a_journal_of_another_job_is_refused_and_left(tmp_path: Path) -> None:
    file = tmp_path / "journal"
    record_all(file)
    before = file.read_bytes()
    with pytest.raises(ArtifactError, match="--overwrite"):
        journal(file, key="another job")
    assert file.read_bytes() == before


def test_without_resume_a_journal_starts_afresh(tmp_path: Path) -> None:
    file = tmp_path / "journal"
    record_all(file)
    with journal(file, key="another job", resume=False) as made:
        assert made.finished == set()
    with journal(file, key="another job") as made:
        assert made.finished == set() and not made.scores.any()


def test_a_journal_without_a_file_keeps_all_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert same_state(record_all(None), record_all(tmp_path / "journal"))
    assert [path.name for path in tmp_path.iterdir()] == ["journal"]


def test_a_journal_is_closed_when_the_job_fails(tmp_path: Path) -> None:
    file = tmp_path / "journal"
    batch = some_batches()[0]
    with pytest.raises(RuntimeError), journal(file) as made:
        made.record(batch)
        raise RuntimeError
    with pytest.raises(ValueError, match="closed"):
        made.record(batch)
    with journal(file) as resumed:
        assert resumed.finished == set(batch.rows)


def test_generated_answers_are_resumed_with_the_scores(tmp_path: Path) -> None:
    file = tmp_path / "journal"
    with journal(file) as made:
        for batch in some_batches(texts=True):
            made.record(batch)
    assert made.texts == {row: f"answer\n{row} 心" for row in range(6)}
    with journal(file) as resumed:
        assert same_state(resumed, made)
    assert record_all(None).texts == {}


def test_predictions_go_on_through_standard_output_as_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    write(Path("-"), some_predictions())
    assert read_predictions(put(tmp_path, out.getvalue(), "p.jsonl")).gold == ["1", "1", ""]
