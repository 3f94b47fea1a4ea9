"""Rows that join and leave a running batch, against mlx-lm's own generation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

from mlxpool_server.domain import Layout, ModelSpec, SamplingParams
from mlxpool_server.mlx_backend.batch import MlxBatch
from mlxpool_server.mlx_backend.loaded_model import MlxModel
from mlxpool_server.mlx_backend.loader import MlxLoader
from tiny_models import ARCHITECTURES, write_model

GREEDY = SamplingParams(temperature=0.0, seed=1)
SAMPLED = SamplingParams(temperature=1.0, seed=5)
# Different lengths: padding, chunks of prefill (16 tokens), a single token.
PROMPTS = [[1, 2, 3], list(range(40)), [9], list(range(100, 117)), [5] * 33]
STEPS = 24


def load(folder: Path) -> MlxModel:
    loader = MlxLoader(prefill_step_tokens=16, default_layout=Layout.FLOAT32)
    return loader.load(ModelSpec("tiny", folder), lambda _: None, lambda: False)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> MlxModel:
    return load(write_model(tmp_path_factory.mktemp("models") / "llama"))


@pytest.fixture
def batch(llama: MlxModel) -> Iterator[MlxBatch]:
    batch = llama.new_runner()
    yield batch
    batch.close()


def run(batch: MlxBatch, slot: int, count: int) -> list[int]:
    """Step until one slot gave so many tokens; what others give meanwhile is dropped."""
    tokens: list[int] = []
    while len(tokens) < count:
        tokens += [token for each, token in batch.step().tokens if each == slot]
    return tokens


def alone(model: MlxModel, prompt: list[int], sampling: SamplingParams, count: int) -> list[int]:
    batch = model.new_runner()
    batch.add(0, prompt, sampling)
    tokens = run(batch, 0, count)
    batch.close()
    return tokens


def test_greedy_is_mlx_lms(folder: Path) -> None:
    """Token for token, for every architecture, in a batch that rows join and leave."""
    reference = load_model(folder)[0]
    expected = [
        [
            token
            for token, _ in generate_step(
                mx.array(prompt), reference, max_tokens=STEPS, prefill_step_size=16
            )
        ]
        for prompt in PROMPTS
    ]
    batch = load(folder).new_runner()
    got: list[list[int]] = [[] for _ in PROMPTS]
    active: set[int] = set()
    step = 0
    while len(active) < len(PROMPTS) or any(len(tokens) < STEPS for tokens in got):
        # One joins every third step; each leaves when it has enough.
        if step % 3 == 0 and len(active) < len(PROMPTS):
            slot = len(active)
            active.add(slot)
            batch.add(slot, PROMPTS[slot], GREEDY)
        for slot, token in batch.step().tokens:
            got[slot].append(token)
        batch.remove([slot for slot in active if len(got[slot]) == STEPS])
        step += 1
        assert step < 200
    assert got == expected
    assert batch.kv_bytes() == 0


def test_prefill_is_reported_in_chunks(batch: MlxBatch) -> None:
    """Prompt tokens so far, growing to the whole prompt; then tokens."""
    batch.add(7, list(range(40)), GREEDY)
    seen: list[int] = []
    tokens: list[int] = []
    while not tokens:
        output = batch.step()
        seen += [done for slot, done in output.prefilled if slot == 7]
        tokens += [token for slot, token in output.tokens if slot == 7]
    assert seen == sorted(seen)
    assert seen[0] == 16
    assert seen[-1] == 40


def test_seed_gives_the_same_alone_and_in_company(llama: MlxModel) -> None:
    """Whatever the neighbours sample, join and leave."""
    expected = alone(llama, [1, 2, 3], SAMPLED, 20)
    batch = llama.new_runner()
    batch.add(1, [4, 5], replace(SAMPLED, seed=99, top_p=0.9))
    run(batch, 1, 3)
    batch.add(0, [1, 2, 3], SAMPLED)
    batch.add(2, [6] * 30, replace(SAMPLED, seed=7, top_k=5))
    got = run(batch, 0, 5)
    batch.remove([1])
    got += run(batch, 0, 15)
    assert got == expected
    assert alone(llama, [1, 2, 3], replace(SAMPLED, seed=6), 20) != expected
    batch.close()


def test_seeded_request_disturbs_nobody(llama: MlxModel) -> None:
    """A greedy neighbour gives what it gives alone."""
    expected = alone(llama, [8, 9], GREEDY, 20)
    batch = llama.new_runner()
    batch.add(0, [8, 9], GREEDY)
    batch.add(1, [8, 9], replace(SAMPLED, top_k=3, xtc_probability=0.5, min_p=0.1))
    assert run(batch, 0, 20) == expected
    batch.close()


@pytest.mark.parametrize(
    "sampling",
    [
        replace(GREEDY, logit_bias={3: 100.0}),
        replace(GREEDY, repetition_penalty=5.0),
        replace(GREEDY, presence_penalty=2.0, frequency_penalty=2.0),
    ],
    ids=["bias", "repetition", "presence and frequency"],
)
def test_processors_stay_with_their_row(llama: MlxModel, sampling: SamplingParams) -> None:
    """Also after rows before them left, and after new rows took their place."""
    plain = alone(llama, [8, 9], GREEDY, 24)
    processed = alone(llama, [8, 9], sampling, 24)
    assert plain != processed
    batch = llama.new_runner()
    batch.add(0, [1, 2], sampling)
    batch.add(1, [8, 9], GREEDY)
    batch.add(2, [8, 9], sampling)
    got: dict[int, list[int]] = {0: [], 1: [], 2: [], 3: []}

    def step(count: int) -> None:
        for _ in range(count):
            for slot, token in batch.step().tokens:
                got[slot].append(token)

    step(8)
    batch.remove([0])
    step(8)
    batch.add(3, [8, 9], GREEDY)
    step(8)
    for slot, expected in ((1, plain), (2, processed), (3, plain)):
        assert got[slot]
        assert got[slot] == expected[: len(got[slot])]
    batch.close()


def test_bias_forces_its_token(batch: MlxBatch) -> None:
    """A bias of 100 wins over everything."""
    batch.add(0, [1], replace(GREEDY, logit_bias={42: 100.0}))
    assert run(batch, 0, 5) == [42] * 5


@pytest.mark.parametrize(
    "sampling",
    [
        replace(SAMPLED, top_k=10**6),
        replace(SAMPLED, temperature=1e-6, top_p=1e-9),
        replace(SAMPLED, temperature=100.0, xtc_probability=1.0, xtc_threshold=0.0),
        replace(SAMPLED, min_p=1.0, penalty_context_size=2**31 - 1, presence_penalty=-2.0),
    ],
    ids=["top_k", "tiny", "hot", "everything"],
)
def test_extreme_requests_harm_no_neighbour(llama: MlxModel, sampling: SamplingParams) -> None:
    """They run, and the greedy row beside them is what it is alone."""
    expected = alone(llama, [8, 9], GREEDY, 10)
    batch = llama.new_runner()
    batch.add(0, [8, 9], GREEDY)
    batch.add(1, [3], sampling)
    assert run(batch, 0, 10) == expected
    assert all(0 <= token < 320 for token in run(batch, 1, 5))
    batch.close()


def test_removal_in_every_phase(llama: MlxModel) -> None:
    """Waiting, prefilling and decoding rows leave; the one that stays is not harmed."""
    expected = alone(llama, [8, 9], GREEDY, 12)
    batch = llama.new_runner()
    batch.add(0, [8, 9], GREEDY)
    got = run(batch, 0, 4)
    batch.add(1, list(range(200)), GREEDY)
    batch.remove([1])
    batch.add(2, list(range(200)), GREEDY)
    got += [token for _, token in batch.step().tokens]
    batch.remove([2])
    batch.add(3, [7], GREEDY)
    got += run(batch, 0, 4)
    batch.remove([3])
    got += run(batch, 0, 12 - len(got))
    assert got == expected
    batch.remove([0])
    assert batch.step().tokens == ()
    batch.close()


def test_kv_bytes_follow_the_rows(llama: MlxModel) -> None:
    """Two rows hold more than one; closing frees all."""
    batch = llama.new_runner()
    assert batch.kv_bytes() == 0
    batch.add(0, [1] * 10, GREEDY)
    run(batch, 0, 1)
    one = batch.kv_bytes()
    batch.add(1, [1] * 10, GREEDY)
    run(batch, 1, 1)
    assert batch.kv_bytes() > one > 0
    batch.close()
    assert batch.kv_bytes() == 0


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("num_before", [0, 1, 4])
def test_forced_tokens(llama: MlxModel, sampling: SamplingParams, num_before: int) -> None:
    """They come next, the model goes on from them as from its own, and a neighbour from its own."""
    expected = alone(llama, PROMPTS[1], sampling, 12)
    batch = llama.new_runner()
    batch.add(0, PROMPTS[0], sampling)
    before = run(batch, 0, num_before)
    forced = [7, 8, 9]
    batch.force(0, forced)
    batch.add(1, PROMPTS[1], sampling)
    tokens: dict[int, list[int]] = {0: list(before), 1: []}
    while len(tokens[1]) < 12 or len(tokens[0]) < num_before + 9:
        for slot, token in batch.step().tokens:
            tokens[slot].append(token)
    batch.close()
    assert tokens[1][:12] == expected
    assert tokens[0][num_before : num_before + 3] == forced
    if sampling is GREEDY:
        after = alone(llama, [*PROMPTS[0], *before, *forced], GREEDY, 6)
        assert tokens[0][num_before + 3 : num_before + 9] == after
