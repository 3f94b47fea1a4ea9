"""MLX's arrays as numpy's."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray


def as_numpy(array: mx.array) -> NDArray[Any]:
    """Wait for it; no copy is made on a CPU.

    Raises: what MLX's evaluation failed with. numpy alone takes no notice of that, and reads
    memory that was never written.
    """
    mx.eval(array)
    return np.asarray(array)
