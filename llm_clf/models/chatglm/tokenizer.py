"""A fast tokenizer that equals ChatGLM's own, built from its SentencePiece model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm_clf.errors import ArtifactError
from llm_clf.models.chatglm.config import CHATGLM3, EOS, PAD
from llm_clf.models.chatglm.weights import require_no_pointer

MODEL = "tokenizer.model"
# The special tokens follow the SentencePiece vocabulary in this order.
SPECIALS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
PREFIX = ("[gMASK]", "sop")
# A ChatGLM3 also ends its answer where another would speak.
SPEAKERS = ("<|user|>", "<|observation|>")
SPACE = "▁"

# The original's build_prompt: rounds of question and answer. It has no special token in it, and the prefix is what the
# tokenizer puts before any text; so rendered text, tokenised, gives the original's ids.
CHATGLM2_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{%- if not loop.first -%}{{ '\\n\\n' }}{%- endif -%}
{{ '[Round ' ~ (loop.index0 // 2 + 1) ~ ']\\n\\n问：' ~ message['content'] ~ '\\n\\n答：' }}
{%- elif message['role'] == 'assistant' -%}
{{ message['content'] }}
{%- else -%}
{{ raise_exception('ChatGLM2 knows the roles user and assistant, in turn.') }}
{%- endif -%}
{%- endfor -%}"""

# The original's build_chat_input, where each role and each message is tokenised alone: SentencePiece puts a space in
# front of every text, which here stands in the template. An empty message has no tokens and so no space.
CHATGLM3_TEMPLATE = """\
{{- '[gMASK]sop' -}}
{%- for message in messages -%}
{{ '<|' ~ message['role'] ~ '|>' ~ (message['metadata'] or '') ~ '\\n' }}
{%- if message['content'] -%}{{ ' ' ~ message['content'] }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"""


def build_tokenizer(folder: Path, *, family: str) -> Any:
    """Return the tokenizer of an original folder as a fast one of transformers.

    Args:
        folder: Holds `tokenizer.model`.
        family: `chatglm2` or `chatglm3`.

    Raises:
        ArtifactError: The file is missing, or is no SentencePiece BPE model as ChatGLM's are.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = _read_pieces(folder)
    vocabulary = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    backend = Tokenizer(
        models.BPE(vocabulary, list(_merges(pieces, vocabulary)), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    names = specials(family)
    backend.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in ("<unk>", "<s>", "</s>", *names)]
    )
    before = " ".join(PREFIX)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{before} $A",
        pair=f"{before} $A $B </s>",
        special_tokens=[(name, backend.token_to_id(name)) for name in (*PREFIX, "</s>")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token="<unk>",
        eos_token="</s>",
        extra_special_tokens=list(names),
        padding_side="left",
        # "eop" in "neoplasm" is text, as "[MASK]" in a paper on BERT is.
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        # The fast default adds token types, which Glm does not take.
        model_input_names=["input_ids", "attention_mask"],
        chat_template=CHATGLM3_TEMPLATE if family == CHATGLM3 else CHATGLM2_TEMPLATE,
    )


def specials(family: str) -> tuple[str, ...]:
    """Return the special tokens that follow the SentencePiece vocabulary."""
    return SPECIALS + ROLES if family == CHATGLM3 else SPECIALS


def end_ids(folder: Path, *, family: str) -> list[int]:
    """Return the ids that end an answer; of a folder without a tokenizer the end token alone."""
    if family != CHATGLM3 or not (folder / MODEL).is_file():
        return [EOS]
    first = _read_pieces(folder).get_piece_size()
    return [EOS, *(first + specials(family).index(name) for name in SPEAKERS)]


def _read_pieces(folder: Path) -> Any:
    from sentencepiece import SentencePieceProcessor

    file = folder / MODEL
    if not file.is_file():
        found = (
            "ice_text.model, so it is a ChatGLM-6B of version 1" if (folder / "ice_text.model").is_file() else "none"
        )
        raise ArtifactError(f"{folder}: needs {MODEL}; found {found}. Copy it from the same place as the weights.")
    require_no_pointer(file)
    pieces = SentencePieceProcessor()
    try:
        pieces.LoadFromSerializedProto(file.read_bytes())
    except RuntimeError as error:
        raise ArtifactError(f"{file}: is no SentencePiece model, or damaged. Copy it again.") from error
    if pieces.eos_id() != EOS or pieces.unk_id() != PAD or not pieces.is_byte(pieces.piece_to_id("<0x00>")):
        raise ArtifactError(
            f"{file}: is not of ChatGLM's kind (unknown token 0, end token 2, bytes as pieces). Give the "
            "tokenizer.model that belongs to the weights."
        )
    return pieces


def _merges(pieces: Any, vocabulary: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Yield BPE merges, the first to be done first.

    SentencePiece joins the neighbours whose joint piece has the highest score; any two pieces that make it up may be
    the ones that stand there.
    """
    ordinary = [
        (pieces.get_score(i), i, piece)
        for piece, i in vocabulary.items()
        if not (pieces.is_byte(i) or pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_unused(i))
    ]
    for _, _, piece in sorted(ordinary, key=lambda item: (-item[0], item[1])):
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                yield left, right
