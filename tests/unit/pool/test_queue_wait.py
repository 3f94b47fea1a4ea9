"""max_queue_wait_s: who waits too long for its turn is told so, and holds nothing."""

from __future__ import annotations

import asyncio

import pytest

from fakes.loader import FakeFiles
from fakes.model import FakeModel
from fakes.running_pool import running_house
from mlxpool_server.domain import (
    Footprint,
    GenerationDelta,
    GenerationPhase,
    GenerationProgress,
)
from mlxpool_server.engine.output_stream import StreamItem
from mlxpool_server.errors import DeadlineUnmeetableError, QueueTimeoutError
from mlxpool_server.pool.turn_stream import TurnStream

SHORT_S = 0.1


def stepped() -> dict[str, FakeFiles]:
    return {"m": FakeFiles(model=FakeModel(is_stepped=True))}


async def test_a_place_in_the_batch_that_does_not_come() -> None:
    """The one that waits fails, the one that runs does not, and the next one runs."""
    async with running_house(stepped(), max_batch_size=1, max_queue_wait_s=SHORT_S) as house:
        running = house.generate("first")
        await running.phase(GenerationPhase.PREFILLING)
        waiting = house.generate("second")
        with pytest.raises(QueueTimeoutError) as caught:
            await waiting.finished()
        assert caught.value.waited_s == SHORT_S
        assert house.generations.num_in_flight == 1
        house.files["m"].model.run_freely()
        assert (await running.finished()).text == "first"
        assert await house.answer("third") == "third"
        joined = house.files["m"].model.batches[0].joined
        assert tuple(b"second") not in joined


async def test_memory_that_does_not_come_free() -> None:
    """The same for who waits in line for memory."""
    files = {"m": FakeFiles(footprint=Footprint(state_bytes=300))}
    files["m"].model = FakeModel(is_stepped=True)
    async with running_house(files, max_queue_wait_s=SHORT_S, limit_bytes=500) as house:
        running = house.generate("first")
        await running.phase(GenerationPhase.PREFILLING)
        waiting = house.generate("second")
        with pytest.raises(QueueTimeoutError):
            await waiting.finished()
        house.files["m"].model.run_freely()
        assert (await running.finished()).text == "first"


async def test_a_running_one_may_take_its_time() -> None:
    """The limit is for the wait; from its first step on a generation is not in the queue."""
    async with running_house(stepped(), max_queue_wait_s=SHORT_S) as house:
        running = house.generate("slow")
        await running.phase(GenerationPhase.PREFILLING)
        # The clock would have to go off meanwhile.
        fired = asyncio.Event()
        asyncio.get_running_loop().call_later(2 * SHORT_S, fired.set)
        await fired.wait()
        house.files["m"].model.run_freely()
        assert (await running.finished()).text == "slow"


async def test_a_load_is_no_queue() -> None:
    """A load may take longer than the limit."""
    files = {"m": FakeFiles()}
    files["m"].may_load.clear()
    async with running_house(files, max_queue_wait_s=SHORT_S, heartbeat_s=SHORT_S) as house:
        stream = house.generate("loaded")
        await stream.phase(GenerationPhase.LOADING)
        for _ in range(3):
            await stream.phase(GenerationPhase.LOADING)
        files["m"].may_load.set()
        assert (await stream.finished()).text == "loaded"


async def test_a_deadline_that_the_queue_does_not_allow() -> None:
    """Refused before `started`; without a deadline, and with a later one, it is let in."""
    async with running_house(stepped(), max_batch_size=1) as house:
        readers = [house.generate(str(index)) for index in range(20)]
        reading = [asyncio.ensure_future(reader.finished()) for reader in readers]
        first = house.generate("x" * 900)
        await first.started()
        forecast = house.generations._forecast
        # Ends at a pace that the test sets: one a second.
        now = 0.0
        forecast._clock = lambda: now
        for _ in range(10):
            now += 1.0
            forecast.ended("m", 20)
        with pytest.raises(DeadlineUnmeetableError) as caught:
            await house.generate("late", deadline_s=2.0).started()
        assert caught.value.expected_wait_s > 10
        patient = house.generate("patient", deadline_s=60.0)
        await patient.started()
        house.files["m"].model.run_freely()
        await asyncio.gather(*reading, first.finished(), patient.finished())


# ---------------------------------------------------------------- the stream by itself


@pytest.mark.parametrize(
    "item",
    [
        GenerationProgress(GenerationPhase.PREFILLING),
        GenerationDelta("a", 1),
        QueueTimeoutError(1, 1),
    ],
)
async def test_its_turn_stops_the_clock(item: StreamItem) -> None:
    """Anything but a place in the queue does."""
    stream = TurnStream(on_end=lambda: None)
    stream.expect_turn(1000, QueueTimeoutError(1, 1), lambda: None)
    stream.put(GenerationProgress(GenerationPhase.QUEUED, queue_position=3))
    assert stream._timer is not None
    stream.put(item)
    assert stream._timer is None


async def test_giving_up_tells_the_engine_first() -> None:
    """What the generation held is given to others behind the abort; what comes later is dropped."""
    order: list[str] = []
    stream = TurnStream(on_end=lambda: order.append("end"))
    stream.expect_turn(0, QueueTimeoutError(1, 1), lambda: order.append("abort"))
    with pytest.raises(QueueTimeoutError):
        async for _ in stream.events(10):
            pass
    stream.put(GenerationDelta("late", 1))
    assert order == ["abort", "end"]
