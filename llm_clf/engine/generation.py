"""Text that the model writes itself: greedy, a batch at once or as a stream."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from llm_clf.engine.batches import pad_left


class TextGenerator:
    """Writes the most probable next token until the end token or the limit.

    Args:
        model: A causal language model of transformers, with or without a PEFT adapter.
        tokenizer: The base's tokenizer.
        pad_id: Token on padded places.
        max_new_tokens: Most tokens of an answer.
    """

    def __init__(self, model: Any, tokenizer: Any, *, pad_id: int, max_new_tokens: int) -> None:
        from transformers import GenerationConfig

        self._model = model
        self._tokenizer = tokenizer
        self._pad_id = pad_id
        # The base's own generation config may sample; only its end tokens count here.
        own = getattr(model.generation_config, "eos_token_id", None)
        ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
        self._ends = sorted(ends)
        self._config = GenerationConfig(
            do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=self._ends, pad_token_id=pad_id
        )
        model.generation_config = self._config

    @torch.inference_mode()
    def complete(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        """Return the text that follows each prompt, without special tokens."""
        batch = pad_left(prompts, self._pad_id, self._model.device)
        written = self._generate(batch.input_ids, batch.attention_mask)[:, batch.input_ids.shape[1] :]
        texts: list[str] = self._tokenizer.batch_decode(written, skip_special_tokens=True)
        return texts

    @torch.inference_mode()
    def stream(self, prompt: Sequence[int], write: Callable[[str], None]) -> str:
        """Return the text that follows a prompt, and hand its pieces to `write` as they come.

        White space around an answer is no part of it, as in the chats of ChatGLM's and others' own code.

        Ctrl-C ends the answer where it is: the text so far is returned.
        """
        streamer = _piece_streamer(self._tokenizer, write)
        ids = torch.tensor([list(prompt)], device=self._model.device)
        try:
            self._generate(ids, torch.ones_like(ids), streamer=streamer)
        except KeyboardInterrupt:
            streamer.end()
        return "".join(streamer.pieces).rstrip()

    def _generate(self, ids: torch.Tensor, mask: torch.Tensor, **extra: Any) -> torch.Tensor:
        written: torch.Tensor = self._model.generate(
            input_ids=ids, attention_mask=mask, generation_config=self._config, **extra
        )
        return written


def _piece_streamer(tokenizer: Any, write: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class PieceStreamer(TextStreamer):  # type: ignore[misc]
        """Hands whole words on instead of printing them, and keeps them."""

        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.pieces: list[str] = []

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            """Take the next piece of text."""
            if not self.pieces:
                text = text.lstrip()
            if text:
                self.pieces.append(text)
                write(text)

    return PieceStreamer()
