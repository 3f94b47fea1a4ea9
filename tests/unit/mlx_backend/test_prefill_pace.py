"""How many tokens a pass gets: what fits in the time that streams can wait."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxpool_server.mlx_backend.prefill_pace import (
    IDLE_PASS_S,
    MIN_STALL_S,
    MIN_TOKENS,
    STALL_STEPS,
    PrefillPace,
)

# Tokens a second: so many that the least of a pass is none of the tests' business.
FAST = 40 * MIN_TOKENS


def settled(step_s: float, max_tokens: int = 100_000) -> PrefillPace:
    """One that has seen many steps of this length."""
    pace = PrefillPace(max_tokens)
    for _ in range(60):
        pace.learn_step(step_s)
    return pace


def test_the_first_pass_is_a_small_one() -> None:
    """Nothing is known yet; it may be a model of a token a second."""
    for is_decoding in (False, True):
        assert PrefillPace(10_000).num_tokens(is_decoding=is_decoding) == MIN_TOKENS
        assert PrefillPace(16).num_tokens(is_decoding=is_decoding) == 16


def test_without_streams_a_pass_may_take_its_time() -> None:
    """However slow the steps were."""
    assert PrefillPace(16).target_s(is_decoding=False) == IDLE_PASS_S
    assert settled(5.0).target_s(is_decoding=False) == IDLE_PASS_S


def test_streams_wait_for_a_few_of_their_steps() -> None:
    """Fast ones for 50 ms: less would be all overhead."""
    assert settled(0.1).target_s(is_decoding=True) == pytest.approx(STALL_STEPS * 0.1)
    assert settled(0.001).target_s(is_decoding=True) == MIN_STALL_S
    assert PrefillPace(16).target_s(is_decoding=True) == MIN_STALL_S


def test_a_pass_takes_what_fits() -> None:
    """Tokens a second times the seconds there are; what a step costs too is not the tokens'."""
    pace = settled(0.1)
    pace.learn_pass(FAST, 1.1)
    assert pace.num_tokens(is_decoding=True) == pytest.approx(FAST * STALL_STEPS * 0.1, abs=1)
    assert pace.num_tokens(is_decoding=False) == pytest.approx(FAST * IDLE_PASS_S, abs=1)


@given(
    max_tokens=st.integers(1, 10_000),
    passes=st.lists(st.tuples(st.integers(1, 10_000), st.floats(0.0, 100.0)), max_size=10),
    steps=st.lists(st.floats(0.0, 100.0), max_size=10),
    is_decoding=st.booleans(),
)
def test_whatever_was_measured_the_number_is_in_its_bounds(
    max_tokens: int, passes: list[tuple[int, float]], steps: list[float], is_decoding: bool
) -> None:
    """Never none, never above the limit, and not so few that the model is read for nothing."""
    pace = PrefillPace(max_tokens)
    for num_tokens, duration_s in passes:
        pace.learn_pass(num_tokens, duration_s)
    for step_s in steps:
        pace.learn_step(step_s)
    num_tokens = pace.num_tokens(is_decoding=is_decoding)
    assert min(max_tokens, MIN_TOKENS) <= num_tokens <= max_tokens


def test_a_slow_first_pass_is_soon_forgotten() -> None:
    """It may have waited for kernels to be compiled; what is faster is believed at once."""
    pace = PrefillPace(100_000)
    pace.learn_pass(MIN_TOKENS, 10.0)
    assert pace.num_tokens(is_decoding=False) == MIN_TOKENS
    pace.learn_pass(FAST, 1.0)
    assert pace.num_tokens(is_decoding=False) == FAST * IDLE_PASS_S


def test_a_pass_that_was_held_up_halves_the_belief() -> None:
    """One measurement is noise, several are a slower machine or a longer context."""
    pace = PrefillPace(100_000)
    pace.learn_pass(FAST, 1.0)
    pace.learn_pass(FAST, 1e12)
    assert pace.num_tokens(is_decoding=False) == FAST * IDLE_PASS_S / 2
    pace.learn_pass(FAST, 1e12)
    assert pace.num_tokens(is_decoding=False) == FAST * IDLE_PASS_S / 4


def test_steps_are_followed_up_and_down() -> None:
    """As the batch grows and shrinks."""
    pace = settled(1.0)
    for _ in range(30):
        pace.learn_step(0.1)
    assert pace.target_s(is_decoding=True) == pytest.approx(STALL_STEPS * 0.1, rel=1e-3)
