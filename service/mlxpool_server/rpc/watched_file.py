"""Whether files have changed: a few stat calls, cheap enough for every connection and call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

# Of each file; None where it is not there. A link that is swapped changes it, too.
State = tuple[tuple[int, int, int] | None, ...]


def state_of(files: Sequence[Path]) -> State:
    return tuple(map(_state, files))


def _state(file: Path) -> tuple[int, int, int] | None:
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
