"""Text to token ids and back, with cuts on token limits at a word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Codec:
    """A tokenizer seen by an episode. Texts are encoded alone and without special tokens."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer` is a fast Hugging Face tokenizer, whose character offsets make exact cuts possible."""
        self.tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def cut(self, text: str, limit: int) -> str:
        """Return the longest start of `text` that ends at a word and has at most `limit` tokens."""
        if limit <= 0:
            return ""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if len(encoded["input_ids"]) <= limit:
            return text
        kept = text[: encoded["offset_mapping"][limit - 1][1]]
        at_word = kept.rsplit(maxsplit=1)[0] if any(c.isspace() for c in kept.strip()) else kept
        return at_word.rstrip()
