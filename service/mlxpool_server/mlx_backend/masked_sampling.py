"""Masks on logits: in numpy for a CPU, in the model's own graph for any other device."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlxpool_server.mlx_backend.row import Row
from mlxpool_server.mlx_backend.sampling.device import DeviceSampler
from mlxpool_server.mlx_backend.sampling.host import Floats

_BITS = 32
_ALL = np.uint32(0xFFFFFFFF)


def masked_on_host(logits: Floats, rows: Sequence[Row]) -> Floats:
    """`logits`, (rows, vocabulary), with -inf where a row's constraint says no."""
    masked = [(place, row.mask) for place, row in enumerate(rows) if row.mask is not None]
    if not masked:
        return logits
    logits = logits.copy()
    vocab_size = logits.shape[1]
    for place, mask in masked:
        words = mask.words(vocab_size)
        bits = np.unpackbits(words.view(np.uint8), bitorder="little", count=vocab_size)
        np.copyto(logits[place], np.float32(-np.inf), where=bits == 0)
    return logits


def masked_on_device(logits: mx.array, rows: Sequence[Row]) -> mx.array:
    """As `masked_on_host`; does not wait for the logits."""
    if all(row.mask is None for row in rows):
        return logits
    return mx.where(_allowed(rows, logits.shape[-1]), logits, mx.array(-mx.inf, logits.dtype))


def _allowed(rows: Sequence[Row], vocab_size: int) -> mx.array:
    """Whether a row's constraint lets a token come: bool, (rows, vocabulary)."""
    num_words = (vocab_size + _BITS - 1) // _BITS
    words = np.full((len(rows), num_words, 1), _ALL, dtype=np.uint32)
    for place, row in enumerate(rows):
        if row.mask is not None:
            words[place, :, 0] = row.mask.words(vocab_size)
    bits = (mx.array(words) >> mx.arange(_BITS, dtype=mx.uint32)) & 1
    return bits.reshape(len(rows), num_words * _BITS)[:, :vocab_size].astype(mx.bool_)


class MaskedSampler:
    """A device sampler for rows whose tokens are all known here before the next are chosen."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._rows: tuple[Row, ...] = ()
        self._sampler: DeviceSampler | None = None

    def sample(self, logits: mx.array, rows: Sequence[Row]) -> mx.array:
        """One token a row, shape (rows,), not evaluated; `logits` has (rows, vocabulary)."""
        # What it holds of the same rows is what it chose itself.
        if self._sampler is None or self._rows != tuple(rows):
            self._sampler = DeviceSampler(self._vocab_size)
            self._sampler.extend([row.sampled for row in rows])
            self._rows = tuple(rows)
        if all(row.sampled.is_plain_greedy for row in rows):
            return _corrected(self._sampler.sample(logits), logits, rows)
        return self._sampler.sample(masked_on_device(logits, rows))

    def clear(self) -> None:
        self._rows = ()
        self._sampler = None


def _corrected(chosen: mx.array, logits: mx.array, rows: Sequence[Row]) -> mx.array:
    """Return the most likely tokens with those of constrained rows: the others' cost nothing."""
    places = [place for place, row in enumerate(rows) if row.mask is not None]
    if not places:
        return chosen
    masked = masked_on_device(
        logits[mx.array(places, dtype=mx.uint32)], [rows[place] for place in places]
    )
    chosen[mx.array(places, dtype=mx.uint32)] = mx.argmax(masked, axis=-1).astype(chosen.dtype)
    return chosen
