"""The child side of a retriever in a process of its own: `python -m retrievers.service.child FD` (see `process`).

Both ends of the socket speak in frames: four bytes with the length, big-endian, then a JSON object.

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
import os
import socket
import struct
import sys
from typing import Any

from retrievers.base import CannotReadError, Hit, RetrieverError, load_attribute, read

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


async def main(descriptor: int) -> None:
    """Make the retriever that the other end names, and answer until that end is gone."""
    reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=descriptor), limit=BUFFER_BYTES)
    start = await read_frame(reader)
    sys.path.extend(folder for folder in start["path"] if folder not in sys.path)
    try:
        retriever = load_attribute(start["target"])(**start["options"])
        about = await retriever.ping() if hasattr(retriever, "ping") else {}
    except RetrieverError as error:
        writer.write(frame({"failed": str(error)}))
        await writer.drain()
        return
    writer.write(frame({"ready": about}))

    tasks: dict[int, asyncio.Task[None]] = {}
    while True:
        message = await read_frame(reader)
        number = message["id"]
        if "cancel" in message:
            if number in tasks:
                tasks[number].cancel()
            continue
        if not ("queries" in message or "read" in message):
            writer.write(frame({"id": number, "alive": True}))
        tasks[number] = asyncio.create_task(_answer(retriever, message, writer))
        tasks[number].add_done_callback(lambda _, number=number: tasks.pop(number))


async def _answer(retriever: Any, message: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    answer = {"id": message["id"]}
    try:
        # Also the frame, because a retriever may give what JSON cannot hold.
        data = frame(answer | await _result(retriever, message))
    except RetrieverError as error:
        data = frame(answer | {"error": str(error), "cannot_read": isinstance(error, CannotReadError)})
    except Exception as error:  # noqa: BLE001, whoever asked must hear of it, or would wait for ever
        data = frame(answer | {"error": f"the retriever broke: {error!r}", "cannot_read": False})
    writer.write(data)
    await writer.drain()


async def _result(retriever: Any, message: dict[str, Any]) -> dict[str, Any]:
    if "queries" in message:
        return {"rows": pack_rows(await retriever.search(message["queries"], message["k"]))}
    if "read" in message:
        found = await read(retriever, message["read"])
        return {"rows": pack_rows([[] if found is None else [found]])}
    if hasattr(retriever, "ping"):
        await retriever.ping()
    return {}


if __name__ == "__main__":
    try:
        asyncio.run(main(int(sys.argv[1])))
    except (asyncio.IncompleteReadError, ConnectionError):
        # Nobody is left to answer to, so nothing is worth waiting for, such as a search that Java is busy with.
        os._exit(0)
