"""The state machine of one stay in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from fakes.model import FakeModel
from fakes.running_engine import PATIENCE_S
from mlxpool_server.domain import LoadPhase, LoadProgress, ModelSpec, ModelState
from mlxpool_server.errors import LoadFailedError, ModelUnloadedError
from mlxpool_server.pool.lease import watch
from mlxpool_server.pool.residency import Residency

ERROR = LoadFailedError("m", "broken")
Step = Callable[[Residency], None]
STEPS: dict[str, Step] = {
    "ready": lambda stay: stay.become_ready(FakeModel()),
    "leave": lambda stay: stay.leave(),
    "force": lambda stay: stay.leave(ERROR),
    "fail": lambda stay: stay.fail(ERROR),
    "end": lambda stay: stay.end(),
}


def _stay(*steps: str) -> Residency:
    residency = Residency(ModelSpec("m", Path("unread")), allow_eviction=True)
    for step in steps:
        STEPS[step](residency)
    return residency


@pytest.mark.parametrize(
    ("steps", "state"),
    [
        ("", ModelState.LOADING),
        ("ready", ModelState.READY),
        ("fail", ModelState.FAILED),
        ("force", ModelState.UNLOADING),
        ("force end", ModelState.UNLOADED),
        ("ready leave", ModelState.UNLOADING),
        ("ready force", ModelState.UNLOADING),
        ("ready leave force", ModelState.UNLOADING),
        ("ready leave leave end", ModelState.UNLOADED),
    ],
)
def test_the_ways_through(steps: str, state: ModelState) -> None:
    """These are the ways from LOADING to gone, and `gone` is set at their ends only."""
    residency = _stay(*steps.split())
    assert residency.state is state
    assert residency.gone.is_set() == (state in (ModelState.FAILED, ModelState.UNLOADED))


@pytest.mark.parametrize(
    "steps",
    ["end", "ready ready", "ready fail", "ready end", "force ready", "force fail", "fail end"],
)
def test_there_is_no_other_way(steps: str) -> None:
    """A step that the state does not allow is a bug, and is told so."""
    with pytest.raises(RuntimeError, match="cannot become"):
        _stay(*steps.split())


def test_a_stopped_load_tells_the_loader() -> None:
    """The loader thread sees it between two tensors; of several errors the first counts."""
    residency = _stay("force")
    assert residency.is_cancelled.is_set()
    residency.leave(ModelUnloadedError("m"))
    assert residency.error is ERROR


def test_a_drain_waits_for_leases_but_an_error_does_not() -> None:
    """A leased stay that unloads holds its bytes until the lease is back or does not count."""
    residency = _stay("ready")
    residency.take_lease()
    residency.leave()
    assert not residency.is_leaving
    residency.return_lease()
    assert residency.is_leaving
    forced = _stay("ready")
    forced.take_lease()
    forced.leave(ERROR)
    assert forced.is_leaving


@pytest.mark.parametrize("how", ["return", "force"])
async def test_a_drain_is_woken(how: str) -> None:
    """`drained` ends with the last lease, or with an error; no heartbeat has to pass."""
    residency = _stay("ready")
    residency.take_lease()
    residency.leave()
    draining = asyncio.ensure_future(residency.drained(10 * PATIENCE_S))
    await asyncio.sleep(0)
    assert not draining.done()
    if how == "return":
        residency.return_lease()
    else:
        residency.leave(ERROR)
    async with asyncio.timeout(PATIENCE_S):
        await draining


def test_progress_counts_while_it_loads() -> None:
    """A late report of the loader thread changes nothing any more."""
    residency = _stay("ready")
    before = residency.progress
    residency.report(LoadProgress(LoadPhase.LOADING, 1, 2))
    assert residency.progress is before


def test_the_weights_go_with_the_stay() -> None:
    """A stay that ended refers to no model."""
    assert _stay("ready", "leave", "end").model is None


async def test_who_watched_a_load_is_not_told_of_a_later_unload() -> None:
    """A load that ended well ended well, even when its model left before anyone looked."""
    residency = _stay()
    watching = watch(residency, lambda: PATIENCE_S)
    assert await anext(watching) is residency.progress
    residency.become_ready(FakeModel())
    residency.leave(ModelUnloadedError("m"))
    assert [progress async for progress in watching] == []
