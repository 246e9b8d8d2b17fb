"""A budget of tokens: a generation starts when the tokens that it may grow to are free, in the order of arrival."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class TokenBudget:
    """Lets its users hold at most `tokens` at once, on one event loop. Who asks for more than `tokens` waits to be alone."""

    def __init__(self, tokens: int) -> None:
        if tokens < 1:
            raise ValueError(f"a budget of {tokens} tokens holds nothing")
        self.tokens = tokens
        self._free = tokens
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def hold(self, tokens: int) -> AsyncIterator[None]:
        """Hold `tokens` during the block, which begins when they are free and all earlier calls have begun theirs."""
        tokens = min(tokens, self.tokens)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = tokens, turn
        self._waiting.append(entry)
        self._hand_out()
        try:
            await turn
            yield
        finally:
            if turn.done() and not turn.cancelled():
                self._free += tokens
            else:
                self._waiting.remove(entry)
            self._hand_out()

    def _hand_out(self) -> None:
        # A cancelled call removes its own entry and then calls this method again.
        while self._waiting and not self._waiting[0][1].cancelled() and self._waiting[0][0] <= self._free:
            tokens, turn = self._waiting.popleft()
            self._free -= tokens
            turn.set_result(None)
