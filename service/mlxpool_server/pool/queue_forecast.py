"""How long a model's queue takes, from how fast it has been moving."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from mlxpool_server.domain import Priority
from mlxpool_server.errors import DeadlineUnmeetableError

# Fewer ends than these, or than a batch, say nothing about the rate.
MIN_ENDS = 4
# Old ends count half as much each time that this has passed.
WINDOW_S = 60.0
# A forecast is rough: refuse only where it is wrong by less than this factor.
MARGIN = 2.0

_RANKS = {Priority.LOW: 0, Priority.NORMAL: 1, Priority.HIGH: 2}


@dataclass(slots=True)
class _Pace:
    """The ends since the first one, while there has been a queue."""

    started_at: float
    num_ends: float = 0.0


class QueueForecast:
    """Event loop only. Knows nothing of a model whose queue has just formed, and says so."""

    def __init__(self, max_batch_size: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_batch_size = max_batch_size
        self._clock = clock
        self._paces: dict[str, _Pace] = {}

    def ended(self, model: str, num_left: int) -> None:
        """A generation left its place in the batch; `num_left` still run or wait."""
        if num_left < self._max_batch_size:
            # No queue any more: what comes after an idle time says nothing about a full batch.
            self._paces.pop(model, None)
            return
        now = self._clock()
        pace = self._paces.get(model)
        if pace is None:
            # Counted from the first end, so that neither a load nor the first answers' length is.
            self._paces[model] = _Pace(now)
            return
        pace.num_ends += 1
        if now - pace.started_at > WINDOW_S:
            pace.num_ends /= 2
            pace.started_at += (now - pace.started_at) / 2

    def wait_s(self, model: str, num_ahead: int) -> float | None:
        """Until who comes after `num_ahead` others has a place; None where nobody can tell."""
        places = num_ahead - self._max_batch_size + 1
        if places <= 0:
            return 0.0
        pace = self._paces.get(model)
        if pace is None or pace.num_ends < max(MIN_ENDS, self._max_batch_size):
            return None
        return places * (self._clock() - pace.started_at) / pace.num_ends

    def check(
        self, model: str, priority: Priority, others: Iterable[Priority], deadline_s: float
    ) -> None:
        """`others` run or wait on the model; those of a lower priority are not in the way.

        Raises: DeadlineUnmeetableError when the queue is clearly longer than `deadline_s`.
        """
        num_ahead = sum(_RANKS[other] >= _RANKS[priority] for other in others)
        wait_s = self.wait_s(model, num_ahead)
        if wait_s is not None and wait_s > MARGIN * deadline_s:
            raise DeadlineUnmeetableError(deadline_s, wait_s)
