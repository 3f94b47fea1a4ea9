"""When a queue is clearly too long for a deadline, and when nobody can tell."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxpool_server.domain import Priority
from mlxpool_server.errors import DeadlineUnmeetableError
from mlxpool_server.pool.queue_forecast import MARGIN, MIN_ENDS, WINDOW_S, QueueForecast

LOW, NORMAL, HIGH = Priority.LOW, Priority.NORMAL, Priority.HIGH
BATCH = 4


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def forecast(clock: Clock) -> QueueForecast:
    return QueueForecast(BATCH, clock)


def run(forecast: QueueForecast, clock: Clock, ends: int, every_s: float) -> None:
    """So many generations end at this pace while others wait."""
    for _ in range(ends):
        clock.now += every_s
        forecast.ended("m", BATCH + 10)


def test_a_free_place_is_no_wait(forecast: QueueForecast) -> None:
    """Whatever is known of the model."""
    assert forecast.wait_s("m", 0) == 0
    assert forecast.wait_s("m", BATCH - 1) == 0


def test_nothing_is_known_at_first(forecast: QueueForecast, clock: Clock) -> None:
    """A queue whose model has not ended a batch's worth yet has no pace."""
    assert forecast.wait_s("m", 100) is None
    run(forecast, clock, max(BATCH, MIN_ENDS), 1.0)
    assert forecast.wait_s("m", 100) is None
    forecast.check("m", NORMAL, [NORMAL] * 100, 0.001)


def test_the_pace(forecast: QueueForecast, clock: Clock) -> None:
    """One place a second: who has the batch and two others ahead waits three seconds."""
    run(forecast, clock, 10, 1.0)
    assert forecast.wait_s("m", BATCH + 2) == pytest.approx(3.0)
    assert forecast.wait_s("other", BATCH + 2) is None


def test_a_load_does_not_count(forecast: QueueForecast, clock: Clock) -> None:
    """The pace begins with the first end, however long that took."""
    clock.now += 300
    run(forecast, clock, 10, 1.0)
    assert forecast.wait_s("m", BATCH) == pytest.approx(1.0)


def test_an_empty_queue_forgets(forecast: QueueForecast, clock: Clock) -> None:
    """An idle hour is no slow queue."""
    run(forecast, clock, 10, 1.0)
    forecast.ended("m", BATCH - 1)
    clock.now += 3600
    assert forecast.wait_s("m", BATCH + 2) is None


def test_the_past_fades(forecast: QueueForecast, clock: Clock) -> None:
    """Answers that have become ten times longer are noticed within a few windows."""
    run(forecast, clock, 600, 0.1)
    run(forecast, clock, int(4 * WINDOW_S), 1.0)
    assert forecast.wait_s("m", BATCH) == pytest.approx(1.0, rel=0.3)


def test_a_stalled_queue_gets_longer(forecast: QueueForecast, clock: Clock) -> None:
    """Time without an end counts."""
    run(forecast, clock, 10, 1.0)
    before = forecast.wait_s("m", BATCH)
    clock.now += 30
    after = forecast.wait_s("m", BATCH)
    assert before is not None
    assert after is not None
    assert after > 3 * before


def test_a_deadline_that_is_clearly_too_short(forecast: QueueForecast, clock: Clock) -> None:
    """Refused with both times; one that may just do is let in."""
    run(forecast, clock, 10, 1.0)
    others = [NORMAL] * (BATCH + 9)
    with pytest.raises(DeadlineUnmeetableError) as caught:
        forecast.check("m", NORMAL, others, 10 / MARGIN - 0.1)
    assert caught.value.expected_wait_s == pytest.approx(10.0)
    forecast.check("m", NORMAL, others, 10 / MARGIN + 0.1)
    forecast.check("m", NORMAL, others, math.inf)


def test_lower_priorities_are_not_in_the_way(forecast: QueueForecast, clock: Clock) -> None:
    """A HIGH one overtakes them; a LOW one has everybody ahead."""
    run(forecast, clock, 10, 1.0)
    others = [LOW] * 50 + [NORMAL] * 50
    forecast.check("m", HIGH, others, 0.1)
    forecast.check("m", NORMAL, others, 30.0)
    with pytest.raises(DeadlineUnmeetableError):
        forecast.check("m", LOW, others, 30.0)


@given(
    st.lists(st.floats(0, 100), max_size=200),
    st.integers(0, 1000),
    st.floats(0.001, 1e6),
)
def test_it_never_fails(gaps: list[float], num_ahead: int, deadline_s: float) -> None:
    """Whatever the times, a wait is a number from 0, and only the one error is raised."""
    clock = Clock()
    forecast = QueueForecast(BATCH, clock)
    for gap in gaps:
        clock.now += gap
        forecast.ended("m", BATCH)
    wait_s = forecast.wait_s("m", num_ahead)
    assert wait_s is None or wait_s >= 0
    try:
        forecast.check("m", NORMAL, [NORMAL] * num_ahead, deadline_s)
    except DeadlineUnmeetableError:
        assert wait_s is not None
        assert wait_s > deadline_s
