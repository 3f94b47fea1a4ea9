"""In what order a decode whose rows are constrained hands its work to the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import pytest

from mlxpool_server.domain import SamplingParams
from mlxpool_server.mlx_backend.decode import Decode
from mlxpool_server.mlx_backend.mask_maker import MaskMaker
from mlxpool_server.mlx_backend.row import Row
from mlxpool_server.mlx_backend.sampling.row import SampledRow

VOCAB_SIZE = 64
GREEDY = SamplingParams(temperature=0.0, seed=1)


class Model:
    def __call__(
        self, tokens: mx.array, caches: list[Any], counts: Sequence[int], adapters: Any
    ) -> mx.array:
        words = mx.broadcast_to(mx.arange(VOCAB_SIZE), (len(counts), VOCAB_SIZE))
        return (words * tokens).astype(mx.float32)


class AnyToken:
    def allowed(self) -> bytes:
        return b"\xff" * (VOCAB_SIZE // 8)

    def advance(self, token_id: int) -> None:
        """It does not matter which."""


@pytest.mark.parametrize("samples_on_host", [True, False])
def test_a_token_is_there_before_the_next_pass(
    *, samples_on_host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the next pass it would be known only when that is done, and its mask later still."""
    masks = MaskMaker()
    row = Row(0, (1,), SampledRow(GREEDY, [1], VOCAB_SIZE), mask=masks.begin(AnyToken()))
    row.accept(2)
    model: Any = Model()
    decode = Decode(model, VOCAB_SIZE, masks, samples_on_host=samples_on_host)
    decode.extend([row], [])
    decode.step()
    shapes: list[tuple[int, ...]] = []
    evaluate: Any = mx.async_eval

    def recorded(array: mx.array, *others: Any) -> None:
        shapes.append(array.shape)
        evaluate(array, *others)

    monkeypatch.setattr(mx, "async_eval", recorded)
    assert len(decode.step()) == 1
    masks.close()
    assert shapes == [(1,), (1, VOCAB_SIZE)]
