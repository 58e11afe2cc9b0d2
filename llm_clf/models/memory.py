"""Estimated memory of a training, by mode: from a base's config alone, no weight is loaded.

The formulas follow what PyTorch, PEFT, bitsandbytes and this package keep; each function says where its terms come
from. They assume a decoder of attention and a gated MLP, an adapter in fp32, no autocast. Mixtures of experts and
sliding or linear attention are estimated as if they were such a decoder.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llm_clf.config import ModelSettings
from llm_clf.models.bases import base_config, loading_of
from llm_clf.models.heads import classes_of, has_linear_head, heads_of, prepare_head, require_head_known

MODES = ("fp32", "bf16", "fp16", "8bit", "4bit")
QUANTIZED = ("8bit", "4bit")
# Bytes of a number by `model.dtype`: of the weights that are not quantised, and of all that is computed.
DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# Answers are short; without rows a label's word and the end token stand for them.
ANSWER_TOKENS = 2
# Queries that attention takes at once on a CPU.
CHUNK = 128
# CPU: Python with torch, transformers and PEFT, resident and measured. CUDA: cuBLAS workspaces and what the caching
# allocator rounds up; the context itself is already missing from the free memory that a process reads of a card.
RUNTIME_BYTES = {"cpu": 9 * 2**26, "cuda": 2**28}
# On CPU glibc takes blocks of up to 32 MiB from a heap that is full of holes after the first micro-batch; larger ones
# are given back. Trainings of 100 million weights held 40 to 80 % more than their tensors. With checkpointing, where
# each layer's work lies between inputs that stay, it was 110 to 280 %, of less, and 430 to 530 % where a quantised base
# has its weights unpacked in between. With MALLOC_MMAP_THRESHOLD_=1048576 there was nothing more, at up to twice the
# time.
RETAINED_SHARE = 0.5
RETAINED_SHARE_CHECKPOINTING = 2.0
RETAINED_SHARE_CHECKPOINTING_QUANTIZED = 4.5
RETAINED_BYTES = 2**32


@dataclass(frozen=True, slots=True)
class BaseShape:
    """What the memory of a base follows from."""

    parameters: int
    """All weights; tied ones count once."""
    linears: tuple[tuple[int, int], ...]
    """Inputs and outputs of each linear layer but the output embedding: the layers that are quantised."""
    layers: int
    """Decoder layers."""
    hidden: int
    """Width of the residual stream."""
    attention: int
    """Heads times the width of a head."""
    intermediate: int
    """Width inside the MLP."""
    vocabulary: int
    """Tokens in the output embedding; labels of a linear head."""
    heads: int = 1
    """Attention heads."""
    groups: int = 1
    """Heads that keys and values have."""


@dataclass(frozen=True, slots=True)
class AdapterShape:
    """What the memory of an adapter follows from."""

    parameters: int
    """Trained weights."""
    inputs: int
    """Inputs of all adapted layers, summed."""
    ranks: int
    """Ranks of all adapted layers, summed."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The largest micro-batch of a training."""

    tokens: int
    """Padded tokens."""
    rows: int
    """Most rows in it."""
    longest: int
    """Tokens of the longest row with its answer."""
    answer: int
    """Tokens of the longest answer, end token included."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Estimated bytes of one mode at its peak."""

    weights: int
    """The frozen base."""
    adapter: int
    """The adapter, its gradients and the optimiser's state."""
    activations: int
    """What the forward of one micro-batch keeps for the backward."""
    workspace: int
    """The largest temporary values."""
    runtime: int
    """The libraries and what the allocator holds back."""

    @property
    def peak(self) -> int:
        """Return the sum: all of these are there when the backward begins."""
        return self.weights + self.adapter + self.activations + self.workspace + self.runtime


def estimate(
    mode: str,
    size: int,
    base: BaseShape,
    adapter: AdapterShape,
    batch: MicroBatch,
    *,
    device: str,
    dropout: bool,
    checkpointing: bool,
    packed: bool = True,
    fast_lora: bool = True,
    fused: bool = True,
    short: bool = True,
) -> Estimate:
    """Return the estimate of one mode of `MODES`.

    Args:
        mode: How the base is held.
        size: Bytes of a number that is computed; of DTYPE_BYTES.
        base: The base's shape.
        adapter: The adapter's shape.
        batch: The largest micro-batch.
        device: `cuda` or `cpu`.
        dropout: Whether the adapter's dropout is above 0.
        checkpointing: Whether activations are computed again in the backward.
        packed: Whether rows stand one behind another (`speed.packing`).
        fast_lora: Whether the adapter computes in the base's type (`speed.fast_lora`).
        fused: Whether layers take few passes (`speed.fused_layers`), taken to be so for every family.
        short: Whether the last layer may leave out what nothing reads.
    """
    # A quantised layer has PEFT's own forward.
    fast, fused = fast_lora and mode not in QUANTIZED, fused and packed
    layer = layer_bytes(
        mode, size, base, adapter, batch, device=device, dropout=dropout, packed=packed, fast=fast, fused=fused
    )
    # With checkpointing each layer keeps its input only; one layer at a time is computed again and kept whole.
    kept = base.layers * batch.tokens * base.hidden * size + layer
    activations = kept if checkpointing else base.layers * layer
    if fused and short and not checkpointing:
        # The last layer keeps its input, normed too, and the keys and values; all else at a few places only.
        keys = 2 * base.attention * base.groups // base.heads
        activations -= layer - (2 * base.hidden + keys) * batch.tokens * size
    workspace = workspace_bytes(mode, size, base, batch, packed=packed, fast=fast)
    return Estimate(
        weights=weight_bytes(mode, size, base),
        adapter=adapter_bytes(adapter.parameters),
        activations=activations,
        workspace=workspace,
        runtime=runtime_bytes(mode, device, activations + workspace, checkpointing=checkpointing),
    )


def weight_bytes(mode: str, size: int, base: BaseShape) -> int:
    """Return the bytes of the frozen base.

    A linear layer of n = inputs x outputs weights takes, quantised:

    - 8bit: n bytes and an fp32 scale for each output (LLM.int8(), https://arxiv.org/abs/2208.07339);
    - 4bit: n / 2 bytes of NF4, a byte of scale for every 64 weights and, as the scales are quantised again, an fp32
      for every 256 of them: 0.127 bits a weight (double quantisation, https://arxiv.org/abs/2305.14314, section 3).

    Embeddings, output embedding, norms and biases keep their type. Else every weight takes its type's size.
    """
    if mode not in QUANTIZED:
        return base.parameters * size
    quantized = sum(inputs * outputs for inputs, outputs in base.linears)
    if mode == "8bit":
        held = quantized + sum(4 * outputs for _, outputs in base.linears)
    else:
        held = sum(_nf4_bytes(inputs * outputs) for inputs, outputs in base.linears)
    return held + (base.parameters - quantized) * size


def _nf4_bytes(weights: int) -> int:
    blocks = math.ceil(weights / 64)
    return math.ceil(weights / 2) + blocks + 4 * math.ceil(blocks / 256)


def adapter_bytes(parameters: int) -> int:
    """Return the bytes of the adapter in training, all fp32: the weight, its gradient and AdamW's two moments."""
    return parameters * (4 + 4 + 2 * 4)


def layer_bytes(
    mode: str,
    size: int,
    base: BaseShape,
    adapter: AdapterShape,
    batch: MicroBatch,
    *,
    device: str,
    dropout: bool,
    packed: bool,
    fast: bool,
    fused: bool,
) -> int:
    """Return the bytes that one decoder layer keeps of a micro-batch for the backward.

    For each token, with b bytes a value, h hidden, a attention, f intermediate. The base is frozen, so that its
    linear layers keep nothing; the rest is what autograd was seen to keep (within 10 % for glm and llama):

    - two norms, each its input in fp32: 2 * 4h; 2h * b where `fused`;
    - attention: query, key and value (repeated to all heads) and the result: 4a * b. Packed on CPU it is the query and
      the softmax over half of the row and of a chunk, heads * (row + chunk) / 2 * b; keys and values are not repeated,
      2a * groups / heads * b;
    - the gated MLP: gate, activated gate and the other half: 3f * b; where `fused` it is computed again, 2f * b;
    - the adapter's input, each layer a copy of its own that dropout made, with its mask: 1 byte on CUDA, a number on
      CPU. It is in fp32 as PEFT computes it, in b bytes where `fast`. Without dropout PEFT's fp32 copy stays; where
      there is nothing to convert, the inputs themselves: the two norms' results, the MLP's product and, packed, the
      rows' attention put together, (2h + f + a) * b. Layers that share their input share its copy where `fast`;
    - between the adapter's two matrices: its type's bytes * rank;
    - 8bit: bitsandbytes keeps the inputs too.

    The attention mask is shared by all layers and counted in `workspace_bytes`.
    """
    number = size if fast else 4
    inputs = adapter.inputs / base.layers
    shared = (2 * base.hidden + base.intermediate + (base.attention if packed else 0)) * size
    on_cpu = device == "cpu"
    token: float = (2 * base.hidden + 2 * base.intermediate) * size
    if not fused:
        token = 2 * 4 * base.hidden + 3 * base.intermediate * size
    if packed and on_cpu:
        token += base.attention * (1 + 2 * base.groups / base.heads) * size
        token += base.heads * size * min(batch.longest, (batch.longest + CHUNK) / 2)
    else:
        token += 4 * base.attention * size
    if dropout:
        copied = shared / size if fast and fused else inputs
        token += copied * (number + (number if on_cpu else 1))
    else:
        token += shared if number == size else inputs * number
    token += number * adapter.ranks / base.layers
    if mode == "8bit" and (dropout or number != size):
        token += shared
    return math.ceil(token * batch.tokens)


def workspace_bytes(mode: str, size: int, base: BaseShape, batch: MicroBatch, *, packed: bool, fast: bool) -> int:
    """Return the bytes of the largest temporary values.

    At the widest linear layer the base's result (b bytes) stands beside the adapter's result, that result scaled, and
    their sum (fp32 each). Where `fast`, it is the MLP's backward that holds most: gradients of both halves, of the gate
    before its activation, and of the two put together, 2.5 times the widest result. A quantised weight is unpacked to
    be multiplied. At the end of the forward it is the logits of the answers' places and the one before them: b bytes,
    then in fp32 a copy, the log-softmax and its gradient. The two moments do not meet. The attention mask is there in
    both: of the longest row where rows are packed, else of all.
    """
    widest = max((outputs for _, outputs in base.linears), default=base.hidden)
    linear = math.ceil(batch.tokens * widest * (2.5 * size if fast else size + 3 * 4))
    if mode in QUANTIZED:
        linear += max((inputs * outputs for inputs, outputs in base.linears), default=0) * size
    logits = batch.rows * (batch.answer + 1) * base.vocabulary * (size + 3 * 4)
    return max(linear, logits) + (batch.longest if packed else batch.tokens) * batch.longest * size


def runtime_bytes(mode: str, device: str, moving: int, *, checkpointing: bool) -> int:
    """Return the bytes of the libraries and of what the allocator holds back.

    Args:
        mode: How the base is held.
        device: `cuda` or `cpu`.
        moving: Bytes that are taken and given back in every step.
        checkpointing: Whether activations are computed again in the backward.
    """
    if device != "cpu":
        return RUNTIME_BYTES[device]
    share = RETAINED_SHARE
    if checkpointing:
        share = RETAINED_SHARE_CHECKPOINTING_QUANTIZED if mode in QUANTIZED else RETAINED_SHARE_CHECKPOINTING
    return RUNTIME_BYTES[device] + min(RETAINED_BYTES, int(share * moving))


def largest_micro_batch(longest: int, mean: float, *, answer: int, batch_size: int, budget: int) -> MicroBatch:
    """Return the largest micro-batch that rows of these lengths can make.

    A micro-batch has at most `budget` padded tokens and the rows of one optimiser step; a row that is longer than the
    budget is one of its own. Rows of mean length are taken to fill it.

    Args:
        longest: Tokens of the longest row with its answer.
        mean: Mean tokens of a row with its answer.
        answer: Tokens of the longest answer with its end token.
        batch_size: Rows per optimiser step.
        budget: The setting `train.micro_batch_tokens`.
    """
    tokens = max(longest, min(budget, batch_size * longest))
    return MicroBatch(tokens, min(batch_size, math.ceil(tokens / mean)), longest, answer)


def empty_model(base: ModelSettings, labels: Sequence[str] = ()) -> Any:
    """Return the base as its config describes it, on the meta device: shapes without weights.

    Args:
        base: Its name and head.
        labels: What a linear head tells apart.

    Raises:
        ArtifactError: The config cannot be found, or is of no model that can have such a head.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    config = base_config(base)
    if base.head == "label-words":
        with loading_of(base.name, "config"), torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    require_head_known(config, base.name)
    config.update(classes_of(labels))
    with loading_of(base.name, "config"), torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    prepare_head(model, base.name, fresh=True)
    return model


def base_shape(model: Any) -> BaseShape:
    """Return the shape of a model without an adapter; its weights are not read."""
    config = model.config.get_text_config()
    linears = tuple(_linears(model))
    heads = config.num_attention_heads
    return BaseShape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        linears=linears,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        attention=heads * (getattr(config, "head_dim", None) or config.hidden_size // heads),
        # Some configs (GPT-2, BLOOM) do not say it: there the MLP's second layer is the one with the most inputs.
        intermediate=getattr(config, "intermediate_size", None) or max((n for n, _ in linears), default=0),
        vocabulary=model.config.num_labels if has_linear_head(model) else config.vocab_size,
        heads=heads,
        groups=getattr(config, "num_key_value_heads", None) or heads,
    )


def _linears(model: Any) -> Sequence[tuple[int, int]]:
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    heads = heads_of(model)
    found = []
    for module in model.modules():
        if isinstance(module, Linear) and module not in heads:
            found.append((module.in_features, module.out_features))
        elif isinstance(module, Conv1D):
            inputs, outputs = module.weight.shape
            found.append((inputs, outputs))
    return found


def adapter_shape(model: Any) -> AdapterShape:
    """Return the shape of a PEFT model's adapter; its weights are not read."""
    adapted = [module for module in model.modules() if getattr(module, "lora_A", None)]
    first = [matrix for module in adapted for matrix in module.lora_A.values()]
    return AdapterShape(
        parameters=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        inputs=sum(matrix.in_features for matrix in first),
        ranks=sum(matrix.out_features for matrix in first),
    )
