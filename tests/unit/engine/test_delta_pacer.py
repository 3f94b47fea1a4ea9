"""Many streams share a number of deltas a second; a single one is hardly ever held back."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from fakes.running_engine import PATIENCE_S
from mlxpool_server.domain import (
    FinishReason,
    GenerationDelta,
    GenerationFinished,
    GenerationPhase,
    GenerationProgress,
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


async def test_the_interval_grows_with_those_who_generate() -> None:
    """N streams wait N times as long; one that only waits for its turn slows nobody."""
    pacer = DeltaPacer(1000.0)
    streams = [OutputStream(pacer=pacer) for _ in range(4)]
    waiting = OutputStream(pacer=pacer)
    waiting.put(GenerationProgress(GenerationPhase.QUEUED))
    for number, stream in enumerate(streams, start=1):
        stream.put(GenerationDelta("a", 1))
        assert pacer.interval_s == number / 1000
    for stream in streams:
        stream.put(FINISHED)
    assert pacer.interval_s == 0


async def test_a_reader_who_leaves_is_not_counted() -> None:
    """A stream that is closed half way makes room for the others."""
    pacer = DeltaPacer(NEVER)
    stream = OutputStream(pacer=pacer)
    stream.put(GenerationDelta("a", 1))
    async with aclosing(stream.events(PATIENCE_S)) as events:
        await anext(events)
        assert pacer.interval_s > 0
    assert pacer.interval_s == 0


@pytest.mark.parametrize("change", ["leave", "set_limit"])
async def test_a_shorter_interval_holds_for_what_is_held(change: str) -> None:
    """When others end, or the limit rises, nobody goes on waiting for the turn it had before."""
    pacer = DeltaPacer(NEVER)
    woken = asyncio.Event()
    for key in ("stays", "leaves"):
        pacer.join(key)
    pacer.tell("stays", asyncio.get_running_loop().time(), woken.set)
    assert not woken.is_set()
    if change == "leave":
        pacer.set_limit(1.0)
        pacer.leave("leaves")
    pacer.set_limit(1000.0)
    async with asyncio.timeout(PATIENCE_S):
        await woken.wait()


async def test_text_that_was_drained_wakes_nobody_later() -> None:
    """What a progress took along is not waited for again."""
    stream = OutputStream(pacer=(pacer := DeltaPacer(NEVER)))
    async with aclosing(stream.events(PATIENCE_S)) as events:
        stream.put(GenerationDelta("a", 1))
        await anext(events)
        stream.put(GenerationDelta("b", 2))
        assert pacer._held
        stream.put(GenerationProgress(GenerationPhase.DECODING))
        await anext(events)
        assert await anext(events) == GenerationDelta("b", 2)
        assert not pacer._held
