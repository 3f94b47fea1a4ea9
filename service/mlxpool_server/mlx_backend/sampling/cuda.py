"""Sampling in one CUDA kernel: `sample_row.cuh`, which `block.cuh` stands before.

As MLX's operations (`device`) the same takes some fifty kernels a step, a sort of every word among
them, and three of these are compiled when they are first met, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import mlx.core as mx
import numpy as np

from mlxpool_server.mlx_backend.memory import device_kind
from mlxpool_server.mlx_backend.sampling.row import COIN, SMALLEST_WEIGHT, SampledRow

# Of a block: the most that CUDA lets it have.
NUM_THREADS = 1024
# The largest number that float32 holds exactly; no context and no vocabulary is longer.
MAX_COUNT = 1 << 24

# The members of `Facts`, all of them floats.
FACTS = (
    "temperature", "top_p", "min_p", "top_k", "is_filtered", "is_greedy", "num_biases",
    "context_size", "longest_context", "repetition", "presence", "frequency", "xtc_threshold",
    "xtc_probability",
)  # fmt: skip

# Shapes: (rows, words) of logits, adjusted and times; (rows, tokens) of context; one of each row
# else. A batch without penalties has one number for times and next_context.
INPUTS = ("logits", "facts", "positions", "seeds", "bias_words", "bias_values", "context")
OUTPUTS = ("tokens", "adjusted", "times", "next_context", "next_positions")

SOURCE = """
  using namespace mlxpool;
  const int row = blockIdx.x;
  const Facts& own_facts = reinterpret_cast<const Facts*>(facts)[row];
  const unsigned position = positions[row];
  const int size = logits_shape[1];
  const long long first_word = static_cast<long long>(row) * size;
  const int first_bias = row * bias_words_shape[1];
  const Bias bias = {
      bias_words + first_bias, bias_values + first_bias, static_cast<int>(own_facts.num_biases)};
  const int held = context_shape[1];
  const int* held_tokens = context + static_cast<long long>(row) * held;
  const int reach = min(held, static_cast<int>(own_facts.context_size));
  const int token = sample_row(
      logits + first_word, size, own_facts, seeds[row], position, bias,
      Context{held_tokens, held - reach, held}, adjusted + first_word, times + first_word);
  if (threadIdx.x == 0) {
    tokens[row] = token;
    next_positions[row] = position + 1;
  }
  const int next_held = min(held + 1, static_cast<int>(own_facts.longest_context));
  append(
      held_tokens, held, token, next_context + static_cast<long long>(row) * next_held, next_held);
"""


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
        self._positions = mx.array([row.position for row in rows], dtype=mx.uint32)
        self._seeds = mx.array(np.array([row.seed for row in rows], dtype=np.uint64))
        self._bias = _bias(rows)
        self._no_context = _empty_context(vocab_size)

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
        tokens, _, _, following, self._positions = _kernel()(
            inputs=[
                logits,
                self._facts,
                self._positions,
                self._seeds,
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
                (num_rows,),
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
def _empty_context(vocab_size: int) -> mx.array:
    """One place, with the id that stands for no token."""
    return mx.array([[vocab_size]], dtype=mx.int32)


@cache
def _kernel() -> Any:
    return mx.fast.cuda_kernel(
        name="sample_rows",
        input_names=INPUTS,
        output_names=OUTPUTS,
        header=header(),
        source=SOURCE,
    )


def header() -> str:
    """What `SOURCE` calls, with its constants."""
    constants = f"""
namespace mlxpool {{
constexpr int THREADS = {NUM_THREADS};
constexpr unsigned long long COIN = {COIN}ull;
constexpr float SMALLEST_WEIGHT = {SMALLEST_WEIGHT}f;
struct Facts {{ float {", ".join(FACTS)}; }};
}} // namespace mlxpool
"""
    folder = files(__package__)
    parts = [folder.joinpath(name).read_text("utf-8") for name in ("block.cuh", "sample_row.cuh")]
    return "\n".join([constants, *parts])
