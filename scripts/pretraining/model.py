"""The model, its optimisers, and a step that computes in bf16 while the weights stay fp32."""

import copy
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GlmConfig, GlmForCausalLM

from pretraining.rows import CONTEXT, Batch


@dataclass(frozen=True, slots=True)
class Design:
    """Sizes of the model."""

    vocabulary: int
    width: int
    layers: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_width: int = 64


def build_model(design: Design, end: int, seed: int) -> GlmForCausalLM:
    """Return the model with random weights, its embeddings tied."""
    torch.manual_seed(seed)
    config = GlmConfig(
        vocab_size=design.vocabulary,
        hidden_size=design.width,
        intermediate_size=design.feed_forward,
        num_hidden_layers=design.layers,
        num_attention_heads=design.heads,
        num_key_value_heads=design.kv_heads,
        head_dim=design.head_width,
        max_position_embeddings=CONTEXT,
        attention_bias=False,
        tie_word_embeddings=True,
        pad_token_id=end,
        eos_token_id=end,
        bos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    )
    return GlmForCausalLM(config)


def build_optimizers(model: GlmForCausalLM, embedding_share: float) -> list[Any]:
    """Return Muon for the matrices inside the layers, AdamW for embeddings and norms.

    Each group's `share` is its part of the learning rate.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    embeddings = [model.model.embed_tokens.weight]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": embeddings, "share": embedding_share}, {"params": norms, "share": 1.0}]
    return [
        torch.optim.Muon([{"params": matrices, "share": 1.0}], weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def rate(step: int, steps: int, warmup: float, decay: float) -> float:
    """Return the learning rate of a step as a share of the highest: warm-up, stable, linear decay to 0."""
    rising = (step + 1) / max(1.0, warmup * steps)
    falling = (steps - step) / max(1.0, decay * steps)
    return min(1.0, rising, falling)


def _half(model: GlmForCausalLM, device: torch.device) -> GlmForCausalLM:
    half = copy.deepcopy(model).to(device)
    # On a CPU, SDPA's own kernels take twice as long as plain products for texts of this length.
    half.set_attn_implementation("eager" if device.type == "cpu" else "sdpa")
    for parameter in half.parameters():
        # Buffers such as the rotary frequencies stay as they are.
        parameter.data = parameter.data.to(torch.bfloat16)
    return half


class Worker:
    """Copies of the model in bf16 that compute losses and gradients; the model itself stays fp32.

    Weights are rounded once a step, and the base is trained as it will be used. Several copies compute batches at the
    same time, each on a thread of its own: small products run better side by side than each of them on all cores.
    """

    def __init__(self, model: GlmForCausalLM, device: torch.device, sampled: int, seed: int, copies: int = 1) -> None:
        self.model = model
        self.copies = [_half(model, device) for _ in range(copies)]
        self.pool = ThreadPoolExecutor(copies)
        self.device, self.sampled, self.seed = device, sampled, seed

    def load(self) -> None:
        """Take over the model's weights and forget the gradients."""
        with torch.no_grad():
            for half in self.copies:
                for mine, parameter in zip(half.parameters(), self.model.parameters(), strict=True):
                    mine.copy_(parameter)
                    mine.grad = None

    def backward(self, batches: Sequence[Batch], step: int) -> float:
        """Give the model the gradient of the batches' mean loss; return that loss in nats per token."""
        self.load()
        whole = float(sum(batch.weights[:, 1:].sum() for batch in batches))

        def one(place: int) -> float:
            half, total = self.copies[place], 0.0
            for part in range(place, len(batches), len(self.copies)):
                generator = torch.Generator().manual_seed(hash((self.seed, step, part)) % 2**63)
                loss = self._loss(half, batches[part], generator) / whole
                torch.autograd.backward(loss)
                total += loss.item()
            return total

        total = sum(self.pool.map(one, range(len(self.copies))))
        for parameter, *mine in zip(self.model.parameters(), *(half.parameters() for half in self.copies), strict=True):
            parameter.grad = sum(x.grad.to(parameter.device, torch.float32) for x in mine if x.grad is not None)
        return total

    def _loss(self, half: GlmForCausalLM, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        """Return the weighted sum of the batch's losses, over a sample of the vocabulary."""
        states = half.model(input_ids=batch.ids.to(self.device), use_cache=False).last_hidden_state[:, :-1]
        targets, weights = batch.ids[:, 1:].flatten(), batch.weights[:, 1:].flatten()
        embeddings = half.get_output_embeddings().weight
        candidates, places, corrections = sample_vocabulary(targets, len(embeddings), self.sampled, generator)
        chosen = embeddings[candidates.to(self.device)]
        parts = (part.to(self.device) for part in (places, weights, corrections))
        return _weighted_loss(states.flatten(0, 1), chosen, *parts)

    @torch.no_grad()
    def measure(self, batches: Sequence[Batch]) -> tuple[float, float]:
        """Return the loss of text in nats per token over the whole vocabulary, and how often an answer is right."""
        self.load()
        half = self.copies[0]
        lost = texts = right = answers = 0.0
        for batch in batches:
            states = half.model(input_ids=batch.ids.to(self.device), use_cache=False).last_hidden_state[:, :-1]
            targets, weights = (x[:, 1:].flatten().to(self.device) for x in (batch.ids, batch.weights))
            logits = half.lm_head(states.flatten(0, 1)[weights > 0]).float()
            targets, weights = targets[weights > 0], weights[weights > 0]
            losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            lost += losses[weights == 1].sum().item()
            texts += (weights == 1).sum().item()
            # The end token behind an answer is no feat.
            asked = (weights > 1) & (targets != half.config.eos_token_id)
            right += (logits[asked].argmax(dim=1) == targets[asked]).sum().item()
            answers += asked.sum().item()
        return lost / max(1.0, texts), right / answers if answers else math.nan


def sample_vocabulary(
    targets: torch.Tensor, vocabulary: int, size: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose the tokens that a batch's losses are computed over: its own targets and some of the others.

    Each of the others stands for as many as were left out, so that the sum in the softmax's denominator is right on
    average (https://arxiv.org/abs/1412.2007), while most of the work over a large vocabulary is spared.

    Args:
        targets: Tokens, shape `(tokens,)`.
        vocabulary: How many there are.
        size: How many to choose; all of them where there are no more, and a multiple of it where targets need more.
        generator: Of the choice.

    Returns:
        The chosen tokens `(chosen,)`, where among them each target is `(tokens,)`, and what is added to the logits of
        each `(chosen,)`.
    """
    own = torch.unique(targets)
    size = min(vocabulary, size * math.ceil(len(own) / size))
    absent = torch.ones(vocabulary, dtype=torch.bool)
    absent[own] = False
    others = absent.nonzero().flatten()
    picked = others[torch.randperm(len(others), generator=generator)[: size - len(own)]]
    corrections = torch.zeros(size)
    if len(picked):
        corrections[len(own) :] = math.log(len(others) / len(picked))
    return torch.cat([own, picked]), torch.searchsorted(own, targets), corrections


def _weighted_loss(
    states: torch.Tensor, embeddings: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, added: torch.Tensor
) -> torch.Tensor:
    """Return the weighted sum of cross-entropies in nats; logits are rounded to bf16, the sum is fp32."""
    logits = (states @ embeddings.t()).float() + added
    return (torch.nn.functional.cross_entropy(logits, targets, reduction="none") * weights).sum()
