"""Rows that generate together, a token each a step.

The step after the next is in the device's hands before the next one's tokens are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlxpool_server.mlx_backend.adapters.adapted_layers import Rows
from mlxpool_server.mlx_backend.drafting.drafted_pass import DraftedPass, rewind
from mlxpool_server.mlx_backend.drafting.drafter import Drafter
from mlxpool_server.mlx_backend.host_arrays import as_numpy
from mlxpool_server.mlx_backend.last_rows import LastRows
from mlxpool_server.mlx_backend.mask_maker import MaskMaker
from mlxpool_server.mlx_backend.masked_sampling import MaskedSampler, masked_on_host
from mlxpool_server.mlx_backend.prefix_cache import PrefixCache
from mlxpool_server.mlx_backend.row import Row, adapters_of
from mlxpool_server.mlx_backend.sampling import host
from mlxpool_server.mlx_backend.sampling.device import DeviceSampler
from mlxpool_server.mlx_backend.scoring import Scoring


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step that was begun."""

    rows: tuple[Row, ...]
    # Chosen by the device; or, with `logits` or drafts, what went in.
    tokens: mx.array
    logits: mx.array | None = None
    scoring: Scoring | None = None
    drafted: DraftedPass | None = None

    @property
    def is_open(self) -> bool:
        """Whether its tokens are still to be chosen here."""
        return self.logits is not None or self.drafted is not None


class Decode:
    """Engine thread only."""

    def __init__(
        self,
        model: LastRows,
        vocab_size: int,
        masks: MaskMaker,
        *,
        samples_on_host: bool,
        drafter: Drafter | None = None,
    ) -> None:
        """`samples_on_host`: what is more than the most likely token is left to numpy.

        `drafter`: guesses tokens ahead, for a model whose caches can forget their last ones.
        """
        self._model = model
        self._vocab_size = vocab_size
        self._samples_on_host = samples_on_host
        self.rows: list[Row] = []
        self._caches: list[Any] = []
        # The tokens that go in next, of all rows: they may not be known here yet.
        self._feed: mx.array | None = None
        self._launched: _Launched | None = None
        # None: its rows' state is known here and not on the device.
        self._sampler: DeviceSampler | None = None
        self._masks = masks
        self._drafter = drafter
        # Rows under constraints, on a device: tokens are chosen when their masks are there.
        self._masked = MaskedSampler(vocab_size)

    @property
    def has_drafts(self) -> bool:
        """Whether the pass that was launched has any."""
        return self._launched is not None and self._launched.drafted is not None

    @property
    def nbytes(self) -> int:
        return sum(cache.nbytes for cache in self._caches)

    def extend(self, rows: Sequence[Row], caches: list[Any]) -> None:
        """Take in rows whose prompts are in `caches` and whose first token is `row.token`."""
        if self.rows:
            for mine, theirs in zip(self._caches, caches, strict=True):
                mine.extend(theirs)
        else:
            self._caches = caches
        self.rows = [*self.rows, *rows]
        if self._feed is not None:
            self._feed = mx.concatenate([self._feed, _as_array(rows)])
        if self._sampler is not None:
            self._sampler.extend([row.sampled for row in rows])

    def remove(self, slots: frozenset[int], prefixes: PrefixCache) -> None:
        """Free these rows before the next step; no harm for those that are not here.

        What they leave behind is kept in `prefixes`.
        """
        fed = self._launched.rows if self._launched is not None else ()
        for index, row in enumerate(self.rows):
            if row.slot in slots:
                known = row.generated if row in fed else row.generated[:-1]
                prefixes.keep((*row.prompt, *known), self._caches, index, row.prefix_owner)
        kept = [index for index, row in enumerate(self.rows) if row.slot not in slots]
        if len(kept) == len(self.rows):
            return
        if not kept:
            self.clear()
            return
        for cache in self._caches:
            cache.filter(kept)
        self.rows = [self.rows[index] for index in kept]
        if self._feed is not None:
            self._feed = self._feed[mx.array(kept, dtype=mx.uint32)]
        if self._sampler is not None:
            self._sampler.keep(kept)

    def clear(self) -> None:
        self.rows = []
        self._caches = []
        self._feed = self._launched = self._sampler = None

    def settle(self) -> None:
        """Wait for what was launched ahead."""
        if self._launched is not None:
            mx.eval(self._launched.tokens, self._launched.logits)
            if self._launched.drafted is not None:
                mx.eval(self._launched.drafted.outcome)
            if self._launched.scoring is not None:
                mx.eval(self._launched.scoring.arrays)

    def step(self, forced: frozenset[int] = frozenset()) -> list[tuple[int, int]]:
        """Launch a step; return what the one before gave: (slot, token), none at first.

        `forced`: slots whose next tokens are given; a step may not run ahead of them.
        """
        launched = self._launched
        is_forced = bool(forced) and any(row.slot in forced for row in self.rows)
        if self._drafter is not None and not is_forced and self._drafter.is_on(self.rows):
            return self._drafted_step(self._drafter, launched)
        if not is_forced and self._chooses_late(launched):
            return self._masked_step(launched)
        is_open = launched is not None and launched.is_open
        if is_forced or self._samples_here() or is_open:
            tokens = self._read(launched)
            # All that was decided is known here now, and not to who chose before.
            self._feed = self._sampler = None
            self._masked.clear()
            if self._is_masked:
                self._launch_logits(_as_array(self.rows))
            else:
                self._launch()
            return tokens
        self._launch()
        return self._read(launched)

    @property
    def _is_masked(self) -> bool:
        return any(row.mask for row in self.rows)

    def _samples_here(self) -> bool:
        return self._samples_on_host and not all(row.is_plain_greedy for row in self.rows)

    def _launch(self) -> None:
        feed = _as_array(self.rows) if self._feed is None else self._feed
        if self._samples_here():
            self._launch_logits(feed)
            return
        rows = tuple(self.rows)
        if self._samples_on_host and all(row.top_logprobs is None for row in rows):
            # Nobody looks at the logits themselves.
            self._feed, scoring = self._model.most_likely(*self._inputs(feed)), None
        else:
            logits = self._logits(feed)
            if self._sampler is None:
                self._sampler = DeviceSampler(self._vocab_size)
                self._sampler.extend([row.sampled for row in rows])
            self._feed = self._sampler.sample(logits)
            scoring = Scoring.of(rows, logits, None if self._samples_on_host else self._feed)
        self._launched = _Launched(rows, tokens=self._feed, scoring=scoring)
        mx.async_eval(  # type: ignore[no-untyped-call]
            self._feed, scoring.arrays if scoring else []
        )

    def _read(self, launched: _Launched | None) -> list[tuple[int, int]]:
        """Wait for a step; what its rows that left meanwhile would have said is dropped."""
        if launched is None:
            return []
        if launched.drafted is not None:
            return self._read_drafted(launched.rows, launched.drafted)
        here = set(self.rows)
        places = [place for place, row in enumerate(launched.rows) if row in here]
        rows = [launched.rows[place] for place in places]
        if launched.logits is not None:
            on_host = as_numpy(launched.logits)[places]
            self._masks.wait(rows)
            logits = masked_on_host(on_host, rows)
            tokens = host.sample(logits, [row.sampled for row in rows])
        else:
            told = as_numpy(launched.tokens)
            tokens = [int(told[place]) for place in places]
        return self._accept(launched, rows, tokens)

    def _accept(
        self, launched: _Launched, rows: Sequence[Row], tokens: Sequence[int]
    ) -> list[tuple[int, int]]:
        for row, token in zip(rows, tokens, strict=True):
            row.accept(token)
        if launched.scoring is not None:
            launched.scoring.tell(frozenset(rows))
        told = [(row.slot, row.token) for row in rows if row.failure is None]
        self._masks.advance(rows)
        return told

    # ------------------------------------------------------------ drafts

    def _drafted_step(self, drafter: Drafter, launched: _Launched | None) -> list[tuple[int, int]]:
        """Guesses follow from all that was said, so no step runs ahead of another."""
        tokens = self._read(launched)
        if launched is not None:
            drafter.end(launched, len(launched.rows), len(tokens))
        self._feed = self._sampler = None
        guesses = drafter.guess(self.rows, self._caches)
        if guesses is None:
            self._launch()
        else:
            drafted = DraftedPass(self._model, self.rows, self._caches, guesses)
            self._launched = _Launched(tuple(self.rows), guesses.fed, drafted=drafted)
            mx.async_eval(drafted.outcome)  # type: ignore[no-untyped-call]
        drafter.begin(self._launched, has_guesses=guesses is not None)
        return tokens

    def _read_drafted(self, rows: Sequence[Row], drafted: DraftedPass) -> list[tuple[int, int]]:
        here = set(self.rows)
        told: list[tuple[int, int]] = []
        for place, row in enumerate(rows):
            if row in here:
                tokens = drafted.accept(place, row)
                row.num_drafted = len(tokens) - 1
                told += [(row.slot, token) for token in tokens]
                if self._drafter is not None:
                    self._drafter.learn(row, drafted.guesses.counts[place], row.num_drafted)
        rewind(self.rows, self._caches)
        return told

    # ------------------------------------------------------------ rows under constraints

    def _chooses_late(self, launched: _Launched | None) -> bool:
        if self._samples_on_host:
            # The most likely of what is allowed needs no numpy.
            return self._is_masked and all(row.sampled.is_plain_greedy for row in self.rows)
        return self._is_masked or (launched is not None and launched.logits is not None)

    def _masked_step(self, launched: _Launched | None) -> list[tuple[int, int]]:
        """Choose tokens from the logits that were launched, and launch the next ones'.

        The masks were made while the device worked on the logits.
        """
        here = set(self.rows)
        if launched is None or launched.logits is None or here.isdisjoint(launched.rows):
            tokens = self._read(launched)
            self._feed = self._sampler = None
            self._launch_logits(_as_array(self.rows))
            return tokens
        places = [place for place, row in enumerate(launched.rows) if row in here]
        rows = [launched.rows[place] for place in places]
        logits = launched.logits
        if len(places) < len(launched.rows):
            logits = logits[mx.array(places, dtype=mx.uint32)]
        self._masks.wait(rows)
        chosen = self._masked.sample(logits, rows)
        # Behind the next pass it would be known only when that is done, and its masks later still.
        mx.async_eval(chosen)  # type: ignore[no-untyped-call]
        joined = self.rows[len(rows) :]
        is_masked = self._is_masked
        if is_masked:
            feed = mx.concatenate([chosen, _as_array(joined)]) if joined else chosen
            self._launch_logits(feed)
        tokens = self._accept(launched, rows, [int(token) for token in as_numpy(chosen)])
        if not is_masked:
            self._masked.clear()
            self._launch()
        return tokens

    def _logits(self, feed: mx.array) -> mx.array:
        return self._model(*self._inputs(feed))

    def _inputs(self, feed: mx.array) -> tuple[mx.array, list[Any], list[int], Rows]:
        """Of a pass over one token a row, as the model takes them."""
        return feed[:, None], self._caches, [1] * len(self.rows), adapters_of(self.rows)

    def _launch_logits(self, feed: mx.array) -> None:
        """Tokens are chosen from the logits when these are there."""
        logits = self._logits(feed)
        if self._samples_on_host:
            logits = logits.astype(mx.float32)
        rows = tuple(self.rows)
        # numpy looks at the rows that ask, on a GPU, too.
        scoring = Scoring.of(rows, logits, None)
        self._launched = _Launched(rows, feed, logits, scoring)
        mx.async_eval(logits, scoring.arrays if scoring else [])  # type: ignore[no-untyped-call]


def _as_array(rows: Sequence[Row]) -> mx.array:
    return mx.array([row.token for row in rows], dtype=mx.uint32)
