"""What MLX's sampler holds between steps: contexts and parameters of rows that come and go."""

from __future__ import annotations

import random
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlxpool_server.domain import SamplingParams
from mlxpool_server.mlx_backend.sampling.device import DeviceSampler, pick
from mlxpool_server.mlx_backend.sampling.row import SampledRow
from references.sampling import on_device, penalized

VOCAB = 30
BASE = SamplingParams(seed=1)
GREEDY = replace(BASE, temperature=0.0)
# Of every kind of parameter one.
NEIGHBOURS = [
    GREEDY,
    BASE,
    replace(BASE, top_p=0.5),
    replace(BASE, top_k=2),
    replace(BASE, min_p=0.3),
    replace(BASE, xtc_probability=1.0, xtc_threshold=0.0),
    replace(BASE, temperature=5.0),
    replace(BASE, repetition_penalty=3.0, penalty_context_size=2),
    replace(GREEDY, presence_penalty=2.0, penalty_context_size=7),
    replace(BASE, frequency_penalty=-1.0, penalty_context_size=2**31 - 1),
    replace(BASE, logit_bias={1: 5.0, 2: -5.0, 3: 1.0}),
    replace(BASE, top_p=0.7, top_k=4, min_p=0.01, xtc_probability=0.5, presence_penalty=1.0),
]


def random_logits(rng: random.Random, num_rows: int) -> np.ndarray:
    numbers = [[rng.gauss(0, 2) for _ in range(VOCAB)] for _ in range(num_rows)]
    return np.array(numbers, dtype=np.float32)


def random_penalties(rng: random.Random) -> SamplingParams:
    """Greedy, so that each token can be told from mlx-lm's logits."""
    if rng.random() < 0.3:
        return GREEDY
    return replace(
        GREEDY,
        repetition_penalty=rng.choice([1.0, 1.7]),
        presence_penalty=rng.choice([0.0, 1.3]),
        frequency_penalty=rng.choice([0.0, 0.9, -0.6]),
        penalty_context_size=rng.choice([1, 4, 9, 2**31 - 1]),
        logit_bias=rng.choice([{}, {5: 2.5, 6: -2.5}]),
    )


@pytest.mark.parametrize("seed", range(12))
def test_contexts_stay_with_their_rows(seed: int) -> None:
    """Rows join, leave and are sampled at random; each token is that of mlx-lm's penalties.

    No row is told its own tokens: the next step is built before anybody has read them.
    """
    rng = random.Random(seed)  # noqa: S311 - a repeatable one
    sampler = DeviceSampler(VOCAB)
    rows: list[SampledRow] = []
    contexts: list[list[int]] = []
    num_compared = 0
    for _ in range(40):
        action = rng.random()
        if not rows or action < 0.2:
            prompts = [
                rng.choices(range(VOCAB), k=rng.randint(1, 12)) for _ in range(rng.randint(1, 3))
            ]
            new = [SampledRow(random_penalties(rng), prompt, VOCAB) for prompt in prompts]
            sampler.extend(new)
            rows += new
            contexts += prompts
        elif action < 0.35 and len(rows) > 1:
            kept = sorted(rng.sample(range(len(rows)), rng.randint(1, len(rows) - 1)))
            sampler.keep(kept)
            rows = [rows[index] for index in kept]
            contexts = [contexts[index] for index in kept]
        else:
            logits = random_logits(rng, len(rows))
            tokens = np.asarray(sampler.sample(mx.array(logits))).tolist()
            for words, row, context, token in zip(logits, rows, contexts, tokens, strict=True):
                changed = penalized(words, row.params, context)
                assert changed[token] == pytest.approx(changed.max(), abs=1e-4)
                context.append(token)
                num_compared += 1
    assert num_compared > 20


def test_a_huge_context_size_takes_no_more_than_there_are_tokens() -> None:
    """A request may ask for 2**31 - 1; reserving that would end the process."""
    params = replace(BASE, presence_penalty=1.0, penalty_context_size=2**31 - 1)
    sampler = DeviceSampler(VOCAB)
    sampler.extend([SampledRow(params, [1, 2, 3], VOCAB), SampledRow(GREEDY, [1], VOCAB)])
    mx.eval(sampler.sample(mx.zeros((2, VOCAB))))
    assert sampler._context is not None
    assert sampler._context.shape == (2, 4)


def test_a_context_is_no_wider_than_what_rows_look_at() -> None:
    """It stops growing there, and shrinks once the row with the widest has left."""
    small = replace(GREEDY, presence_penalty=1.0, penalty_context_size=3)
    wide = replace(small, penalty_context_size=6)
    sampler = DeviceSampler(VOCAB)
    sampler.extend([SampledRow(each, [1] * 5, VOCAB) for each in (small, wide)])
    for _ in range(4):
        sampler.sample(mx.zeros((2, VOCAB)))
    assert sampler._context is not None
    assert sampler._context.shape == (2, 6)
    sampler.keep([0])
    sampler.sample(mx.zeros((1, VOCAB)))
    assert sampler._context.shape == (1, 3)


@pytest.mark.parametrize("seed", range(6))
def test_company_changes_nothing(seed: int) -> None:
    """Alone, among all kinds of neighbours and in any order, a row draws the same."""
    rng = random.Random(seed)  # noqa: S311 - a repeatable one
    logits = random_logits(rng, len(NEIGHBOURS))
    prompts = [rng.choices(range(VOCAB), k=rng.randint(1, 9)) for _ in NEIGHBOURS]

    def row(index: int) -> SampledRow:
        return SampledRow(replace(NEIGHBOURS[index], seed=index + seed), prompts[index], VOCAB)

    alone = [on_device(logits[[index]], [row(index)])[0] for index in range(len(NEIGHBOURS))]
    for size in (2, 5, len(NEIGHBOURS)):
        chosen = rng.sample(range(len(NEIGHBOURS)), size)
        got = on_device(logits[chosen], [row(index) for index in chosen])
        assert got == [alone[index] for index in chosen]


def test_greedy_rows_cost_an_argmax_only() -> None:
    """And what is told apart by nothing is the first of the likeliest."""
    sampler = DeviceSampler(VOCAB)
    sampler.extend([SampledRow(GREEDY, [1], VOCAB)] * 2)
    assert sampler.sample(mx.zeros((2, VOCAB))).tolist() == [0, 0]
    assert sampler._parameters is None


def test_greedy_rows_use_up_no_numbers() -> None:
    """A sampled row's place in its sequence does not depend on who is beside it."""
    rows = [SampledRow(GREEDY, [1], VOCAB), SampledRow(BASE, [1], VOCAB)]
    on_device(np.zeros((2, VOCAB), dtype=np.float32), rows)
    assert [row.position for row in rows] == [0, 1]


def test_half_precision_logits_are_sampled_in_single() -> None:
    """As a model on a GPU gives them; the sum of 30,000 words would stand still in bfloat16."""
    logits = mx.zeros((3, 30_000), dtype=mx.bfloat16)
    sampler = DeviceSampler(30_000)
    sampler.extend([SampledRow(replace(BASE, seed=seed), [1], 30_000) for seed in (1, 2, 3)])
    expected = [
        int(SampledRow(replace(BASE, seed=seed), [], 1).next_draw()[0] * 30_000)
        for seed in (1, 2, 3)
    ]
    assert sampler.sample(logits).tolist() == pytest.approx(expected, abs=2)


def test_a_sum_that_creeps_behind_the_last_word_picks_that_word() -> None:
    """A parallel sum need not stand still over words of no weight."""
    weights = mx.array([[0.0, 1.0, 1.0, 0.0, 0.0]])
    reached = mx.array([[0.0, 1.0, 2.0, 2.000001, 2.000001]])
    assert pick(weights, reached, mx.array([[1 - 2**-24]])).tolist() == [2]
    assert pick(weights, reached, mx.array([[2**-24]])).tolist() == [1]
