"""Steps in which MLX itself raises, on its stream's thread, under a real engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import llama

from faults.broken_files import cut_behind_header
from faults.real_pool import RealHouse, finished, real_house
from mlxpool_server.domain import GenerationDelta, ModelState
from mlxpool_server.errors import GenerationFailedError
from tiny_models import write_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "m": write_model(root / "m"),
        "other": write_model(root / "other", "mamba"),
    }


class Fault:
    """Llamas' passes over as many tokens as `num_tokens` says fail; other models' never do."""

    def __init__(self) -> None:
        self.num_tokens = range(0)


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fault:
    """Such a pass adds a number that cannot be read from its file any more."""
    fault = Fault()
    forward = llama.LlamaModel.__call__
    file = tmp_path / "lost.safetensors"

    def failing(model: Any, inputs: mx.array, *args: Any, **options: Any) -> mx.array:
        hidden: mx.array = forward(model, inputs, *args, **options)
        if inputs.shape[1] not in fault.num_tokens:
            return hidden
        mx.save_safetensors(str(file), {"lost": mx.zeros((64,))})
        lost = mx.load(str(file))
        assert isinstance(lost, dict)
        cut_behind_header(file)
        return hidden + lost["lost"].sum()

    monkeypatch.setattr(llama.LlamaModel, "__call__", failing)
    return fault


PREFILL = range(2, 1000)
DECODE = range(1, 2)


async def fail(house: RealHouse, **options: Any) -> None:
    with pytest.raises(GenerationFailedError):
        await finished(house.generate(**options))


# With the greedy one tokens are chosen by MLX, else on the host, from logits that it reads.
@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize("failing", [PREFILL, DECODE], ids=["prefill", "decode"])
async def test_step_that_fails(
    folders: dict[str, Path], fault: Fault, failing: range, temperature: float
) -> None:
    """Its generation fails; the model stays loaded and answers the next as before."""
    async with real_house(folders) as house:
        expected = await house.answer()
        for _ in range(5):
            fault.num_tokens = failing
            await fail(house, temperature=temperature)
            fault.num_tokens = range(0)
            assert await house.state() is ModelState.READY
            assert await house.answer() == expected


async def test_steps_that_fail_one_after_the_other(folders: dict[str, Path], fault: Fault) -> None:
    """Three in a row and the model is unloaded, its memory freed; the next request loads it."""
    async with real_house(folders) as house:
        expected = await house.answer()
        fault.num_tokens = PREFILL
        for _ in range(3):
            await fail(house)
        await house.gone()
        assert house.pool.used_bytes == 0
        fault.num_tokens = range(0)
        assert await house.answer() == expected


async def test_stream_beside_a_step_that_fails(folders: dict[str, Path], fault: Fault) -> None:
    """A stream on another model gets the tokens that it gets alone."""
    async with real_house(folders) as house:
        expected = await house.answer("other", max_tokens=100)
        await house.load("m")
        stream = house.generate("other", max_tokens=100)
        async for event in stream:
            if isinstance(event, GenerationDelta):
                break
        fault.num_tokens = PREFILL
        await fail(house)
        assert await finished(stream) == expected
