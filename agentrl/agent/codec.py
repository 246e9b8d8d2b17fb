"""Text to token ids and back, with cuts on token limits at a word.

A tokenizer's added tokens, such as <|im_end|> or Qwen's <tool_call>, are its control tokens: written in a text they can
become a single id that means more than its letters. Special tokens, which rule a conversation, become ids only in segments
of our own. The other added tokens become ids wherever they stand, as they did when the model was trained. Foreign text is
therefore neutralised before it is written.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

# How many tokens of a word are given up so that a text ends before it.
_WORD = 16

# <> become [] and [] become (), never the other way round, so that rewriting a text again and again comes to an end.
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


@dataclass(frozen=True, slots=True)
class Encoding:
    """A text with its N token ids. `starts` [N] are the positions in the text at which the ids begin, in order."""

    text: str
    ids: list[int]
    starts: list[int]

    def count(self, start: int, end: int) -> int:
        """Return how many ids begin in text[start:end]."""
        return bisect_left(self.starts, end) - bisect_left(self.starts, start)

    def keep(self, start: int, end: int, most: int, at_word: bool = True) -> str:
        """Return the start of text[start:end] in which at most `most` ids begin: all of it, or what ends at a word.

        Where the last white space is more than 16 tokens back, as in text that is written without, the cut falls inside.
        """
        first = bisect_left(self.starts, start)
        if bisect_left(self.starts, end) - first <= most:
            return self.text[start:end]
        # A character can take several ids, which all begin where it does, so no character is cut in two.
        stop = self.starts[first + most] if most > 0 else start
        kept = self.text[start:stop]
        if not at_word:
            return kept
        if not (kept[-1:].isspace() or self.text[stop].isspace()):
            words = kept.rsplit(maxsplit=1)
            if len(words) == 2 and self.count(stop - len(words[1]), stop) <= _WORD:
                kept = words[0]
        return kept.rstrip()


class Codec:
    """A tokenizer seen by an episode. Texts are encoded alone, and nothing is added before or after them."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer` is a fast Hugging Face tokenizer, whose character offsets make exact cuts possible."""
        self.tokenizer = tokenizer
        # A run of spaces or a single letter that a tokenizer has added controls nothing, and rewriting it would harm text.
        added = [token for token in tokenizer.added_tokens_decoder.values() if len(token.content.strip()) > 1]
        added.sort(key=lambda token: -len(token.content))
        self._added = _any_of(re.escape(token.content) for token in added)
        # Some tokens take the white space beside them along (Phi's <|end|>), and are split off together with it.
        space = {True: r"\s*", False: ""}
        self._split = _any_of(space[t.lstrip] + re.escape(t.content) + space[t.rstrip] for t in added)
        self._latest: tuple[Text, list[int]] = ("", [])

    def encode(self, text: Text) -> list[int]:
        """Return the ids of `text`, in which special tokens are letters except in segments that say otherwise."""
        latest, ids = self._latest
        if text != latest:
            ids = [token for part, split in self._parts(text) for token in self._tokenize(part, split)["input_ids"]]
            # An observation is encoded to see that it fits, and then to be appended: once is enough.
            self._latest = text, ids
        return list(ids)

    def locate(self, text: Text) -> Encoding:
        """Return the ids of `text`, as `encode` does, with the positions at which they begin."""
        whole = as_string(text)
        ids: list[int] = []
        starts: list[int] = []
        position = 0
        for part, split in self._parts(text):
            encoded = self._tokenize(part, split, return_offsets_mapping=True)
            ids += encoded["input_ids"]
            starts += [position + start for start, _ in encoded["offset_mapping"]]
            position += len(part)
        self._latest = text, ids
        # A mark that a tokenizer puts before a text stands nowhere in it, and some say that it begins at 0.
        return Encoding(whole, ids, list(accumulate(starts, max)))

    def _parts(self, text: Text) -> Iterator[tuple[str, bool]]:
        """Yield the parts that are encoded one by one, and whether special tokens in each are mere letters.

        The tokenizer splits a text at its control tokens before anything else, and so does this: between two of them our
        words and foreign ones are encoded together, as they are when a chat template is rendered.
        """
        plain = ""
        for segment in (Segment(text),) if isinstance(text, str) else text:
            end = 0
            for match in self._split.finditer(segment.text) if segment.control else ():
                plain += segment.text[end : match.start()]
                if plain:
                    yield plain, True
                yield match.group(), False
                plain, end = "", match.end()
            plain += segment.text[end:]
        if plain:
            yield plain, True

    def _tokenize(self, text: str, split: bool, **options: Any) -> Any:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=split, **options)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, the special ones written out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def ended(self, ids: Sequence[int]) -> bool:
        """Return whether a turn closed with the model's end token."""
        return bool(ids) and ids[-1] == self.tokenizer.eos_token_id

    def said(self, ids: Sequence[int], stop: Sequence[str]) -> str:
        """Return the text from which the action of a turn is read.

        The end token is left out. So is what the last id says beyond a stop string that it completes, because the closing
        `>` of a tag can share an id with the letters after it.
        """
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
        """Return a start of `text` that has at most `limit` tokens, and ends where `Encoding.keep` ends it."""
        whole = self.locate(text)
        if len(whole.ids) <= limit:
            return text
        room = limit
        while room > 0:
            kept = whole.keep(0, len(text), room, at_word)
            # The start of a text can take more tokens alone than it took within the whole.
            excess = len(self.encode(kept)) - limit
            if excess <= 0:
                return kept
            room -= excess
        return ""


def _any_of(patterns: Iterable[str]) -> re.Pattern[str]:
    # An empty alternation would match everywhere, so one that never matches stands for it.
    return re.compile("|".join(patterns) or r"(?!)")


def _weaken(match: re.Match[str]) -> str:
    token = match.group()
    weaker = token.translate(_WEAKER)
    return weaker if weaker != token else f"{token[0]} {token[1:]}"
