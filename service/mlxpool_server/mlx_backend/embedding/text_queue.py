"""Texts that wait to be embedded, and which of them share the next pass."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass

from mlxpool_server.domain import MAX_STRETCH, SHORT_TOKENS, Pooling


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """`slot` and `place` say whose it is, and which of theirs."""

    slot: int
    place: int
    tokens: tuple[int, ...]
    pooling: Pooling
    normalize: bool

    def __len__(self) -> int:
        return len(self.tokens)


class TextQueue:
    """Jobs take turns: each pass begins with a text of the next one, its longest."""

    def __init__(self, *, may_pad: bool) -> None:
        """`may_pad` False: only texts of one length share a pass."""
        self._may_pad = may_pad
        # By slot, whose turn is next first; each job's longest text first.
        self._jobs: dict[int, list[Text]] = {}

    def add(self, slot: int, texts: Iterable[Text]) -> None:
        self._jobs[slot] = sorted(texts, key=len, reverse=True)

    def remove(self, slot: int) -> None:
        """No harm when nothing of it waits."""
        self._jobs.pop(slot, None)

    def clear(self) -> None:
        self._jobs.clear()

    def take(self, num_tokens: int, longest: int | None = None) -> list[Text]:
        """The texts of the next pass, longest first, of one kind of pooling.

        With their padding they have at most `num_tokens`, or it is a single one. `longest`: leave
        longer ones where they are. None may be left that is short enough.
        """
        first = self._next(longest)
        if first is None:
            return []
        room = max(1, num_tokens // len(first))
        taken: list[Text] = []
        for slot in (first.slot, *(slot for slot in self._jobs if slot != first.slot)):
            taken += self._like(first, self._jobs[slot], room - len(taken))
            if len(taken) == room:
                break
        left = self._jobs.pop(first.slot)
        self._jobs = {slot: texts for slot, texts in self._jobs.items() if texts}
        if left:
            self._jobs[first.slot] = left
        return taken

    def _next(self, longest: int | None) -> Text | None:
        for texts in self._jobs.values():
            start = 0 if longest is None else _place(texts, longest)
            if start < len(texts):
                return texts[start]
        return None

    def _like(self, first: Text, texts: list[Text], room: int) -> list[Text]:
        """Take out up to `room` that may share a pass with `first`."""
        if texts[0].pooling is not first.pooling:
            return []
        shortest = len(first)
        if self._may_pad:
            # A pass costs more than so few tokens.
            is_short = len(first) <= SHORT_TOKENS
            shortest = 1 if is_short else -(-len(first) // MAX_STRETCH)
        start = _place(texts, len(first))
        end = min(_place(texts, shortest - 1), start + room)
        alike = texts[start:end]
        del texts[start:end]
        return alike


def _place(texts: list[Text], length: int) -> int:
    """Where those begin that are no longer than that."""
    return bisect_left(texts, -length, key=lambda text: -len(text))
