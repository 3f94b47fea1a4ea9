"""Memory that prompts leave behind: used while it is free, given back before a model goes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from fakes.loader import FakeFiles
from fakes.running_engine import PATIENCE_S
from fakes.running_pool import House, running_house
from mlxpool_server.domain import Footprint, StopConditions
from mlxpool_server.errors import PoolMemoryLimitError


@pytest.fixture
async def house() -> AsyncGenerator[House, None]:
    """100 bytes; models of 40; each may keep 20 bytes of prompts, and fake ones keep all."""
    files = {name: FakeFiles.of_size(40) for name in "abc"}
    files["long"] = FakeFiles.of_size(40)
    files["long"].footprint = Footprint(logits_bytes=55)
    files["longer"] = FakeFiles.of_size(40)
    files["longer"].footprint = Footprint(logits_bytes=61)
    async with running_house(files, limit_bytes=100, prompt_cache_share=0.2) as house:
        yield house


def kept(house: House, name: str) -> int:
    """What the engine keeps of the model's prompts."""
    return house.engine.stats(name).prompt_cache_bytes


async def test_a_loaded_model_gets_its_share(house: House) -> None:
    """At once when it is free; it is gone with the model."""
    await house.load("a")
    await house.held(60)
    await house.answer(model="a")
    assert kept(house, "a") == 20
    await house.unload("a")
    assert house.pool.used_bytes == 0


async def test_half_of_what_is_free_stays_free() -> None:
    """The next generation need not wait for it."""
    files = {"a": FakeFiles.of_size(40)}
    async with running_house(files, limit_bytes=100, prompt_cache_share=0.5) as house:
        await house.load("a")
        assert house.pool.used_bytes == 70


async def test_prompts_go_before_a_model_does(house: House) -> None:
    """A load that lacks what prompts take evicts nobody."""
    await house.load("a")
    await house.held(60)
    finished = await house.load("b")
    assert finished.evicted_models == ()
    assert house.resident == {"a", "b"}


async def test_prompts_go_for_a_generation(house: House) -> None:
    """It waits for the engine to let them go, and runs."""
    await house.load("long")
    await house.held(60)
    assert await house.answer("x", "long") == "x"


async def test_what_cannot_fit_leaves_prompts_alone(house: House) -> None:
    """A refusal costs nobody anything."""
    await house.load("longer")
    await house.held(60)
    stop = StopConditions(max_tokens=1)
    with pytest.raises(PoolMemoryLimitError):
        await house.answer("x", "longer", stop=stop)
    assert house.pool.used_bytes == 60


async def test_a_lower_limit_takes_prompts_first(house: House) -> None:
    """And nobody is evicted while they are enough."""
    await house.load("a")
    await house.held(60)
    assert await house.pool.set_limit(45) == ()
    assert house.pool.used_bytes <= 45
    assert house.resident == {"a"}


async def test_given_and_taken_back_at_once(house: House) -> None:
    """What is taken back before the engine ever heard of it is free, and nobody waits for it."""
    await house.load("a")
    await house.held(60)
    caches = house.pool._prompt_caches
    caches.start_shrinking(20)
    await house.held(40)
    caches.top_up("a")
    caches.start_shrinking(20)
    assert await house.pool.set_limit(40) == ()
    assert house.pool.used_bytes == 40


async def test_clearing_tells_how_much(house: House) -> None:
    """The model may fill it anew."""
    await house.load("a")
    await house.held(60)
    await house.answer(model="a")
    assert await house.pool.clear_prompt_caches() == 20
    assert house.pool.used_bytes == 60


async def test_clearing_without_models(house: House) -> None:
    """Nothing to do is no error."""
    assert await house.pool.clear_prompt_caches() == 0


async def test_a_dead_engine_keeps_nothing(house: House) -> None:
    """What it would have had to give back is free."""
    await house.load("a")
    await house.held(60)
    await house.engine.stop(PoolMemoryLimitError("a", 1, 1), PATIENCE_S)
    async with asyncio.timeout(PATIENCE_S):
        assert house.pool._eviction.start_freeing(50)
        while house.pool.used_bytes > 40:
            await house.ledger.moved.wait(PATIENCE_S)
