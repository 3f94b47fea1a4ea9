"""How models leave: drained, by force, and when the engine gives them up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from fakes.loader import FakeFiles
from fakes.model import FakeModel, endless
from fakes.running_engine import PATIENCE_S
from fakes.running_pool import House, Stream, running_house
from mlxpool_server.domain import (
    GenerationDelta,
    GenerationPhase,
    LoadOptions,
    LoadPhase,
    LoadProgress,
    ModelState,
)
from mlxpool_server.engine.engine import MAX_CONSECUTIVE_FAILURES
from mlxpool_server.errors import GenerationFailedError, ModelUnloadedError


@pytest.fixture
async def house() -> AsyncGenerator[House, None]:
    """One model "m" of 100 bytes that fills the pool; a test releases its steps."""
    async with running_house({"m": FakeFiles.of_size(100, is_stepped=True)}, limit_bytes=100) as it:
        yield it


async def _running(house: House, text: str = "abcdef") -> Stream:
    """A stream that has its first token and waits for the next step."""
    stream = house.generate(text)
    house.files["m"].model.steps.release(2)  # type: ignore[union-attr]
    await stream.until(GenerationDelta)
    return stream


async def _unloading(house: House, *, force: bool = False) -> asyncio.Task[object]:
    """An unload that has begun and waits."""
    unload = asyncio.ensure_future(house.unload(force=force))
    await asyncio.sleep(0)
    return unload


async def test_an_idle_model_is_freed(house: House) -> None:
    """Its bytes are free, its batch is closed, buffers are returned; how much is told."""
    await house.load()
    unloaded = await house.unload()
    assert (unloaded.was_loaded, unloaded.freed_bytes) == (True, 100)
    assert house.pool.used_bytes == 0
    assert house.files["m"].model.batches[0].is_closed
    assert house.memory.num_clears == 1


async def test_nothing_to_unload(house: House) -> None:
    """A model that is not loaded is no error; an old failure is forgotten."""
    house.files["m"].load_error = OSError("disk")
    with pytest.raises(Exception, match="could not be loaded"):
        await house.load()
    assert await house.state() is ModelState.FAILED
    unloaded = await house.unload()
    assert (unloaded.was_loaded, unloaded.freed_bytes) == (False, 0)
    assert await house.state() is ModelState.UNLOADED


async def test_an_unload_drains(house: House) -> None:
    """Streams go on to their ends; the bytes are held until then."""
    stream = await _running(house)
    unload = await _unloading(house)
    assert await house.state() is ModelState.UNLOADING
    assert house.pool.used_bytes == 100
    assert (await house.pool.get_model("m")).resident_bytes == 100
    house.files["m"].model.run_freely()
    assert (await stream.finished()).text == "abcdef"
    await unload
    assert house.pool.used_bytes == 0


async def test_a_caller_who_gives_up_does_not_stop_the_unload(house: House) -> None:
    """The drain goes on without anybody who waits for it."""
    stream = await _running(house)
    unload = await _unloading(house)
    unload.cancel()
    with pytest.raises(asyncio.CancelledError):
        await unload
    house.files["m"].model.run_freely()
    await stream.finished()
    await house.gone()
    assert house.pool.used_bytes == 0


async def test_force_ends_every_stream(house: House) -> None:
    """Under ten streams, running and waiting, each gets ModelUnloadedError; the bytes are free."""
    model = house.files["m"].model
    model.script = endless
    house.files["m"].context_length = 10**9
    model.run_freely()
    streams = [house.generate() for _ in range(10)]
    for stream in streams[:4]:
        await stream.until(GenerationDelta)
    for stream in streams[4:]:
        await stream.phase(GenerationPhase.QUEUED)
    reading = [asyncio.ensure_future(stream.finished()) for stream in streams]
    await house.unload(force=True)
    results = await asyncio.gather(*reading, return_exceptions=True)
    assert [type(result) for result in results] == [ModelUnloadedError] * 10
    assert house.pool.used_bytes == 0


async def test_force_overtakes_a_drain(house: House) -> None:
    """An unload that waits for its streams stops waiting when a second one uses force."""
    house.files["m"].model.script = endless
    house.files["m"].context_length = 10**9
    stream = await _running(house)
    draining = await _unloading(house)
    forcing = await _unloading(house, force=True)
    house.files["m"].model.run_freely()
    with pytest.raises(ModelUnloadedError):
        await stream.rest()
    await draining
    await forcing
    assert house.pool.used_bytes == 0


async def test_force_while_a_prompt_is_rendered(house: House) -> None:
    """A request that leased the model and did not run yet gets ModelUnloadedError too."""
    await house.load()
    tokenizer = house.files["m"].tokenizer
    tokenizer.may_encode.clear()
    reading = asyncio.ensure_future(house.generate().finished())
    assert await asyncio.to_thread(tokenizer.is_encoding.wait, PATIENCE_S)
    await house.unload(force=True)
    tokenizer.may_encode.set()
    with pytest.raises(ModelUnloadedError):
        await reading


async def test_a_request_that_comes_while_it_unloads(house: House) -> None:
    """It waits for the old stay to end, and then loads the model again."""
    stream = await _running(house)
    unload = await _unloading(house)
    late = house.generate("late")
    await late.started()
    reading = asyncio.ensure_future(late.finished())
    house.files["m"].model.run_freely()
    await stream.finished()
    await unload
    assert (await reading).text == "late"
    assert house.files["m"].num_loads == 2


async def test_a_load_that_comes_while_it_unloads(house: House) -> None:
    """LoadModel waits, tells QUEUED meanwhile, and loads the model again."""
    house.pool._heartbeat_s = 0.001
    stream = await _running(house)
    unload = await _unloading(house)
    events = house.pool.load("m", LoadOptions())
    assert await anext(events) == LoadProgress(LoadPhase.QUEUED)
    house.files["m"].model.run_freely()
    await stream.finished()
    await unload
    last = [event async for event in events][-1]
    assert last.model.state is ModelState.READY  # type: ignore[union-attr]
    assert house.files["m"].num_loads == 2


@pytest.mark.parametrize("first", ["load", "unload"])
async def test_load_and_unload_at_the_same_moment(house: House, first: str) -> None:
    """Both are answered, in either order, and the model is in the state that came last."""
    await house.load()
    house.files["m"].model.run_freely()
    calls = {"load": house.load, "unload": house.unload}
    names = ["load", "unload"] if first == "load" else ["unload", "load"]
    await asyncio.gather(*(calls[name]() for name in names))
    assert house.resident == (set() if first == "load" else {"m"})


async def test_a_given_up_model_loads_again(house: House) -> None:
    """A model whose steps keep failing is freed; the next request loads it and is answered."""
    model = house.files["m"].model
    model.run_freely()
    await house.load()
    for _ in range(MAX_CONSECUTIVE_FAILURES):
        model.step_errors.append(RuntimeError("always"))
        with pytest.raises(GenerationFailedError):
            await house.answer()
    await house.gone()
    status = await house.pool.get_model("m")
    assert status.state is ModelState.FAILED
    assert "kept failing" in status.error_message
    assert house.pool.used_bytes == 0
    assert await house.answer() == "abc"
    assert house.files["m"].num_loads == 2


async def test_an_unload_under_a_dead_engine(house: House) -> None:
    """Nobody waits for a thread that is gone."""
    await house.load()
    house.files["m"].model.run_freely()
    house.files["m"].model.step_errors.append(_Death())
    with pytest.raises(GenerationFailedError):
        await house.answer()
    async with asyncio.timeout(PATIENCE_S):
        await house.deaths.wait()
    assert (await house.unload()).freed_bytes == 100


async def test_only_the_named_model_leaves() -> None:
    """An unload by force touches no other model's streams."""
    files = {
        "a": FakeFiles(model=FakeModel(script=endless), context_length=10**9),
        "b": FakeFiles(model=FakeModel(is_stepped=True)),
    }
    async with running_house(files) as house:
        doomed = house.generate("x", "a")
        await doomed.until(GenerationDelta)
        other = house.generate("other", "b")
        reading = asyncio.ensure_future(other.finished())
        files["b"].model.run_freely()
        await house.unload("a", force=True)
        assert (await reading).text == "other"
        with pytest.raises(ModelUnloadedError):
            await doomed.rest()


class _Death(BaseException):
    """What no step is expected to raise."""
