"""Near-duplicates across splits: altered rows are found in any script, and nothing else changes."""

import json
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

import llm_clf
from llm_clf.cli import app
from llm_clf.errors import ConfigError
from llm_clf.prompting.near_duplicates import CROWD, THRESHOLD, find_near_duplicates, word_pairs

ENGLISH = [f"word{number}" for number in range(3_000)]
CHINESE = [chr(0x4E00 + number) for number in range(3_000)]


def make_text(vocabulary: list[str], length: int, seed: int) -> list[str]:
    return random.Random(seed).choices(vocabulary, k=length)


def alter(words: list[str], share: float, vocabulary: list[str], seed: int) -> list[str]:
    draw, changed = random.Random(seed), list(words)
    for place in draw.sample(range(len(words)), round(share * len(words))):
        changed[place] = draw.choice(vocabulary)
    return changed


def jaccard(one: str, other: str) -> float:
    a, b = set(word_pairs(one)), set(word_pairs(other))
    return len(a & b) / len(a | b)


def test_pairs_of_words_know_no_case_no_marks_and_no_unicode_form() -> None:
    assert word_pairs("The  cat, sat.") == [b"the cat", b"cat sat"] == word_pairs("ＴＨＥ (cat) SAT")
    assert word_pairs("心脏病") == ["心 脏".encode(), "脏 病".encode()]
    assert word_pairs("用PEFT训练") == ["用 peft".encode(), "peft 训".encode(), "训 练".encode()]
    assert word_pairs("one") == [b"one"] and word_pairs(" . ") == [] == word_pairs("")


@pytest.mark.parametrize(("vocabulary", "between"), [(ENGLISH, " "), (CHINESE, "")])
def test_altered_rows_are_found_and_others_are_not(vocabulary: list[str], between: str) -> None:
    held = [make_text(vocabulary, 120, seed) for seed in range(40)]
    rows = [(1 + number % 2, f"held{number}", between.join(words)) for number, words in enumerate(held)]
    for number, words in enumerate(held):
        rows.append((0, f"near{number}", between.join(alter(words, 0.08, vocabulary, number))))
        rows.append((0, f"part{number}", between.join(words[: int(0.8 * len(words))])))
        rows.append((0, f"far{number}", between.join(alter(words, 0.5, vocabulary, number))))
        rows.append((0, f"else{number}", between.join(make_text(vocabulary, 120, 1000 + number))))
    found = find_near_duplicates(rows)
    expected = {(f"{kind}{number}", f"held{number}") for kind in ("near", "part") for number in range(40)}
    pairs = {(one.id, one.other_id) for one in found}
    assert pairs <= expected and len(pairs) >= 0.95 * len(expected)
    text = {row_id: words for _, row_id, words in rows}
    for one in found:
        assert one.similarity >= THRESHOLD and one.split == 0 and one.other_split in (1, 2)
        assert abs(one.similarity - jaccard(text[one.id], text[one.other_id])) < 0.2


def test_only_other_splits_count_and_the_order_of_rows_does_not() -> None:
    words = make_text(ENGLISH, 60, 1)
    rows = [(split, f"{split}{n}", " ".join([*words, "end", f"x{split}{n}"])) for split in (0, 1, 2) for n in range(2)]
    found = find_near_duplicates(rows)
    assert [(one.split, one.other_split) for one in found].count((1, 2)) == 2
    assert sorted(one.id for one in found) == ["00", "01", "10", "11"]
    assert {one.id for one in find_near_duplicates(rows[::-1])} == {one.id for one in found}
    assert find_near_duplicates([row for row in rows if row[0] == 0]) == []
    assert find_near_duplicates([(0, "a", "..."), (2, "b", "!")]) == find_near_duplicates([]) == []


def test_a_crowd_of_like_rows_is_found_without_comparing_all() -> None:
    words = " ".join(make_text(ENGLISH, 60, 1))
    rows = [(2, f"t{number}", f"{words} order {number}") for number in range(3 * CROWD)]
    rows += [(0, f"r{number}", f"{words} order {number + 10_000}") for number in range(3 * CROWD)]
    assert len(find_near_duplicates(rows)) == 3 * CROWD


def write_rows(file: Path, extra: list[tuple[str, str]]) -> Path:
    """Write 60 different rows, and others as `(id, text)`."""
    own = [(f"r{number}", " ".join(make_text(ENGLISH, 40, number))) for number in range(60)]
    with open(file, "w", encoding="utf-8") as lines:
        for number, (row_id, text) in enumerate([*own, *extra]):
            row = {"uuid": row_id, "title": f"t{number}", "abstract": text, "label": str(number % 2)}
            lines.write(json.dumps(row) + "\n")
    return file


def build(rows: Path, task: Path, out: Path, **options: str) -> dict[str, list[dict[str, str]]]:
    llm_clf.build_prompts(rows, task=task, out=out, split="0.6,0.2,0.2", **options)  # type: ignore[arg-type]
    return {
        split: [json.loads(line) for line in (out / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        for split in ("train", "valid", "test")
    }


def test_where_there_are_none_the_option_changes_no_byte(short_task: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [])
    for option in ("warn", "drop", "ignore"):
        build(rows, short_task, tmp_path / option, near_duplicates=option)
    for name in ("train.jsonl", "valid.jsonl", "test.jsonl", "task.yaml", "report.json"):
        content = (tmp_path / "warn" / name).read_bytes()
        assert content == (tmp_path / "drop" / name).read_bytes()
        assert name == "report.json" or content == (tmp_path / "ignore" / name).read_bytes()
    report = json.loads((tmp_path / "warn" / "report.json").read_text())
    assert report["near_duplicates"] == {"threshold": THRESHOLD, "rows": {"train": 0, "valid": 0}, "pairs": []}
    assert json.loads((tmp_path / "ignore" / "report.json").read_text())["near_duplicates"] is None


def test_drop_takes_training_rows_only_and_leaves_all_others_where_they_are(short_task: Path, tmp_path: Path) -> None:
    copies = [(f"copy{n}", " ".join([*make_text(ENGLISH, 40, n), "again"])) for n in range(60)]
    rows = write_rows(tmp_path / "rows.jsonl", copies)
    words = ["build-prompts", str(rows), "--task", str(short_task), "--split", "0.6,0.2,0.2", "--out"]
    warned = CliRunner().invoke(app, [*words, str(tmp_path / "warn")])
    shown = CliRunner().invoke(app, [*words, str(tmp_path / "drop"), "--near-duplicates", "drop"])
    before, after = (
        {
            split: (tmp_path / name / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
            for split in ("train", "valid", "test")
        }
        for name in ("warn", "drop")
    )
    assert (before["valid"], before["test"]) == (after["valid"], after["test"])
    kept = [line for line in before["train"] if line in set(after["train"])]
    assert kept == after["train"]
    held = {json.loads(line)["id"].replace("copy", "r") for split in ("valid", "test") for line in before[split]}
    near = {row["id"] for row in map(json.loads, before["train"]) if row["id"].replace("copy", "r") in held}
    dropped = {json.loads(line)["id"] for line in before["train"]} - {json.loads(line)["id"] for line in kept}
    assert len(near) > 10 and dropped == near

    report = json.loads((tmp_path / "drop" / "report.json").read_text())
    assert report["rows_dropped"] == {"duplicate": 0, "contradicting": 0, "near_duplicate": len(near)}
    assert (report["rows_read"], report["rows_kept"]) == (120, 120 - len(near))
    assert report["splits"]["train"]["rows"] == len(kept) and report["near_duplicates"]["rows"]["train"] == len(near)
    assert f"Dropped from the training rows: {len(near)} that are nearly the same" in shown.stderr
    assert f"Warning: {len(near)} training rows are nearly the same as a validation or test row" in warned.stderr
    assert "alike" in warned.stderr and "--near-duplicates drop" in warned.stderr
    assert json.loads((tmp_path / "warn" / "report.json").read_text())["rows_dropped"]["near_duplicate"] == 0


def test_the_words_of_the_template_make_no_rows_alike(tmp_path: Path) -> None:
    task = tmp_path / "task.yaml"
    task.write_text(
        'instruction: "?"\ninput: "What all rows have in common says nothing: {title}. And this neither: {abstract}"\n'
        "id_column: uuid\nlabel_column: label\nlabels: ['0', '1']\n"
    )
    rows = tmp_path / "rows.jsonl"
    with open(rows, "w", encoding="utf-8") as lines:
        for number in range(40):
            row = {"uuid": f"s{number}", "title": f"a{number}", "abstract": f"b{number}", "label": str(number % 2)}
            lines.write(json.dumps(row) + "\n")
    build(rows, task, tmp_path / "first")
    build(tmp_path / "first" / "train.jsonl", task, tmp_path / "again")
    for name in ("first", "again"):
        report = json.loads((tmp_path / name / "report.json").read_text())
        assert report["near_duplicates"]["rows"] == {"train": 0, "valid": 0}


def test_an_unknown_word_is_refused(short_task: Path, many_rows: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--near-duplicates 'keep': allowed are warn, drop, ignore"):
        llm_clf.build_prompts(many_rows, task=short_task, out=tmp_path / "p", near_duplicates="keep")  # type: ignore[arg-type]
    assert not (tmp_path / "p").exists()
