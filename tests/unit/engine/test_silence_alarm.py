"""The alarm goes off after silence, and only then."""

from __future__ import annotations

import asyncio

from fakes.running_engine import PATIENCE_S
from mlxpool_server.engine.silence_alarm import SilenceAlarm


async def test_it_goes_off_again_and_again() -> None:
    """Silence that lasts is told each time."""
    heard: asyncio.Queue[bool] = asyncio.Queue()
    with SilenceAlarm(0.001, lambda: heard.put_nowait(alarm.is_due)) as alarm:
        async with asyncio.timeout(PATIENCE_S):
            assert [await heard.get() for _ in range(3)] == [True] * 3


async def test_a_reset_puts_it_off() -> None:
    """A timer that was started before a reset finds that it is too early."""
    woken: list[None] = []
    with SilenceAlarm(10 * PATIENCE_S, lambda: woken.append(None)) as alarm:
        assert not alarm.is_due
        alarm.reset()
        alarm._look()
    assert not woken


async def test_nothing_is_left_of_it() -> None:
    """No timer runs on after the end."""
    with SilenceAlarm(PATIENCE_S, lambda: None) as alarm:
        timer = alarm._timer
    assert timer is not None
    assert timer.cancelled()
