"""MemoryService's figures and knobs."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator
from dataclasses import replace

import pytest

from fakes.loader import FakeFiles
from fakes.memory import FakeMemory
from fakes.running_pool import House, running_house
from mlxpool_server.domain import GenerationDelta, MemoryLimits, ModelMemory
from mlxpool_server.errors import InvalidFieldError, MemoryInUseError
from mlxpool_server.pool.memory import PoolMemory


@pytest.fixture
async def house() -> AsyncGenerator[House, None]:
    files = {"a": FakeFiles.of_size(40), "b": FakeFiles.of_size(40)}
    async with running_house(files, limit_bytes=100) as house:
        yield house


@pytest.fixture
def memory(house: House) -> PoolMemory:
    return PoolMemory(house.pool, house.memory)


async def test_usage_shows_the_counters(house: House, memory: PoolMemory) -> None:
    """MLX's counters, the limits in force and the device, as they are now."""
    usage = memory.usage()
    assert (usage.active_bytes, usage.peak_bytes, usage.cache_bytes) == (40, 80, 50)
    assert usage.limits == MemoryLimits(pool_bytes=100, memory_bytes=2000, cache_bytes=300)
    assert (usage.device_bytes, usage.recommended_bytes) == (1000, 1000)
    assert usage.models == ()


async def test_usage_shows_each_model(house: House, memory: PoolMemory) -> None:
    """Models that hold bytes are listed, with the KV cache of what runs on them."""
    await house.load("b")
    house.files["a"].model.steps = threading.Semaphore(2)
    stream = house.generate("xyz", "a")
    await stream.until(GenerationDelta)
    assert memory.usage().models == (ModelMemory("a", 40, 10), ModelMemory("b", 40, 0))
    house.files["a"].model.run_freely()
    await stream.finished()


async def test_a_load_in_flight_is_charged(house: House, memory: PoolMemory) -> None:
    """What a load has reserved shows before its weights are there."""
    house.files["a"].may_load.clear()
    load = house.start_load("a")
    await house.loading("a")
    assert memory.usage().models == (ModelMemory("a", 40, 0),)
    house.files["a"].may_load.set()
    await load


async def test_limits_are_set_together(house: House, memory: PoolMemory) -> None:
    """The answer has the previous limits, those in force, and who was evicted."""
    await house.load("a")
    await house.load("b")
    change = await memory.set_limits(MemoryLimits(pool_bytes=50, cache_bytes=7))
    assert change.previous == MemoryLimits(pool_bytes=100, memory_bytes=2000, cache_bytes=300)
    assert change.current == MemoryLimits(pool_bytes=50, memory_bytes=2000, cache_bytes=7)
    assert change.evicted_models == ("a",)


async def test_all_limits_or_none(house: House, memory: PoolMemory) -> None:
    """When the pool's limit is refused the device's are put back."""
    await house.load("a", pinned=True)
    before = house.memory.limits()
    with pytest.raises(MemoryInUseError):
        await memory.set_limits(MemoryLimits(pool_bytes=39, cache_bytes=7))
    assert house.memory.limits() == before
    assert house.pool.limit_bytes == 100


async def test_a_limit_that_the_device_refuses(house: House) -> None:
    """Then the pool's is not touched either, and nobody is evicted."""

    class Refusing(FakeMemory):
        def set_limits(self, limits: MemoryLimits) -> None:
            raise InvalidFieldError("limits.wired_bytes", "not on this device")

    await house.load("a")
    with pytest.raises(InvalidFieldError):
        await PoolMemory(house.pool, Refusing()).set_limits(MemoryLimits(pool_bytes=1))
    assert house.pool.limit_bytes == 100
    assert house.resident == {"a"}


async def test_clear_buffers_tells_how_much(house: House, memory: PoolMemory) -> None:
    """It returns the bytes that went back to the system."""
    assert await memory.clear(buffers=True, prompts=False) == 50
    assert await memory.clear(buffers=True, prompts=False) == 0
    assert house.memory.num_clears == 2


async def test_reset_peak_tells_the_old_one(house: House, memory: PoolMemory) -> None:
    """The peak starts anew from what is active."""
    assert memory.reset_peak() == 80
    assert memory.reset_peak() == 40


async def test_status_shows_the_stay(house: House) -> None:
    """GetModel shows size, times and requests of a loaded model, and none of an unloaded one."""
    before = await house.pool.get_model("a")
    assert (before.resident_bytes, before.load_time, before.last_used_time) == (0, None, None)
    assert before.info is not None
    house.files["a"].model.steps = threading.Semaphore(2)
    stream = house.generate("xyz", "a")
    await stream.until(GenerationDelta)
    status = await house.pool.get_model("a")
    assert (status.resident_bytes, status.active_requests, status.queued_requests) == (40, 1, 0)
    assert status.load_time is not None
    assert status.last_used_time is not None
    house.files["a"].model.run_freely()
    await stream.finished()
    listed = await house.pool.list_models()
    assert [model.name for model in listed] == ["a", "b"]
    assert replace(listed[1], info=None) == replace(before, name="b", info=None)
