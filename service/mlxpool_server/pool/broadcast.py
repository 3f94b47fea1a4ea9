"""Wake everyone who waits for the next change."""

from __future__ import annotations

import asyncio


class Broadcast:
    """Event loop only. Waiters see a change that happens while they wait, not earlier ones."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self, timeout_s: float) -> bool:
        """False when nothing changed in `timeout_s`."""
        event = self._event
        try:
            async with asyncio.timeout(timeout_s):
                await event.wait()
        except TimeoutError:
            return False
        return True
