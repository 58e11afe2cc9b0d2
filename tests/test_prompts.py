import csv
import io
import itertools
import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from llm_clf.commands.build_prompts import build_prompts
from llm_clf.errors import ConfigError, DataError, LabelError, LlmClfError, TemplateError
from llm_clf.prompting.duplicates import find_duplicates, text_key
from llm_clf.prompting.prompts import SPLITS, Prompt, prompt_line, read_prompts, read_split
from llm_clf.prompting.splits import parse_shares, split_keys
from llm_clf.prompting.tasks import Task, load_task

COLUMNS = ("uuid", "title", "abstract", "label")
TASK = "medical_paper"
Cells = tuple[str, ...]


def write_csv(file: Path, rows: list[Cells], columns: Cells = COLUMNS) -> Path:
    with open(file, "w", encoding="utf-8", newline="") as opened:
        csv.writer(opened).writerows([columns, *rows])
    return file


def write_prompts(file: Path, records: list[dict[str, str]]) -> Path:
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return file


def some_rows(zeros: int, ones: int, unlabelled: int = 0) -> list[Cells]:
    """Rows of distinct texts, mixed: `zeros` of label 0, `ones` of label 1, and some without."""
    labels = ["0"] * zeros + ["1"] * ones + [""] * unlabelled
    rows = [(f"id{i}", f"title {i}", f"abstract number {i}", label) for i, label in enumerate(labels)]
    random.Random(0).shuffle(rows)
    return rows


def prompts_of(file: Path, task: Task | None = None) -> list[Prompt]:
    return list(read_prompts([file], task or load_task(TASK)))


def records_of(folder: Path, split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def inputs_of(folder: Path) -> dict[str, set[str]]:
    return {split: {record["input"] for record in records_of(folder, split)} for split in SPLITS}


def content_of(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder with its bytes, None for folders."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def keys_of(amounts: dict[str | None, int]) -> dict[str | None, list[bytes]]:
    return {label: [text_key(f"{label} {number}") for number in range(n)] for label, n in amounts.items()}


def counts_of(assigned: dict[bytes, int], keys: list[bytes]) -> list[int]:
    return [sum(assigned[key] == split for key in keys) for split in range(3)]


def test_a_row_becomes_a_prompt_with_its_own_cells(tmp_path: Path) -> None:
    file = write_csv(
        tmp_path / "rows.csv", [("007", "A", "b", "Ann", " 1.0 ")], ("uuid", *COLUMNS[1:3], "who", "label")
    )
    [prompt] = prompts_of(file)
    assert (prompt.id, prompt.input, prompt.label) == ("007", "title:A,abstract:b", "1")
    assert prompt.cells == {"uuid": "007", "title": "A", "abstract": "b", "who": "Ann", "label": " 1.0 "}


def test_rows_without_an_id_column_are_numbered_through_all_files(tmp_path: Path) -> None:
    rows = [("a", "b", "1"), ("c", "d", "0")]
    files = [write_csv(tmp_path / name, rows, ("title", "abstract", "label")) for name in ("one.csv", "two.csv")]
    assert [prompt.id for prompt in read_prompts(files, load_task(TASK))] == ["0", "1", "2", "3"]


def test_an_empty_id_is_the_number_of_the_row(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "rows.csv", [("x", "a", "b", "1"), ("", "c", "d", "1"), ("y", "e", "f", "1")])
    assert [prompt.id for prompt in prompts_of(file)] == ["x", "1", "y"]


def test_rows_need_no_label(tmp_path: Path) -> None:
    without = write_csv(tmp_path / "a.csv", [("x", "a", "b")], COLUMNS[:3])
    empty = write_csv(tmp_path / "b.csv", [("x", "a", "b", ""), ("y", "a", "b", "nan"), ("z", "a", "b", " ")])
    assert [prompt.label for prompt in (*prompts_of(without), *prompts_of(empty))] == [None] * 4


def test_a_missing_column_lists_the_columns_that_are_there(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "rows.csv", [("1", "a", "b", "1")], ("uuid", "Title", "summary", "label"))
    with pytest.raises(DataError) as caught:
        prompts_of(file)
    assert str(caught.value) == (
        f"{file}:2: the task needs the columns 'title', 'abstract'; there are 'uuid', 'Title', 'summary', 'label'."
    )


def test_a_missing_column_lists_at_most_thirty(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "rows.csv", [("x",) * 33], tuple(f"c{number}" for number in range(33)))
    with pytest.raises(DataError, match=r"'c0', 'c1', .*'c29' and 3 more"):
        prompts_of(file)


@pytest.mark.parametrize("columns", [("instruction", "text"), ("input", "output")])
def test_half_a_prompts_file_is_no_prompts_file(tmp_path: Path, columns: Cells) -> None:
    file = write_csv(tmp_path / "rows.csv", [("a", "b")], columns)
    with pytest.raises(DataError, match="needs the columns 'title', 'abstract'"):
        prompts_of(file)


def test_a_repeated_id_is_refused_where_it_comes_back(tmp_path: Path) -> None:
    rows = [("1", "a", "b", "1"), ("01", "a", "b", "1"), ("1.0", "a", "b", "0"), ("1", "c", "d", "0")]
    file = write_csv(tmp_path / "rows.csv", rows)
    with pytest.raises(DataError, match=r"rows\.csv:5: the id '1' stands twice"):
        prompts_of(file)


def test_an_id_is_repeated_over_files_too(tmp_path: Path) -> None:
    first = write_csv(tmp_path / "first.csv", [("7", "a", "b", "1")])
    second = write_csv(tmp_path / "second.csv", [("8", "a", "b", "1"), ("7", "c", "d", "1")])
    with pytest.raises(DataError, match=r"second\.csv:3: the id '7' stands twice"):
        list(read_prompts([first, second], load_task(TASK)))


def test_unknown_labels_show_the_first_ten_rows_and_the_count(tmp_path: Path) -> None:
    rows = [(str(i), "a", "b", f"odd{i}" if i % 2 else "1") for i in range(50)]
    with pytest.raises(LabelError) as caught:
        prompts_of(write_csv(tmp_path / "rows.csv", rows))
    message = str(caught.value)
    assert message.startswith("25 rows have a label that the task does not know:\n")
    shown = [line for line in message.splitlines() if "rows.csv:" in line]
    assert [line.partition("rows.csv:")[2] for line in shown] == [
        f"{i + 2}: 'odd{i}' is no label; the labels are 0, 1" for i in range(1, 20, 2)
    ]
    assert "… and 15 more" in message


@pytest.mark.parametrize("count", [1, 10])
def test_up_to_ten_unknown_labels_are_all_shown(tmp_path: Path, count: int) -> None:
    rows = [(str(i), "a", "b", "odd" if i < count else "1") for i in range(20)]
    with pytest.raises(LabelError) as caught:
        prompts_of(write_csv(tmp_path / "rows.csv", rows))
    assert str(caught.value).count("'odd' is no label") == count
    assert "more" not in str(caught.value)


def test_a_prompts_file_is_read_as_it_is(tmp_path: Path) -> None:
    task = load_task(TASK)
    records = [
        {"id": "a", "instruction": task.instruction, "input": "not in the template", "output": "1"},
        {"id": "b", "instruction": task.instruction, "input": "title:x,abstract:y"},
        {"id": "c", "instruction": task.instruction, "input": "z", "output": ""},
    ]
    prompts = prompts_of(write_prompts(tmp_path / "prompts.jsonl", records))
    assert [(prompt.id, prompt.input, prompt.label) for prompt in prompts] == [
        ("a", "not in the template", "1"),
        ("b", "title:x,abstract:y", None),
        ("c", "z", None),
    ]


def test_a_prompts_file_without_ids_is_numbered(tmp_path: Path) -> None:
    records = [{"instruction": load_task(TASK).instruction, "input": text, "output": "0"} for text in "xyz"]
    file = tmp_path / "original.json"
    file.write_text(json.dumps(records), encoding="utf-8")
    assert [(prompt.id, prompt.input) for prompt in prompts_of(file)] == [("0", "x"), ("1", "y"), ("2", "z")]


def test_a_prompts_file_with_another_instruction_is_refused(tmp_path: Path) -> None:
    instruction = load_task(TASK).instruction
    records = [{"instruction": text, "input": "x"} for text in (instruction, instruction + " ")]
    with pytest.raises(DataError) as caught:
        prompts_of(write_prompts(tmp_path / "prompts.jsonl", records))
    assert "prompts.jsonl:2" in str(caught.value)
    assert repr(instruction) in str(caught.value) and repr(instruction + " ") in str(caught.value)


def test_a_table_whose_columns_bear_those_names_is_a_table(tmp_path: Path) -> None:
    task = Task.model_validate(
        {"instruction": "Is it so?", "input": "{instruction}|{input}", "label_column": "y", "labels": ["no", "yes"]}
    )
    file = write_csv(tmp_path / "rows.csv", [("do", "this", "yes")], ("instruction", "input", "y"))
    assert [(prompt.input, prompt.label) for prompt in prompts_of(file, task)] == [("do|this", "yes")]


def test_a_prompt_line_holds_the_first_word_of_the_label() -> None:
    labels = [{"label": "no", "words": ["negative", "no"]}, {"label": "yes", "words": ["positive"]}]
    task = Task.model_validate({"instruction": "Is it?", "input": "{text}", "label_column": "y", "labels": labels})
    record = {"id": "1", "instruction": "Is it?", "input": "x", "output": "negative"}
    assert json.loads(prompt_line(Prompt("1", "x", "no", {}), task)) == record


def test_a_prompt_line_is_one_line_of_plain_characters() -> None:
    task = load_task("news_topic_zh")
    line = prompt_line(Prompt("1", "标题：\n", "财经", {}), task)
    assert line == f'{{"id": "1", "instruction": "{task.instruction}", "input": "标题：\\n", "output": "财经"}}\n'
    assert "output" not in json.loads(prompt_line(Prompt("1", "x", None, {}), task))


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("a b", " a\t\n b "),
        ("a b", "a\u3000b"),
        ("ａｂｃ １", "abc 1"),
        ("é", "e\u0301"),
        ("ﬁne", "fine"),
        ("a b", "a\u00a0b"),
    ],
)
def test_texts_that_differ_in_form_alone_have_one_key(one: str, two: str) -> None:
    assert text_key(one) == text_key(two)


@pytest.mark.parametrize(("one", "two"), [("a b", "ab"), ("A", "a"), ("a.", "a"), ("e", "é"), ("", "-")])
def test_texts_that_differ_have_other_keys(one: str, two: str) -> None:
    assert text_key(one) != text_key(two)


def test_duplicates_do_not_depend_on_the_order_of_rows() -> None:
    rows = [
        (b"twice", "10", "1"),
        (b"twice", "9", "1"),
        (b"half", "1", None),
        (b"half", "3", "0"),
        (b"fight", "4", "0"),
        (b"fight", "2", None),
        (b"fight", "5", "1"),
    ]
    for order in itertools.permutations(rows):
        same = find_duplicates(order)
        assert same.kept == {b"twice": ("9", "1"), b"half": ("3", "0")}
        assert same.duplicates == 2
        assert [sorted(group) for group in same.contradictions] == [["2", "4", "5"]]


def test_a_row_alone_is_kept_whether_labelled_or_not() -> None:
    same = find_duplicates([(b"a", "1", None), (b"b", "2", "x")])
    assert same.kept == {b"a": ("1", None), b"b": ("2", "x")}
    assert (same.duplicates, same.contradictions) == (0, [])


def test_of_equal_unlabelled_rows_one_stays() -> None:
    same = find_duplicates([(b"a", "20", None), (b"a", "3", None), (b"a", "100", None)])
    assert (same.kept, same.duplicates) == ({b"a": ("3", None)}, 2)


def test_every_contradicting_group_is_told() -> None:
    rows = [(key, f"{key.decode()}{i}", str(i)) for key in (b"a", b"b") for i in range(3)]
    same = find_duplicates([*rows, (b"c", "c0", "0")])
    assert sorted(map(sorted, same.contradictions)) == [["a0", "a1", "a2"], ["b0", "b1", "b2"]]
    assert same.kept.keys() == {b"c"}


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("0.8,0.1,0.1", (0.8, 0.1, 0.1)),
        ("1,0,0", (1, 0, 0)),
        (" 0.5 , 0.5 , 0 ", (0.5, 0.5, 0)),
        ("0.3333333,0.3333333,0.3333334", (0.3333333, 0.3333333, 0.3333334)),
    ],
)
def test_shares_are_read(text: str, shares: tuple[float, ...]) -> None:
    assert parse_shares(text) == shares


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0.8",
        "0.8,0.2",
        "0.7,0.1,0.1,0.1",
        "0.8,0.1,0.2",
        "0.5,0.1,0.1",
        "80,10,10",
        "1.2,-0.1,-0.1",
        "0.8;0.1;0.1",
        "nan,0.5,0.5",
        "inf,0,0",
        "0.8,0.2,",
        "a,b,c",
    ],
)
def test_wrong_shares_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="three shares that add up to 1") as caught:
        parse_shares(text)
    assert f"--split {text!r}" in str(caught.value)


@pytest.mark.parametrize("shares", [(0.8, 0.1, 0.1), (0.6, 0.2, 0.2), (1 / 3, 1 / 3, 1 / 3), (0.9, 0.1, 0), (0, 0, 1)])
@pytest.mark.parametrize(
    "amounts", [{"0": 50, "1": 50}, {"0": 93, "1": 7}, {"a": 7, "b": 13, "c": 29, None: 11}, {"0": 1}, {"0": 3, "1": 2}]
)
def test_every_key_is_in_one_split_and_every_label_close_to_the_shares(
    amounts: dict[str | None, int], shares: tuple[float, ...]
) -> None:
    strata = keys_of(amounts)
    assigned = split_keys(strata, shares, 42)
    assert assigned.keys() == {key for keys in strata.values() for key in keys}
    for keys in strata.values():
        for count, share in zip(counts_of(assigned, keys), shares, strict=True):
            assert abs(count - share * len(keys)) <= 1
    for count, share in zip(counts_of(assigned, list(assigned)), shares, strict=True):
        assert abs(count - share * len(assigned)) < 1


def test_shares_that_fit_are_met_exactly() -> None:
    strata = keys_of({"0": 50, "1": 30})
    assigned = split_keys(strata, (0.8, 0.1, 0.1), 42)
    assert {label: counts_of(assigned, keys) for label, keys in strata.items()} == {"0": [40, 5, 5], "1": [24, 3, 3]}


def test_the_split_of_a_set_never_drifts_from_its_shares() -> None:
    rng = random.Random(0)
    for _ in range(300):
        strata = keys_of({str(label): rng.randint(0, 25) for label in range(rng.randint(1, 9))})
        weights = [rng.choice([0, 1, 2, 8, rng.random()]) for _ in SPLITS]
        shares = [weight / (sum(weights) or 1) for weight in weights] if sum(weights) else [1.0, 0.0, 0.0]
        assigned = split_keys(strata, shares, rng.randint(0, 9))
        assert len(assigned) == sum(map(len, strata.values()))
        for keys in strata.values():
            counts = counts_of(assigned, keys)
            assert all(abs(c - share * len(keys)) < 2 for c, share in zip(counts, shares, strict=True))
            assert all(count == 0 for count, share in zip(counts, shares, strict=True) if share == 0)
        totals = counts_of(assigned, list(assigned))
        assert all(abs(c - share * len(assigned)) < 1 for c, share in zip(totals, shares, strict=True))


def test_rare_labels_still_fill_every_split() -> None:
    strata = keys_of({f"label {number:02}": 3 for number in range(40)})
    assert counts_of(split_keys(strata, (0.8, 0.1, 0.1), 42), [key for keys in strata.values() for key in keys]) == [
        96,
        12,
        12,
    ]


def test_the_split_is_the_same_for_every_order_of_rows_and_labels() -> None:
    strata = keys_of({"0": 40, "1": 25, None: 12})
    first = split_keys(strata, (0.7, 0.2, 0.1), 42)
    for seed in range(5):
        rng = random.Random(seed)
        labels = list(strata)
        rng.shuffle(labels)
        mixed = {label: rng.sample(strata[label], len(strata[label])) for label in labels}
        assert split_keys(mixed, (0.7, 0.2, 0.1), 42) == first


def test_the_split_is_the_same_on_every_machine() -> None:
    keys = [bytes([number]) * 16 for number in range(10)]
    assert counts_of(split_keys({"x": keys}, (0.5, 0.3, 0.2), 42), keys) == [5, 3, 2]
    assert [split_keys({"x": keys}, (0.5, 0.3, 0.2), 42)[key] for key in keys] == [0, 1, 1, 2, 0, 2, 0, 0, 1, 0]


def test_another_seed_is_another_split_of_the_same_sizes() -> None:
    strata = keys_of({"0": 60, "1": 40})
    splits = [split_keys(strata, (0.6, 0.2, 0.2), seed) for seed in (0, 1, 42, -1, 2**40)]
    assert all(one != other for one, other in itertools.combinations(splits, 2))
    assert all(counts_of(split, list(split)) == [60, 20, 20] for split in splits)


def test_build_prompts_writes_the_three_files_the_task_and_a_report(tmp_path: Path) -> None:
    rows = some_rows(30, 20)
    file, out = write_csv(tmp_path / "rows.csv", rows), tmp_path / "deep" / "prompts"
    build_prompts([file], task=TASK, out=out)
    assert sorted(content_of(out)) == ["report.json", "task.yaml", "test.jsonl", "train.jsonl", "valid.jsonl"]
    assert [path.name for path in out.parent.iterdir()] == ["prompts"]
    assert load_task(out / "task.yaml") == load_task(TASK)
    by_id = {row[0]: row for row in rows}
    found = {}
    for split, zeros, ones in (("train", 24, 16), ("valid", 3, 2), ("test", 3, 2)):
        records = records_of(out, split)
        assert Counter(record["output"] for record in records) == {"0": zeros, "1": ones}
        for record in records:
            _, title, abstract, label = by_id[record["id"]]
            assert list(record) == ["id", "instruction", "input", "output"]
            assert record["instruction"] == load_task(TASK).instruction
            assert record["input"] == f"title:{title},abstract:{abstract}"
            assert record["output"] == label
        found |= {record["id"]: split for record in records}
        assert [record["id"] for record in records] == [row[0] for row in rows if found.get(row[0]) == split]
    assert found.keys() == by_id.keys()


def test_the_report_says_what_was_read_kept_and_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        *((f"a{i}", f"title {i}", "abstract", "0") for i in range(10)),
        *((f"b{i}", f"other {i}", "abstract", "1") for i in range(10)),
        ("dup", "title  ０", "abstract\n", "0"),
        ("late", "other 1", "abstract", ""),
        ("c1", "fight", "x", "0"),
        ("c2", "fight", "x ", "1"),
        ("free", "unlabelled", "x", ""),
    ]
    file = write_csv(tmp_path / "rows.csv", rows)
    report = build_prompts([file], task=TASK, out=tmp_path / "out", split="0.5,0.5,0", seed=7)
    assert json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8")) == report
    assert report["rows_read"] == 25
    assert report["rows_kept"] == 21
    assert report["rows_dropped"] == {"duplicate": 2, "contradicting": 2, "near_duplicate": 0}
    assert [sorted(group) for group in report["contradicting_ids"]] == [["c1", "c2"]]
    assert report["rows_unlabelled"] == 1
    assert (report["split"], report["seed"], report["sources"]) == ([0.5, 0.5, 0], 7, ["rows.csv"])
    assert [report["splits"][split]["rows"] for split in SPLITS] == [
        len(records_of(tmp_path / "out", split)) for split in SPLITS
    ]
    for split in ("train", "valid"):
        records = records_of(tmp_path / "out", split)
        lengths = [len(record["input"]) for record in records]
        found = report["splits"][split]
        assert {label: found["labels"][label] for label in ("0", "1")} == {"0": 5, "1": 5}
        assert found["labels"].get("(none)", 0) == sum("output" not in record for record in records)
        assert found["input_characters"]["max"] == max(lengths)
        assert found["input_characters"]["mean"] == pytest.approx(sum(lengths) / len(lengths), abs=0.05)
    assert report["splits"]["test"] == {"rows": 0, "labels": {"0": 0, "1": 0}, "input_characters": {}}
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "25 rows read, 21 kept; dropped: 2 duplicates, 2 that differ only in their label." in shown.err
    assert "c1, c2" in shown.err


def test_a_split_of_share_0_is_there_and_empty(tmp_path: Path) -> None:
    build_prompts(
        [write_csv(tmp_path / "rows.csv", some_rows(9, 8, 3))], task=TASK, out=tmp_path / "out", split="0,1,0"
    )
    assert (tmp_path / "out" / "train.jsonl").read_bytes() == b""
    assert (tmp_path / "out" / "test.jsonl").read_bytes() == b""
    assert len(records_of(tmp_path / "out", "valid")) == 20
    task = load_task(TASK)
    assert [len(read_split(tmp_path / "out", split, task)) for split in SPLITS] == [0, 20, 0]


def test_unlabelled_rows_go_through_without_output(tmp_path: Path) -> None:
    report = build_prompts([write_csv(tmp_path / "rows.csv", some_rows(10, 10, 10))], task=TASK, out=tmp_path / "out")
    records = [record for split in SPLITS for record in records_of(tmp_path / "out", split)]
    without = [record for record in records if "output" not in record]
    assert len(records) == 30 and len(without) == 10
    assert {record["id"] for record in without} == {f"id{number}" for number in range(20, 30)}
    assert report["rows_unlabelled"] == 10
    prompts = [prompt for split in SPLITS for prompt in read_split(tmp_path / "out", split, load_task(TASK))]
    assert sum(prompt.label is None for prompt in prompts) == 10


@pytest.mark.parametrize(
    "variants",
    [
        ["{} of the heart", "{}  of\tthe\nheart", "{} of the\u3000heart", "{} of the ｈｅａｒｔ"],
        ["{} of the heart", " {} of the heart", "{} of the heart ", "\n{} of the heart\r\n", "{} of the heart\u3000"],
    ],
    ids=["inside", "at the ends of cells"],
)
def test_no_text_stands_in_two_splits(tmp_path: Path, variants: list[str]) -> None:
    rows = [
        (f"{number}-{name}", variant.format(f"title {number}"), "the abstract", str(number % 2) if name < 3 else "")
        for number in range(40)
        for name, variant in enumerate(variants)
    ]
    random.Random(3).shuffle(rows)
    file = write_csv(tmp_path / "rows.csv", rows)
    report = build_prompts([file], task=TASK, out=tmp_path / "out", split="0.4,0.3,0.3")
    records = [record for split in SPLITS for record in records_of(tmp_path / "out", split)]
    assert sorted(record["id"] for record in records) == sorted(f"{number}-0" for number in range(40))
    assert (report["rows_kept"], report["rows_dropped"]["duplicate"]) == (40, len(rows) - 40)


def test_the_labelled_one_of_equal_rows_stays(tmp_path: Path) -> None:
    rows = [*some_rows(5, 5), ("a", "same", "text", ""), ("zzz", "same", "text", "1"), ("b", "same", "text", "")]
    build_prompts([write_csv(tmp_path / "rows.csv", rows)], task=TASK, out=tmp_path / "out")
    kept = [
        r for split in SPLITS for r in records_of(tmp_path / "out", split) if r["input"] == "title:same,abstract:text"
    ]
    assert [(record["id"], record["output"]) for record in kept] == [("zzz", "1")]


def test_a_second_run_gives_the_same_bytes(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "rows.csv", some_rows(33, 21, 6))
    for name in ("one", "two"):
        build_prompts([file], task=TASK, out=tmp_path / name)
    assert content_of(tmp_path / "one") == content_of(tmp_path / "two")


def test_the_order_of_rows_does_not_matter(tmp_path: Path) -> None:
    rows = [*some_rows(40, 25, 8), ("id900", "title 3", "abstract number 3", "0"), ("id901", "title 70", "x", "")]
    build_prompts([write_csv(tmp_path / "rows.csv", rows)], task=TASK, out=tmp_path / "out")
    for seed in range(3):
        mixed = random.Random(seed).sample(rows, len(rows))
        out = tmp_path / f"mixed{seed}"
        build_prompts([write_csv(tmp_path / f"rows{seed}.csv", mixed)], task=TASK, out=out)
        for split in SPLITS:
            assert sorted(map(str, records_of(out, split))) == sorted(map(str, records_of(tmp_path / "out", split)))


def test_rows_without_ids_keep_their_split_in_another_order(tmp_path: Path) -> None:
    rows = [row[1:] for row in some_rows(30, 20)]
    for name, order in (("one", rows), ("two", rows[::-1])):
        file = write_csv(tmp_path / f"{name}.csv", order, COLUMNS[1:])
        build_prompts([file], task=TASK, out=tmp_path / name)
    assert inputs_of(tmp_path / "one") == inputs_of(tmp_path / "two")


def test_the_cut_into_files_does_not_matter(tmp_path: Path) -> None:
    rows = some_rows(20, 20)
    whole = write_csv(tmp_path / "whole.csv", rows)
    parts = [write_csv(tmp_path / "a.csv", rows[:13]), write_csv(tmp_path / "b.csv", rows[13:])]
    build_prompts([whole], task=TASK, out=tmp_path / "one")
    report = build_prompts(parts, task=TASK, out=tmp_path / "two")
    assert report["sources"] == ["a.csv", "b.csv"]
    assert inputs_of(tmp_path / "one") == inputs_of(tmp_path / "two")


def test_another_seed_gives_another_split(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "rows.csv", some_rows(40, 40))
    for seed in (1, 2):
        build_prompts([file], task=TASK, out=tmp_path / str(seed), seed=seed)
    assert inputs_of(tmp_path / "1") != inputs_of(tmp_path / "2")


def test_prompts_can_be_built_from_prompts(tmp_path: Path) -> None:
    build_prompts([write_csv(tmp_path / "rows.csv", some_rows(30, 30, 5))], task=TASK, out=tmp_path / "one")
    files = [tmp_path / "one" / f"{split}.jsonl" for split in SPLITS]
    build_prompts(files, task=TASK, out=tmp_path / "two")
    for split in SPLITS:
        assert sorted(map(str, records_of(tmp_path / "one", split))) == sorted(
            map(str, records_of(tmp_path / "two", split))
        )


def test_rows_in_another_encoding_become_utf_8(tmp_path: Path) -> None:
    rows = [(str(i), f"心脏 {i}", "医学", str(i % 2)) for i in range(10)]
    text = write_csv(tmp_path / "rows.csv", rows).read_text(encoding="utf-8")
    (tmp_path / "rows.csv").write_bytes(text.encode("gb18030"))
    build_prompts([tmp_path / "rows.csv"], task=TASK, out=tmp_path / "out", encoding="gb18030", split="1,0,0")
    assert [r["input"] for r in records_of(tmp_path / "out", "train")] == [
        f"title:心脏 {i},abstract:医学" for i in range(10)
    ]
    assert "心脏" in (tmp_path / "out" / "train.jsonl").read_text(encoding="utf-8")


def test_rows_come_from_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_csv(tmp_path / "rows.csv", some_rows(10, 10))
    build_prompts([file], task=TASK, out=tmp_path / "from-file")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(file.read_bytes()))))
    build_prompts(["-"], task=TASK, out=tmp_path / "from-stdin")
    assert inputs_of(tmp_path / "from-stdin") == inputs_of(tmp_path / "from-file")


def test_labels_of_several_forms_are_one_label(tmp_path: Path) -> None:
    forms = ["1", "1.0", " 1 ", '"1"', "１", "0", "0.0", " 0", "'0'", "０"]
    rows = [(str(number), f"title {number}", "x", form) for number, form in enumerate(forms)]
    build_prompts([write_csv(tmp_path / "rows.csv", rows)], task=TASK, out=tmp_path / "out", split="1,0,0")
    assert [record["output"] for record in records_of(tmp_path / "out", "train")] == ["1"] * 5 + ["0"] * 5


def test_a_place_that_is_taken_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "rows.csv", some_rows(10, 10))
    build_prompts([file], task=TASK, out=tmp_path / "out")
    before = content_of(tmp_path)
    with pytest.raises(ConfigError, match="--overwrite") as caught:
        build_prompts([write_csv(file, some_rows(10, 10))], task=TASK, out=tmp_path / "out", seed=1)
    assert str(tmp_path / "out") in str(caught.value)
    assert content_of(tmp_path) == before


def test_overwrite_replaces_a_prompts_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    build_prompts([write_csv(tmp_path / "old.csv", some_rows(10, 10))], task=TASK, out=out)
    (out / "left-over.txt").write_text("x", encoding="utf-8")
    new = write_csv(tmp_path / "new.csv", [(f"n{number}", f"new {number}", "x", "1") for number in range(4)])
    build_prompts([new], task=TASK, out=out, split="1,0,0", overwrite=True)
    assert [record["id"] for record in records_of(out, "train")] == ["n0", "n1", "n2", "n3"]
    assert sorted(content_of(out)) == ["report.json", "task.yaml", "test.jsonl", "train.jsonl", "valid.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.csv", "old.csv", "out"]


def test_overwrite_takes_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    file = write_csv(tmp_path / "rows.csv", some_rows(10, 10))
    build_prompts([file], task=TASK, out=tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "report.json").is_file()


@pytest.mark.parametrize(
    "content", [{"notes.txt": "mine"}, {"run.json": "{}"}, {"report.json": "{}", "thesis.tex": "years of work"}]
)
def test_overwrite_never_replaces_a_foreign_folder(tmp_path: Path, content: dict[str, str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name, text in content.items():
        (out / name).write_text(text, encoding="utf-8")
    file = write_csv(tmp_path / "rows.csv", some_rows(10, 10))
    before = content_of(tmp_path)
    with pytest.raises(ConfigError, match="is no prompts folder"):
        build_prompts([file], task=TASK, out=out, overwrite=True)
    assert content_of(tmp_path) == before


def test_overwrite_never_replaces_a_file(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "rows.csv", some_rows(10, 10))
    before = content_of(tmp_path)
    with pytest.raises(ConfigError, match="is no prompts folder"):
        build_prompts([file], task=TASK, out=file, overwrite=True)
    assert content_of(tmp_path) == before


def test_a_refusal_with_overwrite_leaves_the_old_folder(tmp_path: Path) -> None:
    build_prompts([write_csv(tmp_path / "rows.csv", some_rows(10, 10))], task=TASK, out=tmp_path / "out")
    bad = write_csv(tmp_path / "bad.csv", [*some_rows(10, 10), ("x", "a", "b", "odd")])
    before = content_of(tmp_path)
    with pytest.raises(LabelError):
        build_prompts([bad], task=TASK, out=tmp_path / "out", overwrite=True)
    assert content_of(tmp_path) == before


LINE = "1,a,b,0\n"
HEADER = ",".join(COLUMNS) + "\n"


@pytest.mark.parametrize(
    ("content", "arguments", "error"),
    [
        pytest.param(HEADER + LINE + "2,c,d,2\n", {}, LabelError, id="unknown label"),
        pytest.param(HEADER + LINE + "1,c,d,1\n", {}, DataError, id="repeated id"),
        pytest.param(HEADER + LINE + "2,c,d\n", {}, DataError, id="ragged row"),
        pytest.param("uuid,title,label\n1,a,0\n", {}, DataError, id="missing column"),
        pytest.param(HEADER, {}, DataError, id="no rows"),
        pytest.param(HEADER + LINE + "2,a,b,1\n", {}, DataError, id="only contradictions"),
        pytest.param("", {}, DataError, id="empty file"),
        pytest.param(HEADER + "1,é,b,0\n", {"encoding": "ascii"}, DataError, id="wrong encoding"),
        pytest.param(HEADER + LINE, {"split": "0.5,0.5"}, ConfigError, id="wrong split"),
        pytest.param(HEADER + LINE, {"task": "no_such_task"}, TemplateError, id="no such task"),
        pytest.param(HEADER + LINE, {"rows": ["rows.csv", "missing.csv"]}, DataError, id="missing file"),
        pytest.param(HEADER + LINE, {"out": "rows.csv/prompts"}, LlmClfError, id="out under a file"),
    ],
)
def test_nothing_is_left_behind_after_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, arguments: dict[str, Any], error: type[LlmClfError]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text(content, encoding="utf-8")
    with pytest.raises(error):
        build_prompts(**{"rows": ["rows.csv"], "task": TASK, "out": "new/prompts", **arguments})
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]
    assert Path("rows.csv").read_text(encoding="utf-8") == content


def test_a_missing_split_of_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no valid\.jsonl"):
        read_split(tmp_path, "valid", load_task(TASK))
