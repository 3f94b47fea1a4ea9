"""A pass over tokens that are known and tokens that were guessed behind them.

The logits behind each token say what the model would have said there; the guesses stand as far as
they are that. Since a sampled token hangs on its logits, its seed and its place alone, this holds
for sampled rows, too: nobody's answer changes by a guess.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlxpool_server.mlx_backend.drafting.drafter import Guesses
from mlxpool_server.mlx_backend.host_arrays import as_numpy
from mlxpool_server.mlx_backend.last_rows import LastRows
from mlxpool_server.mlx_backend.row import Row, adapters_of
from mlxpool_server.mlx_backend.row_cache import Lengths, RowCache
from mlxpool_server.mlx_backend.sampling import host


class DraftedPass:
    """Begun when it is made. Its caches hold all it was fed until `rewind`."""

    def __init__(
        self, model: LastRows, rows: Sequence[Row], caches: list[Any], guesses: Guesses
    ) -> None:
        """Rows that are no plain greedy ones are sampled by numpy: on a CPU."""
        self.guesses = guesses
        logits = model.all_logits(guesses.fed, caches, adapters_of(rows))
        self._is_greedy = all(row.is_plain_greedy for row in rows)
        # What is likeliest behind each, or logits: (rows, tokens, vocabulary).
        self.outcome = mx.argmax(logits, axis=-1) if self._is_greedy else logits.astype(mx.float32)

    def accept(self, place: int, row: Row) -> list[int]:
        """Let the row take what the model says; return that, the guesses that stand first."""
        told: list[int] = []
        guessed = as_numpy(self.guesses.fed)[place, 1:].tolist()
        for index, token in enumerate(self._tokens(place, row)):
            row.accept(token)
            told.append(row.token)
            if index == self.guesses.counts[place] or guessed[index] != row.token:
                break
        return told

    def _tokens(self, place: int, row: Row) -> Iterator[int]:
        """One after the other: each one's penalties look at those before."""
        outcome = as_numpy(self.outcome)[place]
        if self._is_greedy:
            yield from outcome.tolist()
            return
        for logits in outcome:
            yield from host.sample(logits[np.newaxis], [row.sampled])


def can_rewind(caches: Sequence[Any]) -> bool:
    """Whether these can forget their last tokens."""
    return all(isinstance(cache, RowCache) for cache in caches)


def rewind(rows: Sequence[Row], caches: Sequence[Any]) -> None:
    """Forget what was guessed wrong: all but each row's last token has been fed."""
    lengths = Lengths(tuple(len(row.prompt) + len(row.generated) - 1 for row in rows))
    for cache in caches:
        cache.lengths = lengths
