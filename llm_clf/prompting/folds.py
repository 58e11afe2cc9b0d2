"""Rows cut into folds by label, equal texts together: by the texts and the seed alone, as splits are."""

from collections.abc import Sequence

from llm_clf.errors import ConfigError
from llm_clf.prompting.duplicates import text_key
from llm_clf.prompting.prompts import Prompt
from llm_clf.prompting.splits import split_keys


def fold_rows(prompts: Sequence[Prompt], count: int, seed: int) -> list[list[int]]:
    """Return the numbers of the rows of each fold, in their order.

    Args:
        prompts: Labelled rows. Texts that differ only in Unicode form or white space fall into one fold, whatever
            their labels.
        count: Of folds.
        seed: Of who falls where.

    Raises:
        ConfigError: Some fold would have no row, or leave rows of one label only to train on.
    """
    keys = [text_key(prompt.input) for prompt in prompts]
    strata: dict[str | None, dict[bytes, None]] = {}
    first: dict[bytes, str | None] = {}
    for key, prompt in zip(keys, prompts, strict=True):
        strata.setdefault(first.setdefault(key, prompt.label), {})[key] = None
    fold_of = split_keys({label: list(texts) for label, texts in strata.items()}, [1 / count] * count, seed)
    folds = [[row for row, key in enumerate(keys) if fold_of[key] == fold] for fold in range(count)]
    for fold in folds:
        held_out = set(fold)
        left = {prompt.label for row, prompt in enumerate(prompts) if row not in held_out}
        if not fold or len(left) < 2:
            raise ConfigError(
                f"--folds {count}: the {len(prompts):,} training rows, {len(first):,} different texts, are too few: "
                "each fold needs a row, and the others rows of two labels. Give fewer folds or more rows."
            )
    return folds
