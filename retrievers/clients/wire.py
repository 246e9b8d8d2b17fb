"""What goes over HTTP: Search-R1's retrieval format, and how another server's format is put in its place.

Request: `{"queries": ["..."], "topk": 3, "return_scores": true}`. Answer:
`{"result": [[{"document": {"id": "...", "contents": "..."}, "score": 1.5}]]}`, a list of hits for each query, best first.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Protocol

from retrievers.base import ID_KEYS, Hit, RetrieverError, clean_text, contents_id, titled
from retrievers.names import import_path


class WireFormat(Protocol):
    """How a server is asked and how its answer is read. Both functions may raise ValueError, saying what is wrong."""

    def request(self, queries: Sequence[str], k: int) -> Any:
        """The JSON body that asks for the `k` best hits of each query."""
        ...

    def hits(self, payload: Any, count: int, k: int) -> list[list[Hit]]:
        """Read the JSON answer to `count` queries: at most `k` hits for each, best first."""
        ...


class SearchR1:
    """The format of Search-R1's servers, and of the many that speak it more or less.

    The BM25 server gives its documents no ids, and those of web searches no scores. A missing id is made of the contents. A
    missing score is one over the rank. Whole numbers are taken as ids, `title` and `text` for contents, and documents that
    stand alone for hits. Hits beyond the `k` that were asked for are left out.
    """

    def request(self, queries: Sequence[str], k: int) -> Any:
        """See `WireFormat.request`."""
        return {"queries": list(queries), "topk": k, "return_scores": True}

    def hits(self, payload: Any, count: int, k: int) -> list[list[Hit]]:
        """See `WireFormat.hits`. Raises ValueError if the payload is anything else."""
        rows = payload.get("result") if isinstance(payload, dict) else None
        if not isinstance(rows, list) or len(rows) != count:
            raise ValueError(f"'result' must be a list with one entry for each of the {count} queries")
        if not all(isinstance(row, list) for row in rows):
            raise ValueError("each entry of 'result' must be a list of hits")
        return [[_hit(item, rank) for rank, item in enumerate(row[:k], 1)] for row in rows]


def document_hit(document: Any, score: Any = 0.0) -> Hit:
    """Read one document of Search-R1's format. Raises ValueError if it is none."""
    if not isinstance(document, dict):
        raise ValueError("a document must be an object with 'id' and 'contents'")
    contents = document.get("contents")
    if contents is None and isinstance(document.get("text"), str):
        contents = titled(str(document.get("title") or ""), document["text"])
    if not isinstance(contents, str):
        raise ValueError("a document must have the string 'contents', or 'title' and 'text'")
    name = next((document[key] for key in ID_KEYS if document.get(key) is not None), contents_id(contents))
    if type(name) is int:
        name = str(name)
    if not isinstance(name, str):
        raise ValueError(f"the id {name!r:.50} of a document must be a string or a whole number")
    # JSON has integers that no float can hold.
    if not isinstance(score, int | float) or isinstance(score, bool) or not abs(score) <= sys.float_info.max:
        raise ValueError(f"the score of document {name!r} is {score!r:.50} and must be a finite number")
    return Hit(clean_text(name), clean_text(contents), float(score))


def load_format(path: str) -> WireFormat:
    """The wire format that `package.module:attribute` names: an object, or a class that needs no arguments.

    Raises:
        RetrieverError: if it cannot be imported or has no `request` and `hits`.
    """
    try:
        found = import_path(path)
    except ImportError as error:
        raise RetrieverError(f"wire format {error}") from error
    made = found() if isinstance(found, type) else found
    missing = [name for name in ("request", "hits") if not callable(getattr(made, name, None))]
    if missing:
        raise RetrieverError(
            f"{path!r} is no wire format: it has no {' and no '.join(missing)}; see retrievers.clients.wire"
        )
    return made


def _hit(item: Any, rank: int) -> Hit:
    if not isinstance(item, dict):
        raise ValueError("a hit must be an object with 'document' and 'score'")
    score = item.get("score")
    return document_hit(item.get("document", item), 1.0 / rank if score is None else score)
