"""The pool's own tasks: no caller's cancel reaches them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine


class Tasks:
    """Event loop only."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def wait(self) -> None:
        """Wait for all, those included that start meanwhile."""
        while self._running:
            await asyncio.wait(self._running)
