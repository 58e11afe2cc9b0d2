import csv
import gzip
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_clf.errors import DataError
from llm_clf.prompting.rows import read_rows, rewindable

RECORDS = [
    {"uuid": "007", "title": 'ECG "at rest", part 1', "abstract": "first line\nsecond\tline", "label": "1"},
    {"uuid": "8", "title": "群论：环与理想", "abstract": "", "label": "0"},
    {"uuid": "1e3", "title": " spaces stay ", "abstract": "NaN is no word here", "label": ""},
]
TEXT_FORMATS = (".csv", ".tsv", ".jsonl", ".json")
FORMATS = (*TEXT_FORMATS, ".parquet")


def table_bytes(suffix: str, records: list[dict[str, Any]], encoding: str = "utf-8", end: str = "\n") -> bytes:
    if suffix == ".parquet":
        opened = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(records), opened)
        return opened.getvalue()
    if suffix == ".json":
        return json.dumps(records, ensure_ascii=False, indent=1).replace("\n", end).encode(encoding)
    if suffix == ".jsonl":
        return "".join(json.dumps(record, ensure_ascii=False) + end for record in records).encode(encoding)
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter="," if suffix == ".csv" else "\t", lineterminator=end)
    writer.writerow(records[0])
    writer.writerows(record.values() for record in records)
    return text.getvalue().encode(encoding)


def put(folder: Path, name: str, content: bytes) -> Path:
    file = folder / name
    file.write_bytes(gzip.compress(content) if name.lower().endswith(".gz") else content)
    return file


def cells_of(*files: Path, encoding: str = "utf-8") -> list[dict[str, str]]:
    return [row.cells for row in read_rows(files, encoding=encoding)]


def refusal(file: Path, encoding: str = "utf-8") -> str:
    with pytest.raises(DataError) as caught:
        list(read_rows([file], encoding=encoding))
    return str(caught.value)


def give_stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(content))))


@pytest.mark.parametrize("gz", ["", ".gz", ".GZ"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str, gz: str) -> None:
    file = put(tmp_path, f"some.rows{suffix}{gz}", table_bytes(suffix, RECORDS))
    assert cells_of(file) == RECORDS
    assert [list(cells) for cells in cells_of(file)] == [list(record) for record in RECORDS]


@pytest.mark.parametrize("suffix", FORMATS)
def test_upper_case_endings_are_known(tmp_path: Path, suffix: str) -> None:
    assert cells_of(put(tmp_path, "ROWS" + suffix.upper(), table_bytes(suffix, RECORDS))) == RECORDS


@pytest.mark.parametrize("encoding", ["utf-8", "UTF8", "utf_8", "utf-8-sig"])
@pytest.mark.parametrize("suffix", TEXT_FORMATS)
def test_a_byte_order_mark_is_dropped(tmp_path: Path, suffix: str, encoding: str) -> None:
    file = put(tmp_path, "rows" + suffix, b"\xef\xbb\xbf" + table_bytes(suffix, RECORDS))
    assert cells_of(file, encoding=encoding) == RECORDS


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("encoding", ["gb18030", "utf-16", "GB18030"])
@pytest.mark.parametrize("suffix", TEXT_FORMATS)
def test_other_encodings_are_read_when_they_are_named(tmp_path: Path, suffix: str, encoding: str, gz: str) -> None:
    file = put(tmp_path, "rows" + suffix + gz, table_bytes(suffix, RECORDS, encoding))
    assert cells_of(file, encoding=encoding) == RECORDS


def test_the_encoding_does_not_touch_parquet(tmp_path: Path) -> None:
    assert cells_of(put(tmp_path, "rows.parquet", table_bytes(".parquet", RECORDS)), encoding="gb18030") == RECORDS


@pytest.mark.parametrize("suffix", TEXT_FORMATS)
def test_crlf_ends_rows_and_is_no_part_of_a_cell(tmp_path: Path, suffix: str) -> None:
    assert cells_of(put(tmp_path, "rows" + suffix, table_bytes(suffix, RECORDS, end="\r\n"))) == RECORDS


def test_line_breaks_in_quoted_cells_stay_as_written(tmp_path: Path) -> None:
    file = put(tmp_path, "rows.csv", b'id,text\r\n1,"a\r\nb"\r\n2,"c\nd\n"\r\n3,"e\rf"\r\n')
    assert [cells["text"] for cells in cells_of(file)] == ["a\r\nb", "c\nd\n", "e\rf"]


@pytest.mark.parametrize("end", ["", "\n", "\n\n\n"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_the_end_of_the_last_line_does_not_matter(tmp_path: Path, suffix: str, end: str) -> None:
    content = table_bytes(suffix, RECORDS).rstrip(b"\n") + end.encode()
    assert cells_of(put(tmp_path, "rows" + suffix, content)) == RECORDS


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_field_of_200_kb_is_read_whole(tmp_path: Path, suffix: str) -> None:
    long = [{"id": "1", "text": '心, "x"\n' * 25_000}, {"id": "2", "text": "short"}]
    assert len(long[0]["text"].encode()) > 200_000
    assert cells_of(put(tmp_path, "rows" + suffix, table_bytes(suffix, long))) == long


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", b"a,b,c,d\n,NaN,nan,x\n"),
        ("rows.tsv", b"a\tb\tc\td\n\tNaN\tnan\tx\n"),
        ("rows.jsonl", b'{"a": null, "b": NaN, "c": "", "d": "x"}\n'),
        ("rows.json", b'[{"a": null, "b": NaN, "c": "", "d": "x"}]'),
        ("rows.parquet", table_bytes(".parquet", [{"a": None, "b": math.nan, "c": "", "d": "x"}])),
    ],
)
def test_empty_cells_nulls_and_nan_are_empty_text(tmp_path: Path, name: str, content: bytes) -> None:
    assert cells_of(put(tmp_path, name, content)) == [{"a": "", "b": "", "c": "", "d": "x"}]


@pytest.mark.parametrize("word", ["NA", "None", "null", "N/A", "nano", "-"])
def test_words_that_only_look_empty_stay(tmp_path: Path, word: str) -> None:
    assert cells_of(put(tmp_path, "rows.csv", f"a,b\n{word},1\n".encode())) == [{"a": word, "b": "1"}]


@pytest.mark.parametrize("suffix", FORMATS)
def test_ids_stay_text_as_written(tmp_path: Path, suffix: str) -> None:
    ids = ["007", "1.50", "1e3", "+1", "0x1F", "true", "9007199254740993"]
    file = put(tmp_path, "rows" + suffix, table_bytes(suffix, [{"id": text, "x": "y"} for text in ids]))
    assert [cells["id"] for cells in cells_of(file)] == ids


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_typed_values_become_the_text_of_a_csv_cell(tmp_path: Path, suffix: str) -> None:
    record = {"whole": 9007199254740993, "real": 0.5, "yes": True, "no": False, "many": ["心", 1 if suffix else 0]}
    if suffix == ".parquet":
        record["many"] = ["心", "x"]
    [cells] = cells_of(put(tmp_path, "rows" + suffix, table_bytes(suffix, [record])))
    assert cells == {
        "whole": "9007199254740993",
        "real": "0.5",
        "yes": "true",
        "no": "false",
        "many": '["心", "x"]' if suffix == ".parquet" else '["心", 1]',
    }


@pytest.mark.parametrize("content", [rb'{"a": "x\ud800y"}', rb'{"a": ["x\ud800y"]}', rb'{"a": {"b": "\udfff"}}'])
def test_half_a_surrogate_pair_becomes_text_that_can_be_written(tmp_path: Path, content: bytes) -> None:
    [cells] = cells_of(put(tmp_path, "rows.jsonl", content))
    assert cells["a"].encode("utf-8")


def test_two_files_are_read_one_after_the_other(tmp_path: Path) -> None:
    first = put(tmp_path, "first.csv", table_bytes(".csv", RECORDS[:2]))
    second = put(tmp_path, "second.jsonl.gz", table_bytes(".jsonl", RECORDS[2:]))
    assert cells_of(first, second) == RECORDS
    assert cells_of(second, first) == [*RECORDS[2:], *RECORDS[:2]]
    assert [row.where for row in read_rows([first, second])] == [f"{first}:2", f"{first}:4", f"{second}:1"]


def test_a_row_knows_the_line_that_it_starts_on(tmp_path: Path) -> None:
    table = put(tmp_path, "rows.csv", b'"i\nd",text\n1,"a\nb\nc"\n\n2,d\n')
    lines = put(tmp_path, "rows.jsonl", b'{"id": 1}\n\n  \n{"id": 2}\n')
    array = put(tmp_path, "rows.json", b'[{"id": 1}, {"id": 2}]')
    assert [row.where for row in read_rows([table])] == [f"{table}:3", f"{table}:7"]
    assert [row.where for row in read_rows([lines])] == [f"{lines}:1", f"{lines}:4"]
    assert [row.where for row in read_rows([array])] == [f"{array}, record 0", f"{array}, record 1"]


def test_parquet_records_are_numbered_through_all_batches(tmp_path: Path) -> None:
    records = [{"id": str(number)} for number in range(2500)]
    rows = list(read_rows([put(tmp_path, "rows.parquet", table_bytes(".parquet", records))]))
    assert [row.cells for row in rows] == records
    assert [row.where.rpartition(" ")[2] for row in rows] == [str(number) for number in range(2500)]


def test_rows_come_as_they_are_read(tmp_path: Path) -> None:
    rows = read_rows([put(tmp_path, "rows.jsonl", b'{"id": 1}\nbroken\n'), tmp_path / "missing.csv"])
    assert next(rows).cells == {"id": "1"}
    with pytest.raises(DataError, match=r"rows\.jsonl:2"):
        next(rows)


@pytest.mark.parametrize(
    ("content", "suffix"),
    [
        (table_bytes(".csv", RECORDS), ".csv"),
        (b"\xef\xbb\xbf" + table_bytes(".csv", RECORDS), ".csv"),
        (table_bytes(".jsonl", RECORDS), ".jsonl"),
        (b"\xef\xbb\xbf\r\n " + table_bytes(".jsonl", RECORDS), ".jsonl"),
        (table_bytes(".json", RECORDS), ".json"),
        (b"\n\n" + table_bytes(".json", RECORDS), ".json"),
    ],
)
def test_standard_input_can_be_read_twice(monkeypatch: pytest.MonkeyPatch, content: bytes, suffix: str) -> None:
    give_stdin(monkeypatch, content)
    with rewindable(["-"]) as files:
        assert [file.suffix for file in files] == [suffix]
        assert cells_of(*files) == RECORDS
        assert cells_of(*files) == RECORDS
    assert not files[0].exists()


def test_standard_input_stands_beside_files_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give_stdin(monkeypatch, table_bytes(".csv", RECORDS[:1]))
    file = put(tmp_path, "rows.csv", table_bytes(".csv", RECORDS[1:]))
    with rewindable([Path("-"), str(file)]) as files:
        assert files[1] == file
        assert cells_of(*files) == RECORDS
    assert file.exists()


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "missing.csv: there is no such file" in refusal(tmp_path / "missing.csv")


def test_a_folder_is_refused_with_the_endings_that_are_allowed(tmp_path: Path) -> None:
    folder = tmp_path / "rows.csv"
    folder.mkdir()
    message = refusal(folder)
    assert "is a folder" in message and all(suffix in message for suffix in FORMATS)


@pytest.mark.parametrize(
    ("name", "found"),
    [("rows.xlsx", "'.xlsx'"), ("rows", "''"), ("rows.csv.zip", "'.zip'"), ("rows.gz", "'.gz'"), (".csv", "''")],
)
def test_an_unknown_ending_is_refused_with_those_that_are_known(tmp_path: Path, name: str, found: str) -> None:
    message = refusal(put(tmp_path, name, b"a,b\n1,2\n"))
    assert f"found the ending {found}" in message
    assert all(suffix in message for suffix in FORMATS) and ".gz" in message


@pytest.mark.parametrize("suffix", TEXT_FORMATS)
def test_a_wrong_encoding_names_the_option(tmp_path: Path, suffix: str) -> None:
    message = refusal(put(tmp_path, "rows" + suffix, table_bytes(suffix, RECORDS, "gb18030")))
    assert "is not utf-8" in message and "--encoding gb18030" in message and f"rows{suffix}" in message


@pytest.mark.parametrize("encoding", ["ascii", "utf-16", "gb18030"])
def test_text_that_is_not_in_the_given_encoding_is_refused(tmp_path: Path, encoding: str) -> None:
    message = refusal(put(tmp_path, "rows.csv", b"id,text\n1,n\xff\n"), encoding)
    assert f"is not {encoding}" in message and "--encoding" in message


@pytest.mark.parametrize("encoding", ["utf-9", "no such", "hex"])
def test_an_unknown_encoding_is_refused(tmp_path: Path, encoding: str) -> None:
    message = refusal(put(tmp_path, "rows.csv", b"a,b\n1,2\n"), encoding)
    assert f"--encoding {encoding!r}" in message and "gb18030" in message


@pytest.mark.parametrize("suffix", FORMATS)
def test_gzip_that_was_cut_off_is_refused(tmp_path: Path, suffix: str) -> None:
    whole = gzip.compress(table_bytes(suffix, RECORDS * 50))
    file = tmp_path / f"rows{suffix}.gz"
    for size in (len(whole) // 2, len(whole) - 4):
        file.write_bytes(whole[:size])
        assert "gzip data is damaged or cut off" in refusal(file)


def test_gzip_that_is_none_or_damaged_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv.gz"
    file.write_bytes(b"a,b\n1,2\n")
    assert "gzip data is damaged" in refusal(file)
    whole = bytearray(gzip.compress(table_bytes(".csv", RECORDS)))
    whole[-8] ^= 0xFF
    file.write_bytes(whole)
    assert "gzip data is damaged" in refusal(file)


@pytest.mark.parametrize(
    ("content", "line", "found"),
    [
        (b"id,text\n1,a\n2,b,c\n", 3, "found 3 cells, the header has 2"),
        (b"id,text\n1\n", 2, "found 1 cells, the header has 2"),
        (b'id,text\r\n1,"a\r\nb"\r\n\r\n2,"c\r\nd",e\r\n', 5, "found 3 cells, the header has 2"),
    ],
)
def test_a_ragged_row_is_refused_with_its_line(tmp_path: Path, content: bytes, line: int, found: str) -> None:
    assert f"rows.csv:{line}: {found}" in refusal(put(tmp_path, "rows.csv", content))


def test_a_ragged_tsv_is_refused(tmp_path: Path) -> None:
    assert "rows.tsv:2: found 1 cells, the header has 2" in refusal(put(tmp_path, "rows.tsv", b"a\tb\n1,2\n"))


@pytest.mark.parametrize("content", [b'id,text\n1,a\n2,"b\n', b'id,text\n1,a\n2,"b', b'id,"text\n'])
def test_an_unclosed_quote_is_refused(tmp_path: Path, content: bytes) -> None:
    assert "is not well-formed CSV" in refusal(put(tmp_path, "rows.csv", content))


def test_an_unclosed_quote_is_shown_where_its_row_starts(tmp_path: Path) -> None:
    content = b'id,text\n1,"a\nb"\n2,"never closed\n' + b"3,c\n" * 50
    assert "rows.csv:4: is not well-formed CSV" in refusal(put(tmp_path, "rows.csv", content))


def test_text_after_a_closing_quote_is_refused_with_its_line(tmp_path: Path) -> None:
    message = refusal(put(tmp_path, "rows.csv", b'id,text\n1,a\n2,"b"c\n3,d\n'))
    assert "rows.csv:3: is not well-formed CSV" in message


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv"])
def test_repeated_header_names_are_refused(tmp_path: Path, name: str) -> None:
    content = b"b,a,b,c,a\n1,2,3,4,5\n"
    content = content.replace(b",", b"\t") if name.endswith("tsv") else content
    assert "the header names 'a', 'b' more than once" in refusal(put(tmp_path, name, content))


def test_repeated_parquet_names_are_refused(tmp_path: Path) -> None:
    table = pa.table([pa.array(["1"]), pa.array(["2"])], names=["a", "a"])
    pq.write_table(table, tmp_path / "rows.parquet")
    assert "the header names 'a' more than once" in refusal(tmp_path / "rows.parquet")


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b'{"id": 2', "is not JSON"),
        (b"id,text", "is not JSON"),
        (b'{"id": ' + b"1" * 5000 + b"}", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'[{"id": 2}]', "found list, expected an object"),
        (b'"text"', "found str, expected an object"),
        (b"null", "found NoneType, expected an object"),
    ],
    ids=["cut off", "CSV", "endless number", "endless nesting", "array", "text", "null"],
)
def test_a_broken_jsonl_line_is_refused_with_its_number(tmp_path: Path, line: bytes, found: str) -> None:
    file = put(tmp_path, "rows.jsonl", b'{"id": 1}\n\n' + line + b'\n{"id": 3}\n')
    message = refusal(file)
    assert message.startswith(f"{file}:3: ") and found in message


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b'{"rows": []}', "found dict, expected an array"),
        (b'"text"', "found str, expected an array"),
        (b'[{"id": 1}', "is not JSON"),
        (b'{"id": 1}\n{"id": 2}\n', "name it .jsonl"),
        (b'[{"id": 1}, 2]', "record 1: found int, expected an object"),
        (b'[{"id": ' + b"1" * 5000 + b"}]", "is not JSON"),
    ],
    ids=["object", "text", "cut off", "lines", "number inside", "endless number"],
)
def test_json_that_is_no_array_of_objects_is_refused(tmp_path: Path, content: bytes, found: str) -> None:
    assert found in refusal(put(tmp_path, "rows.json", content))


def test_damaged_parquet_is_refused(tmp_path: Path) -> None:
    whole = table_bytes(".parquet", RECORDS)
    for content in (whole[: len(whole) // 2], whole[:-4], b"a,b\n1,2\n", b"PAR1 and more and PAR1"):
        assert "is not a whole Parquet file" in refusal(put(tmp_path, "rows.parquet", content))
        assert "is not a whole Parquet file" in refusal(put(tmp_path, "rows.parquet.gz", content))


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_an_empty_file_is_refused(tmp_path: Path, suffix: str, gz: str) -> None:
    message = refusal(put(tmp_path, f"rows{suffix}{gz}", b""))
    assert message.startswith(f"{tmp_path / 'rows'}{suffix}{gz}: is ")


@pytest.mark.parametrize("content", [b"\n \n", b"\xef\xbb\xbf"])
def test_jsonl_of_blank_lines_is_refused(tmp_path: Path, content: bytes) -> None:
    assert "rows.jsonl: is empty" in refusal(put(tmp_path, "rows.jsonl", content))


def test_a_table_with_nothing_but_a_header_has_no_rows(tmp_path: Path) -> None:
    assert cells_of(put(tmp_path, "rows.csv", b"id,text\n")) == []
    assert cells_of(put(tmp_path, "rows.json", b"[]")) == []
