"""Filters, seeds and penalties on plain logits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm import sample_utils

from mlxpool_server.domain import SamplingParams
from mlxpool_server.mlx_backend.sampling import (
    SeededSampler,
    exclude_top_choices,
    fold,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    make_processors,
    make_sampler,
)

VOCAB = 100
BASE = SamplingParams(seed=1)


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """mlx-lm's filters without the half second that each new value costs them."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def logprobs(seed: int = 0, spread: float = 3.0) -> mx.array:
    logits = mx.random.normal((1, VOCAB), key=mx.random.key(seed)) * spread
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def draws(params: SamplingParams, count: int, row: mx.array | None = None) -> list[int]:
    sampler = make_sampler(params, VOCAB)
    row = logprobs() if row is None else row
    return [int(sampler(row).item()) for _ in range(count)]


def by_probability(row: mx.array) -> list[int]:
    return [int(each) for each in mx.argsort(-row[0]).tolist()]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("value", [1e-30, 1e-4, 0.1, 0.5, 0.93, 0.999999])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (keep_top_p, sample_utils.apply_top_p),
        (keep_min_p, sample_utils.apply_min_p),
    ],
    ids=["top_p", "min_p"],
)
def test_filters_are_mlx_lms(
    ours: Callable[[mx.array, float], mx.array],
    theirs: Callable[[mx.array, float], mx.array],
    value: float,
) -> None:
    """Ours keep what mlx-lm's keep, on flat and on steep distributions."""
    for seed, spread in ((0, 0.01), (1, 3.0), (2, 30.0)):
        row = logprobs(seed, spread)
        assert mx.array_equal(ours(row, value), theirs(row, value))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("top_k", [1, 7, VOCAB - 1])
def test_top_k_is_mlx_lms(top_k: int) -> None:
    """As many as asked for."""
    row = logprobs()
    kept = keep_top_k(row, top_k)
    assert mx.array_equal(kept, sample_utils.apply_top_k(row, top_k))
    assert int((kept > -mx.inf).sum().item()) == top_k


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.5])
def test_xtc_is_mlx_lms(threshold: float) -> None:
    """Of the tokens above the threshold only the least likely stays; the rest is untouched."""
    row = logprobs(1)
    kept = exclude_top_choices(row, threshold)
    assert mx.array_equal(kept, sample_utils.apply_xtc(row, 1.0, threshold, []))
    above = [index for index in by_probability(row) if math.exp(row[0, index].item()) > threshold]
    gone = [index for index in range(VOCAB) if kept[0, index].item() == -math.inf]
    assert sorted(gone) == sorted(above[:-1])


def test_new_parameter_values_are_not_slow() -> None:
    """A value never seen before costs no compilation, which would stop every stream."""
    row = logprobs()
    draws(replace(BASE, top_p=0.5, min_p=0.01, top_k=9, xtc_probability=0.5), 1, row)
    started = time.perf_counter()
    for step in range(1, 21):
        params = replace(
            BASE, top_p=0.5 + step / 100, min_p=step / 1000, xtc_probability=0.5, top_k=50 - step,
            xtc_threshold=step / 100,
        )  # fmt: skip
        draws(params, 1, row)
    # Compiled, each of them takes half a second.
    assert time.perf_counter() - started < 2


@given(top_p=st.floats(min_value=0, exclude_min=True, max_value=1, width=32))
def test_some_token_always_survives_top_p(top_p: float) -> None:
    """The smallest values underflow; the likeliest token stays all the same."""
    row = logprobs()
    assert keep_top_p(row, top_p)[0, by_probability(row)[0]].item() > -math.inf


@pytest.mark.parametrize(
    "params",
    [
        replace(BASE, temperature=0.0),
        replace(BASE, temperature=1e-38),
        replace(BASE, temperature=2e-5),
        replace(BASE, top_p=1e-45),
        replace(BASE, top_k=1),
        replace(BASE, min_p=1.0),
    ],
    ids=["zero", "denormal", "tiny", "top_p", "top_k", "min_p"],
)
def test_extremes_are_greedy(params: SamplingParams) -> None:
    """Every filter's limit leaves the likeliest token."""
    row = logprobs()
    assert draws(params, 5, row) == [by_probability(row)[0]] * 5


def test_greedy_requests_share_one_sampler() -> None:
    """So that mlx-lm samples their rows in one call."""
    first = make_sampler(replace(BASE, temperature=0.0), VOCAB)
    assert make_sampler(replace(BASE, temperature=0.0, top_p=0.5), VOCAB) is first


@pytest.mark.parametrize("top_k", [VOCAB, VOCAB + 1, 2**31 - 1])
def test_top_k_of_the_whole_vocabulary_is_no_filter(top_k: int) -> None:
    """mlx-lm raises inside the step there."""
    assert draws(replace(BASE, top_k=top_k), 20) == draws(BASE, 20)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63)])
def test_seed_repeats(seed: int) -> None:
    """Over the whole range of int64."""
    params = replace(BASE, seed=seed)
    first = draws(params, 30)
    assert draws(params, 30) == first
    assert len(set(first)) > 3


def test_seeds_differ() -> None:
    """Neighbours and opposites too."""
    seen = {tuple(draws(replace(BASE, seed=seed), 30)) for seed in (0, 1, 2, -1, -2, 2**63 - 1)}
    assert len(seen) == 6


def test_global_generator_is_left_alone() -> None:
    """Neither read nor moved, with every filter on."""
    params = replace(BASE, top_p=0.9, min_p=0.01, top_k=50, xtc_probability=0.5)
    mx.random.seed(3)
    first = draws(params, 10)
    state = [each.tolist() for each in mx.random.state]
    mx.random.seed(4)
    assert draws(params, 10) == first
    mx.random.seed(3)
    assert [each.tolist() for each in mx.random.state] == state


def test_draws_follow_the_probabilities() -> None:
    """Temperature 1 without filters: frequencies are the model's."""
    row = mx.log(mx.array([[0.5, 0.3, 0.15, 0.05]]))
    sampler = SeededSampler(BASE, 4)
    count = 3000
    drawn = [int(sampler(row).item()) for _ in range(count)]
    for index, expected in enumerate((0.5, 0.3, 0.15, 0.05)):
        assert abs(drawn.count(index) / count - expected) < 0.03


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**31))
def test_keys_fit_mlx(seed: int, position: int) -> None:
    """64 bits, another one for the next position and for the next seed."""
    key = fold(seed, position)
    assert 0 <= key < 2**64
    assert key != fold(seed, position + 1)
    assert key != fold(seed + 1, position)


# ---------------------------------------------------------------- processors


def test_defaults_need_no_processor() -> None:
    """Each costs a row of its own; gateways always send repetition_penalty 1.0."""
    assert make_processors(SamplingParams()) == []
    assert make_processors(SamplingParams(repetition_penalty=1.0, logit_bias={})) == []


def process(params: SamplingParams, tokens: list[int]) -> list[float]:
    row = mx.array([[1.0, -1.0, 2.0, 0.5]])
    for processor in make_processors(params):
        row = processor(mx.array(tokens), row)
    return list(row[0].tolist())


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(repetition_penalty=2.0), [0.5, -2.0, 2.0, 0.5]),
        (SamplingParams(presence_penalty=0.5), [0.5, -1.5, 2.0, 0.5]),
        (SamplingParams(frequency_penalty=0.5), [0.0, -1.5, 2.0, 0.5]),
        (SamplingParams(logit_bias={3: 100.0, 2: -100.0}), [1.0, -1.0, -98.0, 100.5]),
        (SamplingParams(presence_penalty=0.5, penalty_context_size=1), [1.0, -1.5, 2.0, 0.5]),
    ],
    ids=["repetition", "presence", "frequency", "bias", "context size"],
)
def test_penalties(params: SamplingParams, expected: list[float]) -> None:
    """On the tokens 0, 0, 1 of the context."""
    assert process(params, [0, 0, 1]) == expected
