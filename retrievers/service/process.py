"""A retriever in a process of its own, which is started again when it dies. That process runs `retrievers.service.child`.

Java, or whatever the retriever needs, can then crash without taking the caller along, and shares no interpreter with it.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from retrievers.base import CannotReadError, Hit, RetrieverError
from retrievers.service.frames import BUFFER_BYTES, frame, read_frame, unpack_rows

_SHORTEST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 5.0
_STABLE_SECONDS = 30.0


class RetrieverStartingError(RetrieverError):
    """The retriever's process died and is being started again; ask again in a second."""


class ProcessRetriever:
    """An asynchronous context manager around a child process and the one socket to it, on one event loop.

    Every call is sent at once; the child works on all of them together, and drops those that are cancelled. When the
    child dies, the calls that wait fail with `RetrieverStartingError`, as do later ones until the next child is ready.

    Four times in `hang_seconds` the child is asked for a sign of life, which its event loop gives at once, however busy
    the retriever's thread is, and for the retriever's `ping`. A child is killed that sends nothing at all for
    `hang_seconds`, or whose retriever answers neither a call nor a ping for `stuck_seconds`: a search may take long,
    but not for ever.
    """

    def __init__(
        self,
        target: str,
        options: Mapping[str, Any],
        *,
        start_seconds: float = 120.0,
        hang_seconds: float = 60.0,
        stuck_seconds: float = 300.0,
    ) -> None:
        """Nothing is started yet.

        Args:
            target: what makes the retriever, as `package.module:attribute`, such as retrievers.lucene.retriever:LuceneRetriever.
            options: its keyword arguments; they go to the child as JSON.
            start_seconds: within which the child must be ready.
            hang_seconds: after which a child that is silent counts as dead.
            stuck_seconds: after which it does too if its retriever answers nothing; longer than any batch of searches.
        """
        self._target, self._options = target, dict(options)
        self._start_seconds, self._hang_seconds, self._stuck_seconds = start_seconds, hang_seconds, stuck_seconds
        self._silent_seconds = self._unanswered_seconds = 0.0
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._next_id = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._reason = "it has not been started; use `async with`"
        self.about: dict[str, Any] = {}
        self.restarts = 0

    @property
    def state(self) -> str:
        """`ready`, `starting` or `stopped`."""
        return "ready" if self._writer is not None else "stopped" if self._supervisor is None else "starting"

    @property
    def pid(self) -> int | None:
        """The child's process id."""
        return None if self._process is None else self._process.pid

    async def __aenter__(self) -> ProcessRetriever:
        """Start the child. Raises RetrieverError if the retriever cannot be made, or not in time."""
        try:
            await self._start()
        except BaseException:
            await self._end("it did not start")
            raise
        self._supervisor = asyncio.create_task(self._supervise())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the child."""
        # First of all, because an interruption may take the awaits below away.
        if self._process is not None:
            self._process.kill()
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            supervisor.cancel()
            await asyncio.gather(supervisor, return_exceptions=True)
        await self._end("it was stopped")

    async def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """Return the `k` best hits of each query, best first, in the order of the queries.

        Raises:
            RetrieverStartingError: if the child died, or another is starting.
            RetrieverError: if the search could not be done.
        """
        answer = await self._ask({"queries": list(queries), "k": k})
        return unpack_rows(answer["rows"])

    async def read(self, document_id: str) -> Hit | None:
        """Return the whole document with this id, with score 0, or None if there is none.

        Raises:
            CannotReadError: if the retriever has no whole documents.
            RetrieverStartingError: if the child died, or another is starting.
            RetrieverError: if the document could not be read.
        """
        answer = await self._ask({"read": document_id})
        return next(iter(unpack_rows(answer["rows"])[0]), None)

    async def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        if self._writer is None:
            kind = RetrieverError if self._supervisor is None else RetrieverStartingError
            raise kind(f"the retriever's process is not ready: {self._reason}")
        number = self._take_id()
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self._writer.write(frame(message | {"id": number}))
            answer = await future
        except asyncio.CancelledError:
            # Work that nobody waits for would hold up the others.
            if self._writer is not None:
                self._writer.write(frame({"id": number, "cancel": True}))
            raise
        finally:
            self._waiting.pop(number, None)
        if "error" in answer:
            raise (CannotReadError if answer["cannot_read"] else RetrieverError)(answer["error"])
        return answer

    def _take_id(self) -> int:
        self._next_id += 1
        return self._next_id

    async def _supervise(self) -> None:
        pause = _SHORTEST_PAUSE_SECONDS
        while True:
            began = time.monotonic()
            try:
                if self._writer is None:
                    await self._start()
                await self._receive()
            except RetrieverError as error:
                await self._end(str(error))
            if time.monotonic() - began > _STABLE_SECONDS:
                pause = _SHORTEST_PAUSE_SECONDS
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            self.restarts += 1

    async def _start(self) -> None:
        """Start a child and wait until it is ready. Raises RetrieverError if it does not get there."""
        try:
            ours = self._spawn()
        except OSError as error:
            raise RetrieverError(f"the retriever's process cannot be started: {error}") from error
        self._reader, writer = await asyncio.open_connection(sock=ours, limit=BUFFER_BYTES)
        try:
            self.about = await self._greet(writer)
        except BaseException:
            writer.close()
            raise
        self._writer = writer

    def _spawn(self) -> socket.socket:
        """Start a child and return our end of the socket. Raises OSError."""
        ours, theirs = socket.socketpair()
        with theirs:
            environment = dict(os.environ)
            root = str(Path(__file__).parents[2])
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH", "")]))
            # A session of its own keeps Ctrl-C away from the child, which ends when our end of the socket does.
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "retrievers.service.child", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env=environment,
                    start_new_session=True,
                )
            except BaseException:
                ours.close()
                raise
        return ours

    async def _greet(self, writer: asyncio.StreamWriter) -> dict[str, Any]:
        """Tell the child what to be; return how the retriever describes itself. Raises RetrieverError."""
        try:
            async with asyncio.timeout(self._start_seconds):
                writer.write(frame({"target": self._target, "options": self._options, "path": sys.path}))
                message = await read_frame(self._reader)
        except TimeoutError as error:
            raise RetrieverError(f"the retriever's process was not ready within {self._start_seconds:g} s") from error
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise RetrieverError("the retriever's process died while it started; stderr says why") from error
        if "failed" in message:
            raise RetrieverError(message["failed"])
        return message["ready"]

    async def _receive(self) -> None:
        """Hand out answers until the child is gone. Raises RetrieverError when it is."""
        self._silent_seconds = self._unanswered_seconds = 0.0
        watch = asyncio.create_task(self._watch())
        try:
            while True:
                message = await read_frame(self._reader)
                self._silent_seconds = 0.0
                if "alive" in message:
                    continue
                self._unanswered_seconds = 0.0
                future = self._waiting.get(message["id"])
                if future is not None and not future.done():
                    future.set_result(message)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise RetrieverError("the retriever's process died and is being started again") from error
        finally:
            watch.cancel()

    async def _watch(self) -> None:
        """Kill a child that hangs; `_receive` then sees that it is gone."""
        pause = self._hang_seconds / 4
        while self._process is not None and self._writer is not None:
            self._writer.write(frame({"id": self._take_id()}))
            await asyncio.sleep(pause)
            # Added up instead of read from a clock, so that a pause of this process is not taken for the child's.
            self._silent_seconds += pause
            self._unanswered_seconds += pause
            if self._silent_seconds >= self._hang_seconds or self._unanswered_seconds >= self._stuck_seconds:
                self._process.kill()
                return

    async def _end(self, reason: str) -> None:
        """See to it that the child is gone, and tell those who wait."""
        self._reason = reason
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(RetrieverStartingError(reason))
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            await asyncio.to_thread(process.wait)
