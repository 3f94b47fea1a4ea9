"""What earlier prompts and answers left in a model's caches, for prompts that begin the same.

A tree of segments. A segment holds, for each layer, the keys and values of some tokens, and begins
where its parent's tokens stop being shared. Layers whose state cannot be cut (windows, recurrent
ones) are kept as they were at a segment's end, so with them only whole segments count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlxpool_server.mlx_backend.pieces import Piece, join_pieces, piece_of

# Shorter ones cost more to keep than to compute again.
MIN_SEGMENT_TOKENS = 16


@dataclass(slots=True, eq=False)
class _Segment:
    tokens: tuple[int, ...]
    # One a layer.
    pieces: list[Piece]
    parent: _Segment | None
    # How many of the parent's tokens come before this one's.
    offset: int = 0
    # By the place in this one's tokens and their own first token.
    children: dict[tuple[int, int], list[_Segment]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)


class PrefixCache:
    """Engine thread only. One model's; never larger than its limit."""

    def __init__(self) -> None:
        # Of each owner: what an adapter computed is of use to its own prompts only.
        self._roots: dict[int, _Segment] = {}
        self._limit_bytes = 0
        self._nbytes = 0
        # Least recently used first; a segment is used with each of its children, and after them,
        # so the first one has none.
        self._order: dict[_Segment, None] = {}
        # Copies that the device does not know of yet.
        self._begun: list[mx.array] = []

    @property
    def nbytes(self) -> int:
        return self._nbytes

    @property
    def is_on(self) -> bool:
        return self._limit_bytes > 0

    def set_limit(self, limit_bytes: int) -> None:
        """Drop what is above it, least recently used first."""
        self._limit_bytes = limit_bytes
        self._shrink_to(limit_bytes)

    def clear(self) -> None:
        self._begun = []
        self._shrink_to(0)

    def count(self, prompt: Sequence[int], owner: int = 0) -> int:
        """How many of the prompt's first tokens `find` would give."""
        num_tokens = sum(count for _, count in self._path(prompt[:-1], owner))
        return num_tokens if num_tokens >= MIN_SEGMENT_TOKENS else 0

    def find(self, prompt: Sequence[int], owner: int = 0) -> tuple[int, list[Any] | None]:
        """How many of the prompt's first tokens are here, and caches of one row that hold them.

        At least the last token is left: its logits have to be computed.
        """
        path = self._path(prompt[:-1], owner)
        num_tokens = sum(count for _, count in path)
        if num_tokens < MIN_SEGMENT_TOKENS:
            return 0, None
        self._touch(path)
        layers = zip(*(segment.pieces for segment, _ in path), strict=True)
        counts = [count for _, count in path]
        return num_tokens, [join_pieces(pieces, counts) for pieces in layers]

    def keep(self, tokens: Sequence[int], caches: list[Any], row: int, owner: int = 0) -> None:
        """Remember what a row of a batch's caches holds of these tokens: all that it was fed."""
        if not self.is_on:
            return
        path = self._path(tokens, owner)
        self._touch(path)
        start = sum(count for _, count in path)
        if len(tokens) - start < MIN_SEGMENT_TOKENS:
            return
        pieces = [piece_of(cache, row, start, len(tokens)) for cache in caches]
        parent, offset = path[-1] if path else (self._root(owner), 0)
        segment = _Segment(tuple(tokens[start:]), pieces, parent, offset)
        if not self._make_room(segment.nbytes, path):
            return
        self._begun += [array for piece in pieces for array in piece.arrays]
        parent.children.setdefault((offset, segment.tokens[0]), []).append(segment)
        self._nbytes += segment.nbytes
        self._touch([*path, (segment, 0)])

    def begin_copies(self) -> None:
        """Hand the device what was kept; until that is done, it keeps whole batches' caches alive.

        On a CPU this waits for most of what was launched before it, so it is called behind a step.
        """
        if self._begun:
            mx.async_eval(self._begun)  # type: ignore[no-untyped-call]
            self._begun = []

    def _root(self, owner: int) -> _Segment:
        return self._roots.setdefault(owner, _Segment((), [], None))

    def _path(self, tokens: Sequence[int], owner: int) -> list[tuple[_Segment, int]]:
        """The segments that these tokens run through, and how many of each one's they share."""
        path: list[tuple[_Segment, int]] = []
        segment, count, start = self._root(owner), 0, 0
        while found := _longest(segment, count, tokens[start:]):
            segment, count = found
            path.append(found)
            start += count
        return path

    def _touch(self, path: list[tuple[_Segment, int]]) -> None:
        for segment, _ in reversed(path):
            self._order.pop(segment, None)
            self._order[segment] = None

    def _make_room(self, num_bytes: int, path: list[tuple[_Segment, int]]) -> bool:
        """Whether so much more fits now; what it would hang on has to stay."""
        if num_bytes + sum(segment.nbytes for segment, _ in path) > self._limit_bytes:
            return False
        # The path was just used: it goes last.
        self._shrink_to(self._limit_bytes - num_bytes)
        return True

    def _shrink_to(self, limit_bytes: int) -> None:
        while self._nbytes > limit_bytes:
            oldest = next(iter(self._order))
            del self._order[oldest]
            self._nbytes -= oldest.nbytes
            if oldest.parent is not None:
                key = oldest.offset, oldest.tokens[0]
                oldest.parent.children[key].remove(oldest)
                if not oldest.parent.children[key]:
                    del oldest.parent.children[key]


def _longest(segment: _Segment, offset: int, tokens: Sequence[int]) -> tuple[_Segment, int] | None:
    """The child at this place that shares most with `tokens`, and how much."""
    if not tokens:
        return None
    shared = [
        (child, _shared(child.tokens, tokens))
        for child in segment.children.get((offset, tokens[0]), ())
    ]
    usable = [
        (child, count)
        for child, count in shared
        if count == len(child.tokens) or _can_be_cut(child)
    ]
    return max(usable, key=lambda each: each[1], default=None)


def _can_be_cut(segment: _Segment) -> bool:
    return all(piece.can_be_cut for piece in segment.pieces)


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many of their first tokens are the same."""
    length = min(len(first), len(second))
    if tuple(first[:length]) == tuple(second[:length]):
        return length
    return next(index for index in range(length) if first[index] != second[index])
