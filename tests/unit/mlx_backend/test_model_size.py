"""Sizes from headers alone."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from mlxpool_server.domain import Layout
from mlxpool_server.mlx_backend.model_size import (
    TensorHeader,
    estimate_bytes,
    missing_weights,
    read_headers,
    vocabulary_of,
)

QUANTIZED = [
    TensorHeader("a.weight", "U32", (64, 16)),
    TensorHeader("a.scales", "BF16", (64, 4)),
    TensorHeader("a.biases", "BF16", (64, 4)),
    TensorHeader("a.bias", "BF16", (64,)),
    TensorHeader("norm.weight", "F32", (64,)),
    TensorHeader("steps", "I32", (2,)),
]


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (Layout.STORED, 64 * 16 * 4 + 2 * 64 * 4 * 2 + 64 * 2 + 64 * 4 + 8),
        # 64 rows of 4 groups of 32 values.
        (Layout.FLOAT32, 64 * 128 * 4 + 64 * 4 + 64 * 4 + 8),
        (Layout.BFLOAT16, 64 * 128 * 2 + 64 * 2 + 64 * 2 + 8),
    ],
)
def test_estimate(layout: Layout, expected: int) -> None:
    """Packed weights unfold, their scales go, whole numbers keep their size."""
    assert estimate_bytes(QUANTIZED, {"group_size": 32, "bits": 4}, layout) == expected


def test_layers_with_a_group_size_of_their_own() -> None:
    """config.json may say so by layer."""
    quantization = {"group_size": 64, "a": {"group_size": 32}}
    whole = estimate_bytes(QUANTIZED, quantization, Layout.FLOAT32)
    assert whole == estimate_bytes(QUANTIZED, {"group_size": 32}, Layout.FLOAT32)


def test_headers_of_every_dtype(tmp_path: Path) -> None:
    """Bytes by tensor are what MLX holds."""
    dtypes = [mx.float32, mx.bfloat16, mx.float16, mx.uint32, mx.int8, mx.uint8, mx.int64, mx.bool_]
    arrays = {str(dtype): mx.zeros((3, 5), dtype) for dtype in dtypes}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), arrays)
    headers = {header.name: header.nbytes for header in read_headers(tmp_path)}
    assert headers == {name: array.nbytes for name, array in arrays.items()}


def test_shards_are_added_up(tmp_path: Path) -> None:
    """Only model*.safetensors: mlx-lm reads no others."""
    for name in ("model-00001-of-00002", "model-00002-of-00002", "adapters"):
        mx.save_safetensors(str(tmp_path / f"{name}.safetensors"), {name: mx.zeros((4,))})
    assert sum(header.nbytes for header in read_headers(tmp_path)) == 32
    assert missing_weights(tmp_path) == ""


def test_missing_weights(tmp_path: Path) -> None:
    """None at all, or fewer than the index names."""
    assert missing_weights(tmp_path) == "model*.safetensors"
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"a": mx.zeros((1,))})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    assert missing_weights(tmp_path) == "model-1.safetensors"
    index.write_text("[")
    assert missing_weights(tmp_path) == ""


def test_vocabulary() -> None:
    """The embedding's rows, packed or not; 0 when there is none."""
    assert vocabulary_of([TensorHeader("model.embed_tokens.weight", "U32", (320, 8))]) == 320
    assert vocabulary_of([TensorHeader("lm_head.weight", "F32", (320, 8))]) == 0
