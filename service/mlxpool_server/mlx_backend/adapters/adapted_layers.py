"""A model's linear layers, taught to add what the rows of a pass want added.

Rows without an adapter get bit for bit what they would get alone: their outputs are chosen, not
multiplied by nought.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from mlxpool_server.mlx_backend.adapters.adapter import Adapter, is_adaptable
from mlxpool_server.mlx_backend.override import Call, override

Rows = Sequence[Adapter | None]


class AdaptedLayers:
    """Engine thread only, but for its making. After all else that replaces a layer's call."""

    def __init__(self, model: nn.Module) -> None:
        # Those of the pass that is being built, and whose rows are whose; None: all rows are.
        self._uses: list[tuple[Adapter, mx.array | None]] = []
        for path, module in model.named_modules():
            if is_adaptable(path, module):
                override(module, "__call__", partial(self._call, path))

    @contextmanager
    def of(self, rows: Rows) -> Iterator[None]:
        """While the block builds a pass over these rows, in their order."""
        self._uses = _uses(rows)
        try:
            yield
        finally:
            self._uses = []

    def _call(self, path: str, product: Call, hidden: mx.array) -> mx.array:
        output = product(hidden)
        for adapter, mask in self._uses:
            layer = adapter.layers.get(path)
            if layer is None:
                continue
            # As mlx-lm's LoRALinear computes it.
            change = (hidden @ layer.first) @ layer.second
            changed = output + (adapter.scale * change).astype(hidden.dtype)
            output = changed if mask is None else mx.where(_shaped(mask, output), changed, output)
        return output


def _uses(rows: Rows) -> list[tuple[Adapter, mx.array | None]]:
    used = {adapter.number: adapter for adapter in rows if adapter is not None}
    if len(used) == 1 and None not in rows:
        return [(adapter, None) for adapter in used.values()]
    return [(adapter, mx.array([row is adapter for row in rows])) for adapter in used.values()]


def _shaped(mask: mx.array, output: mx.array) -> mx.array:
    """One bool a row for (rows, tokens, size), or for (rows * tokens, size)."""
    if output.shape[0] != mask.shape[0]:
        mask = mx.repeat(mask, output.shape[0] // mask.shape[0])
    return mask.reshape(-1, *([1] * (output.ndim - 1)))
