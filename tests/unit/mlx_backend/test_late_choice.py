"""When a decode whose rows are constrained learns its tokens, and who waits for whom."""

from __future__ import annotations

import time
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


class SlowModel:
    """Some 100 ms a pass on two cores, nearly all of them on the device."""

    def __init__(self) -> None:
        self._weight = mx.eye(1024) * 0.5

    def __call__(self, tokens: mx.array, caches: list[Any], counts: Sequence[int]) -> mx.array:
        hidden = mx.broadcast_to(tokens.astype(mx.float32).sum(), (1024, 1024))
        for _ in range(40):
            hidden = hidden @ self._weight
        return mx.broadcast_to(hidden[:1, :VOCAB_SIZE], (len(counts), VOCAB_SIZE)) + 0.0


class Recording:
    """Allows every token; says when it was told of one."""

    def __init__(self) -> None:
        self.advanced_at: list[float] = []

    def allowed(self) -> bytes:
        return b"\xff" * (VOCAB_SIZE // 8)

    def advance(self, token_id: int) -> None:
        self.advanced_at.append(time.monotonic())


@pytest.mark.parametrize("samples_on_host", [True, False])
def test_the_next_mask_is_begun_beside_the_next_pass(*, samples_on_host: bool) -> None:
    """A guide hears of a token long before the logits behind it are there."""
    masks = MaskMaker()
    guide = Recording()
    row = Row(0, (1,), SampledRow(GREEDY, [1], VOCAB_SIZE), mask=masks.begin(guide))
    row.accept(2)
    model: Any = SlowModel()
    decode = Decode(model, VOCAB_SIZE, masks, samples_on_host=samples_on_host)
    decode.extend([row], [])
    decode.step()
    decode.settle()
    started_at = time.monotonic()
    assert len(decode.step()) == 1
    decode.settle()
    settled_at = time.monotonic()
    masks.close()
    assert len(guide.advanced_at) == 1
    assert guide.advanced_at[0] - started_at < (settled_at - started_at) / 2
