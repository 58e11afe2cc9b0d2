"""TF-IDF + logistic regression on a prompts folder: the figure that an LLM must beat.

python scripts/tfidf.py output/contest/prompts
"""

import time
from pathlib import Path

import numpy as np
import typer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from llm_clf.evaluation.metrics import compute_metrics
from llm_clf.prompting.prompts import read_split
from llm_clf.prompting.tasks import load_task


def main(data: Path) -> None:
    """Fit on the training prompts and print accuracy, F1, ROC-AUC and log-loss on the test prompts."""
    task = load_task(data / "task.yaml")
    train, test = ([row for row in read_split(data, split, task) if row.label] for split in ("train", "test"))
    started = time.monotonic()
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True), LogisticRegression(C=10, max_iter=1000)
    )
    model.fit([row.input for row in train], [row.label for row in train])
    order = [list(model.classes_).index(label) for label in task.names]
    probs = model.predict_proba([row.input for row in test])[:, order]
    predicted = [task.names[choice] for choice in np.argmax(probs, axis=1)]
    metrics = compute_metrics([row.label or "" for row in test], predicted, probs, task.names)
    figures = ", ".join(f"{name} {metrics[name]:.4f}" for name in ("accuracy", "f1", "roc_auc", "log_loss"))
    print(f"TF-IDF + logistic regression, {len(train)} training rows: {figures}, {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    typer.run(main)
