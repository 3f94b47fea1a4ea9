"""Many streams share a number of deltas a second; a single one is hardly ever held back."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack, aclosing

import pytest

from fakes.running_engine import PATIENCE_S
from mlxpool_server.domain import (
    FinishReason,
    GenerationDelta,
    GenerationFinished,
    GenerationTimings,
    TokenUsage,
)
from mlxpool_server.engine.delta_pacer import DeltaPacer
from mlxpool_server.engine.output_stream import OutputStream

FINISHED = GenerationFinished(FinishReason.STOP, "ab", TokenUsage(1, 2), GenerationTimings())
# With one reader a stream's turn comes each hundred seconds: not within a test.
NEVER = 0.01


async def test_the_first_delta_never_waits() -> None:
    """Time to first token is nobody's to spend."""
    stream = OutputStream(pacer=DeltaPacer(NEVER))
    async with aclosing(stream.events(PATIENCE_S)) as events, asyncio.timeout(PATIENCE_S):
        stream.put(GenerationDelta("a", 1))
        assert await anext(events) == GenerationDelta("a", 1)


async def test_the_end_does_not_wait_for_its_turn() -> None:
    """What was held back comes with the end, before it."""
    stream = OutputStream(pacer=DeltaPacer(NEVER))
    async with aclosing(stream.events(PATIENCE_S)) as events, asyncio.timeout(PATIENCE_S):
        stream.put(GenerationDelta("a", 1))
        await anext(events)
        stream.put(GenerationDelta("b", 2))
        stream.put(FINISHED)
        assert [event async for event in events] == [GenerationDelta("b", 2), FINISHED]


async def test_what_is_held_comes_when_its_turn_comes() -> None:
    """Several tokens arrive as one delta, without anything else having to happen."""
    stream = OutputStream(pacer=DeltaPacer(100.0))
    async with aclosing(stream.events(PATIENCE_S)) as events, asyncio.timeout(PATIENCE_S):
        stream.put(GenerationDelta("a", 1))
        await anext(events)
        stream.put(GenerationDelta("b", 2))
        stream.put(GenerationDelta("c", 3))
        assert await anext(events) == GenerationDelta("bc", 3)


@pytest.mark.parametrize("num_readers", [1, 4])
async def test_the_interval_grows_with_the_readers(num_readers: int) -> None:
    """N streams wait N times as long: together they get what one would get alone."""
    pacer = DeltaPacer(1000.0)
    with ExitStack() as stack:
        for key in range(num_readers):
            stack.enter_context(pacer.reading(key))
        assert pacer.interval_s == num_readers / 1000
    assert pacer.interval_s == 0


async def test_a_reader_who_left_is_not_woken() -> None:
    """What was held for a stream goes with its reader; the others' turns still come."""
    pacer = DeltaPacer(100.0)
    woken: list[str] = []
    now = asyncio.get_running_loop().time()
    with pacer.reading("stays"):
        with pacer.reading("leaves"):
            pacer.tell("leaves", now, lambda: woken.append("leaves"))
            done = asyncio.Event()
            pacer.tell("stays", now, lambda: (woken.append("stays"), done.set()))
        async with asyncio.timeout(PATIENCE_S):
            await done.wait()
    assert woken == ["stays"]
