"""Whose step is next when several are busy: equal shares of the engine's time."""

from __future__ import annotations

from collections.abc import Collection, Hashable
from typing import Generic, TypeVar

NameT = TypeVar("NameT", bound=Hashable)


class Turns(Generic[NameT]):
    """Engine thread only. Shares are of time, not of steps: a slow model gets fewer of them."""

    def __init__(self) -> None:
        # How much of the engine's time each has had, in seconds.
        self._spent_s: dict[NameT, float] = {}
        self._were_busy: frozenset[NameT] = frozenset()

    def add(self, name: NameT) -> None:
        self._spent_s[name] = 0.0

    def remove(self, name: NameT) -> None:
        self._spent_s.pop(name, None)

    def spend(self, name: NameT, duration_s: float) -> None:
        if name in self._spent_s:
            self._spent_s[name] += duration_s

    def next(self, busy: Collection[NameT]) -> NameT | None:
        """Return who of the `busy` has had least; who comes back from idling saved nothing up."""
        staying = [self._spent_s[name] for name in busy if name in self._were_busy]
        floor_s = min(staying, default=0.0)
        for name in busy:
            if name not in self._were_busy:
                self._spent_s[name] = max(self._spent_s[name], floor_s)
        self._were_busy = frozenset(busy)
        return min(busy, key=self._spent_s.__getitem__, default=None)
