"""Hidden states to one vector a text."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlxpool_server.domain import Pooling

# As torch's normalize: a vector of zeros stays one.
_SHORTEST = 1e-12


def pooled(hidden: mx.array, lengths: Sequence[int], pooling: Pooling) -> mx.array:
    """Of (rows, tokens, size), padded on the right, a vector a row: (rows, size), float32."""
    match pooling:
        case Pooling.CLS:
            return hidden[:, 0].astype(mx.float32)
        case Pooling.LAST_TOKEN:
            last = mx.array(list(lengths), dtype=mx.int32) - 1
            return mx.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0].astype(mx.float32)
        case Pooling.MEAN:
            return summed(hidden, lengths) / mx.array(list(lengths), dtype=mx.float32)[:, None]


def summed(hidden: mx.array, lengths: Sequence[int]) -> mx.array:
    """The sum over each row's own tokens, float32: what padding is, even NaN, does not count."""
    is_own = mx.arange(hidden.shape[1])[None] < mx.array(list(lengths))[:, None]
    return mx.where(is_own[..., None], hidden.astype(mx.float32), 0.0).sum(axis=1)


def normalized(vectors: np.ndarray) -> np.ndarray:
    """Each row of (rows, size) at length 1."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    shortened: np.ndarray = vectors / np.maximum(lengths, _SHORTEST)
    return shortened
