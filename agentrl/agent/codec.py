"""Text to token ids and back, with cuts on token limits at a word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Codec:
    """A tokenizer seen by an episode. Texts are encoded alone, and nothing is added before or after them."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer` is a fast Hugging Face tokenizer, whose character offsets make exact cuts possible."""
        self.tokenizer = tokenizer

    def encode(self, text: str, control_tokens: bool = False) -> list[int]:
        """Return the ids of `text`, in which a control token such as <|im_end|> is only text unless they are allowed."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=not control_tokens)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def cut(self, text: str, limit: int) -> str:
        """Return the longest start of `text` that ends at a word and has at most `limit` tokens."""
        if limit <= 0:
            return ""
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
        if len(encoded["input_ids"]) <= limit:
            return text
        # Cut inside a character or a word, a text can need more tokens than it had as a part of the whole.
        for count in range(limit, 0, -1):
            kept = _to_word(text, encoded["offset_mapping"][count - 1][1])
            if len(self.encode(kept)) <= limit:
                return kept
        return ""


def _to_word(text: str, end: int) -> str:
    """Return text[:end] without the word that `end` cuts in two, if there is another one before it."""
    kept = text[:end]
    whole = kept[-1:].isspace() or text[end : end + 1].isspace()
    if not whole and len(kept.split()) > 1:
        kept = kept.rsplit(maxsplit=1)[0]
    return kept.rstrip()
