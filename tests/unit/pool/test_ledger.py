"""Who holds how many bytes, and who waits for more."""

from __future__ import annotations

import asyncio

import pytest

from fakes.running_pool import WatchedLedger
from mlxpool_server.pool.ledger import Ledger


async def _started(ledger: Ledger, holder: object, num_bytes: int) -> asyncio.Task[None]:
    """A `hold` that has taken its place in the line."""
    holding = asyncio.ensure_future(ledger.hold(holder, num_bytes))
    await asyncio.sleep(0)
    return holding


async def test_what_fits_is_held_at_once() -> None:
    """Bytes that are free are written down without waiting; less than before is given back."""
    ledger = Ledger(100)
    await ledger.hold("a", 60)
    await ledger.hold("a", 80)
    await ledger.hold("a", 30)
    await ledger.hold("b", 70)
    assert (ledger.used_bytes, ledger.unclaimed_bytes) == (100, 0)
    assert (ledger.held_by("a"), ledger.held_by("b"), ledger.held_by("c")) == (30, 70, 0)
    assert ledger.release("b") == 70
    assert ledger.release("b") == 0
    assert ledger.unclaimed_bytes == 70


async def test_who_waits_gets_what_is_freed() -> None:
    """A holder that wants more than is free waits until it is, and nothing is overdrawn."""
    ledger = Ledger(100)
    await ledger.hold("a", 80)
    waiting = await _started(ledger, "b", 50)
    assert ledger.held_by("b") == 0
    assert ledger.unclaimed_bytes == -30
    ledger.release("a")
    await waiting
    assert (ledger.used_bytes, ledger.unclaimed_bytes) == (50, 50)


async def test_no_late_comer_takes_what_was_freed_for_another() -> None:
    """The line is served in order, even when a later one would fit already."""
    ledger = Ledger(100)
    await ledger.hold("a", 80)
    first = await _started(ledger, "first", 90)
    second = await _started(ledger, "second", 10)
    assert not second.done()
    ledger.release("a")
    await first
    await second
    assert ledger.used_bytes == 100


async def test_a_waiter_that_gives_up_leaves_the_line() -> None:
    """Who waited behind it is served, and nothing stays claimed."""
    ledger = Ledger(100)
    await ledger.hold("a", 80)
    first = await _started(ledger, "first", 90)
    second = await _started(ledger, "second", 10)
    first.cancel()
    await second
    assert (ledger.used_bytes, ledger.unclaimed_bytes) == (90, 10)


async def test_a_lower_limit_waits_for_its_bytes() -> None:
    """The old limit is in force until what is held fits the new one."""
    ledger = WatchedLedger(100)
    await ledger.hold("a", 60)
    await ledger.hold("b", 30)
    lowering = asyncio.ensure_future(ledger.set_limit(50))
    await asyncio.sleep(0)
    assert (ledger.limit_bytes, ledger.next_limit_bytes) == (100, 50)
    ledger.release("a")
    await lowering
    assert (ledger.limit_bytes, ledger.used_bytes, ledger.unclaimed_bytes) == (50, 30, 20)
    assert ledger.violations == []


async def test_nobody_takes_the_bytes_of_a_limit_that_is_lowered() -> None:
    """Who comes after the change waits behind it."""
    ledger = WatchedLedger(100)
    await ledger.hold("a", 60)
    lowering = asyncio.ensure_future(ledger.set_limit(50))
    await asyncio.sleep(0)
    late = await _started(ledger, "late", 40)
    ledger.release("a")
    await lowering
    await late
    assert (ledger.limit_bytes, ledger.used_bytes) == (50, 40)
    assert ledger.violations == []


async def test_a_higher_limit_serves_the_line() -> None:
    """Raising it is enough for who waits."""
    ledger = Ledger(100)
    await ledger.hold("a", 80)
    waiting = await _started(ledger, "b", 50)
    await ledger.set_limit(130)
    await waiting
    assert ledger.used_bytes == 130


async def test_a_change_that_is_given_up_changes_nothing() -> None:
    """The limit stays, and the next one is counted from it."""
    ledger = Ledger(100)
    await ledger.hold("a", 60)
    lowering = asyncio.ensure_future(ledger.set_limit(50))
    await asyncio.sleep(0)
    lowering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await lowering
    assert (ledger.limit_bytes, ledger.next_limit_bytes, ledger.used_bytes) == (100, 100, 60)


async def test_two_changes_at_once() -> None:
    """The last one that was asked for is the one that holds."""
    ledger = WatchedLedger(100)
    await ledger.hold("a", 60)
    first = asyncio.ensure_future(ledger.set_limit(50))
    await asyncio.sleep(0)
    second = asyncio.ensure_future(ledger.set_limit(80))
    await asyncio.sleep(0)
    ledger.release("a")
    await first
    await second
    assert (ledger.limit_bytes, ledger.next_limit_bytes) == (80, 80)
    assert ledger.violations == []
