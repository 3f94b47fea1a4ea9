"""Seeds and random numbers, and what a row's parameters ask for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxpool_server.domain import SamplingParams
from mlxpool_server.mlx_backend.sampling.row import SampledRow, fold, uniform

VOCAB = 100
BASE = SamplingParams(seed=1)
SEEDS = st.integers(-(2**63), 2**63 - 1)


def draws(params: SamplingParams, count: int = 30) -> list[tuple[float, bool]]:
    row = SampledRow(params, [], VOCAB)
    return [row.next_draw() for _ in range(count)]


@given(SEEDS, st.integers(0, 2**31))
def test_folded_seeds_have_64_bits(seed: int, position: int) -> None:
    """Another value for the next position and for the next seed."""
    folded = fold(seed, position)
    assert 0 <= folded < 2**64
    assert folded != fold(seed, position + 1)
    assert folded != fold(seed + 1, position)


@given(SEEDS, st.integers(0, 2**31))
def test_uniform_numbers_are_inside_and_exact_in_single_precision(seed: int, position: int) -> None:
    """Neither 0 nor 1, even after rounding to float32."""
    number = uniform(seed, position)
    assert 0.0 < number < 1.0
    assert float(np.float32(number)) == number
    assert 0.0 < np.float32(number) < np.float32(1.0)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1])
def test_uniform_numbers_are_uniform(seed: int) -> None:
    """Every hundredth is hit as often as another (chi-square), neighbours are unrelated."""
    numbers = np.array([uniform(seed, position) for position in range(20_000)])
    counts = np.histogram(numbers, bins=100, range=(0.0, 1.0))[0]
    # 99 degrees of freedom: above 160 once in 10,000 seeds, and these are fixed.
    assert ((counts - 200) ** 2 / 200).sum() < 160
    assert abs(numbers.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03


def test_first_numbers_of_neighbouring_seeds_are_unrelated() -> None:
    """A client that counts its seeds up gets numbers from the whole range."""
    numbers = np.array([uniform(seed, 0) for seed in range(20_000)])
    counts = np.histogram(numbers, bins=100, range=(0.0, 1.0))[0]
    assert ((counts - 200) ** 2 / 200).sum() < 160
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63)])
def test_a_seed_repeats(seed: int) -> None:
    """Over the whole range of int64."""
    params = replace(BASE, seed=seed, xtc_probability=0.5)
    assert draws(params) == draws(params)
    assert len({number for number, _ in draws(params)}) == 30


def test_seeds_differ() -> None:
    """Neighbours and opposites too."""
    seeds = (0, 1, 2, -1, -2, 2**63 - 1)
    assert len({tuple(draws(replace(BASE, seed=seed))) for seed in seeds}) == len(seeds)


@pytest.mark.parametrize("chance", [0.0, 0.2, 0.5, 1.0])
def test_xtc_strikes_as_often_as_asked(chance: float) -> None:
    """Independently of the number that draws."""
    drawn = draws(replace(BASE, xtc_probability=chance), 5000)
    strikes = np.array([strikes for _, strikes in drawn])
    numbers = np.array([number for number, _ in drawn])
    assert abs(strikes.mean() - chance) < 0.02
    if 0 < chance < 1:
        assert abs(numbers[strikes].mean() - 0.5) < 0.03


def test_xtc_does_not_move_the_numbers() -> None:
    """The same seed draws with the same numbers, whatever else is asked for."""
    plain = [number for number, _ in draws(BASE)]
    assert [number for number, _ in draws(replace(BASE, xtc_probability=0.5))] == plain


@pytest.mark.parametrize(
    ("temperature", "is_greedy"),
    [(0.0, True), (1e-38, True), (9.9e-6, True), (1e-5, False), (2e-5, False), (1.0, False)],
)
def test_greedy_below_the_threshold(temperature: float, is_greedy: bool) -> None:
    """Dividing by less overflows float32."""
    assert SampledRow(replace(BASE, temperature=temperature), [], VOCAB).is_greedy is is_greedy


@pytest.mark.parametrize(
    ("changes", "is_plain"),
    [
        ({}, True),
        ({"top_p": 0.5, "min_p": 0.5, "top_k": 3, "xtc_probability": 1.0}, True),
        ({"repetition_penalty": 1.0, "logit_bias": {}}, True),
        ({"repetition_penalty": 1.1}, False),
        ({"presence_penalty": -0.1}, False),
        ({"frequency_penalty": 0.1}, False),
        ({"logit_bias": {1: 1.0}}, False),
        ({"temperature": 0.1}, False),
    ],
)
def test_what_is_plain_greedy(changes: dict[str, object], is_plain: bool) -> None:
    """Filters never drop the likeliest word; gateways always send repetition_penalty 1.0."""
    params = replace(BASE, **({"temperature": 0.0} | changes))  # type: ignore[arg-type]
    assert SampledRow(params, [1], VOCAB).is_plain_greedy is is_plain


@pytest.mark.parametrize("top_k", [0, VOCAB, VOCAB + 1, 2**31 - 1])
def test_top_k_of_the_whole_vocabulary_is_no_filter(top_k: int) -> None:
    """mlx-lm raises inside the step there."""
    row = SampledRow(replace(BASE, top_k=top_k), [], VOCAB)
    assert row.top_k == 0
    assert not row.is_filtered


@given(
    st.lists(st.integers(0, VOCAB - 1), max_size=8),
    st.lists(st.integers(0, VOCAB - 1), max_size=8),
    st.integers(1, 10),
)
def test_context_is_the_last_tokens(prompt: list[int], said: list[int], size: int) -> None:
    """Of the prompt and what was generated, and only where penalties look at it."""
    row = SampledRow(replace(BASE, presence_penalty=1.0, penalty_context_size=size), prompt, VOCAB)
    plain = SampledRow(replace(BASE, penalty_context_size=size), prompt, VOCAB)
    for token in said:
        row.accept(token)
        plain.accept(token)
    assert row.context == [*prompt, *said][-size:]
    assert plain.context == []
