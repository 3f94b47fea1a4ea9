"""Whether tokens are guessed before the next pass, and how many."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx

from mlxpool_server.mlx_backend.drafting.pace import DraftPace
from mlxpool_server.mlx_backend.row import Row


@dataclass(frozen=True, slots=True)
class Guesses:
    """What goes into a pass: each row's last token, and guesses behind it."""

    # (rows, tokens).
    fed: mx.array
    # How many of a row's are guesses; what is behind them is padding.
    counts: tuple[int, ...]


class Guesser(Protocol):
    """Where guesses come from. Engine thread only."""

    def guess(self, rows: Sequence[Row], caches: Sequence[Any], most: int) -> Guesses | None:
        """At most so many a row, for those that can use them; None when there are none."""

    def learn(self, row: Row, num_guessed: int, num_accepted: int) -> None:
        """Tell how a row's guesses did."""


class Drafter:
    """One model's. Engine thread only."""

    def __init__(self, guesser: Guesser, max_drafts: int, *, samples_on_host: bool) -> None:
        """`max_drafts`: of a row and pass. `samples_on_host`: guesses for sampled rows, too."""
        self._guesser = guesser
        self._max_drafts = max_drafts
        self._samples_on_host = samples_on_host
        self._pace = DraftPace()
        # The pass that is measured, when it began, and whether it has guesses.
        self._measured: tuple[object, float, bool] | None = None

    def is_on(self, rows: Sequence[Row]) -> bool:
        """Whether to guess for a batch of these rows; asked once a step."""
        can_guess = all(
            row.mask is None
            and row.top_logprobs is None
            and (self._samples_on_host or row.is_plain_greedy)
            for row in rows
        )
        return can_guess and self._pace.is_worth(len(rows))

    def guess(self, rows: Sequence[Row], caches: Sequence[Any]) -> Guesses | None:
        """None: not this time."""
        # A pass gives one token more than was guessed, and no row works on a place behind its last
        # one: there may be none.
        room = min(row.max_tokens - len(row.generated) - 1 for row in rows)
        most = min(self._max_drafts, room)
        guesses = self._guesser.guess(rows, caches, most) if most > 0 else None
        self._pace.looked(found=guesses is not None)
        return guesses

    def learn(self, row: Row, num_guessed: int, num_accepted: int) -> None:
        """Tell how a row's guesses did."""
        if num_guessed:
            self._guesser.learn(row, num_guessed, num_accepted)

    def begin(self, measured: object, *, has_guesses: bool) -> None:
        """A pass was launched, whose tokens will be read before the next one."""
        self._measured = (measured, time.monotonic(), has_guesses)

    def end(self, measured: object, num_rows: int, num_tokens: int) -> None:
        """Its tokens are here. Another one's are not measured: a step ran ahead of them."""
        if self._measured is not None and self._measured[0] is measured:
            _, began_at, has_guesses = self._measured
            duration_s = time.monotonic() - began_at
            self._pace.learn(num_rows, num_tokens, duration_s, has_guesses=has_guesses)
        self._measured = None
