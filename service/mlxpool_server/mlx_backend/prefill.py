"""Prompts on their way into a cache, a pass at a time."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, CacheList

from mlxpool_server.mlx_backend.last_rows import LastRows
from mlxpool_server.mlx_backend.row import Row, adapters_of


class Prefill:
    """Rows whose prompts are worked on together, padded on the right."""

    def __init__(self, rows: Sequence[Row], caches: list[Any]) -> None:
        self.rows = list(rows)
        self._caches = caches
        # Half of mlx-lm's recurrent models let padding into their state.
        self._may_pad = not any(_is_recurrent(cache) for cache in caches)

    @property
    def num_left(self) -> int:
        """The most tokens of each row that a pass can work on."""
        left = [row.num_left for row in self.rows]
        return (max if self._may_pad else min)(left, default=0)

    @property
    def nbytes(self) -> int:
        return sum(cache.nbytes for cache in self._caches)

    def step(self, model: LastRows, num_tokens: int) -> tuple[list[Row], mx.array, list[Any]]:
        """Begin to work on up to `num_tokens` tokens of each row.

        Returns the rows whose prompts are complete, their logits and their caches: they have
        left. `settle` waits for those that have not.
        """
        num_tokens = min(num_tokens, self.num_left)
        counts = [min(num_tokens, row.num_left) for row in self.rows]
        longest = max(counts)
        is_uneven = min(counts) < longest
        if is_uneven:
            padding = [longest - count for count in counts]
            for cache in self._caches:
                cache.prepare(lengths=counts, right_padding=padding)
        tokens = mx.array([_padded(row, count, longest) for row, count in self._take(counts)])
        logits = model(tokens, self._caches, counts, adapters_of(self.rows))
        if is_uneven:
            for cache in self._caches:
                cache.finalize()
        done = [index for index, row in enumerate(self.rows) if not row.num_left]
        if len(done) < len(self.rows):
            # Without the logits: a head that nobody asked for is never computed.
            mx.async_eval([cache.state for cache in self._caches])  # type: ignore[no-untyped-call]
        if done:
            mx.async_eval(logits)  # type: ignore[no-untyped-call]
        return self._leave(done, logits)

    def settle(self) -> None:
        """Wait for what the last step began."""
        mx.eval([cache.state for cache in self._caches])

    def remove(self, slots: frozenset[int]) -> None:
        kept = [index for index, row in enumerate(self.rows) if row.slot not in slots]
        if len(kept) < len(self.rows):
            self._keep(kept)

    def _take(self, counts: Sequence[int]) -> list[tuple[Row, int]]:
        taken = list(zip(self.rows, counts, strict=True))
        for row, count in taken:
            row.num_done += count
        return taken

    def _leave(self, done: list[int], logits: mx.array) -> tuple[list[Row], mx.array, list[Any]]:
        if len(done) == len(self.rows):
            rows, caches = self.rows, self._caches
            self.rows, self._caches = [], []
            return rows, logits, caches
        rows = [self.rows[index] for index in done]
        caches = []
        if rows:
            caches = copy.deepcopy(self._caches)
            for cache in caches:
                cache.filter(done)
            logits = logits[mx.array(done, dtype=mx.uint32)]
            self._keep([index for index in range(len(self.rows)) if index not in set(done)])
        return rows, logits, caches

    def _keep(self, indices: Sequence[int]) -> None:
        self.rows = [self.rows[index] for index in indices]
        if not self.rows:
            self._caches = []
        for cache in self._caches:
            cache.filter(indices)


def _is_recurrent(cache: Any) -> bool:
    if isinstance(cache, CacheList):
        return any(_is_recurrent(each) for each in cache.caches)
    return isinstance(cache, ArraysCache)


def _padded(row: Row, count: int, length: int) -> list[int]:
    start = row.num_done - count
    return [*row.prompt[start : row.num_done], *([0] * (length - count))]
