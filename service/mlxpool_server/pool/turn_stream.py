"""An output stream that gives up when its generation's turn does not come in time."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from mlxpool_server.domain import GenerationPhase, GenerationProgress
from mlxpool_server.engine.delta_pacer import DeltaPacer
from mlxpool_server.engine.output_stream import OutputStream, StreamItem
from mlxpool_server.errors import QueueTimeoutError


class TurnStream(OutputStream):
    """Event loop only."""

    def __init__(
        self,
        on_end: Callable[[], None],
        see: Callable[[StreamItem], None] = lambda _: None,
        pacer: DeltaPacer | None = None,
    ) -> None:
        """`see` gets each item that comes before the end, and the end."""
        super().__init__(on_end, pacer)
        self._see = see
        self._timer: asyncio.TimerHandle | None = None

    def expect_turn(
        self, wait_s: float, error: QueueTimeoutError, abort: Callable[[], None]
    ) -> None:
        """End with `error` if nothing but queue positions has come after `wait_s`.

        `abort` tells the engine, before what the generation holds is given to others.
        """
        if not math.isinf(wait_s):
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(0.0, wait_s), self._give_up, error, abort)

    def put(self, item: StreamItem) -> None:
        is_queued = isinstance(item, GenerationProgress) and item.phase is GenerationPhase.QUEUED
        if not is_queued:
            self.stop_waiting()
        if not self.has_ended:
            self._see(item)
        super().put(item)

    def stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self, error: QueueTimeoutError, abort: Callable[[], None]) -> None:
        self._timer = None
        abort()
        self.put(error)
