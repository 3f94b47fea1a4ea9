"""Many real models in a pool that holds a few of them, and two layouts of one side by side."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
from mlx_lm.utils import load_model

from e2e.server_process import ServerProcess
from mlxpool_client import AsyncClient, Client, MemoryUsage, ModelState
from references.generation import greedy_alone
from tiny_models import ARCHITECTURES, write_model

pytestmark = pytest.mark.timeout(300)

NUM_MODELS = 20
NUM_REQUESTS = 200
# Each request leases one model: with four at once, one of five resident models is idle.
NUM_WORKERS = 4
MAX_TOKENS = 8
# Five of the largest, and four generations beside them.
LIMIT_BYTES = 5 * 1_560_384 + 4 * 3_000_000


def prompt_of(number: int) -> list[int]:
    """Between 3 and 60 tokens, the same in every run."""
    numbers = random.Random(number)  # noqa: S311 - no secret
    return [numbers.randrange(256) for _ in range(numbers.randrange(3, 60))]


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for number in range(NUM_MODELS):
        architecture = list(ARCHITECTURES)[number % len(ARCHITECTURES)]
        write_model(folder / f"m{number:02}", architecture, seed=number)
    return folder


@pytest.fixture
def server(models_dir: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    limit = str(LIMIT_BYTES)
    with ServerProcess(
        tmp_path / "log.jsonl",
        "--models-dir",
        str(models_dir),
        "--pool-memory-limit-bytes",
        limit,
    ) as process:
        yield process


async def answer(client: AsyncClient, number: int) -> tuple[int, ...]:
    """The tokens of request `number`, greedy."""
    options = {"temperature": 0.0, "max_tokens": MAX_TOKENS, "ignore_eos": True}
    generation = client.generate(
        f"m{number % NUM_MODELS:02}",
        token_ids=prompt_of(number),
        final_only=True,
        include_token_ids=True,
        timeout_s=120,
        **options,  # type: ignore[arg-type]  # the keys are literal two lines up
    )
    return (await generation.result()).token_ids


async def answers_of(
    client: AsyncClient, numbers: list[int], workers: int
) -> dict[int, tuple[int, ...]]:
    waiting = iter(numbers)
    answers: dict[int, tuple[int, ...]] = {}

    async def work() -> None:
        for number in waiting:
            answers[number] = await answer(client, number)

    await asyncio.gather(*(work() for _ in range(workers)))
    return answers


def clear_words(models_dir: Path, number: int) -> tuple[int, ...]:
    """What mlx-lm's own loop answers, up to the first word that rounding may change."""
    model, _ = load_model(models_dir / f"m{number % NUM_MODELS:02}")
    return tuple(greedy_alone(model, prompt_of(number), MAX_TOKENS))


async def watch(client: AsyncClient, samples: list[MemoryUsage]) -> None:
    async with aclosing(client.watch_memory_usage(0.1)) as usages:
        async for usage in usages:
            samples.append(usage)  # noqa: PERF401 - a test reads them while they come


async def test_many_models_share_a_small_pool(server: ServerProcess, models_dir: Path) -> None:
    """20 models in a pool for five large ones: each answers as it does alone, within the limit.

    Another batch rounds otherwise, and random weights make near ties: where an answer differs, all
    that came before the first of them is the same.
    """
    numbers = list(range(NUM_REQUESTS))
    samples: list[MemoryUsage] = []
    async with AsyncClient(server.address, timeout_s=120) as client:
        alone = await answers_of(client, numbers, workers=1)
        random.Random(1).shuffle(numbers)  # noqa: S311 - no secret
        watching = asyncio.ensure_future(watch(client, samples))
        together = await answers_of(client, numbers, NUM_WORKERS)
        watching.cancel()
        states = [model.state for model in await client.list_models()]
    assert together.keys() == alone.keys()
    for number in (each for each in numbers if together[each] != alone[each]):
        clear = clear_words(models_dir, number)
        for answers in (alone, together):
            assert len(answers[number]) == MAX_TOKENS
            assert answers[number][: len(clear)] == clear, number
    assert len(set(alone.values())) > NUM_MODELS
    assert samples
    for sample in samples:
        assert sample.active_bytes <= LIMIT_BYTES
    assert 0 < states.count(ModelState.READY) < NUM_MODELS
    assert any(event["event"] == "model.evicted" for event in server.events())


@pytest.mark.demo_model
def test_one_model_in_two_layouts(demo_folder: Path, tmp_path: Path) -> None:
    """Stored and dequantised, the demo model gives the same answer, each in its own size."""
    config = tmp_path / "layouts.toml"
    config.write_text(
        "".join(
            f'[[models]]\nname = "{layout}"\npath = "{demo_folder}"\nlayout = "{layout}"\n'
            for layout in ("stored", "float32")
        ),
        encoding="utf-8",
    )
    with (
        ServerProcess(tmp_path / "log.jsonl", "--config", str(config)) as server,
        Client(server.address, timeout_s=240) as client,
    ):
        texts = {
            name: client.generate_text(
                name,
                messages=[{"role": "user", "content": "Why is the sky blue?"}],
                temperature=0,
                max_tokens=3,
            )
            for name in ("stored", "float32")
        }
        models = {model.name: model for model in client.list_models()}
    assert texts["stored"] == texts["float32"]
    assert models["stored"].resident_bytes * 4 < models["float32"].resident_bytes
    for model in models.values():
        assert abs(model.estimated_bytes / model.resident_bytes - 1) < 0.05
