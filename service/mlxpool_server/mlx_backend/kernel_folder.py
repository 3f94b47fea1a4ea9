"""Where MLX keeps the CUDA kernels that it compiles, seconds to half a minute each."""

from __future__ import annotations

import os
from importlib.metadata import version

import mlx.core as mx

from mlxpool_server.mlx_backend.memory import device_kind
from mlxpool_server.mlx_backend.user_cache import cache_folder

# MLX asks when it compiles the first one.
VARIABLE = "MLX_PTX_CACHE_DIR"


def keep_kernels() -> None:
    """Keep them in this user's cache folder, unless the variable names another.

    MLX's own choice is below the system's temporary folder: gone with the machine's or container's
    next start, and anybody's to write to. Its files' names do not say for which device they are.
    """
    if device_kind() == "cuda":
        architecture = str(mx.device_info().get("architecture", "cuda"))
        folder = cache_folder() / "kernels" / f"mlx-{version('mlx')}-{architecture}"
        os.environ.setdefault(VARIABLE, str(folder))
