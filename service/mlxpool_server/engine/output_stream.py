"""The event-loop end of one generation: a buffer that its reader drains whole."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Iterator

from mlxpool_server.domain import (
    GenerationDelta,
    GenerationFinished,
    GenerationPhase,
    GenerationProgress,
)
from mlxpool_server.engine.delta_buffer import DeltaBuffer
from mlxpool_server.engine.delta_pacer import DeltaPacer
from mlxpool_server.engine.silence_alarm import SilenceAlarm
from mlxpool_server.errors import MlxpoolError

StreamEvent = GenerationProgress | GenerationDelta | GenerationFinished
# A stream ends with `finished`, or with the error that ended it.
StreamItem = StreamEvent | MlxpoolError


class OutputStream:
    """Event loop only. A slow reader gets fewer, larger deltas: memory is bounded by the output."""

    def __init__(
        self, on_end: Callable[[], None] = lambda: None, pacer: DeltaPacer | None = None
    ) -> None:
        """`on_end` is called when the generation has ended, whether or not that was read.

        `pacer` is shared with other streams; without one the reader gets each token at once.
        """
        self._on_end = on_end
        self._pacer = pacer or DeltaPacer(math.inf)
        self._told_at: float | None = None
        self._progress: GenerationProgress | None = None
        self._latest = GenerationProgress(GenerationPhase.QUEUED)
        self._deltas = DeltaBuffer()
        self._end: GenerationFinished | MlxpoolError | None = None
        self._wake = asyncio.Event()

    @property
    def has_ended(self) -> bool:
        return self._end is not None

    def put(self, item: StreamItem) -> None:
        """Buffer one item. What comes after the end is dropped."""
        if self._end is not None:
            return
        match item:
            case GenerationProgress():
                self._latest = item
                self._progress = item
            case GenerationDelta():
                self._deltas.add(item)
                self._latest = GenerationProgress(GenerationPhase.DECODING)
                self._pacer.join(self)
                self._pacer.tell(self, self._told_at, self._wake.set)
                return
            case GenerationFinished() | MlxpoolError():
                self._end = item
                self._pacer.leave(self)
                self._on_end()
        self._wake.set()

    async def events(self, heartbeat_s: float) -> AsyncGenerator[StreamEvent, None]:
        """Yield what came, in order, until `finished`; after `heartbeat_s` of silence, progress.

        Raises: the error that ended the generation.
        """
        try:
            with SilenceAlarm(heartbeat_s, self._wake.set) as alarm:
                while True:
                    await self._wake.wait()
                    self._wake.clear()
                    for event in self._take(is_silent=alarm.is_due):
                        yield event
                        alarm.reset()
                    if self._end is None:
                        continue
                    if self._has_something:
                        # It came while the reader was busy: it is drained before the end is told.
                        self._wake.set()
                        continue
                    if isinstance(self._end, MlxpoolError):
                        raise self._end
                    yield self._end
                    return
        finally:
            self._pacer.leave(self)

    @property
    def _has_something(self) -> bool:
        """Apart from the end, which comes after it."""
        return self._progress is not None or len(self._deltas) > 0

    def _take(self, *, is_silent: bool) -> Iterator[GenerationProgress | GenerationDelta]:
        """What there is; more may come while the reader is busy with one of them."""
        if is_silent and not self._has_something and self._end is None:
            yield self._latest
        if self._progress is not None:
            progress, self._progress = self._progress, None
            yield progress
        # Those that are here now: what comes meanwhile has its own turn.
        for _ in range(len(self._deltas)):
            self._told_at = asyncio.get_running_loop().time()
            self._pacer.told(self)
            yield self._deltas.take()
