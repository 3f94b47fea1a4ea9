"""A stream's reader sets the pace; its buffer stays as small as the output."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from fakes.running_engine import PATIENCE_S
from mlxpool_server.domain import (
    Channel,
    FinishReason,
    GenerationDelta,
    GenerationFinished,
    GenerationPhase,
    GenerationProgress,
    GenerationTimings,
    OutputPart,
    TokenUsage,
)
from mlxpool_server.engine.output_stream import OutputStream
from mlxpool_server.errors import GenerationFailedError

FINISHED = GenerationFinished(FinishReason.STOP, "abc", TokenUsage(1, 3), GenerationTimings())
PREFILLING = GenerationProgress(GenerationPhase.PREFILLING)
DECODING = GenerationProgress(GenerationPhase.DECODING)


async def test_deltas_merge_for_a_slow_reader() -> None:
    """What came since the last read is one delta: texts and ids joined, the latest count."""
    stream = OutputStream()
    for number, letter in enumerate("abc", start=1):
        stream.put(GenerationDelta(letter, number, (ord(letter),)))
    stream.put(FINISHED)
    events = [event async for event in stream.events(PATIENCE_S)]
    assert events == [GenerationDelta("abc", 3, tuple(b"abc")), FINISHED]


async def test_progress_comes_before_the_text() -> None:
    """Only the latest progress is kept, and it comes before the deltas."""
    stream = OutputStream()
    for item in (PREFILLING, DECODING, GenerationDelta("a", 1), FINISHED):
        stream.put(item)
    events = [event async for event in stream.events(PATIENCE_S)]
    assert events == [DECODING, GenerationDelta("a", 1), FINISHED]


async def test_text_that_comes_while_the_reader_is_busy() -> None:
    """Text and end that arrive while the reader holds a delta come after it, in order."""
    stream = OutputStream()
    stream.put(GenerationDelta("a", 1))
    async with aclosing(stream.events(PATIENCE_S)) as events:
        assert await anext(events) == GenerationDelta("a", 1)
        stream.put(GenerationDelta("b", 2))
        stream.put(FINISHED)
        assert [event async for event in events] == [GenerationDelta("b", 2), FINISHED]


async def test_an_error_comes_after_the_text() -> None:
    """The text that was generated before a failure is not lost."""
    stream = OutputStream()
    stream.put(GenerationDelta("a", 1))
    stream.put(GenerationFailedError("m"))
    async with aclosing(stream.events(PATIENCE_S)) as events:
        assert await anext(events) == GenerationDelta("a", 1)
        with pytest.raises(GenerationFailedError):
            await anext(events)


async def test_nothing_comes_after_the_end() -> None:
    """What is put after the end is dropped."""
    stream = OutputStream()
    for item in (FINISHED, GenerationDelta("x", 4), GenerationFailedError("m")):
        stream.put(item)
    assert [event async for event in stream.events(PATIENCE_S)] == [FINISHED]


async def test_silence_is_filled_with_progress() -> None:
    """After a heartbeat of silence the latest progress is repeated, as often as it takes."""
    stream = OutputStream()
    stream.put(PREFILLING)
    async with aclosing(stream.events(heartbeat_s=0.001)) as events:
        assert [await anext(events) for _ in range(3)] == [PREFILLING] * 3
        stream.put(GenerationDelta("a", 1))
        assert await anext(events) == GenerationDelta("a", 1)
        assert await anext(events) == DECODING


async def test_a_reader_who_waits_is_woken() -> None:
    """An item wakes the reader; no heartbeat has to pass."""
    stream = OutputStream()
    async with aclosing(stream.events(heartbeat_s=10 * PATIENCE_S)) as events:
        reading = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        stream.put(DECODING)
        async with asyncio.timeout(PATIENCE_S):
            assert await reading == DECODING


async def test_channels_keep_their_order() -> None:
    """A slow reader gets one delta for each run of a channel, ids and all, in the model's order."""
    call = OutputPart(Channel.CALL, "f", "(f)")
    stream = OutputStream()
    stream.put(GenerationDelta("", 1, (1,)))
    stream.put(GenerationDelta("", 2, (2,), reasoning="h"))
    stream.put(GenerationDelta("", 3, (3,), reasoning="m"))
    stream.put(GenerationDelta("a", 4, (4,)))
    for number in (5, 6):
        stream.put(GenerationDelta("", number, (number,), unread_call=call))
    stream.put(GenerationDelta("b", 7, (7,)))
    stream.put(FINISHED)
    events = [event async for event in stream.events(PATIENCE_S)]
    assert events == [
        GenerationDelta("", 3, (1, 2, 3), reasoning="hm"),
        GenerationDelta("a", 4, (4,)),
        GenerationDelta("", 5, (5,), unread_call=call),
        GenerationDelta("", 6, (6,), unread_call=call),
        GenerationDelta("b", 7, (7,)),
        FINISHED,
    ]
