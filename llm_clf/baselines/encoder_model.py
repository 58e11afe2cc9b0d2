"""An encoder under a fusion head: the model, its folder on disk, and as something that scores prompts."""

from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, logsigmoid
from torch.nn.utils.rnn import pad_sequence

from llm_clf.baselines.encoder_tokens import RowTokenizer
from llm_clf.config import EncoderDataSettings, EncoderHeadSettings, EncoderSettings
from llm_clf.engine.batches import plan_batches
from llm_clf.engine.fitting import TokenBudget, Work
from llm_clf.engine.scores import Scored, windows
from llm_clf.engine.transfer import to_device
from llm_clf.errors import ArtifactError
from llm_clf.files import cannot_write
from llm_clf.models.adapters import save_tokenizer
from llm_clf.models.devices import DTYPES, choose_device, choose_dtype
from llm_clf.models.encoders import is_causal, load_encoder_tokenizer, load_trunk, longest_input
from llm_clf.prompting.prompts import Prompt
from llm_clf.prompting.tasks import Task
from llm_clf.runs import ENCODER_WEIGHTS

# Before the names of the head's weights; those of the trunk stand as transformers names them.
HEAD = "fusion_head."
# Rows that are sorted by length together. Part of the plan of batches: another number, other rounding.
WINDOW = 16_384
# Plain attention holds a number for each pair of tokens.
PLAIN_ATTENTION_TOKENS = 1024


class FusionHead(nn.Module):
    """Half the sum of two projections, of the mean state and of the pooled one, then dropout and a linear layer.

    Args:
        hidden: Width of the states.
        settings: Width of the projections, dropout and loss.
        labels: How many there are.
    """

    def __init__(self, hidden: int, settings: EncoderHeadSettings, labels: int) -> None:
        super().__init__()
        self.mean = nn.Linear(hidden, settings.width)
        self.pooled = nn.Linear(hidden, settings.width)
        self.dropout = nn.Dropout(settings.dropout)
        self.labels = nn.Linear(settings.width, 1 if settings.loss == "bce" else labels)

    def forward(self, states: Tensor, pooled: Tensor, mask: Tensor) -> Tensor:
        """Return logits, shape `(rows, labels)`; one column where one logit stands for two labels.

        Args:
            states: Of the last layer, shape `(rows, tokens, hidden)`.
            pooled: Shape `(rows, hidden)`.
            mask: 1 on real tokens, 0 on padding, shape `(rows, tokens)`.
        """
        shares = mask / mask.sum(dim=1, keepdim=True)
        mean = (shares.unsqueeze(1) @ states).squeeze(1)
        logits: Tensor = self.labels(self.dropout((self.mean(mean) + self.pooled(pooled)) / 2))
        return logits


class FusionClassifier(nn.Module):
    """An encoder with its head.

    Args:
        trunk: Of transformers, in fp32.
        settings: Of the head.
        labels: How many there are.
        dtype: Type of the trunk's matrix products, a name of DTYPES. The head computes in fp32.
    """

    def __init__(self, trunk: Any, settings: EncoderHeadSettings, labels: int, *, dtype: str) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = FusionHead(trunk.config.hidden_size, settings, labels)
        self.causal = is_causal(trunk.config)
        self.pad_id = int(trunk.config.pad_token_id or 0)
        self._dtype = DTYPES[dtype]

    @property
    def pooled_from(self) -> str:
        """Return what stands for a whole row, in words."""
        if self.causal:
            return "last token"
        return "pooler" if getattr(self.trunk, "pooler", None) is not None else "first token"

    @property
    def device(self) -> torch.device:
        """Return where the weights are."""
        return self.head.labels.weight.device

    def forward(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return the logits of rows of token ids, fp32, shape `(rows, labels)`."""
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=self.pad_id)
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long()
        ids, mask, lengths = (to_device(numbers, self.device) for numbers in (ids, mask, lengths))
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype != torch.float32):
            output = self.trunk(input_ids=ids, attention_mask=mask)
        states = output.last_hidden_state.float()
        return self.head(states, self._pooled(output, states, lengths), mask)  # type: ignore[no-any-return]

    def _pooled(self, output: Any, states: Tensor, lengths: Tensor) -> Tensor:
        """Return what stands for a whole row, shape `(rows, hidden)`.

        It is what the model's pooler gives, else the first token's state. In a causal model that token saw nothing
        but itself, so the last one's is taken.
        """
        if self.causal:
            return states[torch.arange(len(states), device=states.device), lengths - 1]
        pooled = getattr(output, "pooler_output", None)
        return states[:, 0] if pooled is None else pooled.float()


def new_classifier(settings: EncoderSettings, labels: int, device: torch.device) -> FusionClassifier:
    """Return the settings' encoder under a head of random weights, which the seed gives.

    Args:
        settings: Without `auto` for the type of numbers.
        labels: How many there are.
        device: Where to.
    """
    seed = settings.train.seed
    trunk = load_trunk(settings.model.name, attention=_attention(settings, device), seed=seed)
    torch.manual_seed(seed)
    return FusionClassifier(trunk, settings.head, labels, dtype=settings.model.dtype).to(device)


def _attention(settings: EncoderSettings, device: torch.device) -> str | None:
    """Return how attention is computed: on a CPU as plain products, unless rows are so long that they fill memory.

    SDPA's kernels for a CPU took a third more time for a whole training step in bf16.
    """
    return "eager" if device.type == "cpu" and settings.data.max_length <= PLAIN_ATTENTION_TOKENS else None


def row_tokenizer(tokenizer: Any, model: FusionClassifier, task: Task, settings: EncoderDataSettings) -> RowTokenizer:
    """Return what tokenises rows: to the settings' length, or to the encoder's own where that is less."""
    limit = longest_input(model.trunk, tokenizer)
    max_length = min(settings.max_length, limit) if limit else settings.max_length
    return RowTokenizer(tokenizer, task, pad_id=model.pad_id, max_length=max_length)


def save_classifier(model: FusionClassifier, tokenizer: Any, folder: Path) -> None:
    """Write a folder that transformers loads as the encoder, the head's weights beside its own in one file.

    Raises:
        DataError: The folder cannot be written, or the disk is full.
    """
    state = {**model.trunk.state_dict(), **{HEAD + name: weight for name, weight in model.head.state_dict().items()}}
    try:
        # One file, whatever its size: its hash is that of all that was learned.
        model.trunk.save_pretrained(str(folder), state_dict=state, max_shard_size="1TB")
    except (OSError, RuntimeError, SafetensorError) as error:
        raise cannot_write(folder, error, "Then --resume goes on from the last checkpoint.") from error
    save_tokenizer(tokenizer, folder)


def load_classifier(folder: Path, settings: EncoderSettings, labels: int, device: torch.device) -> FusionClassifier:
    """Return what `save_classifier` wrote, in evaluation mode.

    Args:
        folder: Where it is.
        settings: Of the run.
        labels: How many the task has.
        device: Where to.

    Raises:
        ArtifactError: A file is missing, damaged, or of another model.
        ConfigError: The device cannot compute in the settings' type.
    """
    dtype = choose_dtype(settings.model.dtype, device)
    trunk = load_trunk(str(folder), attention=_attention(settings, device))
    model = FusionClassifier(trunk, settings.head, labels, dtype=dtype)
    try:
        with safe_open(folder / ENCODER_WEIGHTS, framework="pt") as stored:
            names = [name for name in stored.keys() if name.startswith(HEAD)]  # noqa: SIM118, it is no dictionary
            model.head.load_state_dict({name.removeprefix(HEAD): stored.get_tensor(name) for name in names})
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ArtifactError(f"{folder / ENCODER_WEIGHTS}: its head does not fit: {reason}. Train again.") from error
    return model.eval().to(device)


def losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return each row's loss in nats, shape `(rows,)`.

    Args:
        logits: Shape `(rows, labels)`, or `(rows, 1)`: of the second of two labels.
        targets: Numbers of the labels, shape `(rows,)`.
    """
    if logits.shape[1] == 1:
        return binary_cross_entropy_with_logits(logits.squeeze(1), targets.float(), reduction="none")
    return cross_entropy(logits, targets, reduction="none")


def log_probabilities(logits: Tensor) -> Tensor:
    """Return log-probabilities in nats, shape `(rows, labels)`."""
    if logits.shape[1] == 1:
        return logsigmoid(torch.cat([-logits, logits], dim=1))
    return logits.log_softmax(dim=1)


class EncoderScorer:
    """Scores prompts by their inputs.

    Args:
        model: In evaluation mode while it scores.
        tokens: Turns inputs into tokens.
        labels: How many there are.
        batch_tokens: Most tokens in one forward, padding included; less where memory runs out.
    """

    def __init__(self, model: FusionClassifier, tokens: RowTokenizer, *, labels: int, batch_tokens: int) -> None:
        self._model, self._tokens, self._labels = model, tokens, labels
        self.batch_tokens = batch_tokens
        """Most tokens of a batch; `score_all` lowers it where memory runs out."""

    @classmethod
    def from_folder(cls, folder: Path, task: Task, settings: EncoderSettings) -> "EncoderScorer":
        """Load what `save_classifier` wrote.

        Raises:
            ArtifactError: It is damaged, or does not fit the task.
        """
        model = load_classifier(folder, settings, len(task.names), choose_device())
        tokenizer = load_encoder_tokenizer(str(folder), model.trunk)
        tokens = row_tokenizer(tokenizer, model, task, settings.data)
        return cls(model, tokens, labels=len(task.names), batch_tokens=settings.predict.batch_tokens)

    def score(
        self,
        prompts: Iterable[Prompt],
        done: Callable[[Scored], None],
        finished: Collection[int] = (),
        *,
        fits: int | None = None,
        found: Callable[[int], None] = lambda tokens: None,
    ) -> int:
        """Score prompts window by window, as `Scorer` says.

        Raises:
            ArtifactError: A score is not a number.
            ConfigError: Memory runs out on a single row.
        """
        budget = TokenBudget(fits or self.batch_tokens, self._model.device, found)
        work = Work(plan_rows, padded_tokens, self._scores, lambda: None)
        first = 0
        for window in windows(prompts, WINDOW):
            numbers = range(first, first + len(window))
            first += len(window)
            if all(number in finished for number in numbers):
                continue
            examples = self._tokens.encode([prompt.input for prompt in window])
            for batch in plan_rows([example.ids for example in examples], self.batch_tokens):
                if not all(numbers[index] in finished for index in batch):
                    scores = budget.fit(work, [examples[index].ids for index in batch])
                    cut = [examples[index].cut for index in batch]
                    done(Scored([numbers[index] for index in batch], scores, cut, None))
        return budget.tokens

    def score_all(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Return the scores of prompts in their order, fp32, shape `(prompts, labels)`.

        Where memory runs out, all are scored anew in batches that fit: the scores are those that such batches would
        have given from the beginning.
        """
        scores = np.empty((len(prompts), self._labels), dtype=np.float32)

        def keep(batch: Scored) -> None:
            scores[batch.rows] = batch.scores

        while (fits := self.score(prompts, keep)) != self.batch_tokens:
            self.batch_tokens = fits
        return scores

    @torch.inference_mode()
    def _scores(self, rows: Sequence[Sequence[int]], budget: int) -> np.ndarray:
        """Return log-probabilities in nats, fp32, shape `(rows, labels)`, in parts where the budget is less."""
        scores = np.empty((len(rows), self._labels), dtype=np.float32)
        for part in plan_rows(rows, budget):
            scores[part] = log_probabilities(self._model([rows[number] for number in part])).cpu().numpy()
        if np.isnan(scores).any():
            raise ArtifactError(
                "The encoder's scores are not numbers (NaN). In fp16 that is an overflow: use --set model.dtype=bf16 "
                "or fp32; otherwise the weights are damaged."
            )
        return scores


def plan_rows(rows: Sequence[Sequence[int]], budget: int) -> list[list[int]]:
    """Group rows of about equal length so that each group takes at most `budget` tokens, padding included."""
    return plan_batches([len(row) for row in rows], budget)


def padded_tokens(rows: Sequence[Sequence[int]]) -> int:
    """Return the tokens of one batch, padding included."""
    return len(rows) * max(len(row) for row in rows)
