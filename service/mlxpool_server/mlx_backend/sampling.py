"""Sampling on top of mlx-lm's filters: seeded per request, one key a position."""

from __future__ import annotations

import mlx.core as mx
from mlx_lm.sample_utils import (
    LogitsProcessor,
    Sampler,
    apply_min_p,
    apply_top_k,
    apply_top_p,
    apply_xtc,
    greedy_sampler,
    make_logits_processors,
)

from mlxpool_server.domain import SamplingParams

# Below this, dividing by the temperature overflows float32; the limit is greedy anyway.
GREEDY_BELOW = 1e-5

_MASK = (1 << 64) - 1


def make_sampler(params: SamplingParams, vocab_size: int) -> Sampler:
    """A callable from log-probs, shape (1, vocab), to token ids, shape (1,). Engine thread only.

    Greedy requests share one object, so that mlx-lm samples their rows in one call.
    """
    if params.temperature < GREEDY_BELOW:
        return greedy_sampler
    return SeededSampler(params, vocab_size)


def make_processors(params: SamplingParams) -> list[LogitsProcessor]:
    """Bias and penalties; a penalty of no effect adds none, since each costs a row of its own."""
    processors: list[LogitsProcessor] = make_logits_processors(
        logit_bias=dict(params.logit_bias) or None,
        repetition_penalty=None if params.repetition_penalty == 1.0 else params.repetition_penalty,
        repetition_context_size=params.penalty_context_size,
        presence_penalty=params.presence_penalty,
        presence_context_size=params.penalty_context_size,
        frequency_penalty=params.frequency_penalty,
        frequency_context_size=params.penalty_context_size,
    )
    return processors


class SeededSampler:
    """Draws with a key made of the request's seed and the position.

    The same seed gives the same draws alone or in a batch, and disturbs no other request.
    """

    def __init__(self, params: SamplingParams, vocab_size: int) -> None:
        self._params = params
        # mlx-lm raises inside the step when top_k reaches the vocabulary's size: it is no filter.
        self._top_k = params.top_k if 0 < params.top_k < vocab_size else 0
        self._position = 0

    def __call__(self, logprobs: mx.array) -> mx.array:
        params = self._params
        draw, coin = mx.random.split(mx.random.key(fold(params.seed or 0, self._position)))
        self._position += 1
        # The order of the filters is mlx-lm's.
        if params.top_p < 1.0:
            logprobs = apply_top_p(logprobs, params.top_p)
        if params.min_p > 0.0:
            logprobs = apply_min_p(logprobs, params.min_p)
        if params.xtc_probability > 0.0:
            cut = apply_xtc(logprobs, 1.0, params.xtc_threshold, [])
            logprobs = mx.where(mx.random.uniform(key=coin) < params.xtc_probability, cut, logprobs)
        if self._top_k:
            logprobs = apply_top_k(logprobs, self._top_k)
        return mx.random.categorical(logprobs * (1.0 / params.temperature), key=draw)


def fold(seed: int, position: int) -> int:
    """Mix seed and position into one 64-bit key (splitmix64: Steele, Lea, Flood 2014)."""
    mixed = (seed + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return mixed ^ (mixed >> 31)
