"""A lazily read model's arrays, brought into memory a portion at a time.

So that progress shows, a cancelled load stops soon, and on a CPU no step of the engine waits for
more than one portion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear
from mlx_lm.utils import dequantize_model

from mlxpool_server.mlx_backend.model_size import EMBEDDINGS

PORTION_BYTES = 8 * 1024 * 1024


def evaluated(
    model: nn.Module, dtype: mx.Dtype | None, processors: AbstractContextManager[None]
) -> Iterator[int]:
    """Evaluate every array; yield the bytes done so far after each portion.

    `dtype` None leaves the weights as they are stored; else they are dequantised into it.
    `processors` is held while a portion is evaluated.
    """
    done = 0
    for nbytes in _evaluations(model, dtype, processors):
        done += nbytes
        yield done


def all_arrays(model: nn.Module) -> list[mx.array]:
    """All arrays of a model, those too that parameters() skips (RoPE frequencies, for one)."""
    found: dict[int, mx.array] = {}

    def visit(value: object) -> None:
        if isinstance(value, mx.array):
            found[id(value)] = value
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)

    for module in model.modules():
        visit(dict(module))
        visit(vars(module))
    return list(found.values())


def _evaluations(
    model: nn.Module, dtype: mx.Dtype | None, processors: AbstractContextManager[None]
) -> Iterator[int]:
    """Yield the bytes of each portion."""
    large: list[mx.array] = []
    if dtype is not None:
        stored = {name: _stored_weight(module) for name, module in model.named_modules()}
        dequantize_model(model)
        model.set_dtype(dtype)
        for name, module in model.named_modules():
            read_rows = stored.get(name)
            if read_rows is not None and module.weight.nbytes > PORTION_BYTES:
                module.weight = mx.zeros(module.weight.shape, dtype)
                large.append(module.weight)
                yield from _filled(module.weight, read_rows, processors)
    portion: list[mx.array] = []
    for array in all_arrays(model):
        if any(array is each for each in large):
            continue
        portion.append(array)
        if sum(each.nbytes for each in portion) >= PORTION_BYTES:
            yield _evaluate(portion, processors)
            portion = []
    if portion:
        yield _evaluate(portion, processors)


def _stored_weight(module: nn.Module) -> Callable[[slice], mx.array] | None:
    """How to read some rows of a module's weight, dequantised."""
    if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding | QuantizedSwitchLinear):
        # Not the module itself: its place in the model will be another's.
        weight, scales, biases = module.weight, module.scales, module.get("biases")
        options = (module.group_size, module.bits, module.mode)
        return lambda rows: mx.dequantize(
            weight[rows], scales[rows], None if biases is None else biases[rows], *options
        )
    weight = module.get("weight")
    return None if weight is None else lambda rows: weight[rows]


def _filled(
    weight: mx.array,
    read_rows: Callable[[slice], mx.array],
    processors: AbstractContextManager[None],
) -> Iterator[int]:
    """Fill a large weight some rows at a time."""
    # A turn each: the memory is written for the first time here, and the stored form read.
    _evaluate([weight], processors)
    _evaluate([read_rows(slice(0, 1))], processors)
    num_rows = max(1, PORTION_BYTES * weight.shape[0] // weight.nbytes)
    for start in range(0, weight.shape[0], num_rows):
        rows = slice(start, min(start + num_rows, weight.shape[0]))
        weight[rows] = read_rows(rows).astype(weight.dtype)
        _evaluate([weight], processors)
        yield weight.nbytes * (rows.stop - rows.start) // weight.shape[0]


def _evaluate(arrays: list[mx.array], processors: AbstractContextManager[None]) -> int:
    """Return how many bytes these are."""
    with processors:
        mx.eval(arrays)
    return sum(array.nbytes for array in arrays)


def embedding_rows(model: nn.Module) -> int:
    """How many tokens have an input embedding; 0 when it is not found."""
    names = {name.removesuffix(".weight") for name in EMBEDDINGS}
    found = [
        (path.rpartition(".")[2] in names, part.weight.shape[0])
        for path, part in model.named_modules()
        if isinstance(part, nn.Embedding | nn.QuantizedEmbedding)
    ]
    known = [rows for is_known, rows in found if is_known]
    return min(known) if known else max((rows for _, rows in found), default=0)
