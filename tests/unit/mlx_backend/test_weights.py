"""Weights a portion at a time: the arrays of one large evaluation, and processors in between."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import dequantize_model, load_model

from mlxpool_server.mlx_backend import weights as weights_module
from mlxpool_server.mlx_backend.weights import all_arrays, evaluated
from tiny_models import write_model

DTYPES = [None, mx.float32, mx.bfloat16, mx.float16]
# Between a norm's weights and a layer's: some arrays are filled by rows, some come together.
PORTION_BYTES = 5000


class Processors:
    """Notes whether they are held, as often as somebody wants them."""

    def __init__(self) -> None:
        self.is_held = False
        self.num_holds = 0

    def __enter__(self) -> None:
        assert not self.is_held
        self.is_held = True
        self.num_holds += 1

    def __exit__(self, *_: object) -> None:
        self.is_held = False


@pytest.fixture(autouse=True)
def _small_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "PORTION_BYTES", PORTION_BYTES)


def read(folder: Path) -> nn.Module:
    return load_model(folder, lazy=True)[0]


def parameters(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def in_one_go(folder: Path, dtype: mx.Dtype | None) -> dict[str, mx.array]:
    model = read(folder)
    if dtype is not None:
        dequantize_model(model)
        model.set_dtype(dtype)
    mx.eval(model.parameters())
    return parameters(model)


def check(folder: Path, dtype: mx.Dtype | None) -> None:
    model = read(folder)
    for _ in evaluated(model, dtype, nullcontext()):
        pass
    got, expected = parameters(model), in_one_go(folder, dtype)
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].dtype == array.dtype, name
        assert mx.array_equal(got[name], array), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "4-bit"])
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_the_arrays_are_those_of_one_large_evaluation(
    tied: bool, quantized: bool, dtype: mx.Dtype | None, tmp_path: Path
) -> None:
    """Bit for bit, in every layout, though most weights are filled some rows at a time."""
    check(write_model(tmp_path / "m", tie_word_embeddings=tied, quantized=quantized), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", ["gemma3_text", "mamba", "qwen3_next", "falcon_h1"])
def test_other_architectures(architecture: str, dtype: mx.Dtype | None, tmp_path: Path) -> None:
    """Convolutions, experts and arrays that belong to no layer."""
    check(write_model(tmp_path / "m", architecture), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", ["gemma3_text", "mamba", "falcon_h1"])
def test_other_quantised_architectures(
    architecture: str, dtype: mx.Dtype | None, tmp_path: Path
) -> None:
    """Whatever layers of them are quantised."""
    check(write_model(tmp_path / "m", architecture, quantized=True), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantised_experts(dtype: mx.Dtype | None, tmp_path: Path) -> None:
    """mlx-lm's own kind of layer, with a matrix for each expert."""
    check(write_model(tmp_path / "m", "qwen3_next", quantized=True), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "4-bit"])
def test_bytes_rise_to_the_total(quantized: bool, dtype: mx.Dtype | None, tmp_path: Path) -> None:
    """In steps of about a portion, and the last of them is all that the model holds."""
    model = read(write_model(tmp_path / "m", quantized=quantized))
    told = list(evaluated(model, dtype, nullcontext()))
    assert told == sorted(told)
    assert len(told) == len(set(told))
    assert told[-1] == sum(array.nbytes for array in all_arrays(model))
    assert len(told) > 5


@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "4-bit"])
def test_large_weights_come_in_small_portions(quantized: bool, tmp_path: Path) -> None:
    """Once dequantised, no portion is much more than the limit: that is how long a step waits."""
    model = read(write_model(tmp_path / "m", quantized=quantized))
    told = [0, *evaluated(model, mx.float32, nullcontext())]
    steps = [after - before for before, after in itertools.pairwise(told)]
    assert max(steps) < 2 * PORTION_BYTES


@pytest.mark.parametrize("dtype", [None, mx.float32])
def test_processors_are_held_while_a_portion_is_evaluated_and_no_longer(
    dtype: mx.Dtype | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two portions a step of the engine may have them."""
    processors = Processors()
    evaluate = mx.eval
    held: list[bool] = []

    def spied(*arrays: object) -> None:
        held.append(processors.is_held)
        evaluate(*arrays)

    monkeypatch.setattr(mx, "eval", spied)
    model = read(write_model(tmp_path / "m", quantized=True))
    held.clear()
    num_portions = 0
    for _ in evaluated(model, dtype, processors):
        num_portions += 1
        assert not processors.is_held
    assert held == [True] * len(held)
    # A large weight takes turns of its own before its first portion.
    assert processors.num_holds >= num_portions > 5
    assert processors.num_holds == len(held)


def test_arrays_outside_of_the_parameters_are_found(tmp_path: Path) -> None:
    """RoPE frequencies and the like belong to the thread that made them until evaluated."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._freqs = mx.arange(4) * 2
            self.rows = [mx.ones(2), {"deep": (mx.zeros(3),)}]

    model = nn.Sequential(Inner(), nn.Linear(2, 2))
    found = {array.shape for array in all_arrays(model)}
    assert found == {(4,), (2,), (3,), (2, 2)}


def test_an_array_that_two_layers_share_counts_once() -> None:
    """So that the measured size is the allocated one."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model.layers[1].weight = model.layers[0].weight
    assert sum(array.nbytes for array in all_arrays(model)) == 4 * 4 * 4
