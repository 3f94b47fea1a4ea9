"""Random orders of everything that can happen to a pool, on a real loop with fake models."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.loader import FakeFiles
from fakes.model import FakeModel
from fakes.running_engine import PATIENCE_S
from fakes.running_pool import House, running_house
from mlxpool_server.domain import ModelState, StopConditions
from mlxpool_server.errors import MlxpoolError

NAMES = "abcd"
SIZES = {"a": 30, "b": 40, "c": 50, "d": 90}
LIMITS = (60, 90, 100, 130)
MAX_ACTIONS = 40

ACTIONS = st.tuples(
    st.sampled_from(
        [
            "generate",
            "generate",
            "load",
            "hang up",
            "cancel",
            "unload",
            "force",
            "limit",
            "pin",
            "expire",
            "break",
            "repair",
            "step fails",
            "gate",
            "open",
            "pause",
        ]
    ),
    st.sampled_from(NAMES),
    st.integers(0, 1000),
)


class Play:
    """Carries out actions; who waits for one of them may never wait for ever."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._waiters: list[asyncio.Task[None]] = []
        self._ids: list[str] = []
        self.wrong: list[str] = []

    async def act(self, action: str, name: str, number: int) -> None:  # noqa: C901, PLR0912 - a table
        house, files = self._house, self._house.files[name]
        match action:
            case "generate":
                self._wait(partial(self._generate, name, number))
            case "load":
                pinned = None if number % 3 else bool(number % 2)
                disallows = number % 5 == 0
                self._wait(partial(house.load, name, pinned=pinned, disallow_eviction=disallows))
            case "hang up" if self._waiters:
                self._waiters[number % len(self._waiters)].cancel()
            case "cancel" if self._ids:
                self._wait(partial(self._cancel, self._ids[number % len(self._ids)]))
            case "unload" | "force":
                self._wait(partial(house.unload, name, force=action == "force"))
            case "limit":
                self._wait(partial(house.pool.set_limit, LIMITS[number % len(LIMITS)]))
            case "pin":
                house.pool._entries[name].is_pinned = bool(number % 2)
            case "expire":
                house.expire()
            case "break":
                files.load_error = OSError("disk")
            case "repair":
                files.load_error = None
            case "step fails":
                files.model.step_errors.append(RuntimeError("step"))
            case "gate":
                files.may_load.clear()
            case "open":
                files.may_load.set()
            case "pause":
                await self._pause(number)
        self._look()

    async def end(self) -> None:
        """Open every gate; everyone who waits gets an answer."""
        for files in self._house.files.values():
            files.may_load.set()
        self._wait(partial(asyncio.sleep, 0))
        done, waiting = await asyncio.wait(self._waiters, timeout=PATIENCE_S)
        assert not waiting, f"{len(waiting)} wait for ever"
        for task in done:
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error
        self._look()
        assert self.wrong == []

    async def _pause(self, number: int) -> None:
        """Let the threads get on: a turn of the loop, or a message to the engine and back."""
        if number % 2:
            await asyncio.sleep(0)
        else:
            await self._house.engine.detach("nobody", MlxpoolError())

    async def _generate(self, name: str, number: int) -> None:
        text = f"{name}{number}"
        generation_id = f"{len(self._ids)}"
        self._ids.append(generation_id)
        stream = self._house.generate(
            text,
            name,
            generation_id=generation_id,
            keep_alive_s=(None, 0.0, 60.0)[number % 3],
            stop=StopConditions(max_duration_s=None if number % 7 else 0.001),
        )
        finished = await stream.finished()
        if not text.startswith(finished.text):
            self.wrong.append(f"{text} was answered with {finished.text}")

    async def _cancel(self, generation_id: str) -> None:
        self._house.generations.cancel(generation_id)

    def _wait(self, work: Callable[[], Coroutine[Any, Any, object]]) -> None:
        async def wait() -> None:
            # Refused, failed, superseded, unloaded: each is an answer.
            with contextlib.suppress(MlxpoolError):
                await work()

        self._waiters.append(asyncio.ensure_future(wait()))

    def _look(self) -> None:
        """What has to hold at every moment."""
        house = self._house
        self.wrong += house.ledger.violations
        for name, entry in house.pool._entries.items():
            residency = entry.residency
            allotment = house.pool._prompt_caches._allotments.get(name)
            kept = house.engine.stats(name).prompt_cache_bytes
            if residency is not None and kept > house.ledger.held_by(allotment):
                self.wrong.append(f"{name} keeps {kept} bytes of prompts that nobody holds")
            if residency is None:
                continue
            if residency.num_leases > entry.num_leases:
                self.wrong.append(f"{name} has a lease that nobody holds")
            is_forced = residency.error is not None
            if residency.state is ModelState.READY and residency.model is None:
                self.wrong.append(f"{name} is READY without weights")
            if residency.num_leases and residency.gone.is_set() and not is_forced:
                self.wrong.append(f"{name} was evicted under a lease")


async def _play(actions: list[tuple[str, str, int]], prompt_cache_share: float = 0.0) -> None:
    files = {name: FakeFiles.of_size(SIZES[name]) for name in NAMES}
    # One whose estimate is too low, one whose estimate is too high.
    files["b"].model = FakeModel(resident_bytes=45)
    files["c"].model = FakeModel(resident_bytes=42)
    async with running_house(
        files, limit_bytes=100, max_batch_size=2, prompt_cache_share=prompt_cache_share
    ) as house:
        play = Play(house)
        for action, name, number in actions:
            await play.act(action, name, number)
        await play.end()
        await _assert_usable(house)


async def _assert_usable(house: House) -> None:
    """After all that, each model can still be loaded and answers."""
    await house.pool.set_limit(max(130, house.pool.limit_bytes))
    for name, files in house.files.items():
        files.load_error = None
        files.model.step_errors.clear()
        house.entry(name).is_pinned = False
        # A model that its last failed step is just giving up fails one more request.
        await house.unload(name, force=True)
    for name in house.files:
        assert await house.answer("still here", name) == "still here"


@settings(max_examples=150, deadline=None)
@given(st.lists(ACTIONS, max_size=MAX_ACTIONS), st.sampled_from([0.0, 0.3]))
def test_any_order_of_actions(
    actions: list[tuple[str, str, int]], prompt_cache_share: float
) -> None:
    """Never over the limit, no evicted lease, no lost waiter, no leaked byte, every text right."""
    asyncio.run(_play(actions, prompt_cache_share))


@pytest.mark.parametrize("seed", range(20))
async def test_many_actions(seed: int) -> None:
    """The same over long plays, by seed."""
    dice = random.Random(seed)  # noqa: S311 - a repeatable play
    kinds = ["generate"] * 6 + ["load", "hang up", "cancel", "unload", "force", "limit", "expire"]
    kinds += ["break", "repair", "repair", "step fails", "gate", "open", "open"] + ["pause"] * 8
    await _play(
        [
            (dice.choice(kinds), dice.choice(NAMES), dice.randrange(1000))
            for _ in range(10 * MAX_ACTIONS)
        ],
        prompt_cache_share=(seed % 3) / 4,
    )
