"""How often streams are told of new tokens: many streams get fewer, larger deltas.

What a message costs the event loop is taken from the engine, which needs the same interpreter and,
on a CPU, the same cores. A reader of one stream of many does not see the difference.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Wake-ups that are due within this part of the interval are made at once.
SLACK = 0.1


class DeltaPacer:
    """Event loop only. All streams together get about `max_deltas_per_s`."""

    def __init__(self, max_deltas_per_s: float) -> None:
        self.max_deltas_per_s = max_deltas_per_s
        self._num_readers = 0
        # Who is told later, by a key of its own: when, and how.
        self._held: dict[object, tuple[float, Callable[[], None]]] = {}
        self._timer: asyncio.TimerHandle | None = None

    @property
    def interval_s(self) -> float:
        """How long a stream waits from one delta to the next."""
        return self._num_readers / self.max_deltas_per_s

    @contextmanager
    def reading(self, key: object) -> Iterator[None]:
        """Around the time in which a stream is read; what is held for it goes with it."""
        self._num_readers += 1
        try:
            yield
        finally:
            self._num_readers -= 1
            self._held.pop(key, None)

    def tell(self, key: object, last_told_at: float | None, wake: Callable[[], None]) -> None:
        """Call `wake` when the stream's turn comes: at once if it was never told anything.

        `last_told_at` is an instant of the event loop's clock.
        """
        if key in self._held:
            return
        loop = asyncio.get_running_loop()
        due_at = loop.time() if last_told_at is None else last_told_at + self.interval_s
        if self._is_due(due_at, loop.time()):
            wake()
            return
        self._held[key] = due_at, wake
        if self._timer is None:
            self._timer = loop.call_at(due_at, self._wake_due)

    def _wake_due(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        due = [key for key, (due_at, _) in self._held.items() if self._is_due(due_at, now)]
        for key in due:
            self._held.pop(key)[1]()
        self._timer = None
        if self._held:
            next_at = min(due_at for due_at, _ in self._held.values())
            self._timer = loop.call_at(next_at, self._wake_due)

    def _is_due(self, due_at: float, now: float) -> bool:
        return due_at <= now + SLACK * self.interval_s
