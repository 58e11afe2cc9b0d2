"""A prompts folder as what a model is trained and validated on."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from llm_clf.errors import DataError
from llm_clf.files import file_hash
from llm_clf.prompting.prompts import SPLITS, Prompt, read_split
from llm_clf.prompting.tasks import Task, load_task


@dataclass(frozen=True, slots=True)
class TrainingData:
    """What is trained and validated on."""

    folder: Path
    task: Task
    train: list[Prompt]
    """Labelled rows only."""
    valid: list[Prompt]
    unlabelled: int
    """Training rows left out because they have no label."""
    hashes: dict[str, str]
    """Of the prompts files, by split."""

    @property
    def validates(self) -> bool:
        """Whether any validation row has a label."""
        return any(prompt.label is not None for prompt in self.valid)

    @property
    def counts(self) -> dict[str, int]:
        """Return how many training rows each label has, in the task's order."""
        found = Counter(prompt.label for prompt in self.train)
        return {name: found[name] for name in self.task.names}


def read_training_data(folder: Path) -> TrainingData:
    """Return the training and validation rows of a folder that `build-prompts` made.

    Raises:
        DataError: It is no such folder, or its training rows have fewer than two labels.
    """
    if not (folder / "task.yaml").is_file():
        raise DataError(f"{folder}: has no task.yaml. Give a folder that `llm-clf build-prompts` made.")
    task = load_task(folder / "task.yaml")
    rows = read_split(folder, "train", task)
    train = [row for row in rows if row.label is not None]
    found = Counter(row.label for row in train)
    if len(found) < 2:
        raise DataError(
            f"{folder / 'train.jsonl'}: found {len(train)} labelled rows with {len(found)} labels; training needs rows "
            "of at least two. Give more rows, or a larger share for training (--split)."
        )
    valid = read_split(folder, "valid", task)
    hashes = {split: file_hash(folder / f"{split}.jsonl") for split in SPLITS[:2]}
    return TrainingData(folder, task, train, valid, len(rows) - len(train), hashes)
