"""How often streams are told of new tokens: many streams get fewer, larger deltas.

What a message costs the event loop is taken from the engine, which needs the same interpreter and,
on a CPU, the same cores. A reader of one stream of many does not see the difference.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

# Wake-ups that are due within this part of the interval are made at once.
SLACK = 0.1


class DeltaPacer:
    """Event loop only. All streams that generate get about `max_deltas_per_s` together."""

    def __init__(self, max_deltas_per_s: float) -> None:
        self._max_deltas_per_s = max_deltas_per_s
        self._generating: set[object] = set()
        # Who is told later, by a key of its own: when it was told last, and how.
        self._held: dict[object, tuple[float, Callable[[], None]]] = {}
        self._timer: asyncio.TimerHandle | None = None

    @property
    def interval_s(self) -> float:
        """How long a stream waits from one delta to the next."""
        return len(self._generating) / self._max_deltas_per_s

    def set_limit(self, max_deltas_per_s: float) -> None:
        self._max_deltas_per_s = max_deltas_per_s
        self._set_timer()

    def join(self, key: object) -> None:
        """The stream has its first token."""
        self._generating.add(key)

    def leave(self, key: object) -> None:
        """No more tokens will come, or nobody reads them. No harm when it left before."""
        self._held.pop(key, None)
        if key in self._generating:
            self._generating.remove(key)
            self._set_timer()

    def told(self, key: object) -> None:
        """The stream has been told everything, whether or not it was its turn."""
        self._held.pop(key, None)

    def tell(self, key: object, last_told_at: float | None, wake: Callable[[], None]) -> None:
        """Call `wake` when the stream's turn comes: at once if it was never told anything.

        `last_told_at` is an instant of the event loop's clock.
        """
        if last_told_at is None or self._is_due(last_told_at):
            self._held.pop(key, None)
            wake()
        elif key not in self._held:
            self._held[key] = last_told_at, wake
            due_at = last_told_at + self.interval_s
            if self._timer is None or due_at < self._timer.when():
                self._set_timer()

    def _wake_due(self) -> None:
        for key in [key for key, (told_at, _) in self._held.items() if self._is_due(told_at)]:
            self._held.pop(key)[1]()
        self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._held:
            first_at = min(told_at for told_at, _ in self._held.values())
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(first_at + self.interval_s, self._wake_due)

    def _is_due(self, last_told_at: float) -> bool:
        waited_s = asyncio.get_running_loop().time() - last_told_at
        return waited_s >= (1 - SLACK) * self.interval_s
