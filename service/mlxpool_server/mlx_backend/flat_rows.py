"""Quantised layers that take a decode step's rows as one matrix.

A step's hidden states are (rows, 1, size). MLX's quantised product then reads the weights anew for
each row; as (rows, size) it reads them once for all.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


def flatten_rows(model: nn.Module) -> None:
    """Teach a model's quantised layers, and those heads that are quantised embeddings."""
    for module in model.modules():
        if isinstance(module, nn.QuantizedLinear):
            _teach(module, "__call__")
        elif isinstance(module, nn.QuantizedEmbedding):
            _teach(module, "as_linear")


def _teach(module: nn.Module, method: str) -> None:
    original = type(module)

    def flat(self: nn.Module, hidden: mx.array) -> mx.array:
        call = getattr(original, method)
        is_step = hidden.ndim == 3 and hidden.shape[1] == 1  # noqa: PLR2004
        output: mx.array = call(self, hidden[:, 0])[:, None] if is_step else call(self, hidden)
        return output

    module.__class__ = type(original.__name__, (original,), {method: flat})
