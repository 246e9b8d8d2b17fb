"""Hits as lines of text within a limit of tokens.

Tokenizing is most of what an observation costs, and it happens in the event loop that also feeds the engine. So the hits
are encoded once, whole and in their frame; what has to go is found by counting ids, and only the result is encoded again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from agentrl.agent.codec import Codec, Encoding, Text
from retrievers.base import Hit

# The head of a hit alone takes about this many tokens.
_LEAST_HIT = 8

# What a text has beyond this many characters for each token of the limit is not even encoded, since whole documents are
# much longer than what is shown of them. Text of any language has far fewer characters to a token.
_CHARACTERS = 8

_NOTHING = "Nothing was found."


@dataclass(frozen=True, slots=True)
class _Line:
    """A hit as a line, in an encoded whole: the spans of its id, title and text there, and their tokens.

    `rest` counts the tokens of the line that are none of these.
    """

    spans: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    rest: int


def fit(
    hits: Sequence[Hit],
    codec: Codec,
    limit: int,
    neutralise: Callable[[str], str],
    write: Callable[[str], Text],
    with_ids: bool,
) -> Text:
    """Write hits, one a line, so that they and their frame have at most `limit` tokens.

    `write` puts the lines, unchanged, into their frame. Where not all of it fits, long texts share the room equally, and
    titles have a room of their own and what texts leave of theirs. Hits without room for their heads are left out, the last
    ones first. A limit that does not even hold a head gives the frame around an ellipsis, which may be longer.
    """
    if not hits:
        return write(_NOTHING)
    bound = limit * _CHARACTERS
    parts = [
        (hit.id[:bound] if with_ids else "", hit.title[:bound], " ".join(hit.text.split())[:bound])
        for hit in hits[: limit // _LEAST_HIT]
    ]
    parts = [tuple(map(neutralise, part)) for part in parts]
    text = write(_join(parts))
    whole = codec.locate(text)
    if parts and len(whole.ids) <= limit:
        return text
    lines = list(_lines(parts, whole))
    room = limit - len(whole.ids) + sum(line.rest + sum(line.tokens) for line in lines)
    while room > 0 and (shares := _shares(lines, room)):
        cut = [
            tuple(whole.keep(*span, most) for span, most in zip(line.spans, shares, strict=True))
            for line, shares in shares
        ]
        text = write(_join(cut))
        # A line that was cut can take a token more alone than it took within the whole.
        excess = len(codec.encode(text)) - limit
        if excess <= 0:
            return text
        room -= excess
    # Not `_NOTHING`: there were hits.
    return write("…")


def fit_text(
    text: str, codec: Codec, limit: int, neutralise: Callable[[str], str], write: Callable[[str], Text]
) -> Text:
    """Write a text so that it and its frame, which `write` puts around it, have at most `limit` tokens.

    The text ends early where not all of it fits. A limit that does not hold the frame gives the frame around an ellipsis.
    """
    body = neutralise(text[: limit * _CHARACTERS]).strip()
    written = write(body or _NOTHING)
    whole = codec.locate(written)
    start = whole.text.find(body)
    room = limit - len(whole.ids) + whole.count(start, start + len(body))
    while len(codec.encode(written)) > limit:
        if room <= 0:
            return write("…")
        written = write(whole.keep(start, start + len(body), room))
        room -= max(0, len(codec.encode(written)) - limit)
    return written


def _line(rank: int, parts: Sequence[str]) -> tuple[str, ...]:
    """Return the words of a line, every second of which is the hit's own: its id, title and text."""
    name, title, text = parts
    return (
        f"Doc {rank}(" + "Id: " * bool(name),
        name,
        ", " * bool(name) + "Title: ",
        title,
        ")" + " " * bool(text),
        text,
    )


def _join(hits: Iterable[Sequence[str]]) -> str:
    return "\n".join("".join(_line(rank, parts)) for rank, parts in enumerate(hits, start=1))


def _lines(hits: Sequence[Sequence[str]], whole: Encoding) -> Iterable[_Line]:
    position = whole.text.index(_join(hits))
    for rank, parts in enumerate(hits, start=1):
        start, spans = position, []
        for number, words in enumerate(_line(rank, parts)):
            if number % 2:
                spans.append((position, position + len(words)))
            position += len(words)
        # With its line break, or where there is none with the first token of the frame's end.
        position += 1
        tokens = tuple(whole.count(*span) for span in spans)
        yield _Line(tuple(spans), tokens, whole.count(start, position) - sum(tokens))


def _shares(lines: Sequence[_Line], room: int) -> list[tuple[_Line, tuple[int, int, int]]]:
    """Return the lines that `room` tokens hold, and how many tokens of its id, title and text each of them keeps."""
    for count in range(len(lines), 0, -1):
        kept = lines[:count]
        names, titles, texts = zip(*(line.tokens for line in kept), strict=True)
        # Titles are bounded, or one as long as a text would leave none to the others.
        name, title = room // 2, room // (count + 3)
        heads = sum(line.rest for line in kept) + _taken(names, name)
        if heads + _taken(titles, title) <= room:
            text = _level(texts, room - heads - _taken(titles, title))
            title = _level(titles, room - heads - _taken(texts, text))
            return [(line, (name, title, text)) for line in kept]
    return []


def _taken(sizes: Sequence[int], most: int) -> int:
    return sum(min(size, most) for size in sizes)


def _level(sizes: Sequence[int], room: int) -> int:
    """Return the largest bound on each of the sizes with which all of them together have at most `room`."""
    for count, size in zip(range(len(sizes), 0, -1), sorted(sizes), strict=True):
        if size * count > room:
            return room // count
        room -= size
    return max(sizes)
