"""The benchmark's arithmetic: windows, percentiles, weights of messages, ratios by repeat."""

from __future__ import annotations

import math

import pytest

from benchmark.measure import Spread, best, mean_of, percentile, ratio_spread, summarise
from benchmark.workload import Answer


def _answer(times: list[float], *, total: int | None = None, start_s: float = 0.0) -> Answer:
    counts = list(range(1, len(times) + 1))
    return Answer(max_tokens=8, start_s=start_s, times=times, counts=counts, total=total)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1), (0.5, 2), (0.75, 3), (0.99, 4), (1, 4)])
def test_a_percentile_is_one_of_the_values(share: float, expected: float) -> None:
    """The nearest rank, never a value between two."""
    assert percentile([4, 1, 3, 2], share) == expected


def test_a_percentile_of_nothing_is_not_a_number() -> None:
    """It must not look like a latency of zero."""
    assert math.isnan(percentile([], 0.5))


def test_only_tokens_of_the_window_count() -> None:
    """Two of four arrive between 1 s and 3 s: one a second."""
    metrics = summarise([_answer([0.5, 1.0, 2.0, 3.0])], 1.0, 3.0)
    assert metrics["tokens_per_s"] == 1.0


def test_a_first_token_counts_when_it_arrives_in_the_window() -> None:
    """The time to it starts with the request, which may have been before the window."""
    early, late = _answer([0.5, 1.5]), _answer([1.25], start_s=0.75)
    metrics = summarise([early, late], 1.0, 2.0)
    assert (metrics["ttft_p50_ms"], metrics["first_tokens"]) == (500.0, 1)


def test_a_gap_counts_when_it_ends_in_the_window() -> None:
    """Gaps of 500 and 750 ms end in it, one of 250 ms before it."""
    metrics = summarise([_answer([0.5, 0.75, 1.25, 2.0, 4.0])], 1.0, 3.0)
    assert (metrics["itl_p50_ms"], metrics["itl_max_ms"]) == (500.0, 750.0)


def test_messages_weigh_what_the_server_says_they_brought() -> None:
    """Four messages brought six tokens: half of the messages, half of the tokens."""
    metrics = summarise([_answer([0.1, 0.2, 1.1, 1.2], total=6)], 1.0, 2.0)
    assert metrics["tokens_per_s"] == 3.0


def test_an_unfinished_answer_weighs_like_the_finished_ones() -> None:
    """Its server has not said yet how many tokens its messages brought."""
    finished, unfinished = _answer([0.1, 0.2], total=3), _answer([1.1, 1.2])
    metrics = summarise([finished, unfinished], 1.0, 2.0)
    assert metrics["tokens_per_s"] == pytest.approx(3.0)


def test_time_per_token_spreads_a_message_over_its_tokens() -> None:
    """Eight tokens in four messages, of which the first brought two: six more in 3 s."""
    metrics = summarise([_answer([1.0, 2.0, 3.0, 4.0], total=8)], 0.0, 5.0)
    assert metrics["tpot_p50_ms"] == 500.0


def test_the_mean_of_windows_is_that_of_what_all_of_them_have() -> None:
    windows = [{"tokens_per_s": 10.0, "gpu_mib": 1.0}, {"tokens_per_s": 20.0}]
    assert mean_of(windows) == {"tokens_per_s": 15.0}


def test_ratios_pair_the_runs_of_one_repeat() -> None:
    """A slow minute hits both and cancels out; a repeat that only one has is left out."""
    ours = {1: {"tokens_per_s": 10.0}, 2: {"tokens_per_s": 4.0}, 3: {"tokens_per_s": 9.0}}
    theirs = {1: {"tokens_per_s": 5.0}, 2: {"tokens_per_s": 2.0}}
    assert ratio_spread(ours, theirs, "tokens_per_s") == Spread(2.0, 2.0, 2.0)


def test_there_is_no_ratio_without_two_numbers() -> None:
    """Missing, zero and not a number are no divisors."""
    ours = {1: {"itl_p50_ms": 1.0}, 2: {"itl_p50_ms": 1.0}, 3: {}}
    theirs = {1: {"itl_p50_ms": 0.0}, 2: {"itl_p50_ms": math.nan}, 3: {"itl_p50_ms": 1.0}}
    assert ratio_spread(ours, theirs, "itl_p50_ms") is None


def test_the_best_of_a_repeat_is_fastest_or_shortest() -> None:
    """More tokens are better, and less time is."""
    one = {1: {"tokens_per_s": 5.0, "ttft_p50_ms": 30.0}}
    other = {1: {"tokens_per_s": 7.0, "ttft_p50_ms": 20.0}}
    assert best([one, other], "tokens_per_s") == {1: {"tokens_per_s": 7.0}}
    assert best([one, other], "ttft_p50_ms") == {1: {"ttft_p50_ms": 20.0}}
