"""One load per model, however many ask, however they leave."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from fakes.loader import FakeFiles
from fakes.model import FakeBatch, FakeModel
from fakes.running_engine import PATIENCE_S
from fakes.running_pool import House, running_house
from mlxpool_server.domain import (
    Footprint,
    GenerationPhase,
    HubSource,
    LoadFinished,
    LoadOptions,
    LoadPhase,
    LoadProgress,
    ModelSpec,
    ModelState,
)
from mlxpool_server.errors import (
    DrainingError,
    GenerationFailedError,
    LoadFailedError,
    LoadSupersededError,
    ModelNotFoundError,
    PoolMemoryLimitError,
)
from mlxpool_server.pool.reservations import Reservation


@pytest.fixture
async def house() -> AsyncGenerator[House, None]:
    """One model "m" of 100 bytes, whose load waits for `may_load`."""
    files = FakeFiles()
    files.may_load.clear()
    async with running_house({"m": files}) as house:
        yield house


# ---------------------------------------------------------------- one load


async def test_many_callers_share_one_load(house: House) -> None:
    """LoadModel and Generate wait for the same load; the files are read once."""
    loads = [house.start_load() for _ in range(5)]
    streams = [house.generate() for _ in range(5)]
    for stream in streams:
        await stream.started()
    await house.loading()
    house.files["m"].may_load.set()
    for load in loads:
        assert (await load).model.state is ModelState.READY
    for stream in streams:
        assert (await stream.finished()).text == "abc"
    assert house.files["m"].num_loads == 1


async def test_a_loaded_model_is_not_loaded_again(house: House) -> None:
    """A second load says so at once."""
    house.files["m"].may_load.set()
    assert not (await house.load()).already_loaded
    again = await house.load()
    assert (again.already_loaded, again.duration_s) == (True, 0.0)
    assert house.files["m"].num_loads == 1


async def test_the_caller_who_started_it_may_leave(house: House) -> None:
    """A cancelled starter stops neither the load nor the other waiters."""
    starter = house.start_load()
    await house.loading()
    waiter = house.start_load()
    await asyncio.sleep(0)
    starter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starter
    house.files["m"].may_load.set()
    assert (await waiter).model.state is ModelState.READY
    assert house.files["m"].num_loads == 1


async def test_every_caller_may_leave(house: House) -> None:
    """Even with nobody waiting the load ends, READY, and the next caller finds it."""
    starter = house.start_load()
    residency = await house.loading()
    starter.cancel()
    house.files["m"].may_load.set()
    while residency.state is ModelState.LOADING:
        await residency.changed.wait(PATIENCE_S)
    assert (await house.load()).already_loaded


async def test_a_cancelled_waiter_harms_nobody(house: House) -> None:
    """Of ten waiters nine leave in turn; the last one gets the model."""
    waiters = [house.start_load() for _ in range(10)]
    await house.loading()
    for waiter in waiters[:-1]:
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
    house.files["m"].may_load.set()
    assert (await waiters[-1]).model.state is ModelState.READY


async def test_progress_is_told_as_it_comes(house: House) -> None:
    """A caller sees the phases and the bytes, and then `finished`."""
    events = house.pool.load("m", LoadOptions())
    seen: list[LoadProgress | LoadFinished] = []
    async for event in events:
        seen.append(event)
        if isinstance(event, LoadProgress) and event.phase is LoadPhase.LOADING:
            house.files["m"].may_load.set()
    assert LoadProgress(LoadPhase.LOADING, 50, 100) in seen
    assert isinstance(seen[-1], LoadFinished)
    assert seen[-1].evicted_models == ()


async def test_silence_is_filled_with_progress() -> None:
    """A load that says nothing repeats its progress after each heartbeat."""
    files = FakeFiles()
    files.may_load.clear()
    async with running_house({"m": files}, heartbeat_s=0.001) as house:
        load = house.start_load()
        await house.loading()
        seen = 0
        async for event in house.pool.load("m", LoadOptions()):
            seen += event == LoadProgress(LoadPhase.LOADING, 50, 100)
            if seen == 3:
                files.may_load.set()
        await load
        assert seen >= 3


async def test_an_unknown_model_is_refused(house: House) -> None:
    """A name that the catalogue does not have raises ModelNotFoundError."""
    with pytest.raises(ModelNotFoundError):
        await house.load("other")
    with pytest.raises(ModelNotFoundError):
        await house.unload("other")
    with pytest.raises(ModelNotFoundError):
        await house.generate(model="other").rest()


async def test_a_hub_model_is_fetched_first() -> None:
    """A model whose files are not here is downloaded by its load, also for a generation."""
    files = {"m": FakeFiles(is_fetched=False), "n": FakeFiles(is_fetched=False)}
    specs = tuple(ModelSpec(name, HubSource(f"org/{name}")) for name in files)
    async with running_house(files, specs=specs) as house:
        assert (await house.pool.get_model("m")).info is None
        with pytest.raises(LoadFailedError, match="not on this machine"):
            await house.pool.info("m")
        assert (await house.load("m")).model.state is ModelState.READY
        assert await house.answer("abc", "n") == "abc"


async def test_files_are_read_again_for_a_load() -> None:
    """A load counts with what the files say now, not with what they said before."""
    async with running_house(limit_bytes=100) as house:
        await house.state()
        house.files["m"].estimated_bytes = 101
        with pytest.raises(PoolMemoryLimitError):
            await house.load()


# ---------------------------------------------------------------- failed loads


@pytest.mark.parametrize("error", [LoadFailedError("m", "corrupt"), OSError("disk"), MemoryError()])
async def test_a_failed_load_tells_every_waiter(house: House, error: Exception) -> None:
    """All get the same LoadFailedError; nothing stays reserved; a later request tries again."""
    files = house.files["m"]
    files.load_error = error
    loads = [house.start_load() for _ in range(3)]
    stream = house.generate()
    await stream.phase(GenerationPhase.LOADING)
    await house.loading()
    assert house.pool.used_bytes == 100
    files.may_load.set()
    results = await asyncio.gather(*loads, return_exceptions=True)
    assert isinstance(results[0], LoadFailedError)
    assert all(result is results[0] for result in results)
    with pytest.raises(LoadFailedError):
        await stream.finished()
    assert house.pool.used_bytes == 0
    assert files.num_loads == 1
    status = await house.pool.get_model("m")
    assert status.state is ModelState.FAILED
    assert status.error_message == results[0].problem
    files.load_error = None
    assert await house.answer() == "abc"
    assert (await house.pool.get_model("m")).error_message == ""


async def test_files_that_are_no_model() -> None:
    """A broken folder fails the load and shows as FAILED; once repaired it shows as before."""
    async with running_house({"m": FakeFiles(inspect_error="no config.json")}) as house:
        status = await house.pool.get_model("m")
        assert (status.state, status.error_message) == (ModelState.FAILED, "no config.json")
        house.files["m"].inspect_error = ""
        status = await house.pool.get_model("m")
        assert (status.state, status.error_message) == (ModelState.UNLOADED, "")
        assert status.info is not None


async def test_a_load_of_a_broken_folder_fails() -> None:
    """Nothing is reserved for a model whose size cannot be read."""
    async with running_house({"m": FakeFiles(inspect_error="no config.json")}) as house:
        with pytest.raises(LoadFailedError, match=r"no config\.json"):
            await house.load()
        assert house.ledger.most_bytes == 0


async def test_a_model_that_the_engine_refuses(house: House) -> None:
    """A batch that cannot be built fails the load like a file that cannot be read."""
    house.files["m"].may_load.set()
    house.files["m"].model.runner_errors.append(RuntimeError("no memory"))
    with pytest.raises(LoadFailedError):
        await house.load()
    assert house.pool.used_bytes == 0
    assert await house.answer() == "abc"


async def test_a_load_under_a_dead_engine(house: House) -> None:
    """A load whose model nobody can take fails; its bytes are free."""
    load = house.start_load()
    await house.loading()
    await house.engine.stop(DrainingError(1.0), PATIENCE_S)
    house.files["m"].may_load.set()
    with pytest.raises(GenerationFailedError):
        await load
    assert house.pool.used_bytes == 0


async def test_buffers_that_cannot_be_returned(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the device while it frees strands nobody: load and unload still end."""

    def fail() -> None:
        raise RuntimeError("device")

    monkeypatch.setattr(house.memory, "clear_cache", fail)
    house.files["m"].may_load.set()
    house.files["m"].load_error = OSError("disk")
    with pytest.raises(LoadFailedError):
        await house.load()
    house.files["m"].load_error = None
    await house.load()
    await house.unload()
    assert house.pool.used_bytes == 0


class _Weights:
    """What a load reads; nothing but the house refers to it."""

    resident_bytes = 100

    def __init__(self, problem: str) -> None:
        self._problem = problem

    def new_runner(self) -> FakeBatch:
        if self._problem:
            raise RuntimeError(self._problem)
        return FakeBatch(FakeModel())

    def new_embedder(self) -> None:
        """It does not embed."""


@pytest.mark.parametrize("case", ["in the loader", "in the engine", "unload", "superseded"])
async def test_weights_are_gone_before_their_bytes(house: House, case: str) -> None:
    """When buffers are cleared, and before the ledger is told, nothing refers to the weights."""
    files = house.files["m"]
    weights: list[weakref.ref[_Weights]] = []
    alive_at_clear: list[bool] = []

    def read(*_args: Any) -> _Weights:
        files.is_loading.set()
        files.may_load.wait(PATIENCE_S)
        model = _Weights("no memory" if case == "in the engine" else "")
        weights.append(weakref.ref(model))
        if case == "in the loader":
            try:
                raise ValueError("bad tensor")
            except ValueError as error:
                raise LoadFailedError("m", "corrupt") from error
        return model

    def clear_cache() -> None:
        alive_at_clear.append(weights[0]() is not None)

    house.pool._loads._loader.load = read  # type: ignore[attr-defined, method-assign]
    house.memory.clear_cache = clear_cache  # type: ignore[method-assign]
    gc.disable()
    try:
        load = house.start_load()
        residency = await house.loading()
        if case == "superseded":
            residency.leave(LoadSupersededError("m"))
        files.may_load.set()
        await asyncio.wait([load])
        if case == "unload":
            assert load.exception() is None
            await house.unload()
        else:
            await residency.gone.wait()
    finally:
        gc.enable()
    assert alive_at_clear == [False]


# ---------------------------------------------------------------- measured and estimated


async def test_the_measured_size_counts() -> None:
    """After a load the ledger holds what was measured; the rest of the estimate is free."""
    files = FakeFiles(estimated_bytes=100, model=FakeModel(resident_bytes=70))
    async with running_house({"m": files}, limit_bytes=100) as house:
        assert (await house.load()).model.resident_bytes == 70
        assert house.pool.used_bytes == 70


async def test_a_model_larger_than_its_estimate_evicts_more() -> None:
    """What the estimate missed is made room for, before the model is used."""
    files = {
        "idle": FakeFiles.of_size(40),
        "m": FakeFiles(estimated_bytes=60, model=FakeModel(resident_bytes=80)),
    }
    async with running_house(files, limit_bytes=100) as house:
        await house.load("idle")
        assert (await house.load("m")).evicted_models == ("idle",)
        assert house.pool.used_bytes == 80


async def test_a_model_that_turns_out_too_large_fails() -> None:
    """A load whose measured size cannot fit is refused, and its bytes are free again."""
    files = FakeFiles(estimated_bytes=60, model=FakeModel(resident_bytes=101))
    async with running_house({"m": files}, limit_bytes=100) as house:
        with pytest.raises(PoolMemoryLimitError) as refusal:
            await house.load()
        assert (refusal.value.required_bytes, refusal.value.available_bytes) == (101, 100)
        assert house.pool.used_bytes == 0


# ---------------------------------------------------------------- the warm-up's bytes


def warmed_files(*, is_loading: bool = False) -> FakeFiles:
    """100 bytes that stay, and 50 while it loads."""
    files = FakeFiles(warm_up_bytes=50, model=FakeModel(resident_bytes=100))
    if is_loading:
        files.may_load.clear()
    return files


async def test_a_load_holds_its_warm_up_too() -> None:
    """Until it is over; shown as the model's size are the weights alone."""
    files = warmed_files(is_loading=True)
    async with running_house({"m": files}, limit_bytes=150) as house:
        loading = house.start_load()
        await house.loading()
        assert house.pool.used_bytes == 150
        files.may_load.set()
        status = (await loading).model
        assert house.pool.used_bytes == 100
        assert status.info is not None
        assert (status.info.estimated_bytes, status.resident_bytes) == (100, 100)


async def test_a_warm_up_that_cannot_fit_is_refused() -> None:
    """Before anything is read or evicted, and foreseen by validate_only."""
    files = {"idle": FakeFiles.of_size(20), "m": warmed_files()}
    async with running_house(files, limit_bytes=149) as house:
        await house.load("idle")
        for validate_only in (False, True):
            with pytest.raises(PoolMemoryLimitError) as refusal:
                await house.load("m", validate_only=validate_only)
            assert (refusal.value.required_bytes, refusal.value.available_bytes) == (150, 149)
        assert files["m"].num_loads == 0
        assert house.pool.used_bytes == 20


async def test_a_warm_up_evicts_the_idle() -> None:
    """They leave for it although the weights alone would fit, as validate_only says."""
    files = {"idle": FakeFiles.of_size(20), "m": warmed_files()}
    async with running_house(files, limit_bytes=150) as house:
        await house.load("idle")
        foreseen = await house.load("m", validate_only=True)
        assert foreseen.evicted_models == ("idle",)
        assert (await house.load("m")).evicted_models == ("idle",)


async def test_a_generation_may_have_what_the_warm_up_gives_back() -> None:
    """Asked during the load, it is judged beside the weights that stay."""
    files = warmed_files(is_loading=True)
    async with running_house({"m": files}, limit_bytes=150) as house:
        loading = house.start_load()
        await house.loading()
        wanted = Reservation("m", Footprint(state_bytes=40), num_tokens=1, prompt_tokens=1)
        house.pool.check_fits(wanted)
        files.may_load.set()
        await loading


# ---------------------------------------------------------------- unload during a load


async def test_an_unload_stops_a_load(house: House) -> None:
    """Every waiter gets LoadSupersededError at once, and the bytes are free."""
    loads = [house.start_load() for _ in range(3)]
    stream = house.generate()
    await stream.phase(GenerationPhase.LOADING)
    await house.loading()
    unloaded = await house.unload()
    assert (unloaded.was_loaded, unloaded.freed_bytes) == (False, 0)
    results = await asyncio.gather(*loads, return_exceptions=True)
    assert all(isinstance(result, LoadSupersededError) for result in results)
    with pytest.raises(LoadSupersededError):
        await stream.finished()
    assert house.pool.used_bytes == 0
    status = await house.pool.get_model("m")
    assert (status.state, status.error_message) == (ModelState.UNLOADED, "")


async def test_a_load_after_the_unload_of_a_load(house: House) -> None:
    """Who comes after the unload does not share the fate of the load that it stopped."""
    stopped = house.start_load()
    await house.loading()
    unload = asyncio.ensure_future(house.unload())
    await asyncio.sleep(0)
    late = [house.start_load(), house.start_load()]
    stream = house.generate()
    await unload
    with pytest.raises(LoadSupersededError):
        await stopped
    house.files["m"].may_load.set()
    for load in late:
        assert (await load).model.state is ModelState.READY
    assert (await stream.finished()).text == "abc"
    assert house.files["m"].num_loads == 2


async def test_a_load_that_ends_at_the_moment_it_is_stopped(house: House) -> None:
    """A load that does not look any more still counts as stopped: its model is let go."""
    house.files["m"].is_cancellable = False
    load = house.start_load()
    await house.loading()
    unload = asyncio.ensure_future(house.unload())
    await asyncio.sleep(0)
    with pytest.raises(LoadSupersededError):
        await load
    house.files["m"].may_load.set()
    await unload
    assert house.pool.used_bytes == 0
    assert house.files["m"].model.batches == []


async def test_an_unload_while_the_engine_takes_the_model_over(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is detached again, every waiter is told, and the name can be loaded anew."""
    attach = house.engine.attach
    is_attached, may_go_on = asyncio.Event(), asyncio.Event()

    async def slow_attach(name: str, model: Any) -> None:
        await attach(name, model)
        is_attached.set()
        await may_go_on.wait()

    monkeypatch.setattr(house.engine, "attach", slow_attach)
    house.files["m"].may_load.set()
    load = house.start_load()
    await is_attached.wait()
    unload = asyncio.ensure_future(house.unload())
    with pytest.raises(LoadSupersededError):
        await load
    may_go_on.set()
    await unload
    (batch,) = house.files["m"].model.batches
    assert batch.is_closed
    assert await house.answer() == "abc"


async def test_a_load_that_fails_while_it_is_stopped(house: House) -> None:
    """The unload is answered; the model is UNLOADED, not FAILED."""
    house.files["m"].is_cancellable = False
    house.files["m"].load_error = OSError("disk")
    load = house.start_load()
    await house.loading()
    unload = asyncio.ensure_future(house.unload())
    await asyncio.sleep(0)
    house.files["m"].may_load.set()
    await unload
    with pytest.raises(LoadSupersededError):
        await load
    assert await house.state() is ModelState.UNLOADED


# ---------------------------------------------------------------- settings, preload, close


async def test_a_load_updates_settings(house: House) -> None:
    """On a loaded model too; unset leaves pinned alone and keep_alive at its default."""
    house.files["m"].may_load.set()
    await house.load(pinned=True, keep_alive_s=5.0)
    assert (house.entry().is_pinned, house.entry().keep_alive_s) == (True, 5.0)
    await house.load()
    assert (house.entry().is_pinned, house.entry().keep_alive_s) == (True, 300.0)
    await house.load(pinned=False)
    assert (house.entry().is_pinned, house.entry().keep_alive_s) == (False, 300.0)


async def test_a_failed_load_pins_nothing(house: House) -> None:
    """A pin that came with a load that failed is undone."""
    house.files["m"].load_error = LoadFailedError("m", "corrupt")
    house.files["m"].may_load.set()
    with pytest.raises(LoadFailedError):
        await house.load(pinned=True)
    assert not house.entry().is_pinned


async def test_preload_starts_what_is_marked() -> None:
    """Marked models load at once; one that fails is logged and harms no other."""
    files = {"a": FakeFiles(), "bad": FakeFiles(inspect_error="broken"), "c": FakeFiles()}
    unread = Path("unread")
    specs = (ModelSpec("a", unread, preload=True), ModelSpec("bad", unread, preload=True))
    async with running_house(files, specs=specs) as house:
        house.pool.preload()
        assert (await house.load("a")).model.state is ModelState.READY
        await house.gone("bad")
        assert await house.state("bad") is ModelState.FAILED
        assert await house.state("c") is ModelState.UNLOADED


async def test_close_with_loads_in_flight(house: House) -> None:
    """Waiters get the given error, no load starts any more, and nothing is held."""
    load = house.start_load()
    stream = house.generate()
    await stream.phase(GenerationPhase.LOADING)
    await house.loading()
    await house.pool.close(DrainingError(1.0))
    with pytest.raises(DrainingError):
        await load
    with pytest.raises(DrainingError):
        await stream.finished()
    with pytest.raises(DrainingError):
        await house.load()
    with pytest.raises(DrainingError):
        await house.generate().finished()
    assert house.pool.used_bytes == 0


async def test_close_lets_every_model_go(house: House) -> None:
    """READY models are detached and freed, whether the engine still runs or not."""
    house.files["m"].may_load.set()
    await house.load(pinned=True)
    await house.engine.stop(DrainingError(1.0), PATIENCE_S)
    await house.pool.close(DrainingError(1.0))
    assert house.pool.used_bytes == 0
    assert house.memory.num_clears == 1
