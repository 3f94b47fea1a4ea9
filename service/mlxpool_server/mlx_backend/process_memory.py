"""How much memory another process takes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

PS_LIMIT_S = 2.0


def resident_bytes(pid: int) -> int:
    """0: nobody can tell, or it is gone."""
    statm = Path(f"/proc/{pid}/statm")
    try:
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return resident_bytes_by_ps(pid)


def resident_bytes_by_ps(pid: int) -> int:
    """For systems without /proc, as macOS."""
    command = ["/bin/ps", "-o", "rss=", "-p", str(pid)]
    try:
        done = subprocess.run(  # noqa: S603 - a fixed command and a number
            command, capture_output=True, timeout=PS_LIMIT_S, check=False
        )
        return int(done.stdout or b"0") * 1024
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return 0
