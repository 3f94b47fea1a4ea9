"""Wake everyone who waits for the next change."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Change:
    """The next one from some moment on, also when it has come before somebody waits for it."""

    _event: asyncio.Event

    async def wait(self, timeout_s: float) -> bool:
        """False when nothing changed in `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._event.wait()
        except TimeoutError:
            return False
        return True


class Broadcast:
    """Event loop only. Waiters see a change that happens while they wait, not earlier ones."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    def next(self) -> Change:
        """The next change after this moment, to be waited for later."""
        return Change(self._event)

    async def wait(self, timeout_s: float) -> bool:
        """False when nothing changed in `timeout_s`."""
        return await self.next().wait(timeout_s)
