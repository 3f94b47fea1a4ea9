"""Turns on processors that the engine and the loader share."""

from __future__ import annotations

import threading
from types import TracebackType


class FairLock:
    """A lock that two threads get in turn, however soon the one asks again.

    On a CPU the engine takes it for a step and the loader for a portion of weights. BLAS's threads
    wait busily for each other: with a third busy thread on their cores a step takes many times as
    long, while the step and the portion one after the other take the sum of both.
    """

    def __init__(self) -> None:
        self._next = threading.Lock()
        self._held = threading.Lock()

    @property
    def is_wanted(self) -> bool:
        """Whether the other thread waits for whoever holds it."""
        return self._next.locked()

    def __enter__(self) -> None:
        # Who let go and comes again waits here while the other, who holds this, waits below.
        with self._next:
            self._held.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._held.release()
