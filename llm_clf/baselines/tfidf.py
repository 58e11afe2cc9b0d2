"""TF-IDF of word and character n-grams with a linear model, which a search on the training rows chooses.

Words are what a person reads in it; characters carry languages that write no spaces, and forms of one word.
"""

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, hstack
from sklearn.calibration import CalibratedClassifierCV
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import FeatureUnion, Pipeline
from sklearn.svm import LinearSVC
from sklearn.utils import resample

from llm_clf.console import progress
from llm_clf.errors import DataError
from llm_clf.evaluation.metrics import compute_metrics

WORDS, CHARACTERS = "words", "characters"
N_GRAMS: dict[str, dict[str, Any]] = {
    WORDS: {"analyzer": "word", "ngram_range": (1, 2), "token_pattern": r"(?u)\b\w+\b"},
    CHARACTERS: {"analyzer": "char_wb", "ngram_range": (1, 4)},
}
# An n-gram counts from so many training rows on.
MIN_ROWS = 2
FOLDS = 3
# More rows are sampled for the search, which so takes no longer; the chosen model is fitted on all.
SEARCH_ROWS = 10_000
LOGISTIC, SVM = "logistic regression", "linear SVM"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A linear model that the search tries."""

    model: str
    c: float
    """Inverse strength of the regularisation."""

    def build(self, labels: int, seed: int) -> Any:
        """Return the model for so many labels, not fitted."""
        if self.model == SVM:
            return LinearSVC(C=self.c, random_state=seed)
        # A model for each label takes half the time of one for all, and is no worse.
        model = LogisticRegression(C=self.c, solver="liblinear", dual=True, random_state=seed)
        return model if labels == 2 else OneVsRestClassifier(model)


CANDIDATES = (*(Candidate(LOGISTIC, c) for c in (1.0, 10.0, 100.0)), *(Candidate(SVM, c) for c in (0.1, 1.0, 10.0)))
WITHOUT_SEARCH = Candidate(LOGISTIC, 10.0)


@dataclass(frozen=True, slots=True)
class Tried:
    """What the search found of a candidate, on rows that it was not fitted on."""

    candidate: Candidate
    accuracy: float
    f1: float
    """Of the second label where there are two, else the mean over labels."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """A model fitted on all training rows, and how it was chosen."""

    pipeline: Pipeline
    """Texts in, probabilities out."""
    chosen: Candidate
    tried: list[Tried]
    """Empty where no search was possible."""
    calibrated: bool


def fit(texts: Sequence[str], labels: Sequence[str], names: Sequence[str], *, seed: int) -> Fitted:
    """Choose a linear model by cross-validation and fit it on all rows; the same seed gives the same model.

    Args:
        texts: Of the training rows.
        labels: Of the same rows, at least two different ones.
        names: All labels in the task's order.
        seed: Of the folds.

    Raises:
        DataError: The texts are empty.
    """
    truth = np.array(labels)
    rarest = min(Counter(labels).values())
    vectorizers, counts = _count(texts)
    with warnings.catch_warnings():
        # A candidate that has not converged is measured like any other.
        warnings.simplefilter("ignore", ConvergenceWarning)
        # A linear SVM has no probabilities of its own, and a label with one row leaves none to calibrate on.
        candidates = [candidate for candidate in CANDIDATES if rarest > 1 or candidate.model == LOGISTIC]
        tried = _search(candidates, counts, truth, names, seed)
        chosen = max(tried, key=lambda one: one.f1).candidate if tried else WITHOUT_SEARCH
        classifier = chosen.build(len(set(labels)), seed)
        if rarest > 1:
            folds = StratifiedKFold(min(FOLDS, rarest), shuffle=True, random_state=seed)
            classifier = CalibratedClassifierCV(classifier, cv=folds, ensemble=False)
        weights = [TfidfTransformer(sublinear_tf=True).fit(block) for block in counts]
        classifier.fit(_weigh(weights, counts), truth)
    blocks = [
        (name, Pipeline([("counts", vectorizer), ("weights", weight)]))
        for (name, vectorizer), weight in zip(vectorizers.items(), weights, strict=True)
    ]
    pipeline = Pipeline([("features", FeatureUnion(blocks)), ("classifier", classifier)])
    return Fitted(pipeline, chosen, tried, calibrated=rarest > 1)


def _count(texts: Sequence[str]) -> tuple[dict[str, CountVectorizer], list[csr_matrix]]:
    """Return the n-grams that stand in enough rows and their counts, words and characters apart, read once."""
    vectorizers, counts = {}, []
    for name, options in N_GRAMS.items():
        vectorizer = CountVectorizer(min_df=MIN_ROWS, dtype=np.float32, **options)
        try:
            counts.append(vectorizer.fit_transform(texts))
        except ValueError:
            # The only fault that these options can have: no n-gram is left, as of words in Chinese.
            continue
        vectorizers[name] = vectorizer
    if not counts:
        raise DataError(
            f"The texts of the {len(texts):,} training rows are empty, so there is nothing to learn. Look at the "
            "columns that the task's input names."
        )
    return vectorizers, counts


def _weigh(weights: Sequence[TfidfTransformer], counts: Sequence[csr_matrix]) -> csr_matrix:
    return hstack([weight.transform(block) for weight, block in zip(weights, counts, strict=True)], format="csr")


def _search(
    candidates: Sequence[Candidate], counts: Sequence[csr_matrix], truth: np.ndarray, names: Sequence[str], seed: int
) -> list[Tried]:
    """Return how well each candidate predicts training rows that it has not seen; nothing where rows are too few.

    The n-grams are those of all training rows, and only their weights and the model are fitted anew in a fold: which
    n-grams there are tells nothing of labels.
    """
    rows = np.arange(len(truth))
    if len(rows) > SEARCH_ROWS:
        rows = np.sort(resample(rows, replace=False, n_samples=SEARCH_ROWS, stratify=truth, random_state=seed))
        counts, truth = [block[rows] for block in counts], truth[rows]
    # With so many folds, each is fitted on rows of two labels at least.
    folds = min(FOLDS, Counter(truth.tolist()).most_common(2)[1][1])
    if folds < 2:
        return []
    predicted = {candidate: np.empty_like(truth) for candidate in candidates}
    splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings(), progress("trying models", folds * len(candidates), "fits") as advance:
        # Where a label is that rare, a fold or two go without it.
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        for train, held_out in splitter.split(truth, truth):
            weights = [TfidfTransformer(sublinear_tf=True).fit(block[train]) for block in counts]
            seen, unseen = (_weigh(weights, [block[part] for block in counts]) for part in (train, held_out))
            for candidate in candidates:
                model = candidate.build(len(set(truth[train].tolist())), seed).fit(seen, truth[train])
                predicted[candidate][held_out] = model.predict(unseen)
                advance(1)
    return [_tried(candidate, truth, found, names) for candidate, found in predicted.items()]


def _tried(candidate: Candidate, truth: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> Tried:
    metrics = compute_metrics(truth.tolist(), predicted.tolist(), None, names)
    return Tried(candidate, metrics["accuracy"], metrics["f1"])


@dataclass(frozen=True, slots=True)
class TellingFeature:
    """An n-gram that speaks for a label."""

    label: str
    kind: str
    """Whether it is of words or of characters."""
    feature: str
    weight: float
    """The linear model's coefficient."""


def telling_features(pipeline: Pipeline, names: Sequence[str], count: int) -> list[TellingFeature]:
    """Return the n-grams that speak most for each label, up to `count` of words and as many of characters."""
    classifier = pipeline.named_steps["classifier"]
    linear = classifier
    if isinstance(classifier, CalibratedClassifierCV):
        linear = classifier.calibrated_classifiers_[0].estimator
    one_a_label = linear.estimators_ if isinstance(linear, OneVsRestClassifier) else [linear]
    coefficients = np.vstack([model.coef_ for model in one_a_label])
    if len(coefficients) == 1:
        # Of two labels there is one row: for the second, against the first.
        coefficients = np.vstack([-coefficients, coefficients])
    row_of = {label: row for row, label in enumerate(linear.classes_.tolist())}
    found, start = [], 0
    for kind, block in pipeline.named_steps["features"].transformer_list:
        features = block.named_steps["counts"].get_feature_names_out()
        for label in names:
            if label in row_of:
                weights = coefficients[row_of[label], start : start + len(features)]
                best = [place for place in np.argsort(-weights, kind="stable")[:count] if weights[place] > 0]
                found += [TellingFeature(label, kind, str(features[place]), float(weights[place])) for place in best]
        start += len(features)
    return sorted(found, key=lambda one: names.index(one.label))
