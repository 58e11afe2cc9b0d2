"""Bad input as a new user would give it: exit code 2, one message that says what to do, and nothing half-written."""

import contextlib
import gzip
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import skops.io
import torch
import yaml
from conftest import ROWS, SHORT_TASK, byte_tokenizer, tiny_model
from filelock import FileLock
from safetensors.torch import load_file, save_file

import llm_clf
from llm_clf import cli
from llm_clf.files import file_hash, partial_name

FAST = ["train.epochs=1", "train.batch_size=8", "data.max_length=96", "model.dtype=fp32", "lora.dropout=0"]
SETTINGS = [word for setting in FAST for word in ("--set", setting)]
CSV = "uuid,title,abstract,label\n" + "".join(",".join(row.values()) + "\n" for row in ROWS).replace(
    "asthma, a", "asthma a"
)


@dataclass(frozen=True)
class Place:
    """A folder of a user: rows, a task, prompts, and a run that was trained on them."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def path(self, name: str) -> Path:
        return self.folder / name

    def write(self, name: str, content: str | bytes) -> Path:
        file = self.path(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return file

    def edit_json(self, name: str, **changes: object) -> None:
        value = json.loads(self.path(name).read_text()) | changes
        self.write(name, json.dumps({key: item for key, item in value.items() if item is not None}))

    def edit_config(self, section: str, **changes: object) -> None:
        config = yaml.safe_load(self.path("run/config.yaml").read_text())
        config[section] |= changes
        self.write("run/config.yaml", yaml.safe_dump(config))

    def command(self, *words: object) -> tuple[int, str, str]:
        """Return exit code, standard output and standard error of a command."""
        self.monkeypatch.setattr(sys, "argv", ["llm-clf", *map(str, words)])
        self.capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 1
        out, err = self.capsys.readouterr()
        return code, out, err

    def build(self, *words: object) -> tuple[object, ...]:
        return ("build-prompts", *words, "--task", "task.yaml", "--out", "new")

    def finetune(self, *words: object) -> tuple[object, ...]:
        return ("finetune", "prompts", "--model", "base", "--out", "new", *SETTINGS, *words)

    def predict(self, *words: object) -> tuple[object, ...]:
        return ("predict", "run", *(words or ("rows.csv",)), "--out", "new.csv")

    def stdin(self, content: bytes) -> None:
        self.monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(content))))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """Make the folder once; every test gets a copy."""
    folder = tmp_path_factory.mktemp("made")
    words = {"1": ["heart", "lung", "fever", "dose"], "0": ["steel", "star", "court", "bridge"]}
    lines = [f"r{i},{words[str(i % 2)][i // 2 % 4]},text {i},{i % 2}\n" for i in range(24)]
    (folder / "many.csv").write_text("uuid,title,abstract,label\n" + "".join(lines))
    (folder / "rows.csv").write_text(CSV)
    (folder / "task.yaml").write_text(SHORT_TASK)
    shutil.copytree(base, folder / "base")
    with contextlib.chdir(folder):
        llm_clf.build_prompts(["many.csv"], task="task.yaml", out="prompts", split="0.5,0.25,0.25")
        llm_clf.finetune("prompts", out="run", model="base", set=FAST)
        llm_clf.baseline_tfidf("prompts", out="tfidf")
        llm_clf.predict("run", ["rows.csv"], out="predictions.csv")
    shutil.copytree(folder / "run" / "adapter", folder / "adapter")
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    folder = tmp_path / "place"
    shutil.copytree(made, folder)
    # The run names its base by the place where it was when it was trained.
    config = yaml.safe_load((folder / "run" / "config.yaml").read_text())
    config["model"]["name"] = str(folder / "base")
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(folder)
    return Place(folder, monkeypatch, capsys)


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {
        str(file.relative_to(folder)): file.read_bytes() if file.is_file() else None
        for file in sorted(folder.rglob("*"))
    }


def refused(place: Place, words: tuple[object, ...], *telling: str) -> str:
    """Run a command, assert that it is refused as it should be, and return its message."""
    before = snapshot(place.folder)
    code, out, err = place.command(*words)
    assert code == 2, (code, out, err)
    assert out == ""
    assert err.count("error: ") == 1 and "Traceback" not in err, err
    # Above the message there is nothing but the plain lines that tell what is going on.
    notes, _, message = err.partition("error: ")
    assert all(
        line.startswith(("Base ", "Note: ", "base", "12 training rows", "Going on", "run:"))
        for line in notes.splitlines()
    ), notes
    for word in telling:
        assert word in message, (word, message)
    after = snapshot(place.folder)
    assert after.keys() == before.keys() and after == before
    return message


Prepare = Callable[[Place], tuple[object, ...]]
KINDS: dict[str, tuple[Prepare, tuple[str, ...]]] = {}


def kind(name: str, *telling: str) -> Callable[[Prepare], Prepare]:
    """Register a kind of bad input: a function that makes it and returns the command."""

    def register(prepare: Prepare) -> Prepare:
        assert name not in KINDS
        KINDS[name] = (prepare, telling)
        return prepare

    return register


# --- rows -------------------------------------------------------------------------------------------------------------


@kind("rows that are absent", "nowhere.csv", "there is no such file")
def _(place: Place) -> tuple[object, ...]:
    return place.build("nowhere.csv")


@kind("rows that are absent, in predict", "nowhere.csv", "there is no such file")
def _(place: Place) -> tuple[object, ...]:
    return place.predict("nowhere.csv")


@kind("an empty file of rows", "empty.csv: is empty", "must name the columns")
def _(place: Place) -> tuple[object, ...]:
    return place.build(place.write("empty.csv", b""))


@kind("a header without rows", "header.csv", "no row is left")
def _(place: Place) -> tuple[object, ...]:
    return place.build(place.write("header.csv", CSV.splitlines()[0] + "\n"))


@kind("a header without rows, in predict", "ROWS", "no row", "Give some")
def _(place: Place) -> tuple[object, ...]:
    return place.predict(place.write("header.csv", CSV.splitlines()[0] + "\n"))


@kind("binary rows", "rows.csv", "is not utf-8", "--encoding")
def _(place: Place) -> tuple[object, ...]:
    return place.build(place.write("rows.csv", bytes(range(256)) * 40))


@kind("rows in another encoding", "rows.csv", "is not utf-8", "--encoding gb18030")
def _(place: Place) -> tuple[object, ...]:
    return place.predict(place.write("rows.csv", CSV.replace("Heart", "心脏").encode("gb18030")))


@kind("an encoding that there is not", "--encoding 'klingon'", "no such encoding", "utf-8")
def _(place: Place) -> tuple[object, ...]:
    return (*place.build("rows.csv"), "--encoding", "klingon")


@kind("gzip that is cut off", "rows.csv.gz", "damaged or cut off", "Compress it again")
def _(place: Place) -> tuple[object, ...]:
    return place.build(place.write("rows.csv.gz", gzip.compress(CSV.encode())[:-20]))


@kind("gzip that is none", "rows.csv.gz", "damaged or cut off")
def _(place: Place) -> tuple[object, ...]:
    return place.predict(place.write("rows.csv.gz", CSV))


@kind("a broken line of JSON", "rows.jsonl:3: is not JSON", "one object")
def _(place: Place) -> tuple[object, ...]:
    lines = [json.dumps(row) for row in ROWS]
    lines[2] = lines[2][:-9]
    return place.build(place.write("rows.jsonl", "\n".join(lines)))


@kind("a line of JSON that is no object", "rows.jsonl:2: found list, expected an object")
def _(place: Place) -> tuple[object, ...]:
    return place.predict(place.write("rows.jsonl", json.dumps(ROWS[0]) + "\n[1, 2]\n"))


@kind("JSON that is no array", "rows.json: found dict, expected an array")
def _(place: Place) -> tuple[object, ...]:
    return place.build(place.write("rows.json", json.dumps(ROWS[0])))


@kind("JSON nested too deep", "rows.jsonl:1: is not JSON")
def _(place: Place) -> tuple[object, ...]:
    return place.build(place.write("rows.jsonl", "[" * 100_000))


@kind("a ragged CSV", "rows.csv:4: found 5 cells, the header has 4", "Quote cells")
def _(place: Place) -> tuple[object, ...]:
    lines = CSV.splitlines()
    lines[3] += ",more"
    return place.build(place.write("rows.csv", "\n".join(lines)))


@kind("a CSV quote that never ends", "rows.csv:3: is not well-formed CSV")
def _(place: Place) -> tuple[object, ...]:
    return place.build(place.write("rows.csv", CSV.replace("b,Bridge", 'b,"Bridge')))


@kind("two columns of one name", "rows.csv", "'title' more than once", "Rename")
def _(place: Place) -> tuple[object, ...]:
    return place.build(place.write("rows.csv", CSV.replace("abstract", "title", 1)))


@kind("ten thousand columns of one name", "rows.csv", "more than once", "and 9970 more")
def _(place: Place) -> tuple[object, ...]:
    return place.build(place.write("rows.csv", ",".join(f"c{i % 10_000}" for i in range(20_000)) + "\n"))


@kind("ten thousand columns without the task's", "rows.csv:2", "'title', 'abstract'", "and 9970 more")
def _(place: Place) -> tuple[object, ...]:
    row = ",".join(["x"] * 10_000) + "\n"
    return place.predict(place.write("rows.csv", ",".join(f"c{i}" for i in range(10_000)) + "\n" + row * 20))


@kind("Parquet that is cut off", "rows.parquet: is not a whole Parquet file")
def _(place: Place) -> tuple[object, ...]:
    pq.write_table(pa.Table.from_pylist(ROWS), place.path("rows.parquet"))
    return place.build(place.write("rows.parquet", place.path("rows.parquet").read_bytes()[:-30]))


@kind("a folder for a file of rows", "prompts: is a folder; give a file that ends in .csv")
def _(place: Place) -> tuple[object, ...]:
    return place.predict("prompts")


@kind("a spreadsheet", "rows.xlsx", "found the ending '.xlsx'", ".parquet")
def _(place: Place) -> tuple[object, ...]:
    return place.build(place.write("rows.xlsx", b"PK\x03\x04"))


@kind("a pipe with a name", "rows.csv: is a pipe", "standard input (-)")
def _(place: Place) -> tuple[object, ...]:
    place.path("rows.csv").unlink()
    os.mkfifo(place.path("rows.csv"))
    return place.build("rows.csv")


@kind("a link that leads nowhere", "link.csv: there is no such file")
def _(place: Place) -> tuple[object, ...]:
    place.path("link.csv").symlink_to("link.csv")
    return place.build("link.csv")


@kind("a file below a file", "rows.csv/more.csv: there is no such file")
def _(place: Place) -> tuple[object, ...]:
    return place.predict("rows.csv/more.csv")


@kind("a name that is too long", "too long")
def _(place: Place) -> tuple[object, ...]:
    return place.build("x" * 300 + ".csv")


@kind("the same rows twice", "rows.csv: is given twice", "Give each file of rows once")
def _(place: Place) -> tuple[object, ...]:
    return place.build("rows.csv", place.path("rows.csv"))


@kind("the same rows twice, in predict", "rows.csv: is given twice")
def _(place: Place) -> tuple[object, ...]:
    return ("predict", "run", "rows.csv", "./rows.csv", "--out", "new.csv")


@kind("standard input twice", "standard input: is given twice")
def _(place: Place) -> tuple[object, ...]:
    place.stdin(CSV.encode())
    return place.build("-", "-")


@kind("an id that stands twice", "again.csv:2: the id 'a' stands twice", "make them unique")
def _(place: Place) -> tuple[object, ...]:
    return place.build("rows.csv", place.write("again.csv", "\n".join(CSV.splitlines()[:2])))


@kind("labels that the task does not know", "2 rows have a label", "rows.csv:2: 'medical' is no label", "0, 1", "Mend")
def _(place: Place) -> tuple[object, ...]:
    text = CSV.replace("surgery.,1", "surgery.,medical").replace("load.,0", "load.,bridge")
    return place.build(place.write("rows.csv", text))


@kind("labels that the run does not know", "rows.csv:2: 'medical' is no label", "the labels are 0, 1")
def _(place: Place) -> tuple[object, ...]:
    return place.predict(place.write("rows.csv", CSV.replace("surgery.,1", "surgery.,medical")))


@kind("a column of the template that is not there", "rows.csv:2: the task needs the columns 'abstract'", "'body'")
def _(place: Place) -> tuple[object, ...]:
    return place.build(place.write("rows.csv", CSV.replace("abstract", "body", 1)))


@kind("rows that all contradict each other", "rows.csv", "no row is left")
def _(place: Place) -> tuple[object, ...]:
    return place.build(place.write("rows.csv", "uuid,title,abstract,label\na,x,y,1\nb,x,y,0\n"))


@kind("standard input that is empty", "standard input: is empty", "must name the columns")
def _(place: Place) -> tuple[object, ...]:
    place.stdin(b"")
    return place.build("-")


@kind("standard input with a broken line", "standard input:2: is not JSON")
def _(place: Place) -> tuple[object, ...]:
    place.stdin(json.dumps(ROWS[0]).encode() + b'\n{"uuid": \n')
    return place.predict("-")


@kind("gzip on standard input that is cut off", "standard input: the gzip data is damaged")
def _(place: Place) -> tuple[object, ...]:
    place.stdin(gzip.compress(CSV.encode())[:-20])
    return place.build("-")


@kind("Parquet on standard input that is cut off", "standard input: is not a whole Parquet file")
def _(place: Place) -> tuple[object, ...]:
    place.stdin(b"PAR1" + b"\0" * 100)
    return place.build("-")


@kind("standard input that is closed", "standard input: is closed", "give a file")
def _(place: Place) -> tuple[object, ...]:
    place.monkeypatch.setattr(sys, "stdin", None)
    return place.build("-")


# --- tasks ------------------------------------------------------------------------------------------------------------


@kind("a task that there is not", "--task 'nothing'", "medical_paper")
def _(place: Place) -> tuple[object, ...]:
    return ("build-prompts", "rows.csv", "--task", "nothing", "--out", "new")


@kind("an instruction for a task", "'Is this", "cannot be a file or folder")
def _(place: Place) -> tuple[object, ...]:
    return ("build-prompts", "rows.csv", "--task", "Is this paper medical? " * 30, "--out", "new")


@kind("a folder for a task", "--task 'prompts'", "is no file")
def _(place: Place) -> tuple[object, ...]:
    return ("build-prompts", "rows.csv", "--task", "prompts", "--out", "new")


@kind("an empty task", "task.yaml: expected the keys instruction, input", "found NoneType")
def _(place: Place) -> tuple[object, ...]:
    place.write("task.yaml", "")
    return place.build("rows.csv")


@kind("a task that is no YAML", "task.yaml: is not YAML", "line 2")
def _(place: Place) -> tuple[object, ...]:
    place.write("task.yaml", "labels: [0, 1\ninput: {")
    return place.build("rows.csv")


@kind("a binary task", "task.yaml: cannot be read")
def _(place: Place) -> tuple[object, ...]:
    place.write("task.yaml", b"\xff\xfe\x00\x81")
    return place.build("rows.csv")


@kind("a task with an unknown key", "labels_column: there is no such key; known are instruction", "label_column")
def _(place: Place) -> tuple[object, ...]:
    place.write("task.yaml", SHORT_TASK.replace("label_column", "labels_column"))
    return place.build("rows.csv")


@kind("a task with one label", "task.yaml", "labels", "at least 2")
def _(place: Place) -> tuple[object, ...]:
    place.write("task.yaml", SHORT_TASK.replace('["0", "1"]', '["1"]'))
    return place.build("rows.csv")


@kind("a task with one word for two labels", "'yes' stands for both")
def _(place: Place) -> tuple[object, ...]:
    labels = "[{label: a, words: [yes]}, {label: b, words: [no, yes]}]"
    place.write("task.yaml", SHORT_TASK.replace('["0", "1"]', labels))
    return place.build("rows.csv")


@kind("a template without columns", "names no column", "{column}")
def _(place: Place) -> tuple[object, ...]:
    place.write("task.yaml", SHORT_TASK.replace("{title}:{abstract}", "text"))
    return place.build("rows.csv")


@kind("a template with an open brace", "is no template")
def _(place: Place) -> tuple[object, ...]:
    place.write("task.yaml", SHORT_TASK.replace("{abstract}", "{abstract"))
    return place.build("rows.csv")


@kind("a template with the answer in it", "{label} is the label column")
def _(place: Place) -> tuple[object, ...]:
    place.write("task.yaml", SHORT_TASK.replace("{abstract}", "{abstract}{label}"))
    return place.build("rows.csv")


@kind("a cut column that the template does not have", "cut: 'body' must stand once in input", "title, abstract")
def _(place: Place) -> tuple[object, ...]:
    place.write("task.yaml", SHORT_TASK.replace("cut: abstract", "cut: body"))
    return place.build("rows.csv")


# --- build-prompts: arguments and places ------------------------------------------------------------------------------


@kind("shares that do not add up", "--split '0.8,0.1,0.2'", "add up to 1")
def _(place: Place) -> tuple[object, ...]:
    return (*place.build("rows.csv"), "--split", "0.8,0.1,0.2")


@kind("shares that are no numbers", "--split 'most,some,few'", "0.8,0.1,0.1")
def _(place: Place) -> tuple[object, ...]:
    return (*place.build("rows.csv"), "--split", "most,some,few")


@kind("a negative seed", "--seed -1", "from 0")
def _(place: Place) -> tuple[object, ...]:
    return (*place.build("rows.csv"), "--seed", "-1")


@kind("prompts onto prompts", "prompts: something is already there", "--overwrite")
def _(place: Place) -> tuple[object, ...]:
    return ("build-prompts", "rows.csv", "--task", "task.yaml", "--out", "prompts")


@kind("prompts onto a run", "run: is no prompts folder, so --overwrite leaves it alone")
def _(place: Place) -> tuple[object, ...]:
    return ("build-prompts", "rows.csv", "--task", "task.yaml", "--out", "run", "--overwrite")


@kind("prompts onto a file", "rows.csv: is no prompts folder")
def _(place: Place) -> tuple[object, ...]:
    return ("build-prompts", "many.csv", "--task", "task.yaml", "--out", "rows.csv", "--overwrite")


@kind("prompts onto those that they are made from", "--out prompts: holds the input prompts/test.jsonl")
def _(place: Place) -> tuple[object, ...]:
    return ("build-prompts", "prompts/test.jsonl", "--task", "task.yaml", "--out", "prompts", "--overwrite")


@kind("prompts below a file", "rows.csv/new: cannot be written", "another --out")
def _(place: Place) -> tuple[object, ...]:
    return ("build-prompts", "many.csv", "--task", "task.yaml", "--out", "rows.csv/new")


@kind("prompts without a name", "--out '.'", "output/NAME")
def _(place: Place) -> tuple[object, ...]:
    return ("build-prompts", "rows.csv", "--task", "task.yaml", "--out", ".", "--overwrite")


@kind("prompts of another instruction", "prompts/test.jsonl:1: the instruction is 'Medical?", "'Which?'", "build the")
def _(place: Place) -> tuple[object, ...]:
    place.write("task.yaml", SHORT_TASK.replace("Medical? 1 or 0", "Which?"))
    return place.build("prompts/test.jsonl")


# --- settings ---------------------------------------------------------------------------------------------------------


@kind("a settings file that is absent", "nowhere.yaml: settings cannot be read", "--config")
def _(place: Place) -> tuple[object, ...]:
    return place.finetune("--config", "nowhere.yaml")


@kind("settings that are no YAML", "config.yaml: is not YAML", "line 1")
def _(place: Place) -> tuple[object, ...]:
    return place.finetune("--config", place.write("config.yaml", "train: {epochs: 3"))


@kind("settings that are a list", "config.yaml: found list, expected sections such as `train:`")
def _(place: Place) -> tuple[object, ...]:
    return place.finetune("--config", place.write("config.yaml", "- train\n"))


@kind("YAML nested too deep", "config.yaml: is not YAML")
def _(place: Place) -> tuple[object, ...]:
    return place.finetune("--config", place.write("config.yaml", "[" * 2_000))


@kind("an unknown setting", "train.epoch: there is no such setting; did you mean train.epochs?")
def _(place: Place) -> tuple[object, ...]:
    return place.finetune("--set", "train.epoch=3")


@kind("a setting of the wrong type", "train.epochs: found 'many'", "integer")
def _(place: Place) -> tuple[object, ...]:
    return place.finetune("--set", "train.epochs=many")


@kind("a setting out of range", "lora.dropout: found 1.5", "less than 1")
def _(place: Place) -> tuple[object, ...]:
    return place.finetune("--set", "lora.dropout=1.5")


@kind("several wrong settings at once", "lora.r: found 0", "train.seed: found -1", "train.metric: found 'best'")
def _(place: Place) -> tuple[object, ...]:
    return place.finetune("--set", "lora.r=0", "--set", "train.seed=-1", "--set", "train.metric=best")


@kind("a seed that is too large", "train.seed: found 1000000000000000000000")
def _(place: Place) -> tuple[object, ...]:
    return place.finetune("--set", f"train.seed={10**21}")


@kind("a setting without a value", "--set 'lora.r'", "SECTION.KEY=VALUE")
def _(place: Place) -> tuple[object, ...]:
    return place.finetune("--set", "lora.r")


@kind("a column to cut that there is not", "data.cut: 'body' is no column", "title, abstract")
def _(place: Place) -> tuple[object, ...]:
    return place.finetune("--set", "data.cut=body")


@kind("a weight of a label that there is not", "train.class_weights: '2' is no label", "0, 1")
def _(place: Place) -> tuple[object, ...]:
    return place.finetune("--set", "train.class_weights={2: 5}")


@kind("modules that the base does not have", "lora.target_modules 'query_key'", "linear layers are", "q_proj")
def _(place: Place) -> tuple[object, ...]:
    return place.finetune("--set", "lora.target_modules=query_key")


@kind("modules that are no regular expression", "lora.target_modules '('", "q_proj")
def _(place: Place) -> tuple[object, ...]:
    return place.finetune("--set", "lora.target_modules=(")


@kind("a length that leaves no room", "data.max_length 16", "instruction", "Raise it")
def _(place: Place) -> tuple[object, ...]:
    return place.finetune("--set", "data.max_length=16")


@kind("a learning rate that is too high", "not", "number", "ower train.learning_rate")
def _(place: Place) -> tuple[object, ...]:
    return place.finetune("--set", "train.learning_rate=1e30", "--set", "train.epochs=9")


# --- finetune: prompts, bases and places ------------------------------------------------------------------------------


@kind("prompts that are absent", "nowhere: has no task.yaml", "build-prompts")
def _(place: Place) -> tuple[object, ...]:
    return ("finetune", "nowhere", "--model", "base", "--out", "new")


@kind("rows in place of prompts", "rows.csv: has no task.yaml", "build-prompts")
def _(place: Place) -> tuple[object, ...]:
    return ("finetune", "rows.csv", "--model", "base", "--out", "new")


@kind("prompts without validation", "prompts: has no valid.jsonl")
def _(place: Place) -> tuple[object, ...]:
    place.path("prompts/valid.jsonl").unlink()
    return place.finetune()


@kind("prompts without training rows", "prompts/train.jsonl: found 0 labelled rows", "at least two", "--split")
def _(place: Place) -> tuple[object, ...]:
    place.write("prompts/train.jsonl", "")
    return place.finetune()


@kind("prompts with one label", "prompts/train.jsonl: found 6 labelled rows with 1 labels", "at least two")
def _(place: Place) -> tuple[object, ...]:
    lines = place.path("prompts/train.jsonl").read_text().splitlines(keepends=True)
    place.write("prompts/train.jsonl", "".join(line for line in lines if json.loads(line)["output"] == "1"))
    return place.finetune()


@kind("prompts with a broken line", "prompts/train.jsonl:2: is not JSON")
def _(place: Place) -> tuple[object, ...]:
    lines = place.path("prompts/train.jsonl").read_text().splitlines(keepends=True)
    lines[1] = lines[1][:20] + "\n"
    place.write("prompts/train.jsonl", "".join(lines))
    return place.finetune()


@kind("prompts whose task was edited", "the instruction is 'Medical? 1 or 0', the task's is 'Which?'")
def _(place: Place) -> tuple[object, ...]:
    place.write("prompts/task.yaml", SHORT_TASK.replace("Medical? 1 or 0", "Which?"))
    return place.finetune()


@kind("a base that is absent", "./no-model: there is no such model folder", "glm-nano")
def _(place: Place) -> tuple[object, ...]:
    return ("finetune", "prompts", "--model", "./no-model", "--out", "new")


@kind("a base that the hub does not have", "nobody/no-model", "cache")
def _(place: Place) -> tuple[object, ...]:
    return ("finetune", "prompts", "--model", "nobody/no-model", "--out", "new")


@kind("a base of a user that there is not", "~nobody-here/model", "home")
def _(place: Place) -> tuple[object, ...]:
    return ("finetune", "prompts", "--model", "~nobody-here/model", "--out", "new")


@kind("a base that is no model folder", "prompts: has no config.json, so it is no model folder")
def _(place: Place) -> tuple[object, ...]:
    return ("finetune", "prompts", "--model", "prompts", "--out", "new")


@kind("a base that is a file", "rows.csv: there is no such model folder")
def _(place: Place) -> tuple[object, ...]:
    return ("finetune", "prompts", "--model", place.path("rows.csv"), "--out", "new")


@kind("a base whose config is broken", "base: the config cannot be loaded", "config.json")
def _(place: Place) -> tuple[object, ...]:
    place.write("base/config.json", "{")
    return place.finetune()


@kind("a base of a kind that transformers does not know", "base: the", "cannot be loaded", "abacus")
def _(place: Place) -> tuple[object, ...]:
    place.edit_json("base/config.json", model_type="abacus", architectures=["Abacus"])
    return place.finetune()


@kind("a base whose weights are cut short", "base: the model cannot be loaded")
def _(place: Place) -> tuple[object, ...]:
    weights = place.path("base/model.safetensors").read_bytes()
    place.write("base/model.safetensors", weights[: len(weights) // 2])
    return place.finetune()


@kind("a base without weights", "base: the model cannot be loaded", "no file named model.safetensors")
def _(place: Place) -> tuple[object, ...]:
    place.path("base/model.safetensors").unlink()
    return place.finetune()


@kind("a base that lacks a layer", "base: its files lack or mis-shape 1 weights, first", "Copy")
def _(place: Place) -> tuple[object, ...]:
    weights = load_file(place.path("base/model.safetensors"))
    weights.pop(next(name for name in weights if "q_proj" in name))
    save_file(weights, place.path("base/model.safetensors"), metadata={"format": "pt"})
    return place.finetune()


@kind("a base without a tokenizer", "base: the tokenizer cannot be loaded")
def _(place: Place) -> tuple[object, ...]:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        place.path(f"base/{name}").unlink()
    return place.finetune()


@kind("a base whose tokenizer is broken", "base: the tokenizer cannot be loaded")
def _(place: Place) -> tuple[object, ...]:
    place.write("base/tokenizer.json", "{}")
    return place.finetune()


@kind(
    "label words that are the same tokens", "'b' of label 'b' and 'a' of label 'a' are the same tokens", "other words"
)
def _(place: Place) -> tuple[object, ...]:
    tokenizer = json.loads(place.path("base/tokenizer.json").read_text())
    vocab = {token: number for token, number in tokenizer["model"]["vocab"].items() if token not in "ab"}
    tokenizer["model"] |= {"vocab": {**vocab, "?": vocab.get("?", 7)}, "unk_token": "?"}
    place.write("base/tokenizer.json", json.dumps(tokenizer))
    place.write("task.yaml", SHORT_TASK.replace('["0", "1"]', "[{label: a, words: [a]}, {label: b, words: [b]}]"))
    place.write("ab.csv", CSV.replace(",1\n", ",a\n").replace(",0\n", ",b\n"))
    assert place.command("build-prompts", "ab.csv", "--task", "task.yaml", "--out", "ab", "--split", "1,0,0")[0] == 0
    return ("finetune", "ab", "--model", "base", "--out", "new", *SETTINGS)


@kind("a run onto a run", "run: something is already there", "--overwrite")
def _(place: Place) -> tuple[object, ...]:
    return ("finetune", "prompts", "--model", "base", "--out", "run")


@kind("a run onto prompts", "prompts: is no run, so --overwrite leaves it alone")
def _(place: Place) -> tuple[object, ...]:
    return ("finetune", "prompts", "--model", "base", "--out", "prompts", "--overwrite")


@kind("a run inside its prompts", "--out prompts/run: lies in the input prompts", "another --out")
def _(place: Place) -> tuple[object, ...]:
    return ("finetune", "prompts", "--model", "base", "--out", "prompts/run")


@kind("a run onto one that holds its prompts", "--out run: holds the input run/prompts")
def _(place: Place) -> tuple[object, ...]:
    shutil.copytree(place.path("prompts"), place.path("run/prompts"))
    return ("finetune", "run/prompts", "--model", "base", "--out", "run", "--overwrite")


@kind("a run inside its base", "--out base/run: lies in the input", "/base")
def _(place: Place) -> tuple[object, ...]:
    return ("finetune", "prompts", "--model", "base", "--out", "base/run")


@kind("a run below a file", "cannot be written", "another --out")
def _(place: Place) -> tuple[object, ...]:
    return ("finetune", "prompts", "--model", "base", "--out", "rows.csv/run")


@kind("a run without a name", "--out '..'", "output/NAME")
def _(place: Place) -> tuple[object, ...]:
    return ("finetune", "prompts", "--model", "base", "--out", "..", "--overwrite")


@kind("a run that an interrupted training left", "new.partial", "--resume goes on", "--overwrite starts anew")
def _(place: Place) -> tuple[object, ...]:
    place.path("new.partial").mkdir()
    return place.finetune()


@kind("an interrupted training whose record is broken", "inputs.json", "--overwrite")
def _(place: Place) -> tuple[object, ...]:
    place.write("new.partial/inputs.json", "[]")
    place.write("new.partial/checkpoints/last/progress.json", "{}")
    return place.finetune("--resume")


# --- predict: runs and adapters ---------------------------------------------------------------------------------------


@kind("a run that is absent", "nowhere: there is no such folder")
def _(place: Place) -> tuple[object, ...]:
    return ("predict", "nowhere", "rows.csv", "--out", "new.csv")


@kind("a run that is not finished", "new: the run is not finished", "--resume")
def _(place: Place) -> tuple[object, ...]:
    place.path("new.partial").mkdir()
    return ("predict", "new", "rows.csv", "--out", "new.csv")


@kind("prompts in place of a run", "prompts: has no run.json, so it is no run", "finetune")
def _(place: Place) -> tuple[object, ...]:
    return ("predict", "prompts", "rows.csv", "--out", "new.csv")


@kind("a run whose run.json is broken", "run.json: cannot be read")
def _(place: Place) -> tuple[object, ...]:
    place.write("run/run.json", "{")
    return place.predict()


@kind("a run whose run.json is another's", "run.json: is not what finetune writes")
def _(place: Place) -> tuple[object, ...]:
    place.write("run/run.json", '["kind", "lora"]')
    return place.predict()


@kind("a run whose run.json tells nothing", "run.json", "base and adapter", "Train again")
def _(place: Place) -> tuple[object, ...]:
    place.write("run/run.json", '{"format": 1, "base": "glm-nano"}')
    return place.predict()


@kind("a run of a newer version", "written by a newer llm-clf (format 99, this one reads 1)", "Upgrade")
def _(place: Place) -> tuple[object, ...]:
    place.edit_json("run/run.json", format=99)
    return place.predict()


@kind("a run without its task", "run: task.yaml is missing", "Copy the whole folder")
def _(place: Place) -> tuple[object, ...]:
    place.path("run/task.yaml").unlink()
    return place.predict()


@kind("a run without its settings", "run: config.yaml is missing")
def _(place: Place) -> tuple[object, ...]:
    place.path("run/config.yaml").unlink()
    return place.predict()


@kind("a run without its adapter", "run: adapter/adapter_model.safetensors is missing")
def _(place: Place) -> tuple[object, ...]:
    shutil.rmtree(place.path("run/adapter"))
    return place.predict()


@kind("a run whose settings are broken", "run: the run is damaged", "epoch: there is no such setting")
def _(place: Place) -> tuple[object, ...]:
    place.edit_config("train", epoch=3)
    return place.predict()


@kind("a run with a task of other labels", "task.yaml: is not the task", "labels are 0, 1, 2, then 0, 1", "train again")
def _(place: Place) -> tuple[object, ...]:
    place.write("run/task.yaml", SHORT_TASK.replace('["0", "1"]', '["0", "1", "2"]'))
    return place.predict()


@kind("a run with a task of another instruction", "task.yaml: is not the task", "instruction", "former file back")
def _(place: Place) -> tuple[object, ...]:
    place.write("run/task.yaml", SHORT_TASK.replace("Medical?", "Is it?"))
    return place.predict()


@kind("a run whose adapter was edited", "adapter_model.safetensors: has changed since the training", "Copy")
def _(place: Place) -> tuple[object, ...]:
    weights = load_file(place.path("run/adapter/adapter_model.safetensors"))
    save_file(
        {name: tensor + 1 for name, tensor in weights.items()}, place.path("run/adapter/adapter_model.safetensors")
    )
    return place.predict()


@kind("a run whose adapter was edited, in chat", "adapter_model.safetensors: has changed since the training")
def _(place: Place) -> tuple[object, ...]:
    weights = place.path("run/adapter/adapter_model.safetensors").read_bytes()
    place.write("run/adapter/adapter_model.safetensors", weights[:-1] + b"\x7f")
    return ("chat", "run", "--once", "text")


@kind("a run whose base is gone", "there is no such model folder")
def _(place: Place) -> tuple[object, ...]:
    shutil.rmtree(place.path("base"))
    return place.predict()


@kind("a run whose base was edited", "is not the one that the run was trained on", "--model")
def _(place: Place) -> tuple[object, ...]:
    weights = load_file(place.path("base/model.safetensors"))
    save_file({name: w * 2 for name, w in weights.items()}, place.path("base/model.safetensors"), {"format": "pt"})
    return place.predict()


@kind("another base than the run's", "is not the one that the run was trained on")
def _(place: Place) -> tuple[object, ...]:
    tiny_model("llama").save_pretrained(place.path("llama"))
    byte_tokenizer(place.path("llama"))
    return (*place.predict(), "--model", "llama")


@kind("a task for a run", "run: is a run and has its own task; leave out --task")
def _(place: Place) -> tuple[object, ...]:
    return (*place.predict(), "--task", "task.yaml")


def bare(place: Place, base: str = "base") -> tuple[object, ...]:
    return ("predict", "adapter", "rows.csv", "--task", "task.yaml", "--model", base, "--out", "new.csv")


@kind("a bare adapter without a base", "adapter: is a bare adapter", "--task TASK --model BASE")
def _(place: Place) -> tuple[object, ...]:
    return ("predict", "adapter", "rows.csv", "--task", "task.yaml", "--out", "new.csv")


@kind("a bare adapter with a base of another shape", "adapter: the adapter does not fit the base gpt2", "trained on")
def _(place: Place) -> tuple[object, ...]:
    tiny_model("gpt2").save_pretrained(place.path("gpt2"))
    byte_tokenizer(place.path("gpt2"))
    return bare(place, "gpt2")


@kind("a bare adapter with a base of another size", "adapter: the adapter does not fit the base", "size mismatch")
def _(place: Place) -> tuple[object, ...]:
    config = json.loads(place.path("base/config.json").read_text()) | {"hidden_size": 64, "head_dim": 16}
    from transformers import AutoConfig, AutoModelForCausalLM

    config.pop("dtype", None)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    model.save_pretrained(place.path("wide"))
    byte_tokenizer(place.path("wide"))
    return bare(place, "wide")


@kind("a bare adapter with another tokenizer", "another tokenizer than that of the base")
def _(place: Place) -> tuple[object, ...]:
    tokenizer = json.loads(place.path("base/tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    place.write("base/tokenizer.json", json.dumps(tokenizer))
    return bare(place)


@kind("a bare adapter whose config is broken", "adapter_config.json: cannot be read")
def _(place: Place) -> tuple[object, ...]:
    place.write("adapter/adapter_config.json", "{")
    return bare(place)


@kind("a bare adapter whose config is a list", "adapter_config.json: found list, expected what PEFT writes")
def _(place: Place) -> tuple[object, ...]:
    place.write("adapter/adapter_config.json", "[]")
    return bare(place)


@kind("a bare adapter of a kind that PEFT does not know", "adapter: the adapter does not fit")
def _(place: Place) -> tuple[object, ...]:
    place.edit_json("adapter/adapter_config.json", peft_type="MAGIC")
    return bare(place)


@kind("a bare adapter without weights", "adapter: holds no adapter weights (adapter_model.safetensors")
def _(place: Place) -> tuple[object, ...]:
    place.path("adapter/adapter_model.safetensors").unlink()
    return bare(place)


@kind("a bare adapter whose weights are cut short", "adapter_model.safetensors: is damaged", "Copy it again")
def _(place: Place) -> tuple[object, ...]:
    weights = place.path("adapter/adapter_model.safetensors").read_bytes()
    place.write("adapter/adapter_model.safetensors", weights[:-100])
    return bare(place)


@kind("a bare adapter whose pickled weights are none", "adapter_model.bin: is damaged", "Copy it again")
def _(place: Place) -> tuple[object, ...]:
    place.path("adapter/adapter_model.safetensors").unlink()
    place.write("adapter/adapter_model.bin", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    return bare(place)


# --- baseline tfidf, and its runs -------------------------------------------------------------------------------------


def baseline(place: Place, *words: object) -> tuple[object, ...]:
    return ("baseline", "tfidf", "prompts", "--out", "new", *words)


def tfidf(place: Place, *words: object) -> tuple[object, ...]:
    return ("predict", "tfidf", *(words or ("rows.csv",)), "--out", "new.csv")


def vouched_model(place: Place, content: bytes) -> None:
    """Put another model into the run, with its hash in run.json."""
    model = place.write("tfidf/model.skops", content)
    facts = json.loads(place.path("tfidf/run.json").read_text())
    place.edit_json("tfidf/run.json", model=facts["model"] | {"hash": file_hash(model)})


@kind("a setting that a baseline does not heed", "--set 'lora.r=3'", "heeds train.seed and decide.calibration")
def _(place: Place) -> tuple[object, ...]:
    return baseline(place, "--set", "lora.r=3")


@kind("a setting that a baseline does not know", "--set 'seed=3'", "heeds train.seed and decide.calibration")
def _(place: Place) -> tuple[object, ...]:
    return baseline(place, "--set", "seed=3")


@kind("a baseline's seed that is none", "train.seed: found 'often'")
def _(place: Place) -> tuple[object, ...]:
    return baseline(place, "--set", "train.seed=often")


@kind("a baseline on prompts that are absent", "nowhere: has no task.yaml", "build-prompts")
def _(place: Place) -> tuple[object, ...]:
    return ("baseline", "tfidf", "nowhere", "--out", "new")


@kind("a baseline on one label", "prompts/train.jsonl: found 6 labelled rows with 1 labels", "at least two")
def _(place: Place) -> tuple[object, ...]:
    lines = place.path("prompts/train.jsonl").read_text().splitlines(keepends=True)
    place.write("prompts/train.jsonl", "".join(line for line in lines if json.loads(line)["output"] == "1"))
    return baseline(place)


@kind("a baseline on empty texts", "all 12 labelled rows have the text ':'", "title, abstract")
def _(place: Place) -> tuple[object, ...]:
    rows = [json.loads(line) | {"input": ":"} for line in place.path("prompts/train.jsonl").read_text().splitlines()]
    place.write("prompts/train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return baseline(place)


@kind("a baseline onto a run", "run: something is already there", "--overwrite")
def _(place: Place) -> tuple[object, ...]:
    return ("baseline", "tfidf", "prompts", "--out", "run")


@kind("a baseline to resume onto another kind of run", "run: is a run of kind lora", "one of kind tfidf", "--out")
def _(place: Place) -> tuple[object, ...]:
    return ("baseline", "tfidf", "prompts", "--out", "run", "--resume")


@kind("a baseline onto prompts", "prompts: is no run, so --overwrite leaves it alone")
def _(place: Place) -> tuple[object, ...]:
    return ("baseline", "tfidf", "prompts", "--out", "prompts", "--overwrite")


@kind("a baseline inside its prompts", "--out prompts/run: lies in the input prompts")
def _(place: Place) -> tuple[object, ...]:
    return ("baseline", "tfidf", "prompts", "--out", "prompts/run")


@kind("what an interrupted training left where a baseline goes", "new.partial", "--overwrite starts anew")
def _(place: Place) -> tuple[object, ...]:
    place.write("new.partial/checkpoints/last/progress.json", "{}")
    return baseline(place, "--resume")


@kind("a table without the columns of a baseline", "rows.csv:2: the task needs the columns 'abstract'", "'body'")
def _(place: Place) -> tuple[object, ...]:
    return tfidf(place, place.write("rows.csv", CSV.replace("abstract", "body", 1)))


@kind("prompts of another task for a baseline", "other.jsonl:1: the instruction is 'Which?'", "build the prompts again")
def _(place: Place) -> tuple[object, ...]:
    row = {"id": "a", "instruction": "Which?", "input": "body: text", "output": "1"}
    return tfidf(place, place.write("other.jsonl", json.dumps(row) + "\n"))


@kind("a base for a baseline", "tfidf: is a run of kind tfidf, which has no base", "leave out --model and --set")
def _(place: Place) -> tuple[object, ...]:
    return (*tfidf(place), "--model", "base")


@kind("settings for a baseline's prediction", "tfidf: is a run of kind tfidf", "leave out --model and --set")
def _(place: Place) -> tuple[object, ...]:
    return (*tfidf(place), "--set", "predict.batch_tokens=64")


@kind("a task for a baseline", "tfidf: is a run and has its own task")
def _(place: Place) -> tuple[object, ...]:
    return (*tfidf(place), "--task", "task.yaml")


@kind("answers of a baseline", "--decode generate: tfidf writes no answers: it is no language model", "Leave it out.")
def _(place: Place) -> tuple[object, ...]:
    return (*tfidf(place), "--decode", "generate")


@kind("chat with a baseline", "tfidf: is no language model", "llm-clf predict tfidf ROWS --out FILE")
def _(place: Place) -> tuple[object, ...]:
    return ("chat", "tfidf", "--once", "text")


@kind("a baseline to merge", "tfidf: is a run of kind tfidf", "finetune")
def _(place: Place) -> tuple[object, ...]:
    return ("merge", "tfidf", "--out", "new")


@kind("a run of a kind that there is not", "run of kind 'crystal ball'", "lora, tfidf", "Upgrade")
def _(place: Place) -> tuple[object, ...]:
    place.edit_json("tfidf/run.json", kind="crystal ball")
    return tfidf(place)


@kind("a run of another kind than it says", "run.json: does not tell base and adapter")
def _(place: Place) -> tuple[object, ...]:
    place.edit_json("tfidf/run.json", kind="lora")
    return tfidf(place)


@kind("a baseline without its model", "tfidf: model.skops is missing")
def _(place: Place) -> tuple[object, ...]:
    place.path("tfidf/model.skops").unlink()
    return tfidf(place)


@kind("a baseline whose model is cut short", "model.skops: has changed since the training", "train again")
def _(place: Place) -> tuple[object, ...]:
    place.write("tfidf/model.skops", place.path("tfidf/model.skops").read_bytes()[:-100])
    return tfidf(place)


@kind("a baseline whose damaged model is vouched for", "model.skops: is damaged", "Copy it again")
def _(place: Place) -> tuple[object, ...]:
    vouched_model(place, place.path("tfidf/model.skops").read_bytes()[:-100])
    return tfidf(place)


@kind("a baseline with foreign types in its model", "model.skops", "it is not loaded", "test_bad_input.Place")
def _(place: Place) -> tuple[object, ...]:
    vouched_model(place, skops.io.dumps({"pipeline": Place(Path("a"), None, None), "n_grams": {}}))  # type: ignore[arg-type]
    return tfidf(place)


@kind("a baseline with a task of another instruction", "task.yaml: is not the task", "former file back")
def _(place: Place) -> tuple[object, ...]:
    place.write("tfidf/task.yaml", SHORT_TASK.replace("Medical?", "Is it?"))
    return tfidf(place)


# --- predict: arguments and places ------------------------------------------------------------------------------------


@kind("a way to decode that there is not", "--decode 'guess'", "score and generate")
def _(place: Place) -> tuple[object, ...]:
    return (*place.predict(), "--decode", "guess")


@kind("columns that there are not", "--columns: there is no column 'authors'", "prob_1", "'title'")
def _(place: Place) -> tuple[object, ...]:
    return (*place.predict(), "--columns", "id,authors")


@kind("a column twice", "--columns: names 'id' more than once")
def _(place: Place) -> tuple[object, ...]:
    return (*place.predict(), "--columns", "id,label,id")


@kind("a column to fill that is not written", "--fill Keywords: is not among the columns", "--columns")
def _(place: Place) -> tuple[object, ...]:
    return (*place.predict(), "--columns", "uuid,label", "--fill", "Keywords=tmp")


@kind("a column of predictions to fill", "--fill label: is a column of predictions")
def _(place: Place) -> tuple[object, ...]:
    return (*place.predict(), "--columns", "uuid,label", "--fill", "label=1")


@kind("a column to fill without a value", "--fill 'Keywords'", "NAME=VALUE")
def _(place: Place) -> tuple[object, ...]:
    return (*place.predict(), "--columns", "uuid,Keywords", "--fill", "Keywords")


@kind("a column to fill twice", "--fill: names 'Keywords' more than once")
def _(place: Place) -> tuple[object, ...]:
    return (*place.predict(), "--columns", "uuid,Keywords", "--fill", "Keywords=a", "--fill", "Keywords=b")


@kind("predictions of another ending", "--out new.xlsx", "'.xlsx'", ".csv, .jsonl, .parquet")
def _(place: Place) -> tuple[object, ...]:
    return ("predict", "run", "rows.csv", "--out", "new.xlsx")


@kind("predictions onto a file", "predictions.csv: a file is already there", "--overwrite")
def _(place: Place) -> tuple[object, ...]:
    return ("predict", "run", "rows.csv", "--out", "predictions.csv")


@kind("predictions onto the rows", "--out rows.csv: is the input rows.csv", "another --out")
def _(place: Place) -> tuple[object, ...]:
    return ("predict", "run", "rows.csv", "--out", "rows.csv", "--overwrite")


@kind("predictions onto the rows by another name", "--out link.csv: is the input rows.csv")
def _(place: Place) -> tuple[object, ...]:
    place.path("link.csv").symlink_to("rows.csv")
    return ("predict", "run", "rows.csv", "--out", "link.csv", "--overwrite")


@kind("predictions inside the run", "--out run/new.csv: lies in the input run")
def _(place: Place) -> tuple[object, ...]:
    return ("predict", "run", "rows.csv", "--out", "run/new.csv")


@kind("predictions onto a folder", "folder.csv: is a folder; give --out a file")
def _(place: Place) -> tuple[object, ...]:
    place.path("folder.csv").mkdir()
    return ("predict", "run", "rows.csv", "--out", "folder.csv", "--resume")


@kind("predictions below a file", "cannot be written", "another --out")
def _(place: Place) -> tuple[object, ...]:
    return ("predict", "run", "rows.csv", "--out", "many.csv/new.csv")


@kind("standard output to resume", "--resume: standard output cannot be resumed", "give --out a file")
def _(place: Place) -> tuple[object, ...]:
    return ("predict", "run", "rows.csv", "--out", "-", "--resume")


@kind("what an interrupted prediction left", "new.csv.partial", "--resume goes on", "--overwrite starts anew")
def _(place: Place) -> tuple[object, ...]:
    place.write("new.csv.partial", '{"key": "some"}\n')
    return place.predict()


@kind("what another prediction left", "new.csv.partial: is what another job left", "--overwrite")
def _(place: Place) -> tuple[object, ...]:
    place.write("new.csv.partial", '{"key": "some"}\n')
    return (*place.predict(), "--resume")


@kind("a file of the user's where the unfinished result stands", "new.csv.partial: is what another job left")
def _(place: Place) -> tuple[object, ...]:
    place.write("new.csv.partial", b"\xff\xfemy own\nlines\n")
    return (*place.predict(), "--resume")


# --- evaluate ---------------------------------------------------------------------------------------------------------


def evaluate(place: Place, text: str, name: str = "file.csv") -> tuple[object, ...]:
    return ("evaluate", place.write(name, text), "--out", "scores")


@kind("predictions that are absent", "nowhere.csv: there is no such file")
def _(place: Place) -> tuple[object, ...]:
    return ("evaluate", "nowhere.csv")


@kind("a folder for predictions", "run: is a folder")
def _(place: Place) -> tuple[object, ...]:
    return ("evaluate", "run")


@kind("empty predictions", "file.csv: is empty")
def _(place: Place) -> tuple[object, ...]:
    return evaluate(place, "")


@kind("predictions without rows", "file.csv: holds no predictions")
def _(place: Place) -> tuple[object, ...]:
    return evaluate(place, "id,label,gold\n")


@kind("predictions without gold", "file.csv: needs the column 'gold'", "labelled rows")
def _(place: Place) -> tuple[object, ...]:
    return evaluate(place, "id,label,prob_0,prob_1\na,1,0.2,0.8\n")


@kind("rows in place of predictions", "needs the column 'gold'", "'title'", "llm-clf predict")
def _(place: Place) -> tuple[object, ...]:
    return ("evaluate", "rows.csv")


@kind("ten thousand columns in place of predictions", "needs the column 'label', 'gold'", "and 9970 more")
def _(place: Place) -> tuple[object, ...]:
    return evaluate(place, ",".join(f"c{i}" for i in range(10_000)) + "\n" + ",".join("x" * 10_000) + "\n")


@kind("a probability that is no number", "file.csv:3: prob_1 is 'high'; expected a number from 0 to 1")
def _(place: Place) -> tuple[object, ...]:
    return evaluate(place, "id,label,prob_0,prob_1,gold\na,1,0.2,0.8,1\nb,1,0.2,high,1\n")


@kind("a probability above 1", "file.csv:2: prob_1 is '80'; expected a number from 0 to 1")
def _(place: Place) -> tuple[object, ...]:
    return evaluate(place, "id,label,prob_0,prob_1,gold\na,1,20,80,1\n".replace("20", "0.2"))


@kind("a gold label that has no column", "file.csv:3: has a label without a column", "0, 1")
def _(place: Place) -> tuple[object, ...]:
    return evaluate(place, "id,label,prob_0,prob_1,gold\na,1,0.2,0.8,1\nb,1,0.2,0.8,maybe\n")


@kind("a metrics folder that is a file", "--out rows.csv: is a file", "another folder")
def _(place: Place) -> tuple[object, ...]:
    return ("evaluate", "predictions.csv", "--out", "rows.csv")


@kind("metrics onto those of a run", "--out run: is a run", "another folder")
def _(place: Place) -> tuple[object, ...]:
    return ("evaluate", "predictions.csv", "--out", "run")


@kind("metrics below a file", "cannot be written")
def _(place: Place) -> tuple[object, ...]:
    return ("evaluate", "predictions.csv", "--out", "rows.csv/scores")


# --- compare, ensemble and leaderboard --------------------------------------------------------------------------------


@kind("a comparison with a file that is absent", "nowhere.csv: there is no such file")
def _(place: Place) -> tuple[object, ...]:
    return ("compare", "predictions.csv", "nowhere.csv")


@kind("a comparison with rows that are no predictions", "many.csv: needs the column", "llm-clf predict")
def _(place: Place) -> tuple[object, ...]:
    return ("compare", "predictions.csv", "many.csv")


@kind("a comparison of different rows", "2 of the 6 rows of predictions.csv are not in fewer.csv", "same rows")
def _(place: Place) -> tuple[object, ...]:
    lines = place.path("predictions.csv").read_text().splitlines(keepends=True)
    place.write("fewer.csv", "".join(lines[:-2]))
    return ("compare", "predictions.csv", "fewer.csv")


@kind("a comparison into a run", "--out run: is a run", "comparison.json")
def _(place: Place) -> tuple[object, ...]:
    return ("compare", "predictions.csv", "predictions.csv", "--out", "run")


@kind("a comparison below a file", "cannot be written")
def _(place: Place) -> tuple[object, ...]:
    return ("compare", "predictions.csv", "predictions.csv", "--out", "rows.csv/scores")


@kind("an ensemble of one run", "needs two different runs or more", "found tfidf")
def _(place: Place) -> tuple[object, ...]:
    return ("ensemble", "tfidf", "--data", "prompts", "--out", "new")


@kind("an ensemble of an unknown method", "--method 'vote'", "mean, log-odds, stacking")
def _(place: Place) -> tuple[object, ...]:
    return ("ensemble", "tfidf", "run", "--data", "prompts", "--out", "new", "--method", "vote")


@kind("an ensemble of a run and an adapter", "adapter: has no run.json, so it is no run")
def _(place: Place) -> tuple[object, ...]:
    return ("ensemble", "tfidf", "adapter", "--data", "prompts", "--out", "new")


@kind("an ensemble of a damaged record of rows", "tfidf/trained-rows.npy: is damaged")
def _(place: Place) -> tuple[object, ...]:
    place.write("tfidf/trained-rows.npy", "what is this")
    return ("ensemble", "tfidf", "run", "--data", "prompts", "--out", "new")


@kind("an ensemble of a base that is another one now", "run: the base", "not the one that the run was trained on")
def _(place: Place) -> tuple[object, ...]:
    tokenizer = place.path("base/tokenizer_config.json")
    place.write("base/tokenizer_config.json", tokenizer.read_text() + " ")
    return ("ensemble", "run", "tfidf", "--data", "prompts", "--out", "new")


@kind("a leaderboard of a split that there is not", "--split 'all'", "test and valid")
def _(place: Place) -> tuple[object, ...]:
    return ("leaderboard", "tfidf", "--data", "prompts", "--split", "all")


@kind("a leaderboard onto the prompts", "--out prompts: is the input prompts")
def _(place: Place) -> tuple[object, ...]:
    return ("leaderboard", "tfidf", "--data", "prompts", "--out", "prompts")


@kind("a leaderboard onto a file", "--out rows.csv: is a file", "leaderboard.csv")
def _(place: Place) -> tuple[object, ...]:
    return ("leaderboard", "tfidf", "--data", "prompts", "--out", "rows.csv")


# --- chat and doctor --------------------------------------------------------------------------------------------------


@kind("chat with a run that is absent", "nowhere: there is no such folder")
def _(place: Place) -> tuple[object, ...]:
    return ("chat", "nowhere", "--once", "text")


@kind("chat with a bare adapter and no base", "adapter: is a bare adapter", "--model BASE")
def _(place: Place) -> tuple[object, ...]:
    return ("chat", "adapter", "--once", "text")


@kind("chat with an adapter and a base of another shape", "adapter: the adapter does not fit the base")
def _(place: Place) -> tuple[object, ...]:
    tiny_model("gpt2").save_pretrained(place.path("gpt2"))
    byte_tokenizer(place.path("gpt2"))
    return ("chat", "adapter", "--model", "gpt2", "--once", "text")


@kind("chat with a base that is absent", "./no-model: there is no such model folder")
def _(place: Place) -> tuple[object, ...]:
    return ("chat", "--model", "./no-model", "--once", "text")


@kind("chat with a task that there is not", "--task 'nothing'", "medical_paper")
def _(place: Place) -> tuple[object, ...]:
    return ("chat", "--model", "base", "--task", "nothing", "--once", "text")


@kind("chat with a text that is too long", "tokens; this base reads 512")
def _(place: Place) -> tuple[object, ...]:
    return ("chat", "--model", "base", "--once", "text " * 500)


@kind("doctor with a base that is absent", "./no-model: there is no such model folder")
def _(place: Place) -> tuple[object, ...]:
    return ("doctor", "--model", "./no-model")


@kind("doctor with prompts that are absent", "nowhere: has no task.yaml", "build-prompts")
def _(place: Place) -> tuple[object, ...]:
    return ("doctor", "--model", "base", "--data", "nowhere", "--json")


@kind("doctor with prompts without labels", "train.jsonl: found no labelled rows")
def _(place: Place) -> tuple[object, ...]:
    place.write("prompts/train.jsonl", "")
    return ("doctor", "--model", "base", "--data", "prompts")


@pytest.mark.parametrize("name", KINDS)
def test_bad_input_is_refused(place: Place, name: str) -> None:
    prepare, telling = KINDS[name]
    refused(place, prepare(place), *telling)


def test_there_are_at_least_sixty_kinds() -> None:
    assert len(KINDS) >= 60


# --- what needs more than one command ---------------------------------------------------------------------------------


def test_rows_of_ten_thousand_columns_are_read(place: Place) -> None:
    names = [f"c{i}" for i in range(10_000)]
    lines = [",".join(["title", "abstract", *names])] + [",".join([f"t{i}", "x", *names]) for i in range(50)]
    place.write("wide.csv", "\n".join(lines))
    code, _, err = place.command(*place.predict("wide.csv"))
    assert code == 0 and "50 rows predicted" in err


@pytest.mark.parametrize("pack", [lambda content: content, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json", ".parquet"])
def test_standard_input_is_known_by_its_first_bytes(place: Place, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    parquet = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), parquet)
    content = {
        ".csv": CSV.encode(),
        ".jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
        ".json": json.dumps(ROWS, indent=1).encode(),
        ".parquet": parquet.getvalue(),
    }[suffix]
    place.stdin(pack(content))
    code, _, err = place.command(*place.predict("-"))
    assert code == 0, err
    assert place.path("new.csv").read_text().count("\n") == 7


def test_chat_goes_on_after_what_it_cannot_do(place: Place) -> None:
    too_long = "text " * 500
    lines = [too_long, "/save rows.csv", "/save rows.csv/x", "/save " + "x" * 300, "/classify", "/nothing", "hello"]
    place.stdin("\n".join([*lines, "/save talk.json", "/exit"]).encode())
    before = place.path("rows.csv").read_bytes()
    code, out, err = place.command("chat", "--model", "base")
    assert code == 0 and "Traceback" not in err
    assert "this base reads 512" in out and "rows.csv is already there; give another name" in out
    assert "cannot be written" in out and "cannot be a file" in out and "There is no /nothing" in out
    assert place.path("rows.csv").read_bytes() == before
    assert [turn["role"] for turn in json.loads(place.path("talk.json").read_text())] == ["user", "assistant"]


@pytest.mark.parametrize(
    "words",
    [
        ("finetune", "prompts", "--model", "base", "--out", "new", *SETTINGS),
        ("finetune", "prompts", "--model", "base", "--out", "new", *SETTINGS, "--resume"),
        ("finetune", "prompts", "--model", "base", "--out", "new", *SETTINGS, "--overwrite"),
        ("predict", "run", "rows.csv", "--out", "new"),
        ("build-prompts", "rows.csv", "--task", "task.yaml", "--out", "new"),
    ],
    ids=lambda words: " ".join((words[0], *words[-1:])),
)
def test_two_commands_for_one_result_are_refused(place: Place, words: tuple[str, ...]) -> None:
    if words[0] == "predict":
        words = (*words[:-1], "new.csv")
    with FileLock(place.path(f".{words[words.index('--out') + 1]}.lock")):
        before = snapshot(place.folder)
        code, out, err = place.command(*words)
        assert code == 2 and out == "" and err.startswith("error: new") and "another command is writing it now" in err
        assert "Wait until that one has ended" in err and snapshot(place.folder) == before
    assert place.command(*words)[0] == 0
    assert not list(place.folder.glob(".*"))


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_a_second_training_is_refused_and_a_killed_one_holds_nobody_up(place: Place) -> None:
    words = [*place.finetune("--set", "train.epochs=5000"), "--resume"]
    first = subprocess.Popen(
        [sys.executable, "-m", "llm_clf", *map(str, words)], env=environment(), stderr=subprocess.DEVNULL
    )
    try:
        last = place.path("new.partial/checkpoints/last/progress.json")
        limit = time.monotonic() + 90
        while not last.is_file():
            assert first.poll() is None and time.monotonic() < limit
            time.sleep(0.05)
        code, _, err = place.command(*place.finetune("--overwrite"))
        assert code == 2 and err.startswith("error: new: another command is writing it now")
        assert first.poll() is None and last.is_file()
    finally:
        first.kill()
        first.wait()
    assert place.path(".new.lock").exists()
    code, _, err = place.command(*place.finetune("--overwrite"))
    assert code == 0 and place.path("new/run.json").is_file() and not place.path(".new.lock").exists(), err


def test_words_that_the_command_line_does_not_know(place: Place) -> None:
    for words in (
        ("predict", "run", "rows.csv"),
        ("predict", "run", "rows.csv", "--out", "new.csv", "--colums", "id"),
        ("build-prompts", "rows.csv", "--task", "task.yaml", "--out", "new", "--seed", "many"),
        ("train", "prompts"),
    ):
        before = snapshot(place.folder)
        code, out, err = place.command(*words)
        assert code == 2 and out == "" and "Error" in err and "Traceback" not in err
        assert snapshot(place.folder) == before


# --- disks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(place: Place) -> Iterator[Callable[[str], Path]]:
    """Return a function that mounts a small disk, or mounts it anew with other options."""
    folder = place.path("disk")
    folder.mkdir()
    mounted = False

    def mount(options: str) -> Path:
        nonlocal mounted
        options = f"remount,{options}" if mounted else options
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip(f"may not mount a small disk here: {done.stderr.decode().strip()}")
        mounted = True
        return folder

    if shutil.which("mount") is None:
        pytest.skip("has no mount")
    yield mount
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def full(place: Place, words: tuple[object, ...]) -> str:
    code, out, err = place.command(*words)
    assert (
        code == 2 and out == "" and err.count("\nerror: ") + err.startswith("error: ") == 1 and "Traceback" not in err
    ), err
    message = err.partition("error: ")[2]
    assert "cannot be written" in message and "another --out" in message
    return message


def test_prompts_on_a_full_disk(place: Place, disk: Callable[[str], Path]) -> None:
    folder = disk("size=16k")
    place.write("long.csv", "uuid,title,abstract,label\n" + "".join(f"l{i},t{i},{i:02000},1\n" for i in range(20)))
    message = full(place, ("build-prompts", "long.csv", "--task", "task.yaml", "--out", "disk/new"))
    assert "disk/new: cannot be written: No space left on device. Make room on the disk" in message
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("size", [0, 24, 100, 180])
def test_a_training_on_a_full_disk_goes_on_when_there_is_room(
    place: Place, disk: Callable[[str], Path], size: int
) -> None:
    words = ("finetune", "prompts", "--model", "base", "--out", "disk/new", *SETTINGS)
    folder = disk(f"size={max(size, 4)}k")
    if not size:
        (folder / "other").write_bytes(b"x" * 4096)
    full(place, words)
    (folder / "other").unlink(missing_ok=True)
    disk("size=4m")
    code, _, err = place.command(*words, "--resume")
    assert code == 0, err
    assert [place.name for place in folder.iterdir()] == ["new"]
    weights = load_file(folder / "new" / "adapter" / "adapter_model.safetensors")
    whole = load_file(place.path("run/adapter/adapter_model.safetensors"))
    assert all(torch.equal(weights[name], whole[name]) for name in whole)


def test_a_prediction_on_a_full_disk_goes_on_when_there_is_room(place: Place, disk: Callable[[str], Path]) -> None:
    place.edit_config("predict", batch_tokens=300)
    place.write("long.csv", "uuid,title,abstract\n" + "".join(f"l{i},t{i},{i}\n" for i in range(400)))
    assert place.command(*place.predict("long.csv"))[0] == 0
    folder = disk("size=16k")
    words = ("predict", "run", "long.csv", "--out", "disk/new.csv")
    message = full(place, words)
    assert "No space left on device" in message and "--resume goes on" in message
    assert [file.name for file in folder.iterdir()] == ["new.csv.partial"]
    disk("size=1m")
    code, _, err = place.command(*words, "--resume")
    assert code == 0 and "Going on: " in err, err
    assert (folder / "new.csv").read_bytes() == place.path("new.csv").read_bytes()
    assert [file.name for file in folder.iterdir()] == ["new.csv"]


def test_predictions_and_metrics_on_a_disk_that_is_full_from_the_start(
    place: Place, disk: Callable[[str], Path]
) -> None:
    folder = disk("size=4k")
    (folder / "other").write_bytes(b"x" * 4096)
    for words in (
        ("predict", "run", "rows.csv", "--out", "disk/new.csv"),
        ("evaluate", "predictions.csv", "--out", "disk"),
    ):
        assert "No space left on device" in full(place, words)
        assert [file.name for file in folder.iterdir()] == ["other"]


@pytest.mark.parametrize("words", [("finetune", "prompts", "--model", "base"), ("predict", "run", "rows.csv")])
def test_a_place_that_may_only_be_read(place: Place, disk: Callable[[str], Path], words: tuple[str, ...]) -> None:
    disk("size=1m")
    folder = disk("ro")
    message = full(place, (*words, "--out", "disk/below/new.csv"))
    assert "disk/below/new.csv: cannot be written: Read-only file system. See to room and rights there" in message
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_no_permission(place: Place) -> None:
    place.path("rows.csv").chmod(0)
    code, _, err = place.command(*place.predict())
    assert code == 2 and "rows.csv: cannot be read: Permission denied" in err
    place.path("closed").mkdir(mode=0o555)
    code, _, err = place.command("build-prompts", "many.csv", "--task", "task.yaml", "--out", "closed/new")
    assert code == 2 and "closed/new: cannot be written: Permission denied" in err


def test_a_file_that_may_not_grow(place: Place) -> None:
    """What a quota does, in a process of its own; no rights to mount are needed."""
    place.write("long.csv", "uuid,title,abstract\n" + "".join(f"l{i},t{i},{i}\n" for i in range(200)))
    place.edit_config("predict", batch_tokens=300)
    words = [sys.executable, "-m", "llm_clf", "predict", "run", "long.csv", "--out", "new.csv"]
    limit = (4096, resource.RLIM_INFINITY)
    done = subprocess.run(
        words,
        env=environment(),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
        check=False,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: new.csv.partial: cannot be written: File too large. Make room"), done.stderr
    assert place.command(*words[3:], "--resume")[0] == 0
    assert not partial_name(place.path("new.csv")).exists()
