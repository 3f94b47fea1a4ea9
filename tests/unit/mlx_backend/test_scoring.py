"""Log-probabilities of a batch's rows, against a plain forward pass."""

from __future__ import annotations

import math
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.utils import load_model

from mlxpool_server.domain import SamplingParams
from mlxpool_server.engine.backend import TokenScores
from mlxpool_server.mlx_backend.batch import MlxBatch
from mlxpool_server.mlx_backend.loaded_model import MlxModel
from mlxpool_server.mlx_backend.memory import device_kind
from mlxpool_server.mlx_backend.row import Row
from mlxpool_server.mlx_backend.sampling.row import SampledRow
from mlxpool_server.mlx_backend.scoring import LOWEST_LOGPROB, Scoring

GREEDY = SamplingParams(temperature=0.0, seed=1)
SAMPLED = SamplingParams(temperature=1.5, seed=5, logit_bias={7: 20.0}, repetition_penalty=1.5)
STEPS = 12

where = pytest.mark.parametrize("on_host", [True, False], ids=["host", "device"])


@pytest.fixture(scope="module")
def plain(folder: Path) -> nn.Module:
    return load_model(folder)[0]


def new_batch(model: MlxModel, on_host: bool) -> MlxBatch:
    batch = model.new_runner()
    batch._samples_on_host = on_host
    return batch


def run(batch: MlxBatch, slots: set[int]) -> dict[int, list[tuple[int, TokenScores | None]]]:
    """Step until all of these gave so many tokens: each with its scores."""
    told: dict[int, list[tuple[int, TokenScores | None]]] = {slot: [] for slot in slots}
    while any(len(each) < STEPS for each in told.values()):
        output = batch.step()
        assert output.scores.keys() <= {slot for slot, _ in output.tokens}
        for slot, token in output.tokens:
            told[slot].append((token, output.scores.get(slot)))
    return told


# A GPU's products of single precision are rounded, and by the number of rows.
TOLERANCE = 1e-4 if device_kind() == "cpu" else 3e-3


def check(
    plain: nn.Module, prompt: list[int], told: list[tuple[int, TokenScores | None]], count: int
) -> None:
    tokens = [token for token, _ in told]
    logits = plain(mx.array([prompt + tokens]))[0, len(prompt) - 1 : -1].astype(mx.float32)
    expected = np.asarray(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    for row, (token, scores) in zip(expected, told, strict=True):
        assert scores is not None
        assert scores.logprob == pytest.approx(row[token], abs=TOLERANCE)
        assert len(scores.top) == count
        best = np.sort(row)[::-1][:count]
        assert [value for _, value in scores.top] == pytest.approx(best.tolist(), abs=TOLERANCE)
        assert [row[word] for word, _ in scores.top] == pytest.approx(best.tolist(), abs=TOLERANCE)


@where
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_those_of_a_forward_pass(
    model: MlxModel, plain: nn.Module, on_host: bool, sampling: SamplingParams
) -> None:
    """From the first token on, in a batch with rows that want others, or none."""
    batch = new_batch(model, on_host)
    prompts = {0: [1, 2, 3], 1: list(range(20)), 2: [9], 3: [4, 5]}
    counts = {0: 5, 1: None, 2: 0, 3: 20}
    for slot, prompt in prompts.items():
        batch.add(slot, prompt, sampling, top_logprobs=counts[slot])
    told = run(batch, set(prompts))
    batch.close()
    for slot, count in counts.items():
        if count is None:
            assert all(scores is None for _, scores in told[slot])
        else:
            check(plain, prompts[slot], told[slot], count)


@where
def test_given_tokens(model: MlxModel, plain: nn.Module, on_host: bool) -> None:
    """A token that is put in the chosen one's place has its own."""
    batch = new_batch(model, on_host)
    batch.add(0, [1, 2, 3], GREEDY, top_logprobs=2)
    told = []
    while len(told) < STEPS:
        output = batch.step()
        told += [(token, output.scores[slot]) for slot, token in output.tokens]
        if output.tokens and len(told) == 3:
            batch.force(0, [11, 12])
    batch.close()
    assert [token for token, _ in told[3:5]] == [11, 12]
    check(plain, [1, 2, 3], told, 2)


@where
def test_rows_leave(model: MlxModel, plain: nn.Module, on_host: bool) -> None:
    """Who stays keeps its own."""
    batch = new_batch(model, on_host)
    for slot in range(3):
        batch.add(slot, [slot + 1, 5], GREEDY, top_logprobs=slot + 1)
    told: list[tuple[int, TokenScores | None]] = []
    while len(told) < STEPS:
        output = batch.step()
        told += [(token, output.scores.get(2)) for slot, token in output.tokens if slot == 2]
        if len(told) == 4:
            batch.remove([0, 1])
    batch.close()
    check(plain, [3, 5], told, 3)


def scored(logits: list[float], token: int, count: int, on_host: bool) -> TokenScores:
    row = Row(0, (1,), SampledRow(GREEDY, [1], len(logits)), top_logprobs=count)
    tokens = None if on_host else mx.array([token], dtype=mx.uint32)
    scoring = Scoring.of([row], mx.array([logits]), tokens)
    assert scoring is not None
    row.accept(token)
    scoring.tell({row})
    assert row.scores is not None
    return row.scores


@where
@pytest.mark.parametrize(
    "logits",
    [
        [math.nan] * 40,
        [-math.inf] * 40,
        [math.inf] * 40,
        [math.inf, -math.inf, math.nan, 0.0] * 10,
        [3e38, -3e38] * 20,
    ],
    ids=["nan", "-inf", "inf", "all kinds", "large"],
)
def test_finite_whatever_the_model_says(logits: list[float], on_host: bool) -> None:
    """Between -9999 and 0, of words that there are."""
    for token in range(4):
        scores = scored(logits, token, 20, on_host)
        assert LOWEST_LOGPROB <= scores.logprob <= 0
        assert len(scores.top) == 20
        for word, value in scores.top:
            assert 0 <= word < len(logits)
            assert LOWEST_LOGPROB <= value <= 0


@where
def test_largest_of_a_large_vocabulary(on_host: bool) -> None:
    """Wherever they stand, in order; more than there are words is all of them."""
    logits = np.random.default_rng(3).normal(size=5003).astype(np.float32)
    expected = np.argsort(-logits, kind="stable")[:20]
    scores = scored(logits.tolist(), 0, 20, on_host)
    assert [word for word, _ in scores.top] == expected.tolist()
    assert [word for word, _ in scored([0.0, 2.0, 1.0], 0, 20, on_host).top] == [1, 2, 0]


def test_nobody_asked() -> None:
    """Nothing is computed."""
    row = Row(0, (1,), SampledRow(GREEDY, [1], 4))
    assert Scoring.of([row], mx.zeros((1, 4)), None) is None
