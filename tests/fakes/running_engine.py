"""A real engine thread on fake models, for tests of the engine."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

from fakes.model import FakeModel
from fakes.tokenizer import EOS, FakeDecoder
from mlxpool_server.domain import (
    FinishReason,
    GenerationDelta,
    GenerationFinished,
    GenerationPhase,
    GenerationProgress,
    SamplingParams,
)
from mlxpool_server.engine.engine import Engine
from mlxpool_server.engine.output_stream import OutputStream, StreamEvent
from mlxpool_server.engine.sequence import SequenceRequest
from mlxpool_server.errors import DrainingError

# Long enough for any machine: only a test that fails waits for it.
PATIENCE_S = 20.0


class FakeClock:
    """Stands still until a test moves it. Any thread."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def sequence_request(text: str = "abc", model: str = "m", **changes: Any) -> SequenceRequest:
    """A generation that echoes `text`."""
    fields: dict[str, Any] = {
        "model": model,
        "prompt": tuple(text.encode()),
        "sampling": SamplingParams(),
        "max_tokens": 10**9,
        "limit_reason": FinishReason.MAX_TOKENS,
        "decoder": FakeDecoder(),
        "received_at": 0.0,
        "submitted_at": 0.0,
        "eos_token_ids": frozenset({EOS}),
    }
    return SequenceRequest(**(fields | changes))


class Reader:
    """One generation and its events, as they come."""

    def __init__(self, engine: Engine, request: SequenceRequest) -> None:
        self.stream = OutputStream()
        self.slot = engine.submit(request, self.stream)
        self._events = self.stream.events(PATIENCE_S)

    async def next(self) -> StreamEvent:
        async with asyncio.timeout(PATIENCE_S):
            return await anext(self._events)

    async def until(self, wanted: Callable[[StreamEvent], bool]) -> StreamEvent:
        async with asyncio.timeout(PATIENCE_S):
            while not wanted(event := await anext(self._events)):
                pass
            return event

    async def phase(self, phase: GenerationPhase) -> StreamEvent:
        """Wait until it is in `phase`."""
        return await self.until(
            lambda event: isinstance(event, GenerationProgress) and event.phase is phase
        )

    async def delta(self) -> StreamEvent:
        return await self.until(lambda event: isinstance(event, GenerationDelta))

    async def rest(self) -> list[StreamEvent]:
        async with asyncio.timeout(PATIENCE_S), aclosing(self._events) as events:
            return [event async for event in events]

    async def finished(self) -> GenerationFinished:
        """Read to the end. Raises: the error that ended it."""
        last = (await self.rest())[-1]
        assert isinstance(last, GenerationFinished)
        return last


class RunningEngine:
    """An engine and what it told the house."""

    def __init__(self, max_batch_size: int, clock: Callable[[], float]) -> None:
        self.deaths = asyncio.Event()
        self.failed_models: asyncio.Queue[str] = asyncio.Queue()
        self.models: list[FakeModel] = []
        self.engine = Engine(
            max_batch_size=max_batch_size,
            on_death=self.deaths.set,
            on_model_failed=self.failed_models.put_nowait,
            clock=clock,
        )

    async def attach(self, name: str = "m", **options: Any) -> FakeModel:
        """A new fake model under this name."""
        model = FakeModel(**options)
        self.models.append(model)
        async with asyncio.timeout(PATIENCE_S):
            await self.engine.attach(name, model)
        return model

    def submit(self, text: str = "abc", model: str = "m", **changes: Any) -> Reader:
        return Reader(self.engine, sequence_request(text, model, **changes))

    async def settle(self) -> None:
        """Wait until the engine thread has seen every message so far."""
        async with asyncio.timeout(PATIENCE_S):
            await self.engine.detach("no such model", DrainingError(1.0))


@asynccontextmanager
async def running_engine(
    max_batch_size: int = 4, clock: Callable[[], float] = time.monotonic
) -> AsyncGenerator[RunningEngine, None]:
    running = RunningEngine(max_batch_size, clock)
    running.engine.start()
    try:
        yield running
    finally:
        for model in running.models:
            model.run_freely()
        await running.engine.stop(DrainingError(1.0), PATIENCE_S)
        assert not [thread for thread in threading.enumerate() if thread.name == "engine"]
