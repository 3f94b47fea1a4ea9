"""A lock that counts how often it was taken, and says whether it is held."""

from __future__ import annotations

import threading
from types import TracebackType


class CountingLock:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.num_turns = 0

    @property
    def is_held(self) -> bool:
        return self._lock.locked()

    def __enter__(self) -> None:
        self._lock.acquire()
        self.num_turns += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lock.release()
