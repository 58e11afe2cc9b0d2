"""Tokens kept on disk: the same as without, found again by content alone, and never trusted when damaged."""

import errno
import os
import threading
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import CHAT_TEMPLATE, SHORT_TASK

import llm_clf
from llm_clf.config import ModelSettings
from llm_clf.engine import token_cache, tokens
from llm_clf.engine.token_cache import ENDING, KEPT, TokenCache
from llm_clf.engine.tokens import Example, PromptTokenizer
from llm_clf.models.bases import load_tokenizer
from llm_clf.prompting.prompts import Prompt
from llm_clf.prompting.tasks import load_task

TEXTS = ["Heart:Aspirin", "Lung:" + "steroids 心 " * 30, "Bridge:", ":🫀", "no template", ""]
EXAMPLES = [Example(array("i", [3, 1, 2**31 - 1]), True), Example(array("i"), False), Example(array("i", [7]), False)]

MakeBase = Callable[..., Path]
Tokens = list[tuple[list[int], bool]]


def plain(examples: list[Example]) -> Tokens:
    return [(list(example.ids), example.cut) for example in examples]


def nothing() -> list[Example]:
    raise AssertionError("was to be found")


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []


class Work:
    """Tokenises rows, and says whether they were tokenised or found."""

    def __init__(self, folder: Path, make_base: MakeBase, task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self._make_base, self._task = make_base, task
        self._calls = 0
        original = tokens.tokenize_text

        def counted(tokenizer: Any, texts: list[str]) -> list[list[int]]:
            self._calls += len(texts)
            return original(tokenizer, texts)

        monkeypatch.setattr(tokens, "tokenize_text", counted)
        monkeypatch.setattr(tokens, "WORTHWHILE", 1)

    def encode(
        self,
        *,
        texts: list[str] = TEXTS,
        task: str = SHORT_TASK,
        max_length: int = 60,
        cut: str | None = None,
        tokenizer: Callable[[Any], Any] = lambda tokenizer: tokenizer,
        cached: bool = True,
        **base: Any,
    ) -> tuple[Tokens, bool]:
        """Return the tokens, and whether they were found."""
        self._task.write_text(task, encoding="utf-8")
        made = tokenizer(load_tokenizer(ModelSettings(name=str(self._make_base("glm", **base)))))
        cache = TokenCache(self.folder / "tokens") if cached else None
        encoder = PromptTokenizer(made, load_task(self._task), max_length=max_length, cut=cut, cache=cache)
        before = self._calls
        found = plain(encoder.encode([Prompt("x", text, None, {}) for text in texts]))
        return found, self._calls == before


@pytest.fixture
def work(tmp_path: Path, make_base: MakeBase, short_task: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    return Work(tmp_path, make_base, short_task, monkeypatch)


def test_tokens_are_the_same_without_a_cache_made_and_found(work: Work) -> None:
    without, _ = work.encode(cached=False)
    assert files(work.folder / "tokens") == []
    assert work.encode() == (without, False)
    assert work.encode() == (without, True)
    assert len(files(work.folder / "tokens")) == 1 and [cut for _, cut in without].count(True) == 1


def lower_cased(tokenizer: Any) -> Any:
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


@pytest.mark.parametrize(
    "change",
    [
        {"texts": [*TEXTS[:-1], " "]},
        {"texts": TEXTS[:-1]},
        {"texts": [*TEXTS[:2], TEXTS[2] + TEXTS[3], *TEXTS[4:], ""]},
        {"texts": TEXTS[::-1]},
        {"task": SHORT_TASK.replace("Medical?", "Medicine?")},
        {"task": SHORT_TASK.replace("{title}:{abstract}", "{abstract}:{title}")},
        {"task": SHORT_TASK.replace("cut: abstract", "cut: null")},
        {"task": SHORT_TASK.replace('"1"]', '"10"]')},
        {"max_length": 61},
        {"cut": "title"},
        {"template": CHAT_TEMPLATE},
        {"bos": True},
        {"tokenizer": lower_cased},
    ],
)
def test_nothing_is_found_where_anything_else_is_given(work: Work, change: dict[str, Any]) -> None:
    work.encode()
    without, _ = work.encode(**change, cached=False)
    assert work.encode(**change) == (without, False)
    assert work.encode(**change) == (without, True)


def test_text_that_is_no_unicode_has_a_key(tmp_path: Path) -> None:
    cache = TokenCache(tmp_path / "tokens")
    cache.get(["a\ud800"], lambda: EXAMPLES)
    assert plain(cache.get(["a\ud800"], nothing)) == plain(EXAMPLES)
    assert cache.get(["a?"], list) == []


def test_few_rows_and_a_tokenizer_in_python_keep_nothing(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        """A tokenizer that does not tell what it is made of."""

        is_fast = False

        def __init__(self, fast: Any) -> None:
            self._fast = fast

        def __getattr__(self, name: str) -> Any:
            return getattr(self._fast, name)

        def __call__(self, *texts: Any, **options: Any) -> Any:
            return self._fast(*texts, **options)

    without, _ = work.encode()
    (work.folder / "tokens").rename(work.folder / "other")
    assert work.encode(tokenizer=Slow) == (without, False)
    monkeypatch.setattr(tokens, "WORTHWHILE", sum(map(len, TEXTS)) + 1)
    assert work.encode() == (without, False) and files(work.folder / "tokens") == []
    monkeypatch.setattr(tokens, "WORTHWHILE", sum(map(len, TEXTS)))
    assert work.encode() == (without, False) and len(files(work.folder / "tokens")) == 1


def test_no_changed_byte_is_trusted(tmp_path: Path) -> None:
    cache = TokenCache(tmp_path / "tokens")
    cache.get(["key"], lambda: EXAMPLES)
    (file,) = (tmp_path / "tokens").iterdir()
    whole = file.read_bytes()
    wrong = [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in range(len(whole))]
    wrong += [b"", b"\0", whole[: len(whole) // 2], whole[:-1], whole + b"\0", whole[4:], b"text " * 100]
    for content in wrong:
        file.write_bytes(content)
        assert plain(cache.get(["key"], lambda: EXAMPLES)) == plain(EXAMPLES)
        assert file.read_bytes() == whole
    assert plain(cache.get(["key"], nothing)) == plain(EXAMPLES)


def test_a_file_under_the_name_of_another_is_not_trusted(tmp_path: Path) -> None:
    cache = TokenCache(tmp_path / "tokens")
    cache.get(["key"], lambda: EXAMPLES)
    (file,) = (tmp_path / "tokens").iterdir()
    cache.get(["other"], list)
    (other,) = set((tmp_path / "tokens").iterdir()) - {file}
    file.replace(other)
    assert cache.get(["other"], list) == []


def test_a_place_that_cannot_be_written_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    gone = tmp_path / "gone"
    for folder in (tmp_path / "file", gone / "tokens"):
        for _ in range(2):
            assert TokenCache(folder).get(["key"], lambda: EXAMPLES) is EXAMPLES
    assert not gone.exists() and (tmp_path / "file").read_text() == "no folder"

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(token_cache.os, "replace", full)
    assert TokenCache(tmp_path / "tokens").get(["key"], lambda: EXAMPLES) is EXAMPLES
    assert files(tmp_path / "tokens") == []


def test_the_files_used_last_stay(tmp_path: Path) -> None:
    folder, cache = tmp_path / "tokens", TokenCache(tmp_path / "tokens")
    names = []
    for age in range(KEPT):
        cache.get([str(age)], lambda: EXAMPLES)
        (name,) = set(files(folder)) - set(names)
        names.append(name)
        os.utime(folder / name, (100 + age, 100 + age))
    left = folder / f"killed{ENDING}.x1"
    foreign = folder / "notes.txt"
    for other in (left, foreign):
        other.write_text("x")
        os.utime(other, (1, 1))
    cache.get(["0"], nothing)  # now it is the newest
    cache.get(["new"], lambda: EXAMPLES)
    assert len(files(folder)) == KEPT + 1 and foreign.exists() and not left.exists()
    assert names[0] in files(folder) and names[1] not in files(folder)


def test_trainings_side_by_side_find_whole_tokens_or_make_them(tmp_path: Path) -> None:
    keys = [str(number) for number in range(KEPT + 2)]
    wanted = {key: [Example(array("i", range(int(key) * 100)), False)] for key in keys}
    wrong: list[str] = []

    def training(seed: int) -> None:
        cache = TokenCache(tmp_path / "tokens")
        for turn in range(60):
            key = keys[(seed + turn // 2) % len(keys)]
            if plain(cache.get([key], lambda: wanted[key])) != plain(wanted[key]):  # noqa: B023
                wrong.append(key)

    both = [threading.Thread(target=training, args=(seed,)) for seed in range(4)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert not wrong and all(name.endswith(ENDING) for name in files(tmp_path / "tokens"))


def test_a_training_is_the_same_with_and_without(
    work: Work, prompts: Path, many_rows: Path, base: Path, tmp_path: Path, short_task: Path
) -> None:
    written = {}
    settings = ["train.epochs=2", "model.dtype=fp32", "data.max_length=48"]
    for name, more in (("without", ["data.token_cache=false"]), ("made", []), ("found", [])):
        run = tmp_path / name
        before = work._calls
        llm_clf.finetune(prompts, out=run, model=str(base), set=[*settings, *more])
        places = (run / "predictions-valid.parquet", run / "adapter" / "adapter_model.safetensors")
        written[name] = [place.read_bytes() for place in places]
        assert len(files(prompts / "tokens")) == (0 if more else 2)
        written[name].append(work._calls - before)
    assert written["without"][:2] == written["made"][:2] == written["found"][:2]
    assert written["found"][2] < written["made"][2] < written["without"][2]
    llm_clf.build_prompts([many_rows], task=short_task, out=prompts, overwrite=True)
    assert not (prompts / "tokens").exists()
