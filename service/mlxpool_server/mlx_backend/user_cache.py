"""Where what this machine fetched or derived once is kept; deleting the folder is always safe."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """Return this user's folder for mlxpool, which may not exist yet.

    `MLXPOOL_CACHE_DIR` names it; otherwise the platform's convention does.
    """
    if named := os.environ.get("MLXPOOL_CACHE_DIR"):
        return Path(named).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mlxpool"
    # The XDG specification says to ignore a relative path.
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "mlxpool"
