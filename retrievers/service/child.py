"""The program of a retriever's own process: `python -m retrievers.service.child FD`; `process` starts it."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from typing import Any

from retrievers.base import CannotReadError, RetrieverError, read
from retrievers.names import import_path
from retrievers.service.frames import BUFFER_BYTES, frame, pack_rows, read_frame


async def main(descriptor: int) -> None:
    """Make the retriever that the other end names, and answer until that end is gone."""
    reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=descriptor), limit=BUFFER_BYTES)
    start = await read_frame(reader)
    sys.path.extend(folder for folder in start["path"] if folder not in sys.path)
    try:
        retriever = import_path(start["target"])(**start["options"])
        about = await retriever.ping() if hasattr(retriever, "ping") else {}
    except (RetrieverError, ImportError) as error:
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
