"""The reference that the samplers are compared with filters as mlx-lm does."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import sample_utils

from mlxpool_server.domain import SamplingParams
from references.sampling import Floats, is_clear, kept_words

VOCAB = 100
BASE = SamplingParams(seed=1)


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """mlx-lm's filters without the half second that each new value costs them."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def random_logits(seed: int, spread: float) -> Floats:
    return (np.random.default_rng(seed).normal(size=VOCAB) * spread).astype(np.float32)


def mlx_lms(logits: Floats, params: SamplingParams, *, strikes: bool) -> Floats:
    """Which words mlx-lm's filters leave, in its sampler's order."""
    row = mx.array(logits)[None]
    row = row - mx.logsumexp(row, axis=-1, keepdims=True)
    if params.top_p < 1.0:
        row = sample_utils.apply_top_p(row, params.top_p)
    if params.min_p > 0.0:
        row = sample_utils.apply_min_p(row, params.min_p)
    if strikes:
        row = sample_utils.apply_xtc(row, 1.0, params.xtc_threshold, [])
    if params.top_k:
        row = sample_utils.apply_top_k(row, params.top_k)
    return np.asarray(row[0] > -mx.inf)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("seed", "spread"), [(0, 0.01), (1, 3.0), (2, 15.0)])
def test_it_leaves_what_mlx_lms_filters_leave(seed: int, spread: float) -> None:
    """Each filter alone and all together, on flat and on steep distributions."""
    logits = random_logits(seed, spread)
    num_compared = 0
    for top_p, min_p, threshold, top_k in itertools.product(
        (1e-30, 0.1, 0.5, 0.93, 1.0),
        (0.0, 1e-30, 1e-4, 0.1, 1.0),
        (None, 0.0, 0.009, 0.05, 0.5),
        (0, 1, 7, VOCAB - 1),
    ):
        params = replace(
            BASE, top_p=top_p, min_p=min_p, xtc_threshold=threshold or 0.0, top_k=top_k
        )
        strikes = threshold is not None
        if not is_clear(logits, params, strikes=strikes):
            continue
        num_compared += 1
        expected = mlx_lms(logits, params, strikes=strikes)
        assert (kept_words(logits, params, strikes=strikes) == expected).all(), params
    assert num_compared > 300
