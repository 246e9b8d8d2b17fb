"""What a retriever's process and its owner say to one another over their socket; see `process` and `child`.

Both ends speak in frames: four bytes with the length, big-endian, then a JSON object.

- to the child, first: `{"target": "package.module:attribute", "options": {…}, "path": [where modules are, …]}`
- back: `{"ready": about}` or `{"failed": why}`
- to the child: `{"id": 1, "queries": […], "k": 3}` or `{"id": 1, "read": "document"}` or `{"id": 1}`, a ping
- back: `{"id": 1, "rows": [[[id, contents, score], …], …]}` or `{"id": 1, "error": why, "cannot_read": false}`; to a
  ping, `{"id": 1, "alive": true}` at once, then `{"id": 1}` when the retriever has answered it
- to the child, and never answered: `{"id": 1, "cancel": true}`; that call needs no answer any more
"""

from __future__ import annotations

import asyncio
import json
import struct
from typing import Any

from retrievers.base import Hit

_LENGTH = struct.Struct(">I")

BUFFER_BYTES = 1 << 20


def frame(message: dict[str, Any]) -> bytes:
    """A message as it goes over the socket."""
    body = json.dumps(message, separators=(",", ":")).encode()
    return _LENGTH.pack(len(body)) + body


async def read_frame(reader: asyncio.StreamReader) -> dict[str, Any]:
    """The next message. Raises IncompleteReadError or ConnectionError if the other end is gone."""
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    return json.loads(await reader.readexactly(length))


def pack_rows(rows: list[list[Hit]]) -> list[list[tuple[str, str, float]]]:
    """Hits as JSON can hold them."""
    return [[(hit.id, hit.contents, hit.score) for hit in row] for row in rows]


def unpack_rows(rows: list[list[list[Any]]]) -> list[list[Hit]]:
    """The hits of `pack_rows`."""
    return [[Hit(*hit) for hit in row] for row in rows]
