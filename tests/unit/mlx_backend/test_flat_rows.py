"""Quantised layers that see a step's rows as one matrix."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxpool_server.mlx_backend.flat_rows import flatten_rows


class Layers(nn.Module):
    """A quantised layer, a quantised embedding that is a head, and one that is not quantised."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.QuantizedLinear(64, 32, bias=True, group_size=32, bits=4)
        self.embedding = nn.QuantizedEmbedding(40, 64, group_size=32, bits=4)
        self.plain = nn.Linear(64, 32)


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 7), (3, 4)])
def test_the_product_is_the_same(shape: tuple[int, int]) -> None:
    """For one row and many, a step and a prompt."""
    layers = Layers()
    hidden = mx.random.normal((*shape, 64), key=mx.random.key(1))
    expected = layers.linear(hidden), layers.embedding.as_linear(hidden), layers.plain(hidden)
    flatten_rows(layers)
    got = layers.linear(hidden), layers.embedding.as_linear(hidden), layers.plain(hidden)
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        assert mx.allclose(one, other, atol=1e-5)


def test_the_product_gets_a_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is what makes it fast where weights are read once a matrix."""
    seen: list[tuple[int, ...]] = []
    product = mx.quantized_matmul

    def spy(hidden: mx.array, *arguments: object, **options: object) -> mx.array:
        seen.append(hidden.shape)
        return product(hidden, *arguments, **options)  # type: ignore[arg-type]

    layers = Layers()
    flatten_rows(layers)
    monkeypatch.setattr(mx, "quantized_matmul", spy)
    layers.linear(mx.zeros((5, 1, 64)))
    layers.linear(mx.zeros((1, 7, 64)))
    layers.embedding.as_linear(mx.zeros((5, 1, 64)))
    assert seen == [(5, 64), (1, 7, 64), (5, 64)]


def test_it_is_still_the_same_kind_of_layer() -> None:
    """Whoever asks what a layer is gets the same answer; its parameters keep their names."""
    layers = Layers()
    names = set(layers.parameters()["linear"])
    flatten_rows(layers)
    assert isinstance(layers.linear, nn.QuantizedLinear)
    assert isinstance(layers.embedding, nn.QuantizedEmbedding)
    assert type(layers.plain) is nn.Linear
    assert set(layers.parameters()["linear"]) == names
    assert layers.embedding(mx.array([1, 2])).shape == (2, 64)
