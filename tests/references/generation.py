"""What a model says alone, by mlx-lm's own loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generate_step

from mlxpool_server.domain import SamplingParams
from references.sampling import processors_of

# Two words nearer to each other than this may change places by rounding.
CLEAR_MARGIN = 1e-3


def greedy_alone(
    model: nn.Module,
    prompt: Sequence[int],
    count: int,
    sampling: SamplingParams | None = None,
    caches: list[Any] | None = None,
) -> list[int]:
    """Up to `count` tokens of a greedy request; fewer where the next one is not clear."""
    params = sampling or SamplingParams()
    processors = processors_of(params)
    if params == SamplingParams(temperature=params.temperature, seed=params.seed):
        # They would do nothing, slowly.
        processors = []
    tokens: list[int] = []
    for token, logprobs in generate_step(
        mx.array(list(prompt)),
        model,
        max_tokens=count,
        logits_processors=processors,
        prompt_cache=caches,
    ):
        second, first = np.sort(np.asarray(logprobs))[-2:]
        if first - second < CLEAR_MARGIN:
            break
        tokens.append(int(token))
    return tokens
