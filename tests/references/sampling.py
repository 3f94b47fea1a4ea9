"""Which words sampling leaves, with what probability, and which one a number picks: in float64."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np
from mlx_lm.sample_utils import LogitsProcessor, make_logits_processors
from numpy.typing import NDArray

from mlxpool_server.domain import SamplingParams
from mlxpool_server.mlx_backend.sampling import cuda, host
from mlxpool_server.mlx_backend.sampling.device import DeviceSampler
from mlxpool_server.mlx_backend.sampling.row import SMALLEST_WEIGHT, SampledRow

Floats = NDArray[Any]

# Nearer to a border than this, single precision may decide otherwise.
CLEAR = 1e-5


class ScriptedRow(SampledRow):
    """A row whose random number is given."""

    def __init__(
        self,
        params: SamplingParams,
        vocab_size: int,
        number: float = 0.5,
        *,
        strikes: bool = False,
        prompt: Sequence[int] = (),
    ) -> None:
        super().__init__(params, prompt, vocab_size)
        self.number = number
        self.strikes = strikes

    def next_draw(self) -> tuple[float, bool]:
        return self.number, self.strikes


def on_host(logits: Floats, rows: Sequence[SampledRow]) -> list[int]:
    """Sample with numpy."""
    return host.sample(logits.astype(np.float32), rows)


def on_device(logits: Floats, rows: Sequence[SampledRow]) -> list[int]:
    """Sample with MLX, these rows as one batch."""
    sampler = DeviceSampler(logits.shape[-1])
    sampler.extend(rows)
    # The CUDA kernel draws its numbers itself: it is compared with these operations elsewhere.
    is_scripted = any(isinstance(row, ScriptedRow) for row in rows)
    with patch.object(cuda, "is_supported", lambda: False) if is_scripted else nullcontext():
        tokens = np.asarray(sampler.sample(mx.array(logits.astype(np.float32))))
    return [int(token) for token in tokens]


def kept_words(logits: Floats, params: SamplingParams, *, strikes: bool = False) -> NDArray[Any]:
    """A mask of the words that the filters leave; of equal ones top_k leaves the first."""
    probs = np.exp(logits.astype(np.float64) - logits.max())
    probs /= probs.sum()
    kept = np.ones(probs.size, dtype=bool)
    if params.top_p < 1.0:
        _, classes = np.unique(-probs, return_inverse=True)
        masses = np.bincount(classes, weights=probs)
        above = (np.cumsum(masses) - masses)[classes]
        # Of equal ones all stay, once the first of them does.
        kept &= (above < params.top_p) | (probs == probs.max())
    kept &= probs >= params.min_p * probs.max()
    if strikes:
        # No word that has no weight in single precision.
        limit = max(params.xtc_threshold * probs[kept].sum(), SMALLEST_WEIGHT * probs.max())
        choices = kept & (probs > limit)
        if choices.any():
            kept &= probs <= probs[choices].min()
    if 0 < params.top_k < probs.size:
        order = sorted(np.flatnonzero(kept), key=lambda word: (-probs[word], word))
        kept[order[params.top_k :]] = False
    return kept


def word_probs(logits: Floats, params: SamplingParams, *, strikes: bool = False) -> Floats:
    """Probabilities of what is left, at the temperature asked for."""
    scaled = (logits.astype(np.float64) - logits.max()) / params.temperature
    weights = np.where(kept_words(logits, params, strikes=strikes), np.exp(scaled), 0.0)
    return np.asarray(weights / weights.sum())


def is_clear(logits: Floats, params: SamplingParams, *, strikes: bool = False) -> bool:
    """Whether slightly different limits leave the same words."""
    kept = [
        kept_words(
            logits,
            replace(
                params,
                top_p=min(1.0, params.top_p * nudge) if params.top_p < 1.0 else 1.0,
                min_p=params.min_p * nudge,
                xtc_threshold=params.xtc_threshold * nudge,
            ),
            strikes=strikes,
        )
        for nudge in (1 - CLEAR, 1.0, 1 + CLEAR)
    ]
    return bool((kept[0] == kept[1]).all() and (kept[1] == kept[2]).all())


def picked(probs: Floats, number: float) -> int | None:
    """The word at which the running sum reaches `number`; None where two are too near."""
    reached = np.cumsum(probs)
    if np.abs(reached[probs > 0] - number).min() < CLEAR and (probs > 0).sum() > 1:
        return None
    return int(np.flatnonzero((reached >= number) & (probs > 0))[0])


def processors_of(params: SamplingParams) -> list[LogitsProcessor]:
    """mlx-lm's own bias and penalties."""
    size = params.penalty_context_size
    processors: list[LogitsProcessor] = make_logits_processors(
        dict(params.logit_bias) or None,
        params.repetition_penalty,
        size,
        params.presence_penalty,
        size,
        params.frequency_penalty,
        size,
    )
    return processors


def penalized(logits: Floats, params: SamplingParams, context: Sequence[int]) -> Floats:
    """Logits of one row after mlx-lm's own bias and penalties."""
    row = mx.array(logits.astype(np.float32))[None]
    for processor in processors_of(params):
        row = processor(mx.array(list(context), dtype=mx.int32), row)
    return np.asarray(row[0])
