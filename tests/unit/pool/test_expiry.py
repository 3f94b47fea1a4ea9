"""keep_alive: idle models leave when their time has come."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from fakes.loader import FakeFiles
from fakes.running_engine import PATIENCE_S
from fakes.running_pool import House, Timer, running_house
from mlxpool_server.domain import GenerationDelta, ModelSpec, ModelState


@pytest.fixture
async def house() -> AsyncGenerator[House, None]:
    async with running_house(default_keep_alive_s=300.0) as house:
        yield house


def _pending(house: House) -> list[Timer]:
    return [timer for timer in house.timers if timer.is_pending]


async def test_an_idle_model_expires(house: House) -> None:
    """After its keep_alive it is unloaded; when that will be is visible."""
    await house.load()
    (timer,) = _pending(house)
    assert timer.delay_s == 300.0
    expire_time = (await house.pool.get_model("m")).expire_time
    assert expire_time is not None
    assert expire_time - time.time() == pytest.approx(300, abs=PATIENCE_S)
    timer.fire()
    assert await house.state() is ModelState.UNLOADING
    await house.gone()
    assert house.pool.used_bytes == 0
    assert (await house.pool.get_model("m")).expire_time is None


async def test_a_running_model_does_not_expire(house: House) -> None:
    """A lease stops the timer, and its return starts it anew."""
    await house.load()
    house.files["m"].model.steps = steps = threading.Semaphore(0)
    stream = house.generate()
    steps.release(2)
    await stream.until(GenerationDelta)
    assert _pending(house) == []
    assert (await house.pool.get_model("m")).expire_time is None
    house.files["m"].model.run_freely()
    await stream.finished()
    (timer,) = _pending(house)
    assert timer.delay_s == 300.0


async def test_the_last_of_several_requests_starts_the_timer(house: House) -> None:
    """While one of two streams still runs the model is not idle."""
    await house.load()
    first, second = house.generate(), house.generate()
    await first.started()
    await second.started()
    await first.finished()
    assert _pending(house) == []
    await second.finished()
    assert len(_pending(house)) == 1


async def test_keep_alive_zero_unloads_when_idle(house: House) -> None:
    """With 0 the model leaves as soon as the request that wanted it so is answered."""
    assert await house.answer(keep_alive_s=0.0) == "abc"
    (timer,) = _pending(house)
    assert timer.delay_s == 0.0
    timer.fire()
    await house.gone()
    assert house.resident == set()


async def test_a_short_keep_alive_really_expires() -> None:
    """With the loop's own timer: the model is gone, with nobody's doing."""
    async with running_house(has_real_timers=True) as house:
        await house.load(keep_alive_s=0.001)
        await house.gone()
        assert house.resident == set()


async def test_never(house: House) -> None:
    """An infinite keep_alive has no timer and no expire_time."""
    await house.load(keep_alive_s=math.inf)
    await house.answer()
    assert _pending(house) == []
    assert (await house.pool.get_model("m")).expire_time is None


async def test_a_pinned_model_does_not_expire(house: House) -> None:
    """Pinning stops the timer; unpinning starts it."""
    await house.load()
    await house.load(pinned=True)
    assert _pending(house) == []
    await house.load(pinned=False)
    assert len(_pending(house)) == 1


async def test_a_load_changes_the_time(house: House) -> None:
    """keep_alive on a loaded model counts from now."""
    await house.load()
    await house.load(keep_alive_s=7.0)
    (timer,) = _pending(house)
    assert timer.delay_s == 7.0


async def test_a_request_changes_the_time(house: House) -> None:
    """keep_alive of a generation counts when it has ended."""
    await house.answer(keep_alive_s=9.0)
    (timer,) = _pending(house)
    assert timer.delay_s == 9.0


async def test_a_refused_request_changes_nothing(house: House) -> None:
    """keep_alive of a request that is not admitted does not count."""
    with pytest.raises(ValueError, match="context"):
        await house.answer("x" * 2000, keep_alive_s=0.0)
    assert house.entry().keep_alive_s == 300.0


async def test_the_catalogue_sets_the_time() -> None:
    """A model's own keep_alive is better than the server's default."""
    specs = (ModelSpec("m", Path("unread"), keep_alive_s=5.0),)
    async with running_house({"m": FakeFiles()}, specs=specs) as house:
        await house.load()
        assert _pending(house)[0].delay_s == 5.0


async def test_an_unload_stops_the_timer(house: House) -> None:
    """A timer of a stay that ended does not touch the next one."""
    await house.load()
    await house.unload()
    assert _pending(house) == []
    await house.load()
    assert len(_pending(house)) == 1


async def test_a_request_speaks_for_the_idle_time_after_it_alone(house: House) -> None:
    """A request's keep_alive does not outlast the next request."""
    await house.load(keep_alive_s=60.0)
    await house.answer(keep_alive_s=1.0)
    assert house.timers[-1].delay_s == 1.0
    await house.answer()
    assert house.timers[-1].delay_s == 60.0
