"""The CUDA kernel against the same sampling in MLX's operations: only where there is CUDA."""

from __future__ import annotations

import random

import mlx.core as mx
import numpy as np
import pytest

from mlxpool_server.domain import SamplingParams
from mlxpool_server.mlx_backend.memory import device_kind
from mlxpool_server.mlx_backend.sampling import cuda
from mlxpool_server.mlx_backend.sampling.device import DeviceSampler
from mlxpool_server.mlx_backend.sampling.row import SampledRow

pytestmark = pytest.mark.skipif(device_kind() != "cuda", reason="no CUDA device")

NUM_STEPS = 3
# Single precision may decide otherwise at the border of a filter or of a word's share.
MAX_DIFFERENT = 0.01


def any_params(rng: random.Random, vocab_size: int) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.0, 0.3, 0.8, 1.3, 5.0]),
        top_p=rng.choice([1.0, 0.95, 0.5, 0.1, 1e-6]),
        top_k=rng.choice([0, 1, 5, 40, vocab_size]),
        min_p=rng.choice([0.0, 0.05, 0.3, 1.0]),
        repetition_penalty=rng.choice([1.0, 1.2]),
        presence_penalty=rng.choice([0.0, 0.5]),
        frequency_penalty=rng.choice([0.0, 0.3, -0.6]),
        penalty_context_size=rng.choice([1, 4, 64, 2**31 - 1]),
        logit_bias=rng.choice([{}, {1: 5.0, 2: -5.0}, {0: -100.0, 3: 1.0, 7: 2.0}]),
        xtc_probability=rng.choice([0.0, 0.0, 1.0, 0.5]),
        xtc_threshold=rng.choice([0.0, 0.1, 0.3]),
        seed=rng.randrange(-(1 << 63), 1 << 63),
    )


@pytest.mark.parametrize("vocab_size", [30, 1000, 49152, 128257])
def test_the_kernel_picks_the_words_that_operations_pick(
    vocab_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hundreds of rows of random parameters get the same word from both, step after step."""
    rng = random.Random(vocab_size)  # noqa: S311 - a repeatable one
    num_rows, num_different, num_compared = 16, 0, 0
    for trial in range(8):
        params = [any_params(rng, vocab_size) for _ in range(num_rows)]
        prompts = [rng.choices(range(vocab_size), k=rng.randint(1, 90)) for _ in params]
        picked = []
        for is_cuda in (True, False):
            monkeypatch.setattr(cuda, "is_supported", lambda is_cuda=is_cuda: is_cuda)
            sampler = DeviceSampler(vocab_size)
            sampler.extend([SampledRow(*each, vocab_size) for each in zip(params, prompts)])  # noqa: B905
            tokens = []
            for step in range(NUM_STEPS):
                numbers = np.random.default_rng((trial, step)).normal(0, 2, (num_rows, vocab_size))
                dtype = (mx.float32, mx.bfloat16, mx.float16)[trial % 3]
                tokens.append(sampler.sample(mx.array(numbers).astype(dtype)).tolist())
            picked.append(np.array(tokens))
        num_different += int((picked[0] != picked[1]).sum())
        num_compared += picked[0].size
    assert num_different <= MAX_DIFFERENT * num_compared


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
@pytest.mark.parametrize("top_k", [0, 5])
def test_logits_without_probabilities_are_taken_greedily(odd: float, top_k: int) -> None:
    """As in numpy; and no thread may see what another one makes of them."""
    numbers = np.random.default_rng(3).normal(0, 2, (16, 1000)).astype(np.float32)
    numbers[:, 7] = odd
    params = SamplingParams(temperature=1.0, top_k=top_k, xtc_probability=1.0, seed=4)
    sampler = DeviceSampler(1000)
    sampler.extend([SampledRow(params, [], 1000) for _ in numbers])
    assert sampler.sample(mx.array(numbers)).tolist() == [7] * 16
