"""Key-value caches of a running batch in which every row has a length of its own.

mlx-lm aligns the rows of a batch at their ends: each join and each padded prompt shifts whole
caches. Here rows begin at 0 and end where they end; what lies behind a row's end is masked, and
written over by its next tokens. Caches that are no plain KVCache (windows, recurrent state) stay
mlx-lm's own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import CacheList, KVCache, make_prompt_cache

from mlxpool_server.domain import KV_STEP_TOKENS
from mlxpool_server.mlx_backend import row_attention


class Lengths:
    """How many tokens each row holds: one immutable value for all the layers of a batch.

    What is derived from it is kept, so that every layer of a forward pass shares the arrays.
    """

    def __init__(self, rows: tuple[int, ...]) -> None:
        self.rows = rows
        self.longest = max(rows, default=0)
        self.is_even = all(row == self.longest for row in rows)
        self._offsets: mx.array | None = None
        self._masks: dict[tuple[int, int | None], mx.array] = {}
        self._next: Lengths | None = None
        self._places: dict[tuple[int, ...], mx.array] = {}
        self._following: dict[tuple[int, ...], Lengths] = {}

    @property
    def offsets(self) -> mx.array:
        """Shape (rows,), int32."""
        if self._offsets is None:
            self._offsets = mx.array(self.rows, dtype=mx.int32)
        return self._offsets

    def next(self) -> Lengths:
        """With one token more in each row."""
        if self._next is None:
            self._next = Lengths(tuple(row + 1 for row in self.rows))
        return self._next

    def plus(self, counts: Sequence[int]) -> Lengths:
        return self._derive(
            tuple(row + count for row, count in zip(self.rows, counts, strict=True))
        )

    def keep(self, indices: Sequence[int]) -> Lengths:
        return self._derive(tuple(self.rows[index] for index in indices))

    def join(self, other: Lengths) -> Lengths:
        return self._derive(self.rows + other.rows)

    def mask(self, num_tokens: int, window: int | None) -> mx.array:
        """What `num_tokens` new tokens of each row may look at: (rows, 1, num_tokens, keys)."""
        key = (num_tokens, window)
        if key not in self._masks:
            keys = mx.arange(self.longest + num_tokens, dtype=mx.int32)
            queries = self.offsets[:, None] + mx.arange(num_tokens, dtype=mx.int32)
            mask = keys <= queries[..., None]
            if window is not None:
                mask = mask & (keys > queries[..., None] - window)
            self._masks[key] = mask[:, None]
        return self._masks[key]

    def places(self, shape: tuple[int, ...]) -> mx.array:
        """Where one new token of each row goes, of this shape: (rows, heads, 1, head size)."""
        if shape not in self._places:
            offsets = self.offsets[:, None, None, None]
            self._places[shape] = mx.broadcast_to(offsets, shape)
        return self._places[shape]

    def _derive(self, rows: tuple[int, ...]) -> Lengths:
        if rows not in self._following:
            self._following[rows] = Lengths(rows)
        return self._following[rows]


class RowCache:
    """One layer's keys and values, shape (rows, heads, capacity, head size) each.

    Speaks the protocol of mlx-lm's batched caches.
    """

    def __init__(self, lengths: Lengths) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.lengths = lengths
        self._padded_from: tuple[Lengths, Sequence[int]] | None = None

    @property
    def offset(self) -> int | mx.array:
        """Tokens before the next one; one number while all rows have as many."""
        return self.lengths.longest if self.lengths.is_even else self.lengths.offsets

    @property
    def state(self) -> tuple[mx.array | None, mx.array | None]:
        return self.keys, self.values

    @property
    def nbytes(self) -> int:
        if self.keys is None or self.values is None:
            return 0
        return self.keys.nbytes + self.values.nbytes

    def size(self) -> int:
        return self.lengths.longest

    def empty(self) -> bool:
        return self.keys is None

    def is_trimmable(self) -> bool:
        return True

    def make_mask(
        self, num_tokens: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        if self.lengths.is_even and window_size is None and not return_array:
            return None if num_tokens == 1 else "causal"
        mask = self.lengths.mask(num_tokens, window_size)
        if num_tokens == 1 and window_size is None:
            row_attention.remember(mask, self.lengths.offsets)
        return mask

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        num_tokens = keys.shape[2]
        end = self.lengths.longest + num_tokens
        self.keys = self._write(_grown(self.keys, keys, end), keys)
        self.values = self._write(_grown(self.values, values, end), values)
        if num_tokens == 1:
            self.lengths = self.lengths.next()
        else:
            self.lengths = self.lengths.plus([num_tokens] * keys.shape[0])
        return self.keys[..., :end, :], self.values[..., :end, :]

    def prepare(self, *, lengths: Sequence[int], right_padding: Sequence[int]) -> None:
        """The next tokens are padded on the right to one length; `lengths` of them count."""
        del right_padding
        self._padded_from = (self.lengths, lengths)

    def finalize(self) -> None:
        """Forget the padding of the last pass."""
        if self._padded_from is not None:
            before, counts = self._padded_from
            self.lengths = before.plus(counts)
            self._padded_from = None

    def filter(self, indices: Sequence[int]) -> None:
        self.lengths = self.lengths.keep(indices)
        if self.keys is not None and self.values is not None:
            # The type that an embedding is looked up with: its kernel is there already.
            kept = mx.array(list(indices), dtype=mx.uint32)
            end = _capacity(self.lengths.longest)
            self.keys = self.keys[kept, :, :end]
            self.values = self.values[kept, :, :end]

    def extend(self, other: RowCache) -> None:
        """Append the rows of `other`."""
        num_rows = len(self.lengths.rows), len(other.lengths.rows)
        self.lengths = self.lengths.join(other.lengths)
        self.keys = _stacked(self.keys, other.keys, num_rows)
        self.values = _stacked(self.values, other.values, num_rows)

    def extract(self, index: int) -> KVCache:
        """A copy of one row."""
        row = KVCache()
        if self.keys is not None:
            row.offset = self.lengths.rows[index]
            row.keys, row.values = self.cut(index, 0, row.offset)
        return row

    def cut(self, index: int, start: int, end: int) -> tuple[mx.array, mx.array]:
        """A copy of one row's keys and values from one token to another; it is not empty."""
        held = slice(index, index + 1), slice(None), slice(start, end)
        keys, values = self.state
        if keys is None or values is None:
            raise IndexError(index)
        return mx.contiguous(keys[held]), mx.contiguous(values[held])

    def _write(self, held: mx.array, new: mx.array) -> mx.array:
        rows, _, num_tokens, _ = new.shape
        if self.lengths.is_even:
            start = self.lengths.longest
            held[:, :, start : start + num_tokens] = new
            return held
        if num_tokens == 1:
            return mx.put_along_axis(held, self.lengths.places(new.shape), new, axis=2)
        for row in range(rows):
            start = self.lengths.rows[row]
            held[row, :, start : start + num_tokens] = new[row]
        return held


def new_caches(model: nn.Module, num_rows: int) -> list[Any]:
    """Empty caches for `num_rows` rows, one a layer.

    Raises: UnbatchableError when the model has a cache that knows one row only.
    """
    lengths = Lengths((0,) * num_rows)
    return [_batched(cache, lengths) for cache in make_prompt_cache(model)]


def batch_problem(model: nn.Module) -> str:
    """Why several rows do not fit into the model's caches; empty when they do."""
    try:
        new_caches(model, 1)
    except UnbatchableError as error:
        return f"its {error} holds one row only"
    return ""


class UnbatchableError(Exception):
    """The model has a cache that cannot hold a batch; the message names its class."""


def _batched(cache: Any, lengths: Lengths) -> Any:
    if type(cache) is KVCache:
        return RowCache(lengths)
    if isinstance(cache, CacheList):
        return CacheList(*(_batched(each, lengths) for each in cache.caches))
    if not hasattr(cache, "merge"):
        raise UnbatchableError(type(cache).__name__)
    return cache.merge([copy.copy(cache) for _ in lengths.rows])


def _capacity(num_tokens: int) -> int:
    return -(-num_tokens // KV_STEP_TOKENS) * KV_STEP_TOKENS


def _grown(held: mx.array | None, new: mx.array, end: int) -> mx.array:
    """`held` with room for `end` tokens."""
    room = _capacity(end) - (0 if held is None else held.shape[2])
    if held is not None and room <= 0:
        return held
    rows, heads, _, size = new.shape
    fresh = mx.zeros((rows, heads, room, size), new.dtype)
    return fresh if held is None else mx.concatenate([held, fresh], axis=2)


def _stacked(
    first: mx.array | None, second: mx.array | None, num_rows: tuple[int, int]
) -> mx.array | None:
    """Both, with as much room a row; None has so many rows that hold nothing yet."""
    known = second if first is None else first
    if known is None:
        return None
    held = [
        mx.zeros((rows, *known.shape[1:]), known.dtype) if each is None else each
        for each, rows in zip((first, second), num_rows, strict=True)
    ]
    capacity = max(each.shape[2] for each in held)
    return mx.concatenate([_padded(each, capacity) for each in held])


def _padded(held: mx.array, capacity: int) -> mx.array:
    missing = capacity - held.shape[2]
    return mx.pad(held, [(0, 0), (0, 0), (0, missing), (0, 0)]) if missing else held
