"""Sampling, seeded per request: one key a position, filters in mlx-lm's order and by its rules.

The filters are mlx-lm's without mx.compile: it builds a kernel for each new value of a parameter,
which stops every stream for half a second.
"""

from __future__ import annotations

import math

import mlx.core as mx
from mlx_lm.sample_utils import LogitsProcessor, Sampler, greedy_sampler, make_logits_processors

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
        if params.top_p < 1.0:
            logprobs = keep_top_p(logprobs, params.top_p)
        if params.min_p > 0.0:
            logprobs = keep_min_p(logprobs, params.min_p)
        if params.xtc_probability > 0.0:
            cut = exclude_top_choices(logprobs, params.xtc_threshold)
            logprobs = mx.where(mx.random.uniform(key=coin) < params.xtc_probability, cut, logprobs)
        if self._top_k:
            logprobs = keep_top_k(logprobs, self._top_k)
        return mx.random.categorical(logprobs * (1.0 / params.temperature), key=draw)


def keep_top_p(logprobs: mx.array, top_p: float) -> mx.array:
    """The most likely tokens whose mass reaches `top_p`, at least one; the others become -inf."""
    ascending = mx.sort(logprobs, axis=-1)
    probs = mx.exp(ascending.astype(mx.float32))
    mass_above = mx.cumsum(probs, axis=-1, reverse=True, inclusive=False)
    total = mass_above[..., :1] + probs[..., :1]
    dropped = (mass_above >= top_p * total).sum(axis=-1, keepdims=True)
    # The product underflows to 0 for the smallest top_p: then every token would be dropped.
    dropped = mx.minimum(dropped, logprobs.shape[-1] - 1)
    threshold = mx.take_along_axis(ascending, dropped, axis=-1)
    return mx.where(logprobs < threshold, -mx.inf, logprobs)


def keep_min_p(logprobs: mx.array, min_p: float) -> mx.array:
    """Tokens at least `min_p` times as likely as the likeliest."""
    threshold = mx.max(logprobs, axis=-1, keepdims=True) + math.log(min_p)
    return mx.where(logprobs < threshold, -mx.inf, logprobs)


def keep_top_k(logprobs: mx.array, top_k: int) -> mx.array:
    """The `top_k` likeliest; `top_k` is below the vocabulary's size."""
    rest = mx.argpartition(-logprobs, kth=top_k - 1, axis=-1)[..., top_k:]
    return mx.put_along_axis(logprobs, rest, mx.array(-mx.inf, logprobs.dtype), axis=-1)


def exclude_top_choices(logprobs: mx.array, threshold: float) -> mx.array:
    """XTC: of the tokens more likely than `threshold`, keep the least likely only."""
    probs = mx.softmax(logprobs, axis=-1)
    least = mx.where(probs > threshold, probs, mx.inf).min(axis=-1, keepdims=True)
    return mx.where(probs > least, -mx.inf, logprobs)


def fold(seed: int, position: int) -> int:
    """Mix seed and position into one 64-bit key (splitmix64: Steele, Lea, Flood 2014)."""
    mixed = (seed + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return mixed ^ (mixed >> 31)
