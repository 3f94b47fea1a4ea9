"""Whether files have changed: a few stat calls, cheap enough for every connection and call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

# None where the file is not there. A link that is swapped changes it, too.
FileState = tuple[int, int, int] | None
State = tuple[FileState, ...]


def state_of(files: Sequence[Path]) -> State:
    return tuple(map(file_state, files))


def file_state(file: Path) -> FileState:
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
