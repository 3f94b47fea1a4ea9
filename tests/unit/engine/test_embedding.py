"""Embeddings on the engine thread: between the steps of streams, and never instead of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from fakes.model import endless
from fakes.running_engine import PATIENCE_S, RunningEngine, running_engine
from mlxpool_server.domain import Pooling, Vector
from mlxpool_server.engine.backend import EmbeddingJob
from mlxpool_server.engine.engine import MAX_CONSECUTIVE_FAILURES
from mlxpool_server.errors import (
    CapabilityMissingError,
    DrainingError,
    GenerationFailedError,
    ModelUnloadedError,
)


@pytest.fixture
async def running() -> AsyncGenerator[RunningEngine, None]:
    async with running_engine() as running:
        yield running


def job(*texts: str, model: str = "m") -> EmbeddingJob:
    return EmbeddingJob(model, tuple(tuple(text.encode()) for text in texts), Pooling.MEAN)


async def embed(running: RunningEngine, *texts: str, model: str = "m") -> list[list[float]]:
    async with asyncio.timeout(PATIENCE_S):
        return [list(vector) for vector in await running.engine.embed(job(*texts, model=model))]


def start(running: RunningEngine, *texts: str) -> asyncio.Task[tuple[Vector, ...]]:
    return asyncio.ensure_future(running.engine.embed(job(*texts)))


async def test_a_vector_a_text(running: RunningEngine) -> None:
    """Vectors come in the order of the texts, from the engine's own thread."""
    model = await running.attach()
    assert await embed(running, "abc", "z") == [[3, ord("a")], [1, ord("z")]]
    assert model.embedders[0].threads == {"engine"}


async def test_streams_go_on_between_passes(running: RunningEngine) -> None:
    """While a model embeds many texts its streams get steps."""
    model = await running.attach(script=endless)
    stream = running.submit("ab")
    await stream.delta()
    assert len(await embed(running, *(300 * "a"))) == 300
    embedder = model.embedders[0]
    assert embedder.steps_before[0] < embedder.steps_before[-1]
    assert not any(embedder.were_alone)
    running.engine.abort(stream.slot)
    await stream.finished()


async def test_a_pass_knows_that_it_is_alone(running: RunningEngine) -> None:
    """With nothing else to do a pass may be long."""
    model = await running.attach()
    await embed(running, "a", "b")
    assert model.embedders[0].were_alone == [True, True]


async def test_a_caller_who_gives_up(running: RunningEngine) -> None:
    """Its texts are forgotten before the next pass; others are answered."""
    model = await running.attach(is_stepped=True)
    given_up = start(running, *"abc")
    await asyncio.to_thread(model.is_waiting.wait, PATIENCE_S)
    other = start(running, "x")
    await asyncio.sleep(0)
    given_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await given_up
    model.run_freely()
    async with asyncio.timeout(PATIENCE_S):
        assert [list(vector) for vector in await other] == [[1, ord("x")]]
    assert running.engine._pending == {}
    assert running.engine.stats("m").running == 0
    # The pass that ran when it gave up, and the other's.
    assert len(model.embedders[0].were_alone) == 2


async def test_jobs_count_as_running(running: RunningEngine) -> None:
    """A model that embeds is in use, with what its texts hold."""
    model = await running.attach(is_stepped=True)
    embedding = start(running, "ab", "c")
    await asyncio.to_thread(model.is_waiting.wait, PATIENCE_S)
    await asyncio.sleep(0)
    stats = running.engine.stats("m")
    assert (stats.running, stats.kv_bytes) == (1, 5)
    model.run_freely()
    async with asyncio.timeout(PATIENCE_S):
        await embedding
    assert running.engine.stats("m").running == 0


async def test_a_failed_pass_leaves_streams_alone(running: RunningEngine) -> None:
    """Jobs of the model get an error that names no cause; its streams and the next job go on."""
    model = await running.attach(script=endless)
    stream = running.submit("ab")
    await stream.delta()
    model.pass_errors.append(RuntimeError("secret"))
    with pytest.raises(GenerationFailedError, match="the embedding on 'm' failed"):
        await embed(running, "abc")
    assert len(model.embedders) == 2
    await stream.delta()
    assert await embed(running, "abc") == [[3, ord("a")]]
    running.engine.abort(stream.slot)
    await stream.finished()


async def test_a_model_whose_passes_keep_failing_is_given_up(running: RunningEngine) -> None:
    """As one whose steps keep failing: it is dropped, and the house is told."""
    model = await running.attach()
    for _ in range(MAX_CONSECUTIVE_FAILURES):
        model.pass_errors.append(RuntimeError("again"))
        with pytest.raises(GenerationFailedError):
            await embed(running, "abc")
    async with asyncio.timeout(PATIENCE_S):
        assert await running.failed_models.get() == "m"


async def test_a_model_without_hidden_states(running: RunningEngine) -> None:
    """It says that it cannot, and generates all the same."""
    model = await running.attach("other")
    running.models.append(model)
    model.can_embed = False
    await running.engine.attach("m", model)
    with pytest.raises(CapabilityMissingError, match="'m' has no embeddings"):
        await embed(running, "abc")
    assert (await running.submit("abc").finished()).text == "abc"


async def test_a_model_that_is_not_here(running: RunningEngine) -> None:
    """An error, and nothing waits."""
    with pytest.raises(GenerationFailedError):
        await embed(running, "abc", model="nobody")


async def test_detach_ends_jobs(running: RunningEngine) -> None:
    """Whoever waits on a model that is taken away gets the reason."""
    model = await running.attach(is_stepped=True)
    embedding = start(running, *"abc")
    await asyncio.to_thread(model.is_waiting.wait, PATIENCE_S)
    detaching = asyncio.ensure_future(running.engine.detach("m", ModelUnloadedError("m")))
    await asyncio.sleep(0)
    model.run_freely()
    await detaching
    with pytest.raises(ModelUnloadedError):
        await embedding


async def test_the_engines_end_ends_jobs() -> None:
    """Nobody waits for an engine that has stopped."""
    async with running_engine() as running:
        model = await running.attach(is_stepped=True)
        embedding = start(running, *"abc")
        await asyncio.to_thread(model.is_waiting.wait, PATIENCE_S)
        stopping = asyncio.ensure_future(running.engine.stop(DrainingError(1.0), PATIENCE_S))
        await asyncio.sleep(0)
        model.run_freely()
        assert await stopping
        with pytest.raises(DrainingError):
            await embedding
        with pytest.raises(GenerationFailedError):
            await embed(running, "abc")
