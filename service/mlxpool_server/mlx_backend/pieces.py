"""What one row left in one layer's cache: cut out of a batch, and put together again."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import CacheList

from mlxpool_server.mlx_backend.row_cache import Lengths, RowCache


class Piece:
    """Arrays of one row and layer."""

    # Whether its first tokens can be used without its last.
    can_be_cut = False

    def __init__(self, arrays: Sequence[mx.array]) -> None:
        self.arrays = list(arrays)
        self.nbytes = sum(array.nbytes for array in self.arrays)


class KvPiece(Piece):
    """What a RowCache holds of some tokens: its parts, (1, heads, tokens, something) each."""

    can_be_cut = True

    def __init__(self, cache: RowCache, row: int, start: int, end: int) -> None:
        super().__init__(cache.cut(row, start, end))
        # Of its kind, and without its arrays.
        self.empty = cache.like(Lengths((0,)))


class StatePiece(Piece):
    """A whole cache, for layers whose state at an earlier token cannot be told."""

    def __init__(self, cache: Any) -> None:
        flat: Any = tree_flatten(cache.state)
        super().__init__([array for _, array in flat if isinstance(array, mx.array)])
        self.cache = cache


class ListPiece(Piece):
    """Of a layer that has several caches."""

    def __init__(self, pieces: list[Piece]) -> None:
        super().__init__([array for piece in pieces for array in piece.arrays])
        self.pieces = pieces
        self.can_be_cut = all(piece.can_be_cut for piece in pieces)


def piece_of(cache: Any, row: int, start: int, end: int) -> Piece:
    """A copy of what a batch's cache holds of one row's tokens from `start` to `end`."""
    if isinstance(cache, RowCache):
        return KvPiece(cache, row, start, end)
    if isinstance(cache, CacheList):
        return ListPiece([piece_of(each, row, start, end) for each in cache.caches])
    return StatePiece(cache.extract(row))


def join_pieces(pieces: Sequence[Any], counts: Sequence[int]) -> Any:
    """A batch's cache of one row, made of the first `counts` tokens of these pieces."""
    last = pieces[-1]
    if isinstance(last, ListPiece):
        parts = zip(*(piece.pieces for piece in pieces), strict=True)
        return CacheList(*(join_pieces(part, counts) for part in parts))
    if isinstance(last, StatePiece):
        return last.cache.merge([copy.deepcopy(last.cache)])
    cache = last.empty.like(Lengths((sum(counts),)))
    cuts = [
        [array[:, :, :count] for array in piece.arrays]
        for piece, count in zip(pieces, counts, strict=True)
    ]
    cache.parts = [mx.concatenate(list(part), axis=2) for part in zip(*cuts, strict=True)]
    return cache
