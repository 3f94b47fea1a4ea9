"""Finds fixed strings in text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


def first_marker(text: str, markers: Sequence[str]) -> tuple[int, int] | None:
    """Return (start, index in `markers`) of the one that ends first, the longest of those.

    So what is found does not depend on how the text was split into pieces. None: there is none.
    """
    starts = [
        (start + len(marker), start, index)
        for index, marker in enumerate(markers)
        if (start := text.find(marker)) >= 0
    ]
    if not starts:
        return None
    _, start, index = min(starts)
    return start, index


def open_tail(text: str, markers: Sequence[str]) -> int:
    """How many characters at the text's end may be the start of a marker."""
    longest = max(map(len, markers), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        tail = text[-size:]
        if any(marker.startswith(tail) for marker in markers):
            return size
    return 0
