"""Finds stop sequences in streamed text, across token and delta borders."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Passes text on, except a tail that may turn out to be the start of a stop sequence.

    The match that ends first wins, the longest of those: what is cut does not depend on how the
    text was split into pushes.
    """

    def __init__(self, sequences: Sequence[str]) -> None:
        self._sequences = tuple(sequences)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Return the text that is certain not to be part of a match; none after a match."""
        if self.matched is not None:
            return ""
        pending = self._held + text
        match = self._first_match(pending)
        if match is not None:
            end, sequence = match
            self.matched = sequence
            self._held = ""
            return pending[: end - len(sequence)]
        held = self._longest_open_tail(pending)
        self._held = pending[len(pending) - held :]
        return pending[: len(pending) - held]

    def finish(self) -> str:
        """Return the tail that was held back: no more text will complete it."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> tuple[int, str] | None:
        ends = [
            (start + len(sequence), sequence)
            for sequence in self._sequences
            if (start := text.find(sequence)) >= 0
        ]
        return min(ends, key=lambda end: (end[0], -len(end[1])), default=None)

    def _longest_open_tail(self, text: str) -> int:
        longest = max(map(len, self._sequences), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            tail = text[-size:]
            if any(sequence.startswith(tail) for sequence in self._sequences):
                return size
        return 0
