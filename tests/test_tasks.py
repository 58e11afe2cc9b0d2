from pathlib import Path
from typing import Any

import pytest
import yaml

from llm_clf.errors import LabelError, TemplateError
from llm_clf.prompting.tasks import Task, canonical, load_task, shipped_tasks

BINARY: dict[str, Any] = {
    "instruction": "Answer yes or no:",
    "input": "title:{title},abstract:{abstract}",
    "id_column": "id",
    "label_column": "label",
    "cut": "abstract",
    "labels": ["no", "yes"],
}


def write_task(folder: Path, **changes: Any) -> Path:
    """Write the binary task with some keys changed; a key that is None is left out."""
    tree = {key: value for key, value in {**BINARY, **changes}.items() if value is not None}
    file = folder / "task.yaml"
    file.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    return file


def a_task(**changes: Any) -> Task:
    return Task.model_validate({**BINARY, **changes})


def refusal(file: Path | str) -> str:
    with pytest.raises(TemplateError) as caught:
        load_task(file)
    return str(caught.value)


def spanned(task: Task, text: str, column: str | None) -> str:
    start, end = task.cut_span(text, column)
    return text[start:end]


def test_the_tasks_that_ship_load_by_their_names() -> None:
    assert {"medical_paper", "news_topic_zh"} <= shipped_tasks().keys()
    for name, file in shipped_tasks().items():
        assert load_task(name) == load_task(file) == load_task(str(file))


def test_the_medical_paper_prompt_is_the_original_to_the_letter() -> None:
    task = load_task("medical_paper")
    assert task.instruction == (
        "Please judge whether it is a medical field paper according to the given paper title and abstract, "
        "output 1 or 0, the following is the paper title and abstract -->"
    )
    assert task.input == "title:{title},abstract:{abstract}"
    assert task.render({"title": "A, b", "abstract": "C: d.\n"}) == "title:A, b,abstract:C: d.\n"
    assert task.names == ("0", "1")
    assert [task.answer(label) for label in task.names] == ["0", "1"]
    assert (task.id_column, task.label_column, task.cut) == ("uuid", "label", "abstract")
    assert task.columns == ("title", "abstract")


def test_the_chinese_task_has_several_labels_with_words() -> None:
    task = load_task("news_topic_zh")
    assert task.names == ("体育", "财经", "科技", "娱乐", "健康")
    assert task.render({"标题": "球赛", "正文": "二比一"}) == "标题：球赛\n正文：二比一"
    assert task.label_of("医疗") == "健康"
    assert task.answer("健康") == "健康"
    assert all(label.meaning for label in task.labels)


@pytest.mark.parametrize("label", ["0", "1"])
@pytest.mark.parametrize("form", ["{}", "{}.0", "{}.", "{}.000", " {} ", '"{}"', "'{}'", ' "{}.0"\n', "“{}”", '" {} "'])
def test_every_way_of_writing_a_number_is_one_label(form: str, label: str) -> None:
    assert load_task("medical_paper").label_of(form.format(label)) == label


@pytest.mark.parametrize(
    ("text", "label"), [("１", "1"), ("０", "0"), ("１．０", "1"), ("　０　", "0"), ("＂１＂", "1")]
)
def test_full_width_labels_are_known(text: str, label: str) -> None:
    assert load_task("medical_paper").label_of(text) == label


@pytest.mark.parametrize("text", ["", " ", "\t\n", "　"])
def test_an_empty_label_is_no_label(text: str) -> None:
    assert load_task("medical_paper").label_of(text) is None


@pytest.mark.parametrize("text", ["2", "10", "01", "-1", "1.5", "0.1", "1 0", "yes", "1,0", "1.0.0"])
def test_an_unknown_label_is_refused_with_those_that_are_known(text: str) -> None:
    with pytest.raises(LabelError) as caught:
        load_task("medical_paper").label_of(text)
    assert str(caught.value) == f"{text!r} is no label; the labels are 0, 1"


def test_only_whole_numbers_lose_their_decimals() -> None:
    assert [canonical(text) for text in ("1.0", "-3.00", "1.50", "v1.0", "a.0")] == ["1", "-3", "1.50", "v1.0", "a.0"]


def test_yes_and_no_stay_text(tmp_path: Path) -> None:
    file = tmp_path / "task.yaml"
    file.write_text(
        "instruction: Is it?\ninput: '{text}'\nlabel_column: on\nid_column: 1\nlabels: [yes, no]\n", encoding="utf-8"
    )
    task = load_task(file)
    assert task.names == ("yes", "no")
    assert (task.label_column, task.id_column) == ("on", "1")
    assert [task.answer(name) for name in task.names] == ["yes", "no"]
    assert task.label_of("yes") == "yes"


def test_labels_stay_as_they_are_written(tmp_path: Path) -> None:
    file = tmp_path / "task.yaml"
    file.write_text(
        "instruction: Which?\ninput: '{text}'\nlabel_column: label\n"
        "labels: [007, 1e3, null, {label: true, words: [on, 2024-01-01]}]\n",
        encoding="utf-8",
    )
    task = load_task(file)
    assert task.names == ("007", "1e3", "null", "true")
    assert task.labels[3].words == ("on", "2024-01-01")


def test_words_of_a_label_all_mean_it_and_the_first_is_said() -> None:
    task = a_task(labels=[{"label": "neg", "words": ["no", "nein"]}, {"label": "pos", "words": ["yes", "ja"]}])
    assert [task.label_of(text) for text in ("neg", "no", "nein", "pos", "yes", "ja")] == ["neg"] * 3 + ["pos"] * 3
    assert (task.answer("neg"), task.answer("pos")) == ("no", "yes")


def test_a_label_without_words_is_its_own_word() -> None:
    task = a_task(labels=[{"label": "no", "meaning": "it is not"}, "yes"])
    assert [label.words for label in task.labels] == [("no",), ("yes",)]
    assert task.labels[0].meaning == "it is not"


def test_labels_keep_the_order_of_the_task() -> None:
    assert a_task(labels=["z", "a", "m"]).names == ("z", "a", "m")


@pytest.mark.parametrize("written", ["null", "~", "", "''"])
def test_columns_that_are_none_are_none(tmp_path: Path, written: str) -> None:
    file = write_task(tmp_path, id_column=None, cut=None)
    file.write_text(file.read_text(encoding="utf-8") + f"id_column: {written}\ncut: {written}\n", encoding="utf-8")
    assert (load_task(file).id_column, load_task(file).cut) == (None, None)


def test_a_task_file_may_start_with_a_byte_order_mark(tmp_path: Path) -> None:
    file = write_task(tmp_path)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_task(file) == a_task()


def test_render_keeps_braces_of_the_template_and_of_the_row() -> None:
    task = a_task(input="{{{title}}} {{x}} {abstract}", cut="abstract")
    assert task.columns == ("title", "abstract")
    assert task.render({"title": "{abstract}", "abstract": "{0} {{title}} %s"}) == "{{abstract}} {x} {0} {{title}} %s"
    text = task.render({"title": "{abstract}", "abstract": "end}"})
    assert spanned(task, text, "abstract") == "end}"


def test_render_takes_columns_of_any_name_and_ignores_the_others() -> None:
    task = a_task(input="{Paper title} | {标题} | {a.b}", cut="标题")
    cells = {"Paper title": "one", "标题": "二", "a.b": "three", "unused": "four"}
    assert task.render(cells) == "one | 二 | three"


def test_a_column_may_stand_twice() -> None:
    task = a_task(input="{title} {abstract} {title}")
    assert task.columns == ("title", "abstract")
    assert task.render({"title": "t", "abstract": "a"}) == "t a t"


@pytest.mark.parametrize("column", ["title", "abstract"])
@pytest.mark.parametrize(
    "cells",
    [
        {"title": "short", "abstract": "long text"},
        {"title": "", "abstract": ""},
        {"title": "a (b) [c] .* \\d", "abstract": "line\nline\r\nline"},
        {"title": "title:", "abstract": "title:x"},
    ],
)
def test_cut_span_is_the_text_of_the_column(cells: dict[str, str], column: str) -> None:
    task = a_task()
    text = task.render(cells)
    assert spanned(task, text, column) == cells[column]
    start, _ = task.cut_span(text, column)
    assert start == (len("title:") if column == "title" else len("title:" + cells["title"] + ",abstract:"))


def test_cut_span_leaves_what_follows_the_column() -> None:
    task = a_task(input="[{abstract}] by {title}. Answer:")
    text = task.render({"abstract": "it] by him. Answer: that", "title": "them"})
    assert spanned(task, text, "abstract") == "it] by him. Answer: that"
    assert text.endswith("] by them. Answer:")


def test_cut_span_ends_with_the_column_where_another_one_holds_its_name() -> None:
    task = a_task()
    text = task.render({"title": "odd,abstract:title", "abstract": "the abstract"})
    start, end = task.cut_span(text, "abstract")
    assert text[start:end].endswith("the abstract")
    assert end == len(text) and text[:start] == "title:odd,abstract:"


def test_cut_span_takes_all_of_the_column_where_it_holds_its_own_name() -> None:
    task = a_task()
    text = task.render({"title": "plain", "abstract": "first,abstract:second"})
    assert spanned(task, text, "abstract") == "first,abstract:second"


@pytest.mark.parametrize("text", ["", "no template here", "title:x", "x title:a,abstract:b", "Title:a,abstract:b"])
def test_text_that_does_not_follow_the_template_gives_way_whole(text: str) -> None:
    assert a_task().cut_span(text, "abstract") == (0, len(text))


def test_text_gives_way_whole_where_no_column_is_named() -> None:
    text = a_task().render({"title": "a", "abstract": "b"})
    assert a_task().cut_span(text, None) == (0, len(text))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"colour": "red"}, ["colour: there is no such key", "label_column"]),
        ({"instruction": None}, ["instruction: "]),
        ({"input": None}, ["input: "]),
        ({"label_column": None}, ["label_column: "]),
        ({"labels": None}, ["labels: "]),
        ({"instruction": ""}, ["instruction: "]),
        ({"input": "no column at all", "cut": None}, ["input: names no column"]),
        ({"cut": "author"}, ["cut: 'author'", "title, abstract"]),
        ({"input": "{abstract} {title} {abstract}"}, ["cut: 'abstract' must stand once"]),
        ({"input": "{title} {label}", "cut": "title"}, ["{label} is the label column"]),
        ({"input": "{title!r}{abstract}"}, ["input: ", "is no template"]),
        ({"input": "{title:>10}{abstract}"}, ["input: ", "is no template", "{title}"]),
        ({"input": "{title:{abstract}}"}, ["input: ", "is no template"]),
        ({"input": "{}{abstract}"}, ["input: ", "is no template"]),
        ({"input": "{title"}, ["input: '{title' is no template"]),
        ({"input": "title}"}, ["input: 'title}' is no template"]),
        ({"labels": ["yes"]}, ["labels: "]),
        ({"labels": []}, ["labels: "]),
        ({"labels": "yes"}, ["labels: "]),
        ({"labels": ["yes", "no", "yes"]}, ["labels: 'yes' stands for both"]),
        ({"labels": ["1", "1.0"]}, ["labels: '1' stands for both '1' and '1.0'"]),
        ({"labels": ["1", "１"]}, ["labels: '1' stands for both"]),
        ({"labels": ["a", {"label": "b", "words": ["a"]}]}, ["labels: 'a' stands for both 'a' and 'b'"]),
        (
            {"labels": [{"label": "a", "words": ["x", "y"]}, {"label": "b", "words": ["y"]}]},
            ["labels: 'y' stands for both 'a' and 'b'"],
        ),
        ({"labels": ["a", " "]}, ["labels: ' ' has a label or word without any letter"]),
        ({"labels": ["a", '""']}, ["labels: '\"\"' has a label or word without any letter"]),
        ({"labels": ["a", ""]}, ["labels.1"]),
        ({"labels": ["a", {"label": "b", "words": []}]}, ["labels.1.words: "]),
        ({"labels": ["a", {"label": "b", "words": [""]}]}, ["labels.1.words.0: "]),
        ({"labels": ["a", {"label": "b", "words": "b"}]}, ["labels.1.words: "]),
        ({"labels": ["a", {"words": ["b"]}]}, ["labels.1.label: "]),
        ({"labels": ["a", {"label": "b", "sense": "c"}]}, ["labels.1.sense: there is no such key"]),
    ],
)
def test_a_wrong_task_is_refused(tmp_path: Path, changes: dict[str, Any], told: list[str]) -> None:
    file = write_task(tmp_path, **changes)
    message = refusal(file)
    assert message.startswith(f"{file}: the task is wrong:")
    for part in told:
        assert part in message


def test_all_faults_of_a_task_are_told_at_once(tmp_path: Path) -> None:
    message = refusal(write_task(tmp_path, colour="red", instruction="", labels=["one"]))
    assert all(key in message for key in ("colour: ", "instruction: ", "labels: "))


def test_an_unknown_key_of_a_label_names_the_keys_of_a_label(tmp_path: Path) -> None:
    message = refusal(write_task(tmp_path, labels=["a", {"label": "b", "sense": "c"}]))
    assert "meaning" in message and "instruction" not in message


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"labels: [a, b\ninput: x", "is not YAML"),
        (b"a: b: c", "is not YAML"),
        (b"- one\n- two\n", "found list"),
        (b"just text", "found str"),
        (b"", "found NoneType"),
        ("instruction: é".encode("latin-1"), "cannot be read"),
    ],
)
def test_a_file_that_is_no_task_is_refused(tmp_path: Path, content: bytes, told: str) -> None:
    file = tmp_path / "task.yaml"
    file.write_bytes(content)
    message = refusal(file)
    assert message.startswith(f"{file}: ") and told in message


@pytest.mark.parametrize("name", ["no_such_task", "prompts/no_such_task.yaml", ""])
def test_an_unknown_task_lists_those_that_ship(name: str) -> None:
    message = refusal(name)
    assert f"--task {name!r}" in message or name == ""
    assert all(shipped in message for shipped in shipped_tasks())


def test_a_folder_is_no_task(tmp_path: Path) -> None:
    assert "is no file" in refusal(tmp_path)


@pytest.mark.parametrize(
    "task",
    [
        *(load_task(name) for name in shipped_tasks()),
        a_task(),
        a_task(id_column=None, cut=None),
        a_task(instruction="a: b # c\n- 'd' \"e\"\n\n  f\t", input=" {title}\n\n{abstract} : {{x}} "),
        a_task(labels=["yes", "no", "007", "1e3", "null", "2024-01-01", "心", "- a", "#"]),
        a_task(labels=[{"label": "a", "words": [" a1", "on"], "meaning": "x: y"}, {"label": "b", "words": ["off"]}]),
    ],
    ids=lambda task: task.input,
)
def test_a_saved_task_loads_as_it_was(tmp_path: Path, task: Task) -> None:
    file = tmp_path / "saved.yaml"
    task.save(file)
    loaded = load_task(file)
    assert loaded == task
    assert loaded.model_dump() == task.model_dump()
    assert list(tmp_path.iterdir()) == [file]
