"""Prompts that begin as earlier ones did: the same tokens, sooner, within the limit."""

from __future__ import annotations

import random
from pathlib import Path

import mlx.core as mx
import pytest

from mlxpool_server.domain import Layout, ModelSpec, SamplingParams
from mlxpool_server.mlx_backend.batch import MlxBatch
from mlxpool_server.mlx_backend.loaded_model import MlxModel
from mlxpool_server.mlx_backend.loader import MlxLoader
from tiny_models import ARCHITECTURES, write_model

GREEDY = SamplingParams(temperature=0.0, seed=1)
PREFIX = [number * 7 % 250 for number in range(100)]
LIMIT_BYTES = 64 * 1024 * 1024


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MlxModel:
    return load(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> MlxModel:
    return load(tmp_path_factory.mktemp("models") / "llama", "llama")


def load(folder: Path, architecture: str) -> MlxModel:
    loader = MlxLoader(prefill_step_tokens=32, default_layout=Layout.FLOAT32)
    spec = ModelSpec("tiny", write_model(folder, architecture))
    return loader.load(spec, lambda _: None, lambda: False)


def generate(batch: MlxBatch, slot: int, prompt: list[int], count: int = 20) -> list[int]:
    """Tokens of one prompt, which then leaves."""
    batch.add(slot, prompt, GREEDY)
    tokens: list[int] = []
    while len(tokens) < count:
        tokens += [token for each, token in batch.step().tokens if each == slot]
    batch.remove([slot])
    return tokens[:count]


def cached_of(batch: MlxBatch, prompt: list[int]) -> int:
    """How many tokens of a prompt come from the cache."""
    batch.add(999, prompt, GREEDY)
    while True:
        output = batch.step()
        if output.tokens:
            batch.remove([999])
            return dict(output.cached).get(999, 0)


def with_cache(model: MlxModel, limit_bytes: int = LIMIT_BYTES) -> MlxBatch:
    batch = model.new_runner()
    batch.limit_prompt_cache(limit_bytes)
    return batch


def test_a_hit_gives_the_tokens_of_a_miss(model: MlxModel) -> None:
    """Chat turns: each prompt is the one before, its answer and something new."""
    warm, cold = with_cache(model), model.new_runner()
    prompt = list(PREFIX)
    for turn in range(3):
        expected = generate(cold, turn, prompt)
        assert generate(warm, turn, prompt) == expected
        prompt += [*expected, turn + 5, turn + 6, turn + 7]
        assert cached_of(warm, prompt) >= len(prompt) - 4
    assert warm.prompt_cache_bytes() > 0


def test_a_shared_beginning_is_enough(llama: MlxModel) -> None:
    """Of a model whose caches can be cut; to the token, not to a block."""
    batch = with_cache(llama)
    generate(batch, 1, [*PREFIX, 1, 2, 3])
    assert cached_of(batch, [*PREFIX, 9, 8, 7]) == len(PREFIX)
    assert cached_of(batch, [*PREFIX[:50], 9, 8, 7]) == 50
    assert cached_of(batch, [9, *PREFIX]) == 0


def test_the_same_prompt_leaves_its_last_token(llama: MlxModel) -> None:
    """Its logits are wanted."""
    batch = with_cache(llama)
    first = generate(batch, 1, PREFIX)
    assert generate(batch, 2, PREFIX) == first
    assert cached_of(batch, PREFIX) == len(PREFIX) - 1


def test_random_conversations(llama: MlxModel) -> None:
    """Whatever was said before, in whatever order, with a cache that is too small for all."""
    chance = random.Random(4)  # noqa: S311 - it picks test cases
    cold = llama.new_runner()
    warm = with_cache(llama, limit_bytes=300_000)
    prompts: list[list[int]] = [list(PREFIX)]
    for turn in range(40):
        begun = chance.choice(prompts)
        prompt = begun[: chance.randrange(1, len(begun) + 1)]
        prompt += [chance.randrange(250) for _ in range(chance.randrange(30))]
        expected = generate(cold, turn, prompt, 6)
        assert generate(warm, turn, prompt, 6) == expected
        prompts.append(prompt + expected)
        assert warm.prompt_cache_bytes() <= 300_000


def test_off_until_it_has_a_limit(llama: MlxModel) -> None:
    """Nothing is kept, and nothing stays when the limit is taken away."""
    batch = llama.new_runner()
    generate(batch, 1, PREFIX)
    assert batch.prompt_cache_bytes() == 0
    batch.limit_prompt_cache(LIMIT_BYTES)
    generate(batch, 2, PREFIX)
    assert batch.prompt_cache_bytes() > 0
    batch.limit_prompt_cache(0)
    assert batch.prompt_cache_bytes() == 0
    assert cached_of(batch, PREFIX) == 0


def test_the_least_recently_used_goes_first(llama: MlxModel) -> None:
    """And what is used stays."""
    batch = with_cache(llama)
    generate(batch, 1, PREFIX)
    size = batch.prompt_cache_bytes()
    batch.limit_prompt_cache(2 * size + size // 2)
    other, third = [7, *PREFIX], [8, *PREFIX]
    generate(batch, 2, other)
    assert cached_of(batch, PREFIX) > 0
    generate(batch, 3, third)
    assert cached_of(batch, PREFIX) > 0
    assert cached_of(batch, third) > 0
    # Last: asking keeps it again.
    assert cached_of(batch, other) == 0


def test_siblings_wait_for_a_shared_prefix(llama: MlxModel) -> None:
    """Of four long prompts that begin the same and come together, one is read in full."""
    batch = with_cache(llama)
    shared = PREFIX * 2
    prompts = {slot: [*shared, slot, slot + 1] for slot in range(4)}
    for slot, prompt in prompts.items():
        batch.add(slot, prompt, GREEDY)
    cached: dict[int, int] = {}
    answered: set[int] = set()
    while len(answered) < len(prompts):
        output = batch.step()
        cached |= dict(output.cached)
        answered |= {slot for slot, _ in output.tokens}
    assert sorted(cached.values()) == [len(shared)] * 3


def test_a_cancelled_prompt_leaves_what_it_had(llama: MlxModel) -> None:
    """Rows removed while they generate are kept; those removed in a prefill leave nothing."""
    batch = with_cache(llama)
    batch.add(1, PREFIX, GREEDY)
    batch.step()
    batch.remove([1])
    assert batch.prompt_cache_bytes() == 0
    assert cached_of(batch, PREFIX) == 0


def test_copies_do_not_outlive_the_batch(llama: MlxModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the last row leaves, what is kept of it is begun at once: no step would do it."""
    begun: list[int] = []
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: begun.append(len(arrays)))
    batch = with_cache(llama)
    batch.add(0, PREFIX, GREEDY)
    while not batch.step().tokens:
        pass
    begun.clear()
    batch.remove([0])
    assert begun
