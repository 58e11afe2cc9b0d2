"""The command line: each command parses, calls the function of its name, and prints."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from llm_clf.errors import ConfigError, LlmClfError

INTERRUPTED = 130
RESUMABLE = {"finetune", "encoder", "predict", "ensemble", "import-chatglm"}

app = typer.Typer(
    name="llm-clf",
    help="Turn a large language model into a text classifier with LoRA.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

baseline = typer.Typer(
    help="Train a smaller model that says whether a language model is worth its price.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
app.add_typer(baseline, name="baseline")

Rows = Annotated[
    list[Path],
    typer.Argument(help="CSV, TSV, JSONL, JSON or Parquet (also .gz), or prompts files; - is standard input."),
]
Prompts = Annotated[Path, typer.Argument(metavar="DIR", help="Folder that build-prompts made.")]
RunPlace = Annotated[Path, typer.Option(metavar="RUN", help="Folder for the run.")]
Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Finished runs of one task, of any kind.")]
Encoding = Annotated[str, typer.Option(help="Encoding of text files, such as gb18030.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what stands at --out.")]
Config = Annotated[Path | None, typer.Option(help="YAML file of settings.")]
Set = Annotated[
    list[str] | None, typer.Option(metavar="KEY=VALUE", help="One setting, such as lora.r=16; may be repeated.")
]
ModelSet = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE",
        help="One setting of model, predict, decide or speed, such as model.quantization=4bit or decide.objective=f1.",
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what an interrupted command left.")]


@app.command("build-prompts")
def build_prompts(
    rows: Rows,
    task: Annotated[str, typer.Option(help="A task file, or the name of one that ships.")],
    out: Annotated[Path, typer.Option(help="Folder for train, valid and test prompts.")],
    split: Annotated[str, typer.Option(help="Shares of train, valid and test.")] = "0.8,0.1,0.1",
    seed: Annotated[int, typer.Option(help="Seed of the split.")] = 42,
    encoding: Encoding = "utf-8",
    near_duplicates: Annotated[
        str,
        typer.Option(
            metavar="warn|drop|ignore",
            help="Rows that are nearly the same as one of another split: tell of them, or drop those to train on.",
        ),
    ] = "warn",
    overwrite: Overwrite = False,
) -> None:
    """Make prompts from rows: checked, without duplicates, split by label.

    Example: `llm-clf build-prompts data/papers.csv --task medical_paper --out output/prompts`
    """
    from llm_clf.commands import build_prompts as command

    command.build_prompts(
        rows,
        task=task,
        out=out,
        split=split,
        seed=seed,
        encoding=encoding,
        near_duplicates=near_duplicates,  # type: ignore[arg-type]
        overwrite=overwrite,
    )


@app.command()
def finetune(
    data: Prompts,
    out: RunPlace,
    model: Annotated[
        str | None, typer.Option(metavar="BASE", help="glm-nano (the default), a model folder, or a Hugging Face id.")
    ] = None,
    config: Config = None,
    set: Set = None,
    sweep: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="YAML file of settings to try; the best of these trainings becomes the run."),
    ] = None,
    folds: Annotated[
        int | None,
        typer.Option(help="Train once for each fold of the training rows, on all others; the run is the mean of all."),
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Train a LoRA adapter on prompts; keep the best by validation F1.

    Example: `llm-clf finetune output/prompts --out output/run --set train.epochs=5`
    """
    from llm_clf.commands import finetune as command

    command.finetune(
        data,
        out=out,
        model=model,
        config=config,
        set=set or (),
        sweep=sweep,
        folds=folds,
        resume=resume,
        overwrite=overwrite,
    )


@app.command()
def predict(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run folder, or an adapter folder with --task and --model.")
    ],
    rows: Rows,
    out: Annotated[Path, typer.Option(metavar="FILE", help=".csv, .jsonl or .parquet; - is JSONL on standard output.")],
    decode: Annotated[
        str,
        typer.Option(metavar="score|generate", help="Score the labels, or let the model write and read its answer."),
    ] = "score",
    columns: Annotated[
        str | None, typer.Option(help="Columns to write, comma-separated; the rows' own columns may be named too.")
    ] = None,
    fill: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="What a column of --columns holds where the rows lack it or their cell is empty; may be repeated.",
        ),
    ] = None,
    task: Annotated[str | None, typer.Option(help="For a bare adapter: the task.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="BASE", help="For a bare adapter: the base. For a run: where its base is now.")
    ] = None,
    set: ModelSet = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Bare probabilities and the most probable label, whatever the run decides by.")
    ] = False,
    prior: Annotated[
        str | None,
        typer.Option(
            metavar="LABEL=SHARE,...", help="How frequent labels are in these rows, where that differs from training."
        ),
    ] = None,
    encoding: Encoding = "utf-8",
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Predict a label and the probability of each label for every row.

    Example: `llm-clf predict output/run data/papers-new.csv --out output/predictions.csv`
    """
    from llm_clf.commands import predict as command

    command.predict(
        run,
        rows,
        out=out,
        decode=decode,  # type: ignore[arg-type]
        columns=columns,
        fill=_parse_fill(fill or []),
        task=task,
        model=model,
        set=set or (),
        raw=raw,
        prior=_parse_prior(prior) if prior is not None else None,
        encoding=encoding,
        resume=resume,
        overwrite=overwrite,
    )


def _parse_prior(text: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for part in text.split(","):
        # A label may hold an equals sign; a share cannot.
        label, equals, share = part.rpartition("=")
        try:
            value = float(share)
        except ValueError:
            value = float("nan")
        if not (equals and label) or not 0 < value < 1:
            raise ConfigError(f"--prior {part!r}: expected LABEL=SHARE with a share between 0 and 1, such as 1=0.02.")
        if label in found:
            raise ConfigError(f"--prior: names {label!r} more than once; name each label once.")
        found[label] = value
    return found


def _parse_fill(fill: list[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in fill]
    names = [name for name, _, _ in pairs]
    for text, (name, equals, _) in zip(fill, pairs, strict=True):
        if not (name and equals):
            raise ConfigError(f"--fill {text!r}: expected NAME=VALUE, such as Keywords=none.")
        if names.count(name) > 1:
            raise ConfigError(f"--fill: names {name!r} more than once; name each column once.")
    return {name: value for name, _, value in pairs}


@app.command()
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="File that predict wrote from labelled rows.")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for metrics.json, report.html and its plots as PNG.")
    ] = None,
    rows: Annotated[
        Path | None,
        typer.Option(metavar="ROWS", help="The rows that were predicted; their texts and columns are shown."),
    ] = None,
    run: Annotated[
        Path | None, typer.Option(metavar="RUN", help="What made the predictions; the report shows how it learned.")
    ] = None,
    slice: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN", help="A column by whose values the report tells apart; may be repeated."),
    ] = None,
    suspects: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.csv",
            help="Write the rows whose gold label looks wrong. The predictions must come from a model that was not "
            "trained on these rows: of validation or test rows, or out-of-fold.",
        ),
    ] = None,
    encoding: Encoding = "utf-8",
) -> None:
    """Measure predictions against the gold labels; with --out, write a report to look at.

    Example: `llm-clf evaluate output/predictions.parquet --out output/report --rows output/prompts/test.jsonl`
    """
    from llm_clf.commands import evaluate as command
    from llm_clf.evaluation.tables import metrics_text

    print(
        metrics_text(
            command.evaluate(
                predictions, out=out, rows=rows, run=run, slice=slice or (), suspects=suspects, encoding=encoding
            )
        )
    )


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="PREDICTIONS", help="File that predict wrote from labelled rows: A.")],
    b: Annotated[Path, typer.Argument(metavar="PREDICTIONS", help="Another one of the same rows: B.")],
    metric: Annotated[str, typer.Option(help="The metric of the verdict.")] = "f1",
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for comparison.json and flips.csv.")] = None,
) -> None:
    """Tell whether one of two predictions of the same rows is really better, and which rows flip.

    Example: `llm-clf compare output/tfidf.parquet output/predictions.parquet --out output/comparison`
    """
    from llm_clf.commands import compare as command
    from llm_clf.evaluation.tables import comparison_text

    facts = command.compare(a, b, metric=metric, out=out)
    print(f"A: {a}\nB: {b}\n{comparison_text(facts)}")


@app.command()
def chat(
    source: Annotated[
        Path | None, typer.Argument(metavar="[RUN|ADAPTER]", help="Run or adapter folder; none: the base alone.")
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="BASE", help="The base; needed for a bare adapter.")] = None,
    task: Annotated[str | None, typer.Option(help="For a bare adapter or a base: the task of /classify.")] = None,
    set: ModelSet = None,
    once: Annotated[str | None, typer.Option(metavar="TEXT", help="Answer one text and leave.")] = None,
) -> None:
    """Talk to a run, an adapter or a base: see what it says, and what its labels are.

    Example: `llm-clf chat output/run`, then `/classify A trial of aspirin after surgery`
    """
    from llm_clf.commands import chat as command

    command.chat(source, model=model, task=task, set=set or (), once=once)


@baseline.command("tfidf")
def baseline_tfidf(
    data: Prompts,
    out: RunPlace,
    set: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="train.seed=42, of the folds, or one of decide, such as decide.objective=f1."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Change nothing where the run is finished.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Train TF-IDF with logistic regression or a linear SVM, whichever is better on the training rows.

    Example: `llm-clf baseline tfidf output/prompts --out output/tfidf`
    """
    from llm_clf.commands import baseline_tfidf as command

    command.baseline_tfidf(data, out=out, set=set or (), resume=resume, overwrite=overwrite)


@baseline.command("encoder")
def baseline_encoder(
    data: Prompts,
    out: RunPlace,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME_OR_PATH", help="An encoder, such as roberta-base or a folder; glm-nano is the default."
        ),
    ] = None,
    config: Config = None,
    set: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="One setting, such as train.epochs=3; may be repeated."),
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Fine-tune all of an encoder with a head on its mean state and its first; keep the best by validation F1.

    Example: `llm-clf baseline encoder output/prompts --out output/encoder --model roberta-base`
    """
    from llm_clf.commands import baseline_encoder as command

    command.baseline_encoder(
        data, out=out, model=model, config=config, set=set or (), resume=resume, overwrite=overwrite
    )


@app.command()
def ensemble(
    runs: Runs,
    data: Annotated[Path, typer.Option(metavar="DIR", help="Prompts whose validation rows choose the weights.")],
    out: RunPlace,
    method: Annotated[
        str,
        typer.Option(
            metavar="mean|log-odds|stacking",
            help="Weighted mean of probabilities or of log-odds, or logistic regression on top.",
        ),
    ] = "log-odds",
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Combine runs into one, with weights chosen on validation rows, and test whether that is better than the best.

    Example: `llm-clf ensemble output/tfidf output/run --data output/prompts --out output/ensemble`
    """
    from llm_clf.commands import ensemble as command

    command.ensemble(
        runs,
        data=data,
        out=out,
        method=method,  # type: ignore[arg-type]
        resume=resume,
        overwrite=overwrite,
    )


@app.command()
def leaderboard(
    runs: Runs,
    data: Annotated[Path, typer.Option(metavar="DIR", help="Prompts whose rows all runs are measured on.")],
    split: Annotated[str, typer.Option(metavar="test|valid", help="Which rows of DIR.")] = "test",
    metric: Annotated[str, typer.Option(help="The metric by which runs are sorted.")] = "f1",
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for leaderboard.csv, .json and .md, and for the predictions."),
    ] = None,
) -> None:
    """Measure runs on the same rows: one table of quality, speed and size, and which are really worse than the best.

    Example: `llm-clf leaderboard output/tfidf output/run --data output/prompts --out output/leaderboard`
    """
    from llm_clf.commands import leaderboard as command

    print(command.leaderboard_text(command.leaderboard(runs, data=data, split=split, metric=metric, out=out)))


@app.command()
def verify(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Finished run of any kind.")],
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Prompts that the run was trained on, where that folder was moved."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="BASE", help="Where the run's base is now, if it was moved.")
    ] = None,
) -> None:
    """Predict a run's validation rows afresh, and compare with what it stores to the last bit.

    Example: `llm-clf verify output/run`
    """
    from llm_clf.commands import verify as command

    command.verify(run, data=data, model=model)


@app.command()
def merge(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the model.")],
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Prompts that the run was trained on; needed where it was validated: its validation rows are scored "
            "again.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="BASE", help="Where the run's base is now; for a run in 8 or 4 bits, its half-precision base."
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Add a run's adapter into its base: a model folder that transformers loads anywhere, without this package.

    Example: `llm-clf merge output/run --data output/prompts --out output/model`
    """
    from llm_clf.commands import merge as command

    command.merge(run, out=out, data=data, model=model, overwrite=overwrite)


@app.command("import-chatglm")
def import_chatglm(
    source: Annotated[Path, typer.Argument(help="Original ChatGLM2 or ChatGLM3 folder.")],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write.")],
    only: Annotated[str, typer.Option(metavar="all|weights|tokenizer", help="Write one half of it.")] = "all",
    set: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="model.family=chatglm2, model.rope_ratio=linear, …")
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Write an original ChatGLM folder as one that transformers loads anywhere, without this package.

    Example: `llm-clf import-chatglm models/chatglm2-6b models/chatglm2-6b-glm`
    """
    from llm_clf.commands import import_chatglm as command

    command.import_chatglm(
        source,
        out,
        only=only,  # type: ignore[arg-type]
        set=set or (),
        resume=resume,
        overwrite=overwrite,
    )


@app.command("import-adapter")
def import_adapter(
    source: Annotated[Path, typer.Argument(help="Adapter folder trained on ChatGLM's own code.")],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write.")],
    base: Annotated[str, typer.Option(metavar="CHATGLM_DIR", help="The base that the adapter was trained on.")],
    overwrite: Overwrite = False,
) -> None:
    """Write a LoRA adapter of ChatGLM's own code as one of the native model.

    Example: `llm-clf import-adapter old/adapter models/adapter --base models/chatglm2-6b`
    """
    from llm_clf.commands import import_adapter as command

    command.import_adapter(source, out, base=base, overwrite=overwrite)


@app.command()
def doctor(
    model: Annotated[str | None, typer.Option(metavar="BASE", help="Estimate the memory that this base needs.")] = None,
    set: Set = None,
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="Prompts whose lengths the estimate takes.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell what this machine can run: devices, number types, memory, disk, versions. Fit for a bug report.

    Example: `llm-clf doctor --model glm-nano --data output/prompts`
    """
    import json

    from llm_clf.commands import doctor as command

    facts = command.doctor(model=model, set=set or (), data=data)
    print(json.dumps(facts, indent=2) if as_json else command.doctor_text(facts))


def main() -> None:
    """Run the command line: 0 done, 2 the input is wrong, 130 interrupted, 1 a bug with its traceback."""
    try:
        app()
    except LlmClfError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as leaving:
        # Typer turns Ctrl-C into this exit code, without a word.
        if leaving.code == INTERRUPTED:
            _tell_of_interruption()
        raise
    except Exception as error:
        # A library that is interrupted half-way, in an import or a callback, may end with an error of its own.
        if not _began_with_ctrl_c(error):
            raise
        _tell_of_interruption()
        sys.exit(INTERRUPTED)


def _tell_of_interruption() -> None:
    goes_on = "; the same command with --resume goes on" if set(sys.argv) & RESUMABLE else ""
    print(f"Interrupted{goes_on}.", file=sys.stderr)


def _began_with_ctrl_c(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


if __name__ == "__main__":
    main()
