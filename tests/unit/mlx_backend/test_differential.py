"""Random requests through the batch and the engine, against mlx-lm's loop for one."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.nn as nn
import pytest
from mlx_lm.utils import load_model

from fakes.running_engine import PATIENCE_S, RunningEngine, running_engine, sequence_request
from mlxpool_server.domain import (
    FinishReason,
    GenerationDelta,
    GenerationFinished,
    Layout,
    ModelSpec,
    SamplingParams,
)
from mlxpool_server.engine.output_stream import OutputStream
from mlxpool_server.errors import DrainingError
from mlxpool_server.mlx_backend import batch as batch_module
from mlxpool_server.mlx_backend.batch import MlxBatch
from mlxpool_server.mlx_backend.loaded_model import MlxModel
from mlxpool_server.mlx_backend.loader import MlxLoader
from references.generation import greedy_alone
from tiny_models import ARCHITECTURES, RARE_ARCHITECTURES, VOCAB_SIZE, write_model

GREEDY = SamplingParams(temperature=0.0, seed=1)
NUM_REQUESTS = 30
MAX_ROWS = 6


@dataclass
class Request:
    """One request and what came of it."""

    slot: int
    prompt: list[int]
    sampling: SamplingParams
    max_tokens: int
    # None: it stays until it has all its tokens. Else it leaves after so many steps.
    leaves_after: int | None
    steps: int = 0
    tokens: list[int] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        left = self.leaves_after is not None and self.steps >= self.leaves_after
        return left or len(self.tokens) >= self.max_tokens


def random_sampling(dice: random.Random) -> SamplingParams:
    if dice.random() < 0.5:
        return GREEDY
    if dice.random() < 0.5:
        return replace(
            GREEDY,
            repetition_penalty=dice.choice([1.0, 1.5]),
            presence_penalty=dice.choice([0.0, 1.0]),
            frequency_penalty=dice.choice([0.0, 0.7]),
            penalty_context_size=dice.choice([3, 64, 2**31 - 1]),
            logit_bias=dice.choice([{}, {4: 3.0, 5: -3.0}]),
        )
    # Nothing to compare these with: they are the others' company.
    return SamplingParams(
        temperature=dice.uniform(0.5, 2.0),
        top_p=dice.choice([1.0, 0.8]),
        top_k=dice.choice([0, 10]),
        min_p=dice.choice([0.0, 0.05]),
        presence_penalty=dice.choice([0.0, 1.0]),
        seed=dice.getrandbits(32),
    )


def random_prompt(dice: random.Random) -> list[int]:
    length = dice.choice([1, 2, dice.randint(1, 20), dice.randint(1, 80)])
    return [dice.randrange(VOCAB_SIZE) for _ in range(length)]


def random_request(dice: random.Random, slot: int) -> Request:
    leaves_after = dice.randint(0, 12) if dice.random() < 0.3 else None
    return Request(
        slot, random_prompt(dice), random_sampling(dice), dice.randint(1, 14), leaves_after
    )


class RandomClock:
    """Each look at it takes another time, the same ones in every run."""

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice
        self._now = 1000.0

    def __call__(self) -> float:
        self._now += self._dice.choice([0.0001, 0.003, 0.02, 0.2])
        return self._now


def play(batch: MlxBatch, requests: list[Request], dice: random.Random) -> None:
    """They come in bursts and one by one, and leave when they are over."""
    waiting, active = list(requests), dict[int, Request]()
    for _ in range(10_000):
        if not waiting and not active:
            return
        arriving = dice.choice([0, 0, 1, 1, 3]) if active else 1
        while waiting and arriving and len(active) < MAX_ROWS:
            request = waiting.pop(0)
            batch.add(request.slot, request.prompt, request.sampling)
            active[request.slot] = request
            arriving -= 1
        for slot, token in batch.step().tokens:
            active[slot].tokens.append(token)
        for request in active.values():
            request.steps += 1
        over = [slot for slot, request in active.items() if request.is_over]
        batch.remove(over)
        for slot in over:
            del active[slot]
    pytest.fail("they never end")


def check(requests: list[Request], reference: nn.Module) -> int:
    """Return how many tokens were compared."""
    num_compared = 0
    for request in requests:
        assert all(0 <= token < VOCAB_SIZE for token in request.tokens)
        if request.sampling.temperature > 0 or not request.tokens:
            continue
        expected = greedy_alone(reference, request.prompt, len(request.tokens), request.sampling)
        assert request.tokens[: len(expected)] == expected, request
        num_compared += len(expected)
    return num_compared


@pytest.fixture(scope="module", params=[*ARCHITECTURES, *RARE_ARCHITECTURES])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="module")
def reference(folder: Path) -> nn.Module:
    return load_model(folder)[0]


def load(folder: Path, prefill_step_tokens: int) -> MlxModel:
    loader = MlxLoader(prefill_step_tokens=prefill_step_tokens, default_layout=Layout.FLOAT32)
    return loader.load(ModelSpec("tiny", folder), lambda _: None, lambda: False)


@pytest.mark.parametrize(
    ("samples_on_host", "prompt_cache_bytes"), [(True, 0), (False, 300_000)], ids=["host", "device"]
)
def test_random_requests(
    folder: Path,
    reference: nn.Module,
    samples_on_host: bool,
    prompt_cache_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Token for token what each gets alone, whoever comes, samples and leaves beside it.

    With numpy's sampler, and with MLX's and prompts that go on from earlier ones.
    """
    dice = random.Random(1)  # noqa: S311 - repeatable
    monkeypatch.setattr(batch_module, "time", SimpleNamespace(monotonic=RandomClock(dice)))
    batch = load(folder, dice.choice([16, 48, 128])).new_runner()
    batch.limit_prompt_cache(prompt_cache_bytes)
    batch._samples_on_host = samples_on_host
    requests = [random_request(dice, slot) for slot in range(NUM_REQUESTS)]
    if prompt_cache_bytes:
        for request, earlier in zip(requests[5:], requests, strict=False):
            if dice.random() < 0.5:
                request.prompt = earlier.prompt + request.prompt[:20]
    play(batch, requests, dice)
    assert batch.kv_bytes() == 0
    assert batch.prompt_cache_bytes() <= prompt_cache_bytes
    batch.close()
    assert check(requests, reference) > 50


# ---------------------------------------------------------------- through the engine


class Letters:
    """A letter for each token."""

    def push(self, token_id: int) -> str:
        return chr(0x4E00 + token_id)

    def finish(self) -> str:
        return ""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[MlxModel, nn.Module]:
    folder = write_model(tmp_path_factory.mktemp("models") / "llama")
    return load(folder, 48), load_model(folder)[0]


async def generate(running: RunningEngine, request: Request, dice: random.Random) -> None:
    """Read the stream, or cancel it after some tokens; what was said is in the request."""
    await asyncio.sleep(dice.random() * 0.3)
    stream = OutputStream()
    slot = running.engine.submit(
        sequence_request(
            prompt=tuple(request.prompt),
            sampling=request.sampling,
            max_tokens=request.max_tokens,
            decoder=Letters(),
            eos_token_ids=frozenset(),
            include_token_ids=True,
        ),
        stream,
    )
    if request.leaves_after == 0:
        running.engine.abort(slot)
    finished = None
    async with asyncio.timeout(PATIENCE_S), aclosing(stream.events(PATIENCE_S)) as events:
        async for event in events:
            if isinstance(event, GenerationDelta):
                request.tokens += event.token_ids
                if request.leaves_after is not None and len(request.tokens) > request.leaves_after:
                    running.engine.abort(slot)
            elif isinstance(event, GenerationFinished):
                finished = event
    assert finished is not None
    assert finished.usage.completion_tokens == len(request.tokens)
    assert finished.text == "".join(chr(0x4E00 + token) for token in request.tokens)
    if request.leaves_after is None:
        assert finished.finish_reason is FinishReason.MAX_TOKENS
        assert len(request.tokens) == request.max_tokens


async def test_random_requests_through_the_engine(llama: tuple[MlxModel, nn.Module]) -> None:
    """Some are cancelled at random points: what they said until then is right too."""
    model, reference = llama
    dice = random.Random(11)  # noqa: S311 - repeatable
    requests = [random_request(dice, slot) for slot in range(60)]
    async with running_engine(max_batch_size=MAX_ROWS) as running:
        await running.engine.attach("m", model)
        await asyncio.gather(*(generate(running, request, dice) for request in requests))
        await running.engine.detach("m", DrainingError(1.0))
    assert check(requests, reference) > 100


async def test_stops_through_the_engine(llama: tuple[MlxModel, nn.Module]) -> None:
    """A stop token or text ends its row in the middle of a batch, and no other."""
    model, reference = llama
    dice = random.Random(12)  # noqa: S311 - repeatable
    prompts = [random_prompt(dice) for _ in range(12)]
    known = [greedy_alone(reference, prompt, 14) for prompt in prompts]

    async def finish(index: int) -> GenerationFinished:
        tokens = known[index]
        stop = tokens[len(tokens) // 2] if tokens else 0
        changes: dict[str, Any] = [
            {"stop_token_ids": frozenset({stop})},
            {"stop_sequences": (chr(0x4E00 + stop),)},
            {},
        ][index % 3]
        stream = OutputStream()
        running.engine.submit(
            sequence_request(
                prompt=tuple(prompts[index]),
                sampling=GREEDY,
                max_tokens=14,
                decoder=Letters(),
                eos_token_ids=frozenset(),
                include_token_ids=True,
                **changes,
            ),
            stream,
        )
        async with asyncio.timeout(PATIENCE_S), aclosing(stream.events(PATIENCE_S)) as events:
            last = [event async for event in events][-1]
        assert isinstance(last, GenerationFinished)
        return last

    async with running_engine(max_batch_size=MAX_ROWS) as running:
        await running.engine.attach("m", model)
        ended = await asyncio.gather(*(finish(index) for index in range(len(prompts))))
        await running.engine.detach("m", DrainingError(1.0))
    for index, (tokens, last) in enumerate(zip(known, ended, strict=True)):
        if not tokens:
            continue
        letters = "".join(chr(0x4E00 + token) for token in tokens)
        stop = letters[len(tokens) // 2]
        if index % 3 == 2:
            assert last.finish_reason is FinishReason.MAX_TOKENS
            assert last.text.startswith(letters)
        else:
            assert last.text == letters[: letters.index(stop)]
