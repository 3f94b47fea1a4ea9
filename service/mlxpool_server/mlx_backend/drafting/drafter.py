"""Which tokens of which rows are guessed before the next pass."""

from __future__ import annotations

import time
from collections.abc import Sequence

from mlxpool_server.mlx_backend.drafting.pace import DraftPace
from mlxpool_server.mlx_backend.drafting.prompt_lookup import PromptLookup
from mlxpool_server.mlx_backend.row import Row


class Drafter:
    """One model's. Engine thread only."""

    def __init__(self, max_drafts: int, *, samples_on_host: bool) -> None:
        """`max_drafts`: of a row and pass. `samples_on_host`: guesses of sampled rows, too."""
        self._max_drafts = max_drafts
        self._samples_on_host = samples_on_host
        self._pace = DraftPace()
        # The pass that is measured, when it began, and whether it has drafts.
        self._measured: tuple[object, float, bool] | None = None

    def is_on(self, rows: Sequence[Row]) -> bool:
        """Whether to guess for a batch of these rows; asked once a step."""
        can_draft = all(
            row.mask is None
            and row.top_logprobs is None
            and (self._samples_on_host or row.is_plain_greedy)
            for row in rows
        )
        return can_draft and self._pace.is_worth(len(rows))

    def drafts(self, rows: Sequence[Row]) -> list[list[int]] | None:
        """Of each row, maybe none; None when no row has any."""
        drafts = [self._draft(row) for row in rows]
        return drafts if any(drafts) else None

    def learn(self, row: Row, num_drafted: int) -> None:
        """Tell how a row's guesses did, when the row knows it."""
        if row.lookup is not None and num_drafted:
            row.lookup.learn(num_drafted, row.num_drafted)

    def begin(self, measured: object, *, has_drafts: bool) -> None:
        """A pass was launched, whose tokens will be read before the next one."""
        self._measured = (measured, time.monotonic(), has_drafts)

    def end(self, measured: object, num_rows: int, num_tokens: int) -> None:
        """Its tokens are here. Another one's are not measured: a step ran ahead of them."""
        if self._measured is not None and self._measured[0] is measured:
            _, began_at, has_drafts = self._measured
            duration_s = time.monotonic() - began_at
            self._pace.learn(num_rows, num_tokens, duration_s, has_drafts=has_drafts)
        self._measured = None

    def _draft(self, row: Row) -> list[int]:
        # The pass gives one token more than is guessed.
        most = min(self._max_drafts, row.max_ahead - len(row.generated) - 1)
        if most <= 0:
            return []
        if row.lookup is None:
            row.lookup = PromptLookup(row.prompt, self._max_drafts)
        row.lookup.extend(row.generated[row.lookup.num_said :])
        return row.lookup.draft(most)
