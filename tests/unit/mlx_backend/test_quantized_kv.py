"""Keys and values in 4 and 8 bits, against mlx-lm's own quantised cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models import cache as mlx_caches
from mlx_lm.utils import load_model

from mlxpool_server.domain import KvQuantization, Layout, ModelSpec, SamplingParams
from mlxpool_server.errors import LoadFailedError
from mlxpool_server.mlx_backend.loaded_model import MlxModel
from mlxpool_server.mlx_backend.loader import MlxLoader
from mlxpool_server.mlx_backend.memory import device_kind
from mlxpool_server.mlx_backend.quantized_row_cache import QuantizedRowCache
from mlxpool_server.mlx_backend.row_cache import Lengths
from tiny_models import RARE_ARCHITECTURES, write_model

GREEDY = SamplingParams(temperature=0.0, seed=1)
# Different lengths: padding, chunks of prefill (16 tokens), a single token.
PROMPTS = [[1, 2, 3], list(range(40)), [9], list(range(100, 117)), [5] * 33]
STEPS = 24
EIGHT_BITS, FOUR_BITS = KvQuantization(8, 32), KvQuantization(4, 32)
# Of a float32: the values' own bits, and a scale and a bias for each 32 of them.
SHARE = {EIGHT_BITS: (8 + 2) / 32, FOUR_BITS: (4 + 2) / 32}


def write(folder: Path, architecture: str = "llama", **changes: Any) -> Path:
    return write_model(folder / architecture, architecture, **({"head_dim": 32} | changes))


def loader() -> MlxLoader:
    return MlxLoader(prefill_step_tokens=16, default_layout=Layout.FLOAT32)


def load(folder: Path, quantization: KvQuantization | None = EIGHT_BITS) -> MlxModel:
    spec = ModelSpec("tiny", folder, kv_quantization=quantization)
    return loader().load(spec, lambda _: None, lambda: False)


def generate_all(model: MlxModel) -> tuple[list[list[int]], int]:
    """Tokens of all prompts, one joining every third step, and the most bytes of their caches."""
    batch = model.new_runner()
    got: list[list[int]] = [[] for _ in PROMPTS]
    most, step = 0, 0
    while any(len(tokens) < STEPS for tokens in got):
        slot, is_turn = divmod(step, 3)
        if slot < len(PROMPTS) and not is_turn:
            batch.add(slot, PROMPTS[slot], GREEDY)
        for each, token in batch.step().tokens:
            got[each].append(token)
        most = max(most, batch.kv_bytes())
        batch.remove([each for each, tokens in enumerate(got) if len(tokens) == STEPS])
        step += 1
        assert step < 400
    batch.close()
    return got, most


def mlx_lms(folder: Path, prompt: list[int], quantization: KvQuantization) -> list[int]:
    """What mlx-lm generates alone, with its own quantised cache from the first token on."""
    model = load_model(folder)[0]
    caches = [
        each.to_quantized(quantization.group_size, quantization.bits)
        if type(each) is mlx_caches.KVCache
        else each
        for each in mlx_caches.make_prompt_cache(model)
    ]
    steps = generate_step(
        mx.array(prompt), model, max_tokens=STEPS, prefill_step_size=16, prompt_cache=caches
    )
    return [token for token, _ in steps]


# MLX 0.32.4 has no quantised product over a batch there, and mlx-lm's cache needs one.
has_reference = pytest.mark.skipif(
    device_kind() == "cuda", reason="mlx-lm's quantised cache does not run on CUDA"
)


@has_reference
@pytest.mark.parametrize("quantization", [EIGHT_BITS, FOUR_BITS])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "qwen3_next"])
def test_a_batch_gives_mlx_lms_tokens(
    architecture: str, quantization: KvQuantization, tmp_path: Path
) -> None:
    """Rows that join and leave; layers with a window or recurrent state beside quantised ones."""
    folder = write(tmp_path, architecture)
    expected = [mlx_lms(folder, prompt, quantization) for prompt in PROMPTS]
    got, _ = generate_all(load(folder, quantization))
    assert got == expected


@pytest.mark.parametrize("quantization", [EIGHT_BITS, FOUR_BITS])
def test_it_takes_as_much_less_memory(quantization: KvQuantization, tmp_path: Path) -> None:
    """Packed values, scales and biases, to the byte; and the footprint knows."""
    folder = write(tmp_path)
    _, plain_bytes = generate_all(load(folder, None))
    _, held_bytes = generate_all(load(folder, quantization))
    assert held_bytes == plain_bytes * SHARE[quantization]
    plain, rounded = (
        loader().inspect(ModelSpec("tiny", folder, kv_quantization=each))
        for each in (None, quantization)
    )
    assert plain is not None
    assert rounded is not None
    per_token = plain.footprint.kv_bytes_per_token
    assert rounded.footprint.kv_bytes_per_token == per_token * SHARE[quantization]
    # Its attention writes the scores to memory, on every device.
    assert rounded.footprint.score_bytes > 0


def test_a_prefix_that_is_cached(tmp_path: Path) -> None:
    """Another prompt goes on from the middle of one, with the tokens it would have had."""
    model = load(write(tmp_path))
    first, second = list(range(60)), [*range(50), 7, 8, 9]
    batch = model.new_runner()
    batch.limit_prompt_cache(1 << 24)
    batch.add(0, first, GREEDY)
    tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
    cached: dict[int, int] = {}

    def run(slot: int) -> None:
        while len(tokens[slot]) < STEPS:
            output = batch.step()
            cached.update(output.cached)
            for each, token in output.tokens:
                tokens[each].append(token)
        batch.remove([slot])

    run(0)
    batch.add(1, second, GREEDY)
    run(1)
    assert cached == {1: 50}
    batch.limit_prompt_cache(0)
    batch.add(2, second, GREEDY)
    run(2)
    assert tokens[1] == tokens[2]
    batch.close()


@has_reference
def test_a_model_whose_rows_cannot_share_a_batch(tmp_path: Path) -> None:
    """It is served a row at a time, and rounds what it can."""
    text_config = RARE_ARCHITECTURES["llama4"]["text_config"] | {"head_dim": 32}
    folder = write(tmp_path, "llama4", text_config=text_config)
    model = load(folder)
    assert model.batch_problem
    got, _ = generate_all(model)
    assert got == [mlx_lms(folder, prompt, EIGHT_BITS) for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("architecture", "changes", "problem"),
    [
        ("llama", {"head_dim": 48}, "divisible"),
        ("mamba", {}, "no plain cache of keys and values"),
    ],
)
def test_a_model_that_cannot_round_is_not_loaded(
    architecture: str, changes: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    """The load says why; nobody gets a cache of another kind than was asked for."""
    with pytest.raises(LoadFailedError, match=problem):
        load(write(tmp_path, architecture, **changes))


def test_what_attention_gets_is_what_was_written() -> None:
    """To the precision of 8 bits, for rows of different lengths."""
    cache = QuantizedRowCache(Lengths((0, 0)), EIGHT_BITS)
    rng = np.random.default_rng(1)
    keys, values = (mx.array(rng.normal(size=(2, 3, 7, 64)).astype(np.float32)) for _ in "kv")
    cache.prepare(lengths=[7, 4], right_padding=[0, 3])
    cache.update_and_fetch(keys, values)
    cache.finalize()
    fetched = cache.update_and_fetch(keys[:, :, :1], values[:, :, :1])
    for got, wrote in zip(fetched, (keys, values), strict=True):
        held = np.asarray(mx.dequantize(*got, 32, 8) if isinstance(got, tuple) else got)
        wanted = np.asarray(wrote)
        assert held.shape[2] == 8
        assert np.allclose(held[0, :, :7], wanted[0], atol=0.02)
        assert np.allclose(held[1, :, :4], wanted[1, :, :4], atol=0.02)
        assert np.allclose(held[0, :, 7], wanted[0, :, 0], atol=0.02)
        assert np.allclose(held[1, :, 4], wanted[1, :, 0], atol=0.02)
