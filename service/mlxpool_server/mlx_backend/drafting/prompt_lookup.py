"""Drafts without a draft model: what followed the last tokens where they stood before.

Prompt lookup decoding (Saxena 2023): answers repeat what they are about.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mlxpool_server.mlx_backend.drafting.drafter import Guesses
from mlxpool_server.mlx_backend.row import Row

# So many of the last tokens are looked for, the longer first.
GRAM_SIZES = (3, 2)
# Of a longer prompt the end is looked at: 16,384 tokens take about 10 ms.
MAX_INDEXED_TOKENS = 16_384
FIRST_WIDTH = 3


class PromptLookups:
    """Guesses for the rows of a batch, each from its own tokens."""

    def __init__(self, max_drafts: int) -> None:
        self._max_drafts = max_drafts

    def guess(self, rows: Sequence[Row], caches: Sequence[Any], most: int) -> Guesses | None:
        del caches
        drafts = [[] if row.may_be_forced else self._of(row).draft(most) for row in rows]
        width = max(map(len, drafts))
        if width == 0:
            return None
        fed = [
            [row.token, *draft, *([0] * (width - len(draft)))]
            for row, draft in zip(rows, drafts, strict=True)
        ]
        return Guesses(mx.array(fed, dtype=mx.uint32), tuple(map(len, drafts)))

    def learn(self, row: Row, num_guessed: int, num_accepted: int) -> None:
        self._of(row).learn(num_guessed, num_accepted)

    def _of(self, row: Row) -> PromptLookup:
        """The row's, which knows all it has said."""
        lookup = row.guesser
        if not isinstance(lookup, PromptLookup):
            lookup = row.guesser = PromptLookup(row.prompt, self._max_drafts)
        lookup.extend(row.generated[lookup.num_said :])
        return lookup


class PromptLookup:
    """One row's. It guesses more at once while its guesses are right."""

    def __init__(self, prompt: Sequence[int], max_drafts: int) -> None:
        self._tokens: list[int] = []
        # Where the latest follower of these tokens is.
        self._followers: dict[tuple[int, ...], int] = {}
        self._max_drafts = max_drafts
        self._width = min(FIRST_WIDTH, max_drafts)
        # Of the row's answer, how many tokens are known here.
        self.num_said = 0
        self._append(prompt[-MAX_INDEXED_TOKENS:])

    def extend(self, tokens: Sequence[int]) -> None:
        """Take what the row has said since."""
        self._append(tokens)
        self.num_said += len(tokens)

    def _append(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            place = len(self._tokens)
            for size in GRAM_SIZES:
                if place >= size:
                    self._followers[tuple(self._tokens[-size:])] = place
            self._tokens.append(token)

    def draft(self, most: int) -> list[int]:
        """At most so many tokens that may come next; none where nothing is alike."""
        count = min(most, self._width)
        for size in GRAM_SIZES:
            place = self._followers.get(tuple(self._tokens[-size:]))
            if place is not None:
                # What goes round in a circle goes on doing so.
                period = len(self._tokens) - place
                return [self._tokens[place + index % period] for index in range(count)]
        return []

    def learn(self, num_guessed: int, num_accepted: int) -> None:
        """Twice as many when all were right, half as many when none was."""
        if num_accepted == num_guessed:
            self._width = min(self._max_drafts, 2 * max(num_guessed, self._width))
        elif num_accepted == 0:
            self._width = max(1, self._width // 2)
        else:
            self._width = num_accepted + 1
