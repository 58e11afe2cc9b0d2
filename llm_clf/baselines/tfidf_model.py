"""A TF-IDF model on disk, without pickle, and as something that scores prompts."""

import copy
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
import skops.io
from sklearn.exceptions import InconsistentVersionWarning
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.pipeline import Pipeline
from skops.io.exceptions import UntrustedTypesFoundException

from llm_clf.console import say
from llm_clf.engine.scores import Scored, windows
from llm_clf.errors import ArtifactError
from llm_clf.files import replacing
from llm_clf.prompting.prompts import Prompt

# What a model holds beside scikit-learn's public classes and numpy's arrays, which skops trusts by itself.
TRUSTED = (
    "sklearn.calibration._CalibratedClassifier",
    "sklearn.calibration._SigmoidCalibration",
    "sklearn.model_selection._split.StratifiedKFold",
)
BATCH_ROWS = 512


def save_pipeline(file: Path, pipeline: Pipeline) -> None:
    """Write a fitted pipeline with skops; its n-grams as one text a block, for skops needs 800 bytes for each."""
    vocabularies = {name: counts.vocabulary_ for name, counts in _vectorizers(pipeline).items()}
    # In the copy an empty vocabulary stands in place of each.
    bare = copy.deepcopy(pipeline, {id(vocabulary): {} for vocabulary in vocabularies.values()})
    n_grams = {name: "\n".join(sorted(found, key=found.__getitem__)) for name, found in vocabularies.items()}
    with replacing(file) as temporary:
        skops.io.dump({"pipeline": bare, "n_grams": n_grams}, temporary, compression=zipfile.ZIP_DEFLATED)


def load_pipeline(file: Path) -> Pipeline:
    """Return a pipeline that `save_pipeline` wrote.

    Raises:
        ArtifactError: The file is damaged, holds types that are not trusted, or another model.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", InconsistentVersionWarning)
        try:
            stored = skops.io.load(file, trusted=list(TRUSTED))
        except UntrustedTypesFoundException as error:
            raise ArtifactError(
                f"{file}: holds what a model of this kind does not, and it is not loaded: {error}. Train again."
            ) from error
        except Exception as error:
            # A damaged file shows itself in any error of zip, JSON, numpy or the objects that are put together.
            reason = " ".join(str(error).split())[:300]
            raise ArtifactError(
                f"{file}: is damaged: {reason or repr(error)}. Copy it again, or train again."
            ) from error
    versions = [one.message for one in caught if isinstance(one.message, InconsistentVersionWarning)]
    for found in versions[:1]:
        say(
            f"Note: {file} was made with scikit-learn {found.original_sklearn_version}, and this is "
            f"{found.current_sklearn_version}: probabilities can differ."
        )
    return _with_n_grams(file, stored)


def _with_n_grams(file: Path, stored: object) -> Pipeline:
    """Put the n-grams back, and see that what was stored is whole."""
    try:
        pipeline, n_grams = stored["pipeline"], stored["n_grams"]  # type: ignore[index]
        if not isinstance(pipeline, Pipeline):
            raise TypeError(f"found {type(pipeline).__name__}")
        for name, counts in _vectorizers(pipeline).items():
            counts.vocabulary_ = {n_gram: place for place, n_gram in enumerate(n_grams[name].split("\n"))}
        pipeline.predict_proba([""])
    except Exception as error:
        raise ArtifactError(f"{file}: is no model that `llm-clf baseline tfidf` wrote. Train again.") from error
    return pipeline


def _vectorizers(pipeline: Pipeline) -> dict[str, CountVectorizer]:
    return {name: block.named_steps["counts"] for name, block in pipeline.named_steps["features"].transformer_list}


class TfidfScorer:
    """Scores prompts by their inputs; the instruction is the same for all and tells nothing.

    Args:
        pipeline: Fitted: texts in, probabilities out.
        names: Labels in the task's order. One that no training row had scores lowest.
    """

    def __init__(self, pipeline: Pipeline, names: Sequence[str]) -> None:
        self._pipeline = pipeline
        self._columns = [names.index(label) for label in pipeline.classes_]
        self._labels = len(names)

    def score(
        self,
        prompts: Iterable[Prompt],
        done: Callable[[Scored], None],
        finished: Collection[int] = (),
        *,
        fits: int | None = None,
        found: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        """Score prompts batch by batch, as `Scorer` says; memory is no question here."""
        first = 0
        for batch in windows(prompts, BATCH_ROWS):
            rows = list(range(first, first + len(batch)))
            if not all(row in finished for row in rows):
                done(Scored(rows, self._scores([prompt.input for prompt in batch]), [False] * len(rows), None))
            first += len(batch)

    def _scores(self, texts: Sequence[str]) -> np.ndarray:
        """Return log-probabilities in nats, fp32, shape `(texts, labels)`."""
        probs = np.zeros((len(texts), self._labels))
        probs[:, self._columns] = self._pipeline.predict_proba(texts)
        # The smallest number in place of 0 keeps the logarithm finite; as a probability in fp32 it is 0 again.
        return np.log(np.maximum(probs, np.finfo(probs.dtype).tiny)).astype(np.float32)
