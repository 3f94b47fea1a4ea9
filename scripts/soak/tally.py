"""What became of each stream, as its client saw it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Self

import grpc.aio

from mlxpool.v1 import model_service_pb2 as pb

# No stream of ours takes so long: one that does has no end.
STREAM_DEADLINE_S = 120.0
_COUNTERS = ("failed", "refused")


@dataclass(slots=True)
class Tally:
    """A stream is admitted with its first event, and lost when it has no end after that."""

    calls: int = 0
    admitted: int = 0
    finished: int = 0
    # Admitted, and ended with a status that is not OK.
    failed: Counter[str] = field(default_factory=Counter)
    # Ended with a status before the first event.
    refused: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    tokens: int = 0
    # Between two messages with text of one stream, in ms, within the window.
    gaps_ms: list[float] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        for name in ("calls", "admitted", "finished", "lost", "tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.failed += other.failed
        self.refused += other.refused
        self.gaps_ms += other.gaps_ms

    def facts(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        # asdict() makes Counters of pairs out of Counters.
        facts = {each.name: getattr(self, each.name) for each in fields(self)}
        return facts | {name: dict(facts[name]) for name in _COUNTERS}

    @classmethod
    def of(cls, facts: dict[str, Any]) -> Self:
        """The reverse of `facts()`, by way of JSON."""
        counters = {name: Counter(facts[name]) for name in _COUNTERS}
        return cls(**(facts | counters))


@dataclass(slots=True)
class Window:
    """When gaps count, by `time.perf_counter()`; at its end no new stream is begun."""

    begin_s: float
    end_s: float

    @classmethod
    def of(cls, ramp_s: float, seconds: float) -> Self:
        now = time.perf_counter()
        return cls(now + ramp_s, now + ramp_s + seconds)

    @property
    def is_over(self) -> bool:
        return time.perf_counter() >= self.end_s

    def __contains__(self, at_s: object) -> bool:
        return isinstance(at_s, float) and self.begin_s <= at_s < self.end_s


Event = pb.GenerateResponse
Call = grpc.aio.UnaryStreamCall[Any, Any]


class Stream:
    """One Generate call, read event by event; `close()` books what became of it."""

    def __init__(self, call: Call, tally: Tally, window: Window) -> None:
        self.call = call
        self._tally = tally
        self._window = window
        self._is_admitted = False
        self._has_finished = False
        self._last_s: float | None = None
        self._num_tokens = 0
        tally.calls += 1

    async def read(self, until: Callable[[Event], bool] = lambda _: False) -> None:
        """To the end, or to the first event that `until` likes. Its failure is not raised."""
        try:
            async with asyncio.timeout(STREAM_DEADLINE_S):
                while isinstance(event := await self.call.read(), Event):
                    self._see(event)
                    if until(event):
                        return
        except (grpc.aio.AioRpcError, asyncio.CancelledError):
            # The call has its status; a cancel of this very task is not ours to hide.
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise
        except TimeoutError:
            # Without a status, so close() finds it lost.
            return

    async def close(self) -> None:
        """Wait for the status of a call that was read to its end or cancelled."""
        tally = self._tally
        tally.tokens += self._num_tokens
        code = None
        try:
            async with asyncio.timeout(STREAM_DEADLINE_S if self.call.done() else 5.0):
                code = await self.call.code()
        except TimeoutError:
            self.call.cancel()
        if not self._is_admitted:
            tally.refused[code.name if code else "NO_STATUS"] += 1
        elif self._has_finished:
            tally.finished += 1
        elif code is not None and code is not grpc.StatusCode.OK:
            tally.failed[code.name] += 1
        else:
            tally.lost += 1

    def _see(self, event: Event) -> None:
        if not self._is_admitted:
            self._is_admitted = True
            self._tally.admitted += 1
        if event.HasField("delta"):
            now = time.perf_counter()
            self._num_tokens = event.delta.completion_tokens
            if self._last_s is not None and now in self._window:
                self._tally.gaps_ms.append(1e3 * (now - self._last_s))
            self._last_s = now
        elif event.HasField("finished"):
            self._has_finished = True
