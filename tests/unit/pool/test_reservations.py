"""Memory for running generations: who gets it, who waits, who is refused."""

from __future__ import annotations

import asyncio

import pytest

from fakes import FakeFiles, FakeModel
from fakes.running_engine import PATIENCE_S
from fakes.running_pool import House, Stream, running_house
from mlxpool_server.domain import (
    FinishReason,
    Footprint,
    GenerationEvent,
    GenerationPhase,
    StopConditions,
)
from mlxpool_server.errors import ModelUnloadedError, PoolMemoryLimitError

# With weights of 100 bytes and a limit of 1000, three rows fit.
ROW_BYTES = 300
ROWS = Footprint(state_bytes=ROW_BYTES)


def stepped(**options: object) -> FakeFiles:
    return FakeFiles(model=FakeModel(is_stepped=True), footprint=ROWS, **options)  # type: ignore[arg-type]  # a test's shorthand


Answer = asyncio.Task[list[GenerationEvent]]


async def _running(house: House, count: int) -> list[Answer]:
    """So many generations that hold their bytes; the engine thread waits in their first step."""
    answers = []
    before = house.pool.used_bytes or house.files["m"].model.resident_bytes
    for number in range(1, count + 1):
        answers.append(asyncio.ensure_future(house.generate().rest()))
        await house.held(before + number * ROW_BYTES)
    return answers


async def _hang_up(answer: Answer) -> None:
    answer.cancel()
    await asyncio.wait({answer})


async def _end(house: House, answers: list[Answer]) -> None:
    house.files["m"].model.run_freely()
    await asyncio.gather(*answers)


async def _waiting(house: House, model: str = "m", **changes: object) -> Stream:
    stream = house.generate(model=model, **changes)
    await stream.phase(GenerationPhase.QUEUED)
    return stream


async def test_running_generations_are_in_the_ledger() -> None:
    """What a generation can take is held while it runs, and given back when it ends."""
    async with running_house({"m": stepped()}) as house:
        answers = await _running(house, 1)
        assert house.pool.used_bytes == 100 + ROW_BYTES
        await _end(house, answers)
        assert house.pool.used_bytes == 100


async def test_who_does_not_fit_waits_for_those_who_run() -> None:
    """A fourth row waits in line and runs when one of three has ended."""
    async with running_house({"m": stepped()}) as house:
        answers = await _running(house, 3)
        late = await _waiting(house)
        assert house.pool.used_bytes == 1000
        await _end(house, answers)
        assert (await late.finished()).text == "abc"


async def test_what_never_fits_is_refused_before_it_starts() -> None:
    """A generation too large for an empty pool fails with both numbers, and nothing is loaded."""
    files = FakeFiles(footprint=Footprint(kv_bytes_per_token=10))
    async with running_house({"m": files}) as house:
        with pytest.raises(PoolMemoryLimitError) as caught:
            await house.generate(stop=StopConditions(max_tokens=500)).started()
        # Weights, and 3 + 500 tokens in a cache that grows by 256.
        assert (caught.value.required_bytes, caught.value.available_bytes) == (100 + 7590, 1000)
        assert files.num_loads == 0


async def test_idle_models_leave_for_generations() -> None:
    """A generation that does not fit evicts what is idle, and no more than it takes."""
    files = {"m": stepped(), "old": FakeFiles(), "new": FakeFiles()}
    files["old"].estimated_bytes = files["old"].model.resident_bytes = 400
    files["new"].estimated_bytes = files["new"].model.resident_bytes = 300
    async with running_house(files) as house:
        for name in ("m", "old", "new"):
            await house.load(name)
        answer = asyncio.ensure_future(house.generate().rest())
        await house.held(100 + 300 + ROW_BYTES)
        assert house.resident == {"m", "new"}
        await _end(house, [answer])


async def test_a_cancel_ends_the_wait() -> None:
    """A generation cancelled in line ends as CANCELLED, and the next one moves up."""
    async with running_house({"m": stepped()}) as house:
        answers = await _running(house, 3)
        first = await _waiting(house, generation_id="first")
        second = await _waiting(house)
        house.generations.cancel("first")
        await _end(house, answers)
        assert (await first.finished()).finish_reason is FinishReason.CANCELLED
        assert (await second.finished()).text == "abc"


async def test_the_time_limit_ends_the_wait() -> None:
    """max_duration counts in line too."""
    async with running_house({"m": stepped()}) as house:
        answers = await _running(house, 3)
        late = house.generate(stop=StopConditions(max_duration_s=0.05))
        await late.phase(GenerationPhase.QUEUED)
        # It leaves the line by itself: nobody else moves.
        ended = asyncio.ensure_future(late.finished())
        assert (await ended).finish_reason is FinishReason.TIME_LIMIT
        assert house.pool.used_bytes == 1000
        await _end(house, answers)


async def test_hanging_up_in_line_leaves_nothing() -> None:
    """A caller who leaves the line holds neither bytes nor a place."""
    async with running_house({"m": stepped()}) as house:
        answers = await _running(house, 3)
        late = await _waiting(house)
        await late.close()
        assert house.pool.used_bytes == 1000
        for answer in answers:
            await _hang_up(answer)
        assert house.pool.used_bytes == 100


async def test_a_forced_unload_ends_the_wait() -> None:
    """Who waits for memory of a model that is unloaded by force learns of it."""
    async with running_house({"m": stepped()}) as house:
        answers = await _running(house, 3)
        answers.append(asyncio.ensure_future((await _waiting(house)).rest()))
        unloading = asyncio.ensure_future(house.unload(force=True))
        await house.residency().changed.wait(PATIENCE_S)
        house.files["m"].model.run_freely()
        for answer in answers:
            with pytest.raises(ModelUnloadedError):
                await answer
        await unloading


async def test_when_all_wait_for_each_other_one_is_refused() -> None:
    """Two models fill the pool and neither's first generation fits: one fails, the other runs."""
    files = {name: FakeFiles(footprint=Footprint(state_bytes=300)) for name in "ab"}
    for each in files.values():
        each.estimated_bytes = each.model.resident_bytes = 400
        each.may_load.clear()
    async with running_house(files) as house:
        answers = [asyncio.ensure_future(house.answer(model=name)) for name in "ab"]
        await house.loading("a")
        for each in files.values():
            each.may_load.set()
        outcomes = await asyncio.gather(*answers, return_exceptions=True)
        assert sorted(map(type, outcomes), key=str) == [PoolMemoryLimitError, str]


async def test_every_row_is_as_long_as_the_longest() -> None:
    """A short row beside a long one is charged for the padding of its cache."""
    footprint = Footprint(kv_bytes_per_token=1)
    files = FakeFiles(model=FakeModel(is_stepped=True), footprint=footprint)
    async with running_house({"m": files}, limit_bytes=5000) as house:
        short = asyncio.ensure_future(
            house.generate("abc", stop=StopConditions(max_tokens=1)).rest()
        )
        await house.held(100 + (4 + 256))
        long = asyncio.ensure_future(
            house.generate("abc", stop=StopConditions(max_tokens=900)).rest()
        )
        await house.held(100 + 2 * (903 + 256))
        await _hang_up(long)
        assert house.pool.used_bytes == 100 + (4 + 256)
        await _end(house, [short])
