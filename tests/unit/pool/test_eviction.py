"""Who leaves for whom, and that nobody leaves for nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from fakes.loader import FakeFiles
from fakes.model import endless
from fakes.running_engine import PATIENCE_S
from fakes.running_pool import House, Stream, running_house
from mlxpool_server.domain import (
    GenerationDelta,
    LoadFinished,
    LoadOptions,
    LoadPhase,
    LoadProgress,
    ModelSpec,
    ModelState,
)
from mlxpool_server.errors import LoadSupersededError, MemoryInUseError, PoolMemoryLimitError


@pytest.fixture
async def house() -> AsyncGenerator[House, None]:
    """Room for two of the models "a", "b", "c" of 40 bytes; "big" needs 90, "huge" 101."""
    files = {name: FakeFiles.of_size(40) for name in "abc"}
    files |= {"big": FakeFiles.of_size(90), "huge": FakeFiles.of_size(101)}
    async with running_house(files, limit_bytes=100) as house:
        yield house


async def _running(house: House, name: str) -> Stream:
    """A stream that runs until it is closed."""
    house.files[name].model.script = endless
    house.files[name].context_length = 10**9
    stream = house.generate("x", name)
    await stream.until(GenerationDelta)
    return stream


async def _evicting(house: House, name: str) -> asyncio.Task[LoadFinished]:
    """A load whose victims are leaving."""
    load = house.start_load(name)
    await asyncio.sleep(0)
    residency = house.residency(name)
    while not residency.evicted_models:
        await residency.changed.wait(PATIENCE_S)
    return load


# ---------------------------------------------------------------- who is evicted


async def test_the_least_recently_used_leaves(house: House) -> None:
    """A request makes a model the last to go."""
    await house.load("a")
    await house.load("b")
    await house.answer("x", "a")
    assert (await house.load("c")).evicted_models == ("b",)
    assert house.resident == {"a", "c"}


async def test_a_load_counts_as_a_use(house: House) -> None:
    """A model that was loaded and not used yet is newer than one that was used before."""
    await house.load("a")
    await house.answer("x", "a")
    await house.load("b")
    assert (await house.load("c")).evicted_models == ("a",)


async def test_no_more_leave_than_it_takes(house: House) -> None:
    """Eviction stops as soon as enough is free; for a large model several leave."""
    await house.load("a")
    await house.load("b")
    finished = await house.load("c")
    assert finished.evicted_models == ("a",)
    finished = await house.load("big")
    assert finished.evicted_models == ("b", "c")
    assert house.resident == {"big"}


async def test_evictions_are_told_as_progress(house: House) -> None:
    """A caller sees the phase EVICTING before LOADING, and buffers are returned in between."""
    await house.load("a")
    await house.load("b")
    house.files["c"].may_load.clear()
    phases: list[LoadPhase] = []
    async for event in house.pool.load("c", LoadOptions()):
        if isinstance(event, LoadProgress):
            phases.append(event.phase)
            if event.phase is LoadPhase.LOADING:
                assert house.memory.num_clears == 1
                house.files["c"].may_load.set()
        else:
            assert isinstance(event, LoadFinished)
    assert phases.index(LoadPhase.EVICTING) < phases.index(LoadPhase.LOADING)


async def test_a_pinned_model_stays(house: House) -> None:
    """A pinned model is not evicted; unpinned it is."""
    await house.load("a", pinned=True)
    await house.load("b")
    assert (await house.load("c")).evicted_models == ("b",)
    await house.load("a", pinned=False)
    assert (await house.load("big")).evicted_models == ("a", "c")


async def test_a_model_pinned_by_the_catalogue_stays() -> None:
    """The operator's pin holds without any request."""
    files = {name: FakeFiles.of_size(60) for name in "ab"}
    spec = ModelSpec("a", Path("unread"), pinned=True)
    async with running_house(files, specs=(spec,), limit_bytes=100) as house:
        await house.load("a")
        with pytest.raises(PoolMemoryLimitError):
            await house.load("b")
        assert house.resident == {"a"}


# ---------------------------------------------------------------- leases


async def test_a_running_model_stays(house: House) -> None:
    """A model that generates is not evicted, however long ago it was asked."""
    stream = await _running(house, "a")
    await house.load("b")
    assert (await house.load("c")).evicted_models == ("b",)
    with pytest.raises(PoolMemoryLimitError) as refusal:
        await house.load("big")
    assert (refusal.value.required_bytes, refusal.value.available_bytes) == (90, 60)
    assert house.resident == {"a", "c"}
    await stream.close()
    assert (await house.load("big")).evicted_models == ("c", "a")


async def test_a_model_whose_prompt_is_rendered_stays(house: House) -> None:
    """A lease is taken before the prompt is rendered: the model that it needs stays."""
    await house.load("a")
    await house.load("b")
    tokenizer = house.files["a"].tokenizer
    tokenizer.may_encode.clear()
    stream = house.generate("x", "a")
    reading = asyncio.ensure_future(stream.finished())
    assert await asyncio.to_thread(tokenizer.is_encoding.wait, PATIENCE_S)
    with pytest.raises(PoolMemoryLimitError):
        await house.load("big")
    assert (await house.load("c")).evicted_models == ("b",)
    tokenizer.may_encode.set()
    assert (await reading).text == "x"
    assert house.files["a"].num_loads == 1


async def test_a_model_loaded_while_the_prompt_is_rendered_stays(house: House) -> None:
    """The lease also holds a model that somebody else brought in meanwhile."""
    tokenizer = house.files["a"].tokenizer
    tokenizer.may_encode.clear()
    stream = house.generate("x", "a")
    reading = asyncio.ensure_future(stream.finished())
    assert await asyncio.to_thread(tokenizer.is_encoding.wait, PATIENCE_S)
    await house.load("a")
    with pytest.raises(PoolMemoryLimitError):
        await house.load("big")
    house.expire()
    tokenizer.may_encode.set()
    assert (await reading).text == "x"
    assert house.files["a"].num_loads == 1


# ---------------------------------------------------------------- what cannot fit


async def test_what_can_never_fit_evicts_nobody(house: House) -> None:
    """A model above the limit is refused with the two numbers, before anybody leaves."""
    await house.load("a")
    await house.load("b")
    with pytest.raises(PoolMemoryLimitError) as refusal:
        await house.load("huge")
    assert (refusal.value.required_bytes, refusal.value.available_bytes) == (101, 100)
    assert house.resident == {"a", "b"}
    assert house.files["huge"].num_loads == 0


async def test_disallow_eviction(house: House) -> None:
    """With it a load is refused where it would evict, and goes where it fits."""
    await house.load("a")
    assert (await house.load("b", disallow_eviction=True)).evicted_models == ()
    with pytest.raises(PoolMemoryLimitError) as refusal:
        await house.load("c", disallow_eviction=True)
    assert (refusal.value.required_bytes, refusal.value.available_bytes) == (40, 20)
    assert house.resident == {"a", "b"}


async def test_validate_only_changes_nothing(house: House) -> None:
    """It answers whom a load would evict, or refuses as the load would; nothing moves."""
    await house.load("a")
    await house.load("b")
    answer = await house.load("c", validate_only=True, pinned=True, keep_alive_s=0.0)
    assert (answer.already_loaded, answer.evicted_models) == (False, ("a",))
    assert answer.model.state is ModelState.UNLOADED
    assert not house.entry("c").is_pinned
    assert (await house.load("a", validate_only=True)).already_loaded
    with pytest.raises(PoolMemoryLimitError):
        await house.load("huge", validate_only=True)
    with pytest.raises(PoolMemoryLimitError):
        await house.load("c", validate_only=True, disallow_eviction=True)
    assert house.resident == {"a", "b"}


# ---------------------------------------------------------------- at the same time


async def test_two_loads_when_only_one_fits(house: House) -> None:
    """The second is refused while the first loads; later it evicts it."""
    house.files["big"].may_load.clear()
    first = house.start_load("big")
    await house.loading("big")
    with pytest.raises(PoolMemoryLimitError) as refusal:
        await house.load("a")
    assert (refusal.value.required_bytes, refusal.value.available_bytes) == (40, 10)
    house.files["big"].may_load.set()
    assert (await first).model.state is ModelState.READY
    assert (await house.load("a")).evicted_models == ("big",)


async def test_two_loads_do_not_evict_twice_for_the_same_bytes(house: House) -> None:
    """Each load gets the bytes of its own victim, whatever order they leave in."""
    await house.load("a", pinned=True)
    await house.load("b")
    loads = [house.start_load("c"), house.start_load("big")]
    c, big = await asyncio.gather(*loads, return_exceptions=True)
    assert isinstance(c, LoadFinished)
    assert c.evicted_models == ("b",)
    assert isinstance(big, PoolMemoryLimitError)
    assert house.resident == {"a", "c"}


async def test_a_load_takes_what_is_being_freed(house: House) -> None:
    """A model that leaves anyway is waited for; nobody else is evicted for its bytes."""
    await house.load("a")
    await house.load("b")
    unload = asyncio.ensure_future(house.unload("b"))
    await asyncio.sleep(0)
    assert (await house.load("c")).evicted_models == ()
    await unload
    assert house.resident == {"a", "c"}


async def test_a_model_that_drains_is_still_in_use(house: House) -> None:
    """Bytes of a model whose streams go on cannot be counted on."""
    stream = await _running(house, "a")
    unload = asyncio.ensure_future(house.unload("a"))
    await asyncio.sleep(0)
    with pytest.raises(PoolMemoryLimitError):
        await house.load("big")
    await stream.close()
    await unload
    await house.load("big")


async def test_a_load_stopped_while_it_waits_for_its_victims(house: House) -> None:
    """Its bytes are free again, and the victims are gone: nobody waits for ever."""
    await house.load("a")
    await house.load("b")
    load = await _evicting(house, "big")
    await house.unload("big")
    with pytest.raises(LoadSupersededError):
        await load
    assert house.pool.used_bytes == 0
    await house.load("c")


# ---------------------------------------------------------------- the limit


async def test_a_lower_limit_evicts_idle_models(house: House) -> None:
    """The least recently used leave until the rest fits; the limit holds when it returns."""
    await house.load("a")
    await house.load("b")
    assert await house.pool.set_limit(50) == ("a",)
    assert (house.pool.limit_bytes, house.pool.used_bytes) == (50, 40)
    assert house.resident == {"b"}
    with pytest.raises(PoolMemoryLimitError):
        await house.load("big")


async def test_a_limit_below_what_is_in_use_is_refused(house: House) -> None:
    """The numbers are told, and nothing has changed: no limit, no eviction."""
    await house.load("a", pinned=True)
    await house.load("b")
    with pytest.raises(MemoryInUseError) as refusal:
        await house.pool.set_limit(39)
    assert (refusal.value.limit_bytes, refusal.value.in_use_bytes) == (39, 40)
    assert house.pool.limit_bytes == 100
    assert house.resident == {"a", "b"}
    assert await house.pool.set_limit(40) == ("b",)


async def test_a_higher_limit_makes_room(house: House) -> None:
    """Nobody leaves, and what did not fit does."""
    await house.load("a")
    assert await house.pool.set_limit(200) == ()
    assert (await house.load("huge")).evicted_models == ()
    assert house.resident == {"a", "huge"}


async def test_a_limit_lowered_during_a_load(house: House) -> None:
    """What the load reserved is in use: the limit is refused below it, and holds above it."""
    await house.load("a")
    house.files["b"].may_load.clear()
    load = house.start_load("b")
    await house.loading("b")
    with pytest.raises(MemoryInUseError) as refusal:
        await house.pool.set_limit(39)
    assert refusal.value.in_use_bytes == 40
    assert await house.pool.set_limit(40) == ("a",)
    assert house.pool.used_bytes == 40
    house.files["b"].may_load.set()
    assert (await load).model.state is ModelState.READY


async def test_a_limit_lowered_while_a_load_waits_for_its_victim(house: House) -> None:
    """Bytes that a load waits for are not given to a lower limit."""
    await house.load("a")
    await house.load("b")
    load = await _evicting(house, "big")
    with pytest.raises(MemoryInUseError) as refusal:
        await house.pool.set_limit(80)
    assert refusal.value.in_use_bytes == 90
    assert await house.pool.set_limit(90) == ()
    assert (await load).model.state is ModelState.READY
    assert (house.pool.limit_bytes, house.pool.used_bytes) == (90, 90)


async def test_a_model_that_is_leaving_is_not_in_use(house: House) -> None:
    """A limit may be lowered to what will be left."""
    await house.load("a")
    await house.load("b")
    unload = asyncio.ensure_future(house.unload("b"))
    await asyncio.sleep(0)
    assert await house.pool.set_limit(40) == ()
    await unload
    assert house.resident == {"a"}
