"""Quantised layers that take a decode step's rows as one matrix.

A step's hidden states are (rows, 1, size). MLX's quantised product then reads the weights anew for
each row; as (rows, size) it reads them once for all.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlxpool_server.mlx_backend.override import Call, override


def flatten_rows(model: nn.Module) -> None:
    """Teach a model's quantised layers, and those heads that are quantised embeddings."""
    for module in model.modules():
        if isinstance(module, nn.QuantizedLinear):
            override(module, "__call__", _flat)
        elif isinstance(module, nn.QuantizedEmbedding):
            override(module, "as_linear", _flat)


def _flat(product: Call, hidden: mx.array) -> mx.array:
    is_step = hidden.ndim == 3 and hidden.shape[1] == 1  # noqa: PLR2004
    return product(hidden[:, 0])[:, None] if is_step else product(hidden)
