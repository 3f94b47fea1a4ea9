"""Layers that get the same array, run as one product."""

from __future__ import annotations

from contextlib import nullcontext

import mlx.core as mx
import mlx.nn as nn
import pytest

from fakes.counting_lock import CountingLock
from mlxpool_server.mlx_backend.flat_rows import flatten_rows
from mlxpool_server.mlx_backend.joined_products import join_products
from mlxpool_server.mlx_backend.weights import all_arrays

NAMES = ("q_proj", "k_proj", "v_proj")


class Attention(nn.Module):
    """The projections of a model with fewer key-value heads than query heads."""

    def __init__(self, *, bias: bool = False, bits: int = 0, v_bits: int = 0) -> None:
        super().__init__()
        for name, size in zip(NAMES, (96, 32, 32), strict=True):
            self[name] = nn.Linear(64, size, bias=bias)
        if bits:
            nn.quantize(
                self,
                group_size=32,
                class_predicate=lambda name, _: {
                    "group_size": 32,
                    "bits": v_bits if v_bits and name == "v_proj" else bits,
                },
            )
        mx.eval(self.parameters())

    def __call__(self, hidden: mx.array) -> list[mx.array]:
        return [self[name](hidden) for name in NAMES]


def products_of(monkeypatch: pytest.MonkeyPatch, module: Attention, hidden: mx.array) -> int:
    """How many products a pass takes."""
    count = 0

    def counted(function: object) -> object:
        def call(*arguments: object, **options: object) -> object:
            nonlocal count
            count += 1
            return function(*arguments, **options)  # type: ignore[operator]

        return call

    with monkeypatch.context() as patched:
        for kind in (nn.Linear, nn.QuantizedLinear):
            patched.setattr(kind, "__call__", counted(kind.__call__))
        module(hidden)
    return count


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (2, 7)])
@pytest.mark.parametrize(
    "kind", [{}, {"bias": True}, {"bits": 4}, {"bits": 8, "bias": True}], ids=str
)
def test_the_products_are_the_same(kind: dict[str, int], shape: tuple[int, int]) -> None:
    """For dense and quantised layers, a step and a prompt, pass after pass."""
    module = Attention(**kind)  # type: ignore[arg-type]
    inputs = [mx.random.normal((*shape, 64), key=mx.random.key(seed)) for seed in range(2)]
    expected = [module(hidden) for hidden in inputs]
    flatten_rows(module)
    join_products(module, nullcontext())
    for hidden, wanted in zip(inputs, expected, strict=True):
        for one, other in zip(module(hidden), wanted, strict=True):
            assert one.shape == other.shape
            assert mx.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "expected"), [({}, 1), ({"bits": 4}, 1), ({"bits": 4, "v_bits": 8}, 3)]
)
def test_alike_layers_take_one_product(
    monkeypatch: pytest.MonkeyPatch, kind: dict[str, int], expected: int
) -> None:
    """Layers stored in different ways stay apart."""
    module = Attention(**kind)  # type: ignore[arg-type]
    join_products(module, nullcontext())
    assert products_of(monkeypatch, module, mx.zeros((3, 1, 64))) == expected


def test_a_layer_that_asks_for_queries_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 3n's layers that share keys and values have weights for them all the same."""
    module = Attention()
    module.is_kv_shared_layer = True
    join_products(module, nullcontext())
    assert products_of(monkeypatch, module, mx.zeros((3, 1, 64))) == 3


def test_another_array_gets_its_own_product() -> None:
    """What was computed for one array is never given to another one."""
    module = Attention()
    hidden, other = (mx.random.normal((2, 1, 64), key=mx.random.key(seed)) for seed in range(2))
    expected = module["q_proj"](hidden), module["k_proj"](other), module["v_proj"](hidden)
    join_products(module, nullcontext())
    got = module["q_proj"](hidden), module["k_proj"](other), module["v_proj"](hidden)
    for one, wanted in zip(got, expected, strict=True):
        assert mx.allclose(one, wanted, atol=1e-5)


def test_a_replaced_kind_of_layer_is_left_alone() -> None:
    """It may do more than its product."""

    class Scaled(nn.Linear):
        def __call__(self, hidden: mx.array) -> mx.array:
            return 2 * super().__call__(hidden)

    module = Attention()
    module["k_proj"] = Scaled(64, 32, bias=False)
    hidden = mx.ones((1, 1, 64))
    expected = module(hidden)[1]
    join_products(module, nullcontext())
    assert mx.array_equal(module(hidden)[1], expected)


def test_the_weights_are_held_once() -> None:
    """The layers keep theirs by name, as parts of the joined ones, and the lock is held."""
    module, lock = Attention(), CountingLock()
    before = {name: module[name].weight for name in NAMES}
    size = sum(array.nbytes for array in all_arrays(module))
    join_products(module, lock)
    assert sum(array.nbytes for array in all_arrays(module)) == size
    assert all(mx.array_equal(module[name].weight, before[name]) for name in NAMES)
    assert lock.num_turns == 1
