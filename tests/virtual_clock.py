"""An event loop whose clock stands still while there is work and jumps to the next timer when there is none."""

import asyncio
import selectors


class _Jumping(selectors.SelectSelector):
    """Waits for nothing: what it is asked to wait passes at once."""

    def __init__(self):
        super().__init__()
        self.now = 0.0

    def select(self, timeout=None):
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everything waits, and no timer will end it"
            self.now += max(0.0, timeout)
        return ready


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """Sleeps and timeouts take no time of ours and all of theirs; no threads, no network."""

    def __init__(self):
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self):
        return self._jumping.now


def run(coroutine):
    """Run a coroutine as asyncio.run does, by the virtual clock."""
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        return runner.run(coroutine)
