"""Layers that read the same input, run as one product: queries, keys and values, or gate and up.

On a GPU a small batch's step is bound by how many products are launched, not by their size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxpool_server.mlx_backend.override import Call, override

# As mlx-lm's models name them; each of a group is called with the same array.
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

OPTIONS = ("bits", "group_size", "mode")


def join_products(model: nn.Module, processors: AbstractContextManager[None]) -> None:
    """Teach a model's modules, after `flatten_rows`, which would hide that they get the same array.

    What they hold takes no more memory than before. `processors` is held for each group.
    """
    for module in list(model.modules()):
        if getattr(module, "is_kv_shared_layer", False):
            # It asks for queries only: the other parts would be computed, and kept, for nobody.
            continue
        for names in GROUPS:
            layers = [module.get(name) for name in names]
            if _are_alike(layers):
                with processors:
                    _join(layers)


def _are_alike(layers: Sequence[Any]) -> bool:
    first = layers[0]
    kind = _class_of(first)
    return kind is not None and all(
        _class_of(layer) is kind and _facts(layer) == _facts(first) for layer in layers
    )


def _class_of(layer: Any) -> type | None:
    """None for what is no plain layer: it may do more than its product."""
    own: type = type(layer)
    kinds: tuple[type, ...] = (nn.Linear, nn.QuantizedLinear)
    for kind in kinds:
        # One whose method was replaced keeps its name.
        if own is kind or (kind in own.__bases__ and own.__name__ == kind.__name__):
            return kind
    return None


def _facts(layer: nn.Module) -> list[object]:
    """What has to be the same of layers that are joined."""
    options = [getattr(layer, name, None) for name in OPTIONS]
    arrays = [(name, layer[name].shape[1:], layer[name].dtype) for name in _arrays(layer)]
    return [*options, *arrays]


def _arrays(layer: nn.Module) -> list[str]:
    return sorted(name for name, value in layer.items() if isinstance(value, mx.array))


def _join(layers: list[Any]) -> None:
    first = layers[0]
    ends = list(accumulate(layer.weight.shape[0] for layer in layers))
    # With its options, and what was replaced in it.
    whole = copy.copy(first)
    for name in _arrays(first):
        whole[name] = mx.concatenate([layer[name] for layer in layers])
        mx.eval(whole[name])
        for layer, part in zip(layers, mx.split(whole[name], ends[:-1]), strict=True):
            layer[name] = part
        # Views, so that the originals are freed layer by layer.
        mx.eval([layer[name] for layer in layers])
    shared = _Shared(whole, ends)
    for index, layer in enumerate(layers):
        override(layer, "__call__", partial(shared.part, index))


class _Shared:
    """One product for all of a group: who is called first computes it, the others find it."""

    def __init__(self, whole: nn.Module, ends: list[int]) -> None:
        self._whole = whole
        self._ends = ends
        self._hidden: mx.array | None = None
        self._parts: dict[int, mx.array] = {}

    def part(self, index: int, _: Call, hidden: mx.array) -> mx.array:
        if hidden is not self._hidden or index not in self._parts:
            parts = mx.split(self._whole(hidden), self._ends[:-1], axis=-1)
            self._hidden, self._parts = hidden, dict(enumerate(parts))
        part = self._parts.pop(index)
        if not self._parts:
            self._hidden = None
        return part
