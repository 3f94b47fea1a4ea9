"""Sampling in one CUDA kernel; `cuda_source` says how.

As MLX's operations (`device`) the same takes some fifty kernels a step, a sort of every word among
them, and three of these are compiled when they are first met, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from mlxpool_server.mlx_backend.memory import device_kind
from mlxpool_server.mlx_backend.sampling.cuda_source import FACTS, HEADER, SOURCE
from mlxpool_server.mlx_backend.sampling.row import COIN, SampledRow

NUM_THREADS = 1024
# The largest number that float32 holds exactly; no context and no vocabulary is longer.
MAX_COUNT = 1 << 24


def is_supported() -> bool:
    return device_kind() == "cuda"


class CudaRows:
    """The rows of one batch, in its order; made anew when they change.

    All that a step needs is on the device since the step before, so that nothing is made and sent
    for each row by the thread that a small model waits for.
    """

    def __init__(self, rows: Sequence[SampledRow], vocab_size: int) -> None:
        self._rows = [row for row in rows if not row.is_greedy]
        self._longest_context = min(max(row.context_size for row in rows), MAX_COUNT)
        facts = [_facts(row, self._longest_context) for row in rows]
        self._facts = mx.array(np.array(facts, dtype=np.float32))
        draws = [(row.position, row.seed & 0xFFFFFFFF, row.seed >> 32) for row in rows]
        self._draws = mx.array(np.array(draws, dtype=np.uint32))
        self._bias = _bias(rows)
        self._no_context = _none(vocab_size)

    def sample(
        self, logits: mx.array, context: mx.array | None
    ) -> tuple[mx.array, mx.array | None]:
        """One token a row, and the context with it, not evaluated.

        `logits`: (rows, vocabulary); `context`: (rows, tokens), int32, None when no row has
        penalties.
        """
        num_rows = logits.shape[0]
        next_size = 0
        if context is not None:
            next_size = min(context.shape[1] + 1, self._longest_context)
        for row in self._rows:
            row.position += 1
        tokens, _, _, following, self._draws = _kernel()(
            inputs=[
                logits,
                self._facts,
                self._draws,
                *self._bias,
                self._no_context if context is None else context,
            ],
            template=[("T", logits.dtype)],
            grid=(num_rows * NUM_THREADS, 1, 1),
            threadgroup=(NUM_THREADS, 1, 1),
            output_shapes=[
                (num_rows,),
                logits.shape,
                (1, 1) if context is None else logits.shape,
                (1, 1) if context is None else (num_rows, next_size),
                self._draws.shape,
            ],
            output_dtypes=[mx.uint32, mx.float32, mx.int32, mx.int32, mx.uint32],
        )
        return tokens, None if context is None else following


def _facts(row: SampledRow, longest_context: int) -> list[float]:
    params = row.params
    known = {
        "temperature": row.temperature,
        "top_p": params.top_p,
        "min_p": params.min_p,
        "top_k": row.top_k,
        "is_filtered": row.is_filtered,
        "is_greedy": row.is_greedy,
        "num_biases": len(params.logit_bias),
        "context_size": min(row.context_size, MAX_COUNT),
        "longest_context": longest_context,
        "repetition": params.repetition_penalty,
        "presence": params.presence_penalty,
        "frequency": params.frequency_penalty,
        "xtc_threshold": params.xtc_threshold,
        "xtc_probability": params.xtc_probability,
    }
    return [known[name] for name in FACTS]


def _bias(rows: Sequence[SampledRow]) -> tuple[mx.array, mx.array]:
    """Words and what is added to their logits, (rows, the most words of one row) each."""
    size = max(len(row.params.logit_bias) for row in rows)
    if not size:
        return _no_bias()
    words = np.zeros((len(rows), size), dtype=np.int32)
    values = np.zeros((len(rows), size), dtype=np.float32)
    for index, row in enumerate(rows):
        count = len(row.params.logit_bias)
        words[index, :count] = list(row.params.logit_bias)
        values[index, :count] = list(row.params.logit_bias.values())
    return mx.array(words), mx.array(values)


@cache
def _no_bias() -> tuple[mx.array, mx.array]:
    """No row looks at it."""
    return mx.array([[0]], dtype=mx.int32), mx.array([[0.0]], dtype=mx.float32)


@cache
def _none(vocab_size: int) -> mx.array:
    """A context of the id that stands for no token."""
    return mx.array([[vocab_size]], dtype=mx.int32)


@cache
def _kernel() -> Any:
    places = "".join(
        f"constexpr int {name.upper()} = {place};\n" for place, name in enumerate(FACTS)
    )
    return mx.fast.cuda_kernel(
        name="sample_rows",
        input_names=["logits", "facts", "draws", "bias_words", "bias_values", "context"],
        output_names=["tokens", "adjusted", "seen_times", "next_context", "next_draws"],
        header=f"{HEADER}constexpr int NUM_FACTS = {len(FACTS)};\n"
        f"constexpr unsigned long long COIN = {COIN}ull;\n{places}",
        source=SOURCE,
    )
