"""Rows of keys and values in 4 or 8 bits, as mlx-lm's attention reads them."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlxpool_server.domain import KvQuantization
from mlxpool_server.mlx_backend.row_cache import Lengths, RowCache

Quantized = tuple[mx.array, ...]


class QuantizedRowCache(RowCache):
    """Its parts: packed values, scales and biases of the keys, then those of the values."""

    def __init__(self, lengths: Lengths, quantization: KvQuantization) -> None:
        super().__init__(lengths)
        self._quantization = quantization
        # mlx-lm's attention asks for these.
        self.bits = quantization.bits
        self.group_size = quantization.group_size

    def encoded(self, keys: mx.array, values: mx.array) -> Sequence[mx.array]:
        return [
            part
            for array in (keys, values)
            for part in mx.quantize(array, group_size=self.group_size, bits=self.bits)
        ]

    def fetched(self, parts: Sequence[mx.array]) -> tuple[Quantized, Quantized]:
        return tuple(parts[:3]), tuple(parts[3:])

    def like(self, lengths: Lengths) -> QuantizedRowCache:
        return QuantizedRowCache(lengths, self._quantization)
