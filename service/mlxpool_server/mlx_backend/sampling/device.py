"""Sampling as part of the model's own graph: for a GPU, and for greedy rows anywhere.

Nothing here waits for a result, so the next step can be built on tokens that nobody has seen yet.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlxpool_server.mlx_backend.sampling import cuda
from mlxpool_server.mlx_backend.sampling.row import SMALLEST_WEIGHT, SampledRow


class DeviceSampler:
    """The rows of one batch, in its order; parameters are arrays with a row each."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._rows: list[SampledRow] = []
        # One or the other: made when they are first needed.
        self._parameters: _Parameters | None = None
        self._cuda_rows: cuda.CudaRows | None = None
        # The tokens that penalties look at: (rows, those of the longest). The id behind the
        # vocabulary's last stands for none.
        self._context: mx.array | None = None

    def extend(self, rows: Sequence[SampledRow]) -> None:
        self._rows = [*self._rows, *rows]
        self._parameters = self._cuda_rows = None
        self._context = self._joined_context(rows)

    def keep(self, indices: Sequence[int]) -> None:
        self._rows = [self._rows[index] for index in indices]
        self._parameters = self._cuda_rows = None
        if not any(row.has_penalties for row in self._rows):
            self._context = None
        elif self._context is not None:
            self._context = self._context[mx.array(list(indices), dtype=mx.uint32)]

    def sample(self, logits: mx.array) -> mx.array:
        """One token a row, shape (rows,), not evaluated; `logits` has (rows, vocabulary)."""
        if all(row.is_plain_greedy for row in self._rows):
            return mx.argmax(logits, axis=-1)
        if cuda.is_supported():
            if self._cuda_rows is None:
                self._cuda_rows = cuda.CudaRows(self._rows, self._vocab_size)
            tokens, self._context = self._cuda_rows.sample(logits, self._context)
            return tokens
        if self._parameters is None:
            self._parameters = _Parameters(self._rows, self._vocab_size)
        logits = self._adjusted(logits.astype(mx.float32), self._parameters)
        tokens = mx.argmax(logits, axis=-1)
        if not all(row.is_greedy for row in self._rows):
            top = mx.max(logits, axis=-1, keepdims=True)
            drawn = _draw(logits - top, self._rows, self._parameters)
            # Beside a logit that is no number, or infinite, nothing has a probability.
            is_greedy = self._parameters.is_greedy | ~mx.isfinite(top[:, 0])
            tokens = mx.where(is_greedy, tokens, drawn)
        if self._context is not None:
            # As wide as there are tokens: a context size may be anything up to 2**31.
            size = max(row.context_size for row in self._rows)
            self._context = mx.concatenate(
                [self._context, tokens[:, None].astype(mx.int32)], axis=1
            )[:, -size:]
        return tokens

    def _joined_context(self, rows: Sequence[SampledRow]) -> mx.array | None:
        if not any(row.has_penalties for row in self._rows):
            return None
        none = self._vocab_size
        held = self._context
        size = max(len(row.context) for row in rows)
        if held is None:
            held = mx.full((len(self._rows) - len(rows), size), none, dtype=mx.int32)
        size = max(size, held.shape[1])
        new = mx.array(
            [[none] * (size - len(row.context)) + row.context for row in rows], dtype=mx.int32
        )
        missing = size - held.shape[1]
        if missing:
            held = mx.pad(held, [(0, 0), (missing, 0)], constant_values=mx.array(none, mx.int32))
        return mx.concatenate([held, new])

    def _adjusted(self, logits: mx.array, parameters: _Parameters) -> mx.array:
        """With bias and penalties. A column more takes what is said of the token that is none."""
        if parameters.bias is None and self._context is None:
            return logits
        logits = mx.pad(logits, [(0, 0), (0, 1)])
        if parameters.bias is not None:
            words, values = parameters.bias
            logits = logits.at[parameters.row_numbers, words].add(values)
        if self._context is not None:
            in_reach = parameters.in_reach(self._context.shape[1])
            words = mx.where(in_reach, self._context, self._vocab_size)
            own = mx.take_along_axis(logits, words, axis=-1)
            penalty = parameters.repetition
            own = mx.where(own < 0, own * penalty, own / penalty)
            logits = mx.put_along_axis(logits, words, own, axis=-1)
            counts = mx.zeros_like(logits).at[parameters.row_numbers, words].add(1.0)
            logits = logits - parameters.presence * (counts > 0) - parameters.frequency * counts
        return logits[:, :-1]


class _Parameters:
    """A batch's parameters as arrays of shape (rows, 1); made anew when its rows change."""

    def __init__(self, rows: Sequence[SampledRow], vocab_size: int) -> None:
        self.row_numbers = mx.arange(len(rows))[:, None]
        self.is_greedy = mx.array([row.is_greedy for row in rows])
        self.temperature = _column([row.temperature for row in rows])
        self.top_p = _column([row.params.top_p for row in rows])
        self.min_p = _column([row.params.min_p for row in rows])
        self.top_k = mx.array([[row.top_k or vocab_size] for row in rows])
        self.xtc_threshold = _column([row.params.xtc_threshold for row in rows])
        self.repetition = _column([row.params.repetition_penalty for row in rows])
        self.presence = _column([row.params.presence_penalty for row in rows])
        self.frequency = _column([row.params.frequency_penalty for row in rows])
        self.needs_order = any(row.params.top_p < 1.0 or row.top_k for row in rows)
        self.has_filters = any(row.is_filtered for row in rows)
        self.has_xtc = any(row.params.xtc_probability > 0.0 for row in rows)
        self.bias = _bias(rows, vocab_size)
        self._context_sizes = mx.array([[row.context_size] for row in rows])

    def in_reach(self, size: int) -> mx.array:
        """Which of the last `size` tokens each row's penalties look at: (rows, size)."""
        return mx.arange(size)[None] >= size - self._context_sizes


def _draw(logits: mx.array, rows: Sequence[SampledRow], parameters: _Parameters) -> mx.array:
    """One word a row; of `logits` the greatest of each row is 0."""
    draws = [(0.5, False) if row.is_greedy else row.next_draw() for row in rows]
    if parameters.has_filters:
        strikes = mx.array([[strikes] for _, strikes in draws]) if parameters.has_xtc else None
        logits = mx.where(_kept(mx.exp(logits), parameters, strikes), logits, -mx.inf)
        if parameters.has_xtc:
            # It may have taken the likeliest: what is left has to have a weight that is no 0.
            logits = logits - mx.max(logits, axis=-1, keepdims=True)
    weights = mx.exp(logits / parameters.temperature)
    return pick(weights, mx.cumsum(weights, axis=-1), _column([number for number, _ in draws]))


def pick(weights: mx.array, reached: mx.array, numbers: mx.array) -> mx.array:
    """The word of each row at which the running sum of the weights reaches its number."""
    # A parallel sum may creep over words of no weight: they are never picked, and do not count.
    reached = mx.where(weights > 0, reached, 0.0)
    return mx.argmax(reached >= numbers * reached.max(axis=-1, keepdims=True), axis=-1)


def _kept(weights: mx.array, parameters: _Parameters, strikes: mx.array | None) -> mx.array:
    """Which words the filters leave; `weights` are probabilities over the likeliest one's."""
    size = weights.shape[-1]
    floor = parameters.min_p
    ordered = mx.sort(weights, axis=-1) if parameters.needs_order else None
    if ordered is not None:
        above = mx.cumsum(ordered, axis=-1, reverse=True, inclusive=False)
        total = above[:, :1] + ordered[:, :1]
        dropped = (above >= parameters.top_p * total).sum(axis=-1, keepdims=True)
        # top_p 1 keeps all; and some word always stays, though the product may underflow.
        dropped = mx.where(parameters.top_p >= 1.0, 0, mx.minimum(dropped, size - 1))
        floor = mx.maximum(floor, mx.take_along_axis(ordered, dropped, axis=-1))
    kept = weights >= floor
    num_excluded: mx.array | int = 0
    if strikes is not None:
        left = mx.where(kept, weights, 0.0)
        limit = parameters.xtc_threshold * left.sum(axis=-1, keepdims=True)
        limit = mx.maximum(limit, SMALLEST_WEIGHT)
        least = mx.where(left > limit, left, mx.inf).min(axis=-1, keepdims=True)
        excluded = strikes & kept & (weights > least)
        num_excluded = excluded.sum(axis=-1, keepdims=True)
        kept = kept & ~excluded
    if ordered is not None:
        last = mx.maximum(size - num_excluded - parameters.top_k, 0)
        kth = mx.take_along_axis(ordered, last, axis=-1)
        # Of equal ones the first stay.
        is_tied = kept & (weights == kth)
        quota = parameters.top_k - (kept & (weights > kth)).sum(axis=-1, keepdims=True)
        surplus = is_tied & (mx.cumsum(is_tied.astype(mx.int32), axis=-1) > quota)
        kept = kept & (weights >= kth) & ~surplus
    return kept


def _column(values: list[float]) -> mx.array:
    return mx.array(values, dtype=mx.float32)[:, None]


def _bias(rows: Sequence[SampledRow], vocab_size: int) -> tuple[mx.array, mx.array] | None:
    """Words and what is added to their logits, (rows, the most words of one row) each."""
    size = max(len(row.params.logit_bias) for row in rows)
    if not size:
        return None
    words, values = [], []
    for row in rows:
        missing = size - len(row.params.logit_bias)
        words.append([*row.params.logit_bias, *([vocab_size] * missing)])
        values.append([*row.params.logit_bias.values(), *([0.0] * missing)])
    return mx.array(words, dtype=mx.int32), mx.array(values, dtype=mx.float32)
