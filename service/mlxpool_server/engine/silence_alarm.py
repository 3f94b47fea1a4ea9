"""Says when nothing has happened for a while, without a timer for every thing that happens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Self


class SilenceAlarm:
    """Event loop only. A context manager: it runs inside."""

    def __init__(self, after_s: float, wake: Callable[[], None]) -> None:
        """`wake` is called when the last `reset` is `after_s` ago, and each `after_s` from then."""
        self._after_s = after_s
        self._wake = wake
        self._loop = asyncio.get_running_loop()
        self._reset_at = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_due(self) -> bool:
        return self._loop.time() - self._reset_at >= self._after_s

    def reset(self) -> None:
        self._reset_at = self._loop.time()

    def __enter__(self) -> Self:
        self.reset()
        self._sleep(self._after_s)
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _sleep(self, seconds: float) -> None:
        self._timer = self._loop.call_later(seconds, self._look)

    def _look(self) -> None:
        """The timer is left alone by `reset`: it sleeps on for what is missing."""
        silent_s = self._loop.time() - self._reset_at
        if silent_s >= self._after_s:
            self._wake()
            silent_s = 0.0
        self._sleep(self._after_s - silent_s)
