"""Finds stop sequences in streamed text, across token and delta borders."""

from __future__ import annotations

from collections.abc import Sequence

from mlxpool_server.markers import first_marker, open_tail


class StopMatcher:
    """Passes text on, except a tail that may turn out to be the start of a stop sequence."""

    def __init__(self, sequences: Sequence[str]) -> None:
        self._sequences = tuple(sequences)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Return the text that is certain not to be part of a match; none after a match."""
        if not self._sequences:
            return text
        if self.matched is not None:
            return ""
        pending = self._held + text
        found = first_marker(pending, self._sequences)
        if found is not None:
            start, index = found
            self.matched = self._sequences[index]
            self._held = ""
            return pending[:start]
        held = open_tail(pending, self._sequences)
        self._held = pending[len(pending) - held :]
        return pending[: len(pending) - held]

    def finish(self) -> str:
        """Return the tail that was held back: no more text will complete it."""
        held, self._held = self._held, ""
        return held
