"""Hits as lines of text within a limit of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from agentrl.agent.codec import Codec, Text
from retrievers.base import Hit

# The head of a hit alone takes about this many tokens.
_LEAST_HIT = 8

_NOTHING = "Nothing was found."


def fit(
    hits: Sequence[Hit],
    codec: Codec,
    limit: int,
    neutralise: Callable[[str], str],
    write: Callable[[str], Text],
    with_ids: bool,
) -> Text:
    """Write hits, one a line, so that they and their frame have at most `limit` tokens; long texts share the room."""
    names = [(f"Id: {neutralise(hit.id)}, " if with_ids else "", neutralise(hit.title)) for hit in hits]
    texts = [neutralise(" ".join(hit.text.split())) for hit in hits]
    room = limit - len(codec.encode(write("")))
    # The last hits are left out when there is no room for the heads of all.
    for count in range(min(len(hits), limit // _LEAST_HIT), 0, -1):
        # A title is bounded too: in a corpus without titles a whole paragraph stands in its place.
        heads = [
            f"Doc {rank}({codec.cut(name, room // 2)}Title: {codec.cut(title, min(limit // (count + 3), room // 2))})"
            for rank, (name, title) in enumerate(names[:count], start=1)
        ]
        frame = len(codec.encode(write(_lines(heads, [""] * count))))
        # Encoding the parts together can take a few tokens more than apart, so the share shrinks until the whole fits.
        for share in range((limit - frame) // count, -1, -1):
            text = write(_lines(heads, [codec.cut(text, share) for text in texts[:count]]))
            if len(codec.encode(text)) <= limit:
                return text
    # Where not even one head has room, there were hits all the same.
    return write("…" if hits else _NOTHING)


def _lines(heads: Sequence[str], texts: Sequence[str]) -> str:
    return "\n".join(f"{head} {text}".rstrip() for head, text in zip(heads, texts, strict=True))
