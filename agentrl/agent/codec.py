"""Text to token ids and back, with cuts on token limits at a word.

A tokenizer's added tokens, such as <|im_end|> or Qwen's <tool_call>, are its control tokens: written in a text they can
become a single id that means more than its letters. Those that it counts as special, the ones that rule a conversation,
become ids only in segments of our own. The others become ids wherever they stand, as they do in what the model was trained
on. Foreign text is therefore neutralised before it is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

# Each step leaves a text that reads the same, and no step leads back.
_WEAKER = str.maketrans("<>[]", "[]()")


# Control characters say nothing to a reader, and some split a tag that is read as whole.
_CONTROLS = {code: " " for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n\r"}


def clean(text: str) -> str:
    """Return foreign text as text that can be read: control characters as spaces, halves of surrogate pairs as U+FFFD.

    Tokenizers refuse a text with half a surrogate pair, and JSON from a server can hold one.
    """
    return text.translate(_CONTROLS).encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a text. Only where `control` is true do special tokens in it become their ids."""

    text: str
    control: bool = False


Text = str | tuple[Segment, ...]
"""What becomes token ids. A plain string yields no special token."""


def as_string(text: Text) -> str:
    """Return the letters of a text."""
    return text if isinstance(text, str) else "".join(segment.text for segment in text)


class Codec:
    """A tokenizer seen by an episode. Texts are encoded alone, and nothing is added before or after them."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer` is a fast Hugging Face tokenizer, whose character offsets make exact cuts possible."""
        self.tokenizer = tokenizer
        # Runs of spaces, which some tokenizers add, mean nothing but themselves; a lone letter could not be written else.
        added = [token for token in tokenizer.added_tokens_decoder.values() if len(token.content.strip()) > 1]
        added.sort(key=lambda token: -len(token.content))
        self._added = _any_of(re.escape(token.content) for token in added)
        # Some tokens take the white space beside them along (Phi's <|end|>), and are split off together with it.
        space = {True: r"\s*", False: ""}
        self._split = _any_of(space[t.lstrip] + re.escape(t.content) + space[t.rstrip] for t in added)

    def encode(self, text: Text) -> list[int]:
        """Return the ids of `text`, in which special tokens are letters except in segments that say otherwise.

        The tokenizer splits a text at its control tokens before anything else, and so does this: between two of them our
        words and foreign ones are encoded together, as they are when a chat template is rendered.
        """
        if isinstance(text, str):
            return self._encode(text, split=True)
        ids: list[int] = []
        plain = ""
        for segment in text:
            end = 0
            for match in self._split.finditer(segment.text) if segment.control else ():
                ids += self._encode(plain + segment.text[end : match.start()], split=True)
                ids += self._encode(match.group(), split=False)
                plain, end = "", match.end()
            plain += segment.text[end:]
        return ids + self._encode(plain, split=True)

    def _encode(self, text: str, split: bool) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=split)["input_ids"] if text else []

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def ended(self, ids: Sequence[int]) -> bool:
        """Return whether a turn closed with the model's end token."""
        return bool(ids) and ids[-1] == self.tokenizer.eos_token_id

    def said(self, ids: Sequence[int], stop: Sequence[str]) -> str:
        """Return the text of a turn as its action is read: without the end token and without what its last id says
        beyond a stop string that it completes, since a closing `>` can share an id with letters after it."""
        if self.ended(ids):
            return self.decode(ids[:-1])
        text = self.decode(ids)
        before = self.decode(ids[:-1])
        ends = [text.find(tag) + len(tag) for tag in stop if tag in text and tag not in before]
        return text[: min(ends)] if ends and not any(tag in before for tag in stop) else text

    def neutralise(self, text: str) -> str:
        """Clean foreign text and rewrite control tokens in it so that they are read as letters, <|im_end|> as [|im_end|]."""
        text = clean(text)
        while (weaker := self._added.sub(_weaken, text)) != text:
            text = weaker
        return text

    def cut(self, text: str, limit: int, at_word: bool = True) -> str:
        """Return the longest start of `text` that ends at a word, or anywhere, and has at most `limit` tokens."""
        if limit <= 0:
            return ""
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
        if len(encoded["input_ids"]) <= limit:
            return text
        # Cut inside a character or a word, a text can need more tokens than it had as a part of the whole.
        for count in range(limit, 0, -1):
            end = encoded["offset_mapping"][count - 1][1]
            kept = _to_word(text, end) if at_word else text[:end]
            if len(self.encode(kept)) <= limit:
                return kept
        return ""


def _any_of(patterns: Iterable[str]) -> re.Pattern[str]:
    # An empty alternation would match everywhere, so one that never matches stands for it.
    return re.compile("|".join(patterns) or r"(?!)")


def _weaken(match: re.Match[str]) -> str:
    token = match.group()
    weaker = token.translate(_WEAKER)
    return weaker if weaker != token else f"{token[0]} {token[1:]}"


def _to_word(text: str, end: int) -> str:
    """Return text[:end] without the word that `end` cuts in two, if there is another one before it."""
    kept = text[:end]
    whole = kept[-1:].isspace() or text[end : end + 1].isspace()
    if not whole and len(kept.split()) > 1:
        kept = kept.rsplit(maxsplit=1)[0]
    return kept.rstrip()
