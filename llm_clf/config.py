"""Settings: one frozen tree for each kind of training, with what each key means, allows and defaults to."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WrapValidator,
    field_validator,
)
from pydantic_core import PydanticCustomError

DEFAULT_BASE = "glm-nano"
Metric = Literal["f1", "macro_f1", "weighted_f1", "accuracy", "log_loss", "roc_auc"]
METRICS: tuple[str, ...] = get_args(Metric)
Schedule = Literal["cosine", "linear", "constant"]


def _labels_are_text(value: Any) -> Any:
    """Labels are text, also where YAML reads a number: `{0: 1, 1: 5}`."""
    if isinstance(value, Mapping):
        return {str(key) if type(key) is int else key: weight for key, weight in value.items()}
    return value


ClassWeights = Annotated[
    Literal["balanced"] | dict[str, Annotated[float, Field(gt=0)]] | None, BeforeValidator(_labels_are_text)
]


class Section(BaseModel):
    """A group of settings: unknown keys and changes after loading are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class ModelSettings(Section):
    """The base model and how it is held in memory."""

    name: Annotated[str, Field(min_length=1)] = DEFAULT_BASE
    """`glm-nano`, a local folder (also an original ChatGLM2 or ChatGLM3 one), or a Hugging Face id."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Type of the frozen weights; auto: bf16 where the device computes in it, else fp16 on CUDA and fp32 on CPU."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """Hold the linear layers in 8 bits (LLM.int8()) or 4 bits (NF4, double quantisation), and compute in `dtype`."""
    family: Literal["auto", "chatglm2", "chatglm3"] = "auto"
    """An original ChatGLM folder: whose prompts and special tokens; auto: by the name in its files, or the folder's."""
    rope_ratio: Literal["auto", "linear", "theta"] = "auto"
    """An original ChatGLM folder: its `rope_ratio` divides positions or multiplies theta; auto: by the family."""
    head: Literal["label-words", "linear"] = "label-words"
    """How labels are read: by the words that stand for them, or by a linear layer on the model's states."""
    pooling: Literal["last", "mean"] = "last"
    """What a linear head reads: the state of the prompt's last token, or the mean of the states of all its tokens."""

    @field_validator("pooling")
    @classmethod
    def _pooling_has_a_head(cls, value: str, others: ValidationInfo) -> str:
        if value == "mean" and others.data.get("head") == "label-words":
            raise PydanticCustomError("head", "Label words have no states to pool; it goes with model.head linear only")
        return value


class DataSettings(Section):
    """How rows become tokens."""

    max_length: Annotated[int, Field(ge=16)] = 1024
    """Most tokens of a prompt with its answer; never more than the base's own limit."""
    cut: str | None = None
    """The column that gives way in a row that is too long; none: the one that the task names."""
    token_cache: bool = True
    """finetune keeps the tokens of many rows in the prompts folder, `DIR/tokens`, and finds them again."""


class LoraSettings(Section):
    """The adapter; PEFT calls alpha and dropout `lora_alpha` and `lora_dropout`, the rest as here."""

    r: Annotated[int, Field(ge=1)] = 8
    """Rank."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """Scale: the adapter's output is multiplied by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Dropout on the adapter's input."""
    target_modules: str | list[str] = "all-linear"
    """Names of the linear layers that get an adapter, a regular expression, or all-linear."""
    exclude_modules: list[str] | None = None
    """Names of layers that get none."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead."""
    use_dora: bool = False
    """Weight-decomposed LoRA: magnitude and direction apart."""


class TrainSettings(Section):
    """The training loop."""

    epochs: Annotated[int, Field(ge=1)] = 3
    """Passes over the training rows."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Rows per optimiser step."""
    micro_batch_tokens: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Most tokens in one forward and backward, padding included; auto: what fits. Does not change the result."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Highest learning rate."""
    schedule: Schedule = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup: Annotated[float, Field(ge=0)] = 0.05
    """Warm-up: a share of all steps where below 1, else a number of steps."""
    eval_every: Annotated[float, Field(gt=0)] = 1.0
    """Epochs between evaluations; 0.5 evaluates twice an epoch."""
    metric: Metric = "f1"
    """What the kept checkpoint is best in; f1: of the second label where there are two, macro otherwise."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Stop after so many evaluations without a better one; 0 never stops early."""
    class_weights: ClassWeights = None
    """Weight of a row by its label: balanced (by inverse frequency), or a number per label."""
    sampling: Literal["shuffled", "balanced"] = "shuffled"
    """Rows of an epoch: each once; or as many, the same number of each label: rare ones several times."""
    seed: Annotated[int, Field(ge=0, le=10**9)] = 42
    """Seed of the adapter's initial weights, of dropout, of the order of rows, of folds."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Recompute activations in the backward pass: less memory, about a third more time; auto: where it is needed."""

    @field_validator("sampling")
    @classmethod
    def _balanced_once(cls, value: str, others: ValidationInfo) -> str:
        if value == "balanced" and others.data.get("class_weights") is not None:
            raise PydanticCustomError(
                "twice", "With train.class_weights rare labels would count twice; give one of both"
            )
        return value


class PredictSettings(Section):
    """Scoring, in validation and in prediction alike."""

    batch_tokens: Annotated[int, Field(ge=1)] = 8192
    """Most tokens in one forward, padding included."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 32
    """Most tokens of a generated answer (`--decode generate`)."""
    merge: Literal["auto"] | bool = "auto"
    """Add the adapter into the base's weights to score; auto: where no validation probability moves by over 1e-3."""


def _none_is_text(value: Any) -> Any:
    """`none` is what these settings show where they are off, so it may be given too."""
    return None if value == "none" else value


def _one_of(expected: str) -> WrapValidator:
    """Say in one line what a setting takes that has several forms."""

    def check(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(_none_is_text(value))
        except ValidationError as error:
            # As context: in the message itself, braces would be places to fill.
            raise PydanticCustomError("form", "Expected {forms}", {"forms": expected}) from error

    return WrapValidator(check)


Share = Annotated[float, Field(gt=0, lt=1)]
ByLabel = Annotated[dict[str, Annotated[float, Field(ge=0)]], BeforeValidator(_labels_are_text)]


class PrecisionTarget(Section):
    """Of two labels: as much recall of the second as a precision leaves."""

    precision: Annotated[float, Field(gt=0, le=1)]
    """Smallest precision."""


class RecallTarget(Section):
    """Of two labels: as much precision of the second as a recall leaves."""

    recall: Annotated[float, Field(gt=0, le=1)]
    """Smallest recall."""


class CostMatrix(Section):
    """What each mistake costs."""

    costs: Annotated[dict[str, ByLabel], BeforeValidator(_labels_are_text)]
    """By gold label, then by predicted label."""


class ErrorTarget(Section):
    """Answer as many rows as a share of wrong answers leaves."""

    error: Share
    """Largest share of wrong answers."""


class CoverageTarget(Section):
    """Sets of labels that hold the right one."""

    coverage: Share
    """Smallest share of sets that do."""


class DecideSettings(Section):
    """From scores to probabilities and labels; what is fitted is fitted on validation rows, when the run is trained."""

    calibration: Literal["auto", "none", "temperature", "vector"] = "auto"
    """Rescale scores so that probabilities hold: temperature (one number), vector (two a label), auto: what helps."""
    objective: Annotated[
        Literal["f1"] | PrecisionTarget | RecallTarget | CostMatrix | None,
        _one_of("none, f1, {precision: 0.95}, {recall: 0.95} or {costs: {GOLD: {PREDICTED: 5}}}"),
    ] = None
    """What labels are chosen for: none: the most probable; f1: best F1; a precision or recall to reach; least cost."""
    threshold: Annotated[Share | None, BeforeValidator(_none_is_text)] = None
    """In place of an objective: of two labels the second, where it has at least so much probability."""
    abstain: Annotated[
        Share | ErrorTarget | CoverageTarget | None,
        _one_of("none, a probability such as 0.8, {error: 0.05} or {coverage: 0.9}"),
    ] = None
    """When no label is given: below a probability; so that few answers are wrong; where a label set holds not one."""
    priors: Annotated[
        Annotated[dict[str, Share], BeforeValidator(_labels_are_text)] | None, BeforeValidator(_none_is_text)
    ] = None
    """Shares of labels where the run is used, if they differ from training; the rest goes to labels not named."""

    @field_validator("threshold")
    @classmethod
    def _one_rule(cls, value: float | None, others: ValidationInfo) -> float | None:
        if value is not None and others.data.get("objective") is not None:
            raise PydanticCustomError("rule", "It stands in place of decide.objective; give one of them")
        return value

    @field_validator("abstain")
    @classmethod
    def _sets_say_the_label(cls, value: Any, others: ValidationInfo) -> Any:
        chosen = others.data.get("objective") is not None or others.data.get("threshold") is not None
        if isinstance(value, CoverageTarget) and chosen:
            raise PydanticCustomError(
                "sets", "A label set of one label is the answer; leave out decide.objective and decide.threshold"
            )
        return value

    @field_validator("priors")
    @classmethod
    def _sets_know_one_base_rate(cls, value: Any, others: ValidationInfo) -> Any:
        if value is not None and isinstance(others.data.get("abstain"), CoverageTarget):
            raise PydanticCustomError(
                "sets", "The coverage of label sets holds for rows like the validation rows only; leave out one of both"
            )
        return value


class SpeedSettings(Section):
    """Ways to do less work for the same result, up to rounding."""

    packing: bool = True
    """Rows one behind another, without padding, each prompt read once for all labels; needs a known family."""
    shared_prefix: bool = True
    """With packing: read what all prompts begin with once, for all rows of a step or a prediction."""
    fast_lora: bool = True
    """LoRA layers in the base's number type, the update added by one product."""
    fused_layers: bool = True
    """With packing: layers of known families with norm, rotary embedding, gate and attention in few passes."""
    short_last_layer: bool = True
    """With fused layers: the last one's queries, output and MLP only where an answer is read."""


class Tree(Section):
    """All settings of a command, in sections."""

    @field_validator("*", mode="before")
    @classmethod
    def _empty_section(cls, value: Any) -> Any:
        """A section with nothing under it (`train:`) means its defaults."""
        return {} if value is None else value

    def having(self, section: str, **found: Any) -> Self:
        """Return the settings with what was found out for keys of a section."""
        return self.model_copy(update={section: getattr(self, section).model_copy(update=found)})


class Settings(Tree):
    """All settings of a run."""

    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    lora: LoraSettings = LoraSettings()
    train: TrainSettings = TrainSettings()
    predict: PredictSettings = PredictSettings()
    decide: DecideSettings = DecideSettings()
    speed: SpeedSettings = SpeedSettings()

    def merging(self, merge: bool) -> "Settings":
        """Return the settings with `predict.merge` decided."""
        return self.having("predict", merge=merge)


class EncoderModelSettings(Section):
    """The encoder and the type of its numbers."""

    name: Annotated[str, Field(min_length=1)] = DEFAULT_BASE
    """A folder or a Hugging Face id of an encoder, such as `roberta-base`, or `glm-nano`, the base that ships."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Type of the matrix products; weights are fp32. auto: bf16 where the device has it, else fp16 on CUDA and fp32."""


class EncoderDataSettings(Section):
    """How rows become tokens."""

    max_length: Annotated[int, Field(ge=16)] = 512
    """Most tokens of a row, special ones included; never more than the encoder's own limit."""


class EncoderHeadSettings(Section):
    """What reads the labels from the encoder's states."""

    width: Annotated[int, Field(ge=1)] = 128
    """Width that the mean of the states and the pooled state are brought to before they are added."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Dropout on the half sum of both."""
    loss: Literal["cross-entropy", "bce"] = "cross-entropy"
    """cross-entropy: a logit for each label; bce: binary cross-entropy on one logit, for two labels."""


class EncoderTrainSettings(Section):
    """The training loop."""

    epochs: Annotated[int, Field(ge=1)] = 4
    """Passes over the training rows."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Rows per optimiser step."""
    micro_batch_tokens: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Most tokens in one forward and backward, padding included; auto: by the device. Does not change the result."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    """Highest learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW's, on matrices; biases and norms have none."""
    schedule: Schedule = "linear"
    """How the learning rate falls after the warm-up."""
    warmup: Annotated[float, Field(ge=0)] = 0.1
    """Warm-up: a share of all steps where below 1, else a number of steps."""
    eval_every: Annotated[float, Field(gt=0)] = 1.0
    """Epochs between evaluations; 0.5 evaluates twice an epoch."""
    metric: Metric = "f1"
    """What the kept checkpoint is best in; f1: of the second label where there are two, macro otherwise."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Stop after so many evaluations without a better one; 0 never stops early."""
    class_weights: ClassWeights = None
    """Weight of a row by its label: balanced (by inverse frequency), or a number per label."""
    seed: Annotated[int, Field(ge=0, le=10**9)] = 42
    """Seed of the head's initial weights, of dropout and of the order of rows."""


class EncoderPredictSettings(Section):
    """Scoring, in validation and in prediction alike."""

    batch_tokens: Annotated[int, Field(ge=1)] = 8192
    """Most tokens in one forward, padding included."""


class EncoderSettings(Tree):
    """All settings of an encoder run."""

    model: EncoderModelSettings = EncoderModelSettings()
    data: EncoderDataSettings = EncoderDataSettings()
    head: EncoderHeadSettings = EncoderHeadSettings()
    train: EncoderTrainSettings = EncoderTrainSettings()
    predict: EncoderPredictSettings = EncoderPredictSettings()
    decide: DecideSettings = DecideSettings()


def settings_to_dict(settings: Tree) -> dict[str, Any]:
    """Return the settings as plain values, fit for YAML and JSON."""
    return settings.model_dump(mode="json")


def known_keys(kind: type[Tree] = Settings) -> list[str]:
    """Return every setting as `section.key`."""
    return [
        f"{section}.{key}"
        for section, field in kind.model_fields.items()
        for key in getattr(field.annotation, "model_fields", {})
    ]
