"""What every model has done since the server started: counted here, timed by an observer."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from mlxpool_server.domain import (
    FinishReason,
    GenerationDelta,
    GenerationFinished,
    GenerationPhase,
    GenerationProgress,
    ModelActivity,
)
from mlxpool_server.engine.output_stream import StreamItem
from mlxpool_server.pool.observer import PoolObserver, Unobserved


class Activity:
    """Event loop only. A model that left the catalogue keeps its counts: counters never fall."""

    def __init__(self, observer: PoolObserver | None = None) -> None:
        self.observer: PoolObserver = observer or Unobserved()
        # By model and field of ModelActivity: each delta of each stream adds to one of them.
        self._counts: defaultdict[str, defaultdict[str, Any]] = defaultdict(
            lambda: defaultdict(int)
        )

    def of(self, model: str) -> ModelActivity:
        counts = self._counts.get(model)
        return ModelActivity() if counts is None else ModelActivity(**counts)

    def meter(self, model: str, received_at: float) -> Meter:
        """For one generation; `received_at` is an instant of time.monotonic."""
        return Meter(self, model, received_at)

    def load_finished(self, model: str, seconds: float) -> None:
        self.add(model, loads=1)
        self.observer.load_finished(model, seconds)

    def load_failed(self, model: str) -> None:
        self.add(model, failed_loads=1)

    def evicted(self, model: str) -> None:
        self.add(model, evictions=1)

    def add(self, model: str, **amounts: float) -> None:
        """Add to these counts of the model."""
        counts = self._counts[model]
        for name, amount in amounts.items():
            counts[name] += amount


class Meter:
    """Sees each item of one generation as it comes from the engine, read or not."""

    def __init__(
        self,
        activity: Activity,
        model: str,
        received_at: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._activity = activity
        self._model = model
        self._received_at = received_at
        self._clock = clock
        self._last_at: float | None = None
        self._num_counted = 0
        # Its finish reason is not known until its calls are read.
        self._unread: GenerationFinished | None = None
        self._has_reader = True

    def see(self, item: StreamItem) -> None:
        match item:
            case GenerationProgress(phase=GenerationPhase.DECODING):
                self._first_token()
            case GenerationDelta(completion_tokens=total):
                self._delta(total)
            case GenerationFinished():
                self._finished(item)

    def read(self, finished: GenerationFinished) -> None:
        """What there was of calls is read now."""
        if self._unread is not None:
            self._unread = None
            self._activity.observer.generation_finished(self._model, finished)

    def leave(self) -> None:
        """Nobody reads its calls any more. No harm when called before."""
        self._has_reader = False
        if self._unread is not None:
            self.read(self._unread)

    def _first_token(self) -> None:
        self._last_at = self._clock()
        seconds = self._last_at - self._received_at
        self._activity.add(self._model, first_tokens=1, time_to_first_token_s=seconds)
        self._activity.observer.first_token(self._model, seconds)
        self._count(1)

    def _delta(self, total: int) -> None:
        num_new = total - self._num_counted
        if num_new < 1 or self._last_at is None:
            return
        now = self._clock()
        self._activity.observer.inter_token(self._model, (now - self._last_at) / num_new)
        self._last_at = now
        self._count(total)

    def _finished(self, finished: GenerationFinished) -> None:
        usage = finished.usage
        self._count(usage.completion_tokens)
        self._activity.add(
            self._model,
            finished_generations=1,
            prompt_tokens=usage.prompt_tokens,
            cached_prompt_tokens=usage.cached_prompt_tokens,
            prompt_cache_hits=int(usage.cached_prompt_tokens > 0),
        )
        if finished.unread_parts and finished.finish_reason is FinishReason.STOP:
            self._unread = finished
        else:
            self._activity.observer.generation_finished(self._model, finished)
        if not self._has_reader:
            self.leave()

    def _count(self, total: int) -> None:
        """All tokens of the generation so far, each counted once."""
        if total > self._num_counted:
            self._activity.add(self._model, completion_tokens=total - self._num_counted)
            self._num_counted = total
