"""A tokenizer in which every name is one piece, so that copying a name is copying one token.

With byte pairs a name is two to six tokens, and a model of this size does not learn to copy those reliably. Names as added tokens
would not do either: the codec takes every added token out of what was retrieved (`agentrl.agent.codec`).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END = "<|end|>"
"""The only token that is no text: the end of a text, and padding."""

_SPACE = "▁"
_TAGS = tuple(f"<{slash}{name}>" for name in ("think", "search", "answer", "information") for slash in ("", "/"))
_WORD = re.compile(r"<[^>]+>| ?[A-Za-z]+(?:'s)?")
# A Unigram model picks the pieces whose scores add up to the most: one before two, a name before words, a word before letters.
_NAME, _HEADING, _FREQUENT, _NUMBER, _LETTER = -1.0, -2.0, -6.0, -9.0, -14.0
# Below the six letters of its name: a text that spells "<0x41>" means no byte.
_BYTE = -200.0
_LEAST = 10
"""How often a word must stand in the texts to be a piece."""


def make_tokenizer(names: Sequence[str], texts: Iterable[str], documents: int) -> PreTrainedTokenizerFast:
    """Return a Unigram tokenizer whose pieces are the names, tags, numbers below 1,000 and the frequent words of the texts.

    Everything else is spelled in letters, and what no letter of the texts spells in bytes. Text comes back as it was, but for
    "▁", which stands for a space. `documents` is how many passages a
    search shows: the heading of each is one piece.
    """
    taken = set(names)
    words: Counter[str] = Counter()
    letters = set(string.printable) - set("\x0b\x0c\r")
    for text in texts:
        letters.update(text)
        words.update(word for word in _WORD.findall(text) if word.strip() not in taken)
    pieces = {_piece(letter): _LETTER for letter in sorted(letters)}
    pieces |= {f"{number:0{width}d}": _NUMBER for width in (1, 2, 3) for number in range(10**width)}
    pieces |= {_piece(word): _FREQUENT for word, count in sorted(words.items()) if count >= _LEAST}
    pieces |= {_piece(f"Doc {number}(Title:"): _HEADING for number in range(1, documents + 1)}
    pieces |= {before + tag: _NAME for tag in _TAGS for before in ("", _SPACE)}
    pieces |= {_SPACE + _piece(name): _NAME for name in sorted(taken)}
    vocabulary = [("<unk>", _BYTE), *((f"<0x{byte:02X}>", _BYTE) for byte in range(256)), *pieces.items()]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


def _piece(text: str) -> str:
    return text.replace(" ", _SPACE)
