"""Attention over rows of different lengths, in its own CUDA kernel: only where there is CUDA."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlxpool_server.mlx_backend import row_attention
from mlxpool_server.mlx_backend.memory import device_kind
from mlxpool_server.mlx_backend.row_attention import row_attention as attend

pytestmark = pytest.mark.skipif(device_kind() != "cuda", reason="no CUDA device")

CAPACITY = 512
# Of 16-bit numbers, against single precision.
MAX_ERROR = 4e-3


@pytest.mark.parametrize(
    ("size", "num_heads", "kv_heads", "dtype"),
    [
        (64, 9, 3, mx.bfloat16),
        (64, 4, 4, mx.float16),
        (128, 32, 8, mx.bfloat16),
        (128, 64, 8, mx.float16),
        (256, 8, 1, mx.bfloat16),
    ],
)
@pytest.mark.parametrize("num_tokens", [1, 37, 300])
def test_each_row_sees_its_own_tokens(
    size: int, num_heads: int, kv_heads: int, dtype: mx.Dtype, num_tokens: int
) -> None:
    """What lies behind a row's end is never looked at; the rest is plain softmax attention."""
    num_rows = 6
    queries = mx.random.normal((num_rows, num_heads, 1, size)).astype(dtype)
    keys, values = (
        mx.random.normal((num_rows, kv_heads, CAPACITY, size)).astype(dtype)[:, :, :num_tokens]
        for _ in range(2)
    )
    offsets = mx.array([row * 97 % num_tokens for row in range(num_rows)], dtype=mx.int32)
    is_seen = (mx.arange(num_tokens) <= offsets[:, None])[:, None, None]
    found = attend(queries, keys, values, offsets, size**-0.5).astype(mx.float32)
    wide = [mx.repeat(each.astype(mx.float32), num_heads // kv_heads, 1) for each in (keys, values)]
    scores = queries.astype(mx.float32) * size**-0.5 @ wide[0].swapaxes(-1, -2)
    wanted = mx.softmax(mx.where(is_seen, scores, -mx.inf), axis=-1) @ wide[1]
    error = mx.linalg.norm(found - wanted) / mx.linalg.norm(wanted)
    assert error.item() < MAX_ERROR


def test_another_mask_goes_to_mlx() -> None:
    """Only the mask that was said to be the rows' lengths is replaced by them."""
    row_attention.install()
    queries = mx.random.normal((2, 4, 1, 64)).astype(mx.bfloat16)
    keys = mx.random.normal((2, 4, 9, 64)).astype(mx.bfloat16)
    nothing = mx.zeros((2, 1, 1, 9), dtype=mx.bool_)
    first = (mx.arange(9) < 1)[None, None, None] | nothing
    row_attention.remember(nothing, mx.array([8, 8], dtype=mx.int32))
    found = mx.fast.scaled_dot_product_attention(queries, keys, keys, scale=1.0, mask=first)
    assert mx.allclose(found, keys[:, :, :1]).item()
