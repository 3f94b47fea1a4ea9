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
from mlxpool_server.mlx_backend.sampling.row import SampledRow

NUM_THREADS = 1024
# The largest number that float32 holds exactly; no context and no vocabulary is longer.
MAX_COUNT = 1 << 24
NUMBER, XTC_STRIKES = FACTS.index("number"), FACTS.index("xtc_strikes")
CONTEXT_SIZE, NEXT_SIZE = FACTS.index("context_size"), FACTS.index("next_size")


def is_supported() -> bool:
    return device_kind() == "cuda"


class CudaRows:
    """The rows of one batch, in its order; made anew when they change."""

    def __init__(self, rows: Sequence[SampledRow], vocab_size: int) -> None:
        self._rows = list(rows)
        self._facts = np.array([_facts(row) for row in rows], dtype=np.float32)
        self._context_size = max(row.context_size for row in rows)
        self._bias = _bias(rows)
        self._none = mx.full((1, 1), vocab_size, dtype=mx.int32)

    def sample(
        self, logits: mx.array, context: mx.array | None
    ) -> tuple[mx.array, mx.array | None]:
        """One token a row, and the context with it, not evaluated.

        `logits`: (rows, vocabulary); `context`: (rows, tokens), int32, None when no row has
        penalties.
        """
        num_rows = logits.shape[0]
        held = 0 if context is None else context.shape[1]
        next_size = 0 if context is None else min(held + 1, self._context_size)
        facts = self._facts
        facts[:, NEXT_SIZE] = next_size
        for fact, row in zip(facts, self._rows, strict=True):
            if not row.is_greedy:
                fact[NUMBER], fact[XTC_STRIKES] = row.next_draw()
        words, values = self._bias
        tokens, _, _, following = _kernel()(
            inputs=[
                logits,
                mx.array(facts),
                words,
                values,
                self._none if context is None else context,
            ],
            template=[("T", logits.dtype)],
            grid=(num_rows * NUM_THREADS, 1, 1),
            threadgroup=(NUM_THREADS, 1, 1),
            output_shapes=[
                (num_rows,),
                logits.shape,
                (1, 1) if context is None else logits.shape,
                (1, 1) if context is None else (num_rows, next_size),
            ],
            output_dtypes=[mx.uint32, mx.float32, mx.int32, mx.int32],
        )
        return tokens, None if context is None else following


def _facts(row: SampledRow) -> list[float]:
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
        "repetition": params.repetition_penalty,
        "presence": params.presence_penalty,
        "frequency": params.frequency_penalty,
        "xtc_threshold": params.xtc_threshold,
    }
    return [float(known.get(name, 0.0)) for name in FACTS]


def _bias(rows: Sequence[SampledRow]) -> tuple[mx.array, mx.array]:
    """Words and what is added to their logits, (rows, the most words of one row) each."""
    size = max(1, *(len(row.params.logit_bias) for row in rows))
    words = np.zeros((len(rows), size), dtype=np.int32)
    values = np.zeros((len(rows), size), dtype=np.float32)
    for index, row in enumerate(rows):
        count = len(row.params.logit_bias)
        words[index, :count] = list(row.params.logit_bias)
        values[index, :count] = list(row.params.logit_bias.values())
    return mx.array(words), mx.array(values)


@cache
def _kernel() -> Any:
    places = "".join(
        f"constexpr int {name.upper()} = {place};\n" for place, name in enumerate(FACTS)
    )
    return mx.fast.cuda_kernel(
        name="sample_rows",
        input_names=["logits", "facts", "bias_words", "bias_values", "context"],
        output_names=["tokens", "adjusted", "seen_times", "next_context"],
        header=HEADER + f"constexpr int NUM_FACTS = {len(FACTS)};\n" + places,
        source=SOURCE,
    )
