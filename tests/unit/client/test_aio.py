"""The aio client: what awaiting adds to the behaviour of the sync one."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import grpc
import pytest

from mlxpool_client import (
    AsyncClient,
    AsyncGeneration,
    CacheKind,
    Delta,
    Finished,
    GenerationCancelledError,
    IncompleteStreamError,
    LoadFinished,
    LoadProgress,
    ModelNotFoundError,
    Progress,
    QueueFullError,
    Started,
    UnavailableError,
)

if TYPE_CHECKING:
    from tests.unit.client.conftest import FakeServer

WAIT_S = 10


@pytest.fixture
async def aio_client(server: FakeServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.target, timeout_s=20) as client:
        yield client


async def held(client: AsyncClient, server: FakeServer) -> AsyncGeneration:
    """Return a generation that has started and stays silent."""
    server.models.hold = True
    server.models.generation = server.models.generation[:1]
    generation = client.generate("demo", "hi")
    assert isinstance(await anext(generation), Started)
    return generation


async def server_saw_the_end(server: FakeServer) -> bool:
    return await asyncio.to_thread(server.models.generation_ended.wait, WAIT_S)


async def test_events_arrive_in_order(aio_client: AsyncClient) -> None:
    """A generation is Started, Progress, Deltas and one Finished, in the server's order."""
    events = [event async for event in aio_client.generate("demo", "hi")]
    assert [type(event) for event in events] == [Started, Progress, Delta, Delta, Finished]


async def test_text_is_the_whole_output(aio_client: AsyncClient) -> None:
    """text() and generate_text() read to the end; the id is known from the first event on."""
    generation = aio_client.generate("demo", "hi")
    assert await generation.text() == "Hello you"
    assert await generation.text() == "Hello you"
    assert generation.generation_id == "g1"
    assert await aio_client.generate_text("demo", "hi") == "Hello you"


@pytest.mark.parametrize("leave", ["close", "aclose", "with", "drop"])
async def test_leaving_cancels_the_call(
    aio_client: AsyncClient, server: FakeServer, leave: str
) -> None:
    """The server sees the cancel when the stream is closed, its block left, or it is dropped."""
    generation = await held(aio_client, server)
    match leave:
        case "close":
            generation.close()
        case "aclose":
            await generation.aclose()
        case "with":
            async with generation:
                pass
        case _:
            del generation
    assert await server_saw_the_end(server)


async def test_cancelling_the_reader_cancels_the_call(
    aio_client: AsyncClient, server: FakeServer
) -> None:
    """A cancelled task gets CancelledError, and the server sees the cancel."""
    generation = await held(aio_client, server)
    reader = asyncio.ensure_future(anext(generation))
    await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert await server_saw_the_end(server)
    with pytest.raises(GenerationCancelledError):
        await generation.text()


async def test_a_timeout_around_the_reader_stays_a_timeout(
    aio_client: AsyncClient, server: FakeServer
) -> None:
    """asyncio.timeout() around a reader raises TimeoutError, not the stream's own error."""
    generation = await held(aio_client, server)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await anext(generation)
    assert await server_saw_the_end(server)


async def test_closing_from_another_task_wakes_the_reader(
    aio_client: AsyncClient, server: FakeServer
) -> None:
    """A reader whose stream another task closes gets an error, not a cancel of its own."""
    generation = await held(aio_client, server)
    reader = asyncio.ensure_future(anext(generation))
    await asyncio.sleep(0)
    generation.close()
    with pytest.raises(GenerationCancelledError):
        await reader


async def test_a_stream_without_finished_failed(
    aio_client: AsyncClient, server: FakeServer
) -> None:
    """A stream that ends with OK but without Finished raises, every time it is asked."""
    server.models.generation.pop()
    generation = aio_client.generate("demo", "hi")
    for _ in range(2):
        with pytest.raises(IncompleteStreamError):
            await generation.text()


async def test_a_failed_stream_goes_on_failing(aio_client: AsyncClient, server: FakeServer) -> None:
    """The error of a stream is raised every time it is asked, with the server's reason."""
    server.models.failures = [server.failure(grpc.StatusCode.UNAVAILABLE, "QUEUE_FULL")] * 9
    generation = aio_client.generate("demo", "hi")
    for _ in range(2):
        with pytest.raises(QueueFullError):
            await anext(generation)


async def test_unary_calls(aio_client: AsyncClient, server: FakeServer) -> None:
    """Each call sends its request and returns its typed answer."""
    assert [model.name for model in await aio_client.list_models()] == ["demo"]
    assert (await aio_client.get_model("demo")).context_length == 2048
    assert (await aio_client.unload_model("demo", force=True)).freed_bytes == 1 << 30
    assert (await aio_client.tokenize("demo", "Hi")).token_ids == (7, 8)
    assert (await aio_client.embed("demo", ["Hi"])).vectors == ((0.5, -2.0),)
    assert await aio_client.count_tokens("demo", "Hi") == 2
    assert (await aio_client.server_info()).device_name == "cpu"
    await aio_client.cancel_generation("g1")
    assert (await aio_client.memory_usage()).limits.pool_bytes == 4 << 30
    assert (await aio_client.set_memory_limits(pool_bytes=5)).current.pool_bytes == 5
    assert await aio_client.clear_cache(CacheKind.PROMPTS) == 1 << 20
    assert await aio_client.reset_peak_memory() == 2 << 30


async def test_unary_errors_are_typed(aio_client: AsyncClient, server: FakeServer) -> None:
    """A failed call raises the error of its reason."""
    server.models.failures = [server.failure(grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")]
    with pytest.raises(ModelNotFoundError):
        await aio_client.get_model("nope")


async def test_load_and_watch_streams(aio_client: AsyncClient, server: FakeServer) -> None:
    """Loads and memory samples are streams too; samples of a newer server are skipped."""
    events = [event async for event in aio_client.load_model("demo", keep_alive_s=math.inf)]
    assert [type(event) for event in events] == [LoadProgress, LoadFinished]
    assert (await aio_client.load_model("demo").result()).evicted_models == ("old",)
    assert len([usage async for usage in aio_client.watch_memory_usage(0.5)]) == 2


async def test_waiting_until_ready(aio_client: AsyncClient, nobody: str) -> None:
    """wait_until_ready() returns once the server answers, and gives up after its time."""
    await aio_client.wait_until_ready(WAIT_S)
    async with AsyncClient(nobody) as client:
        with pytest.raises(UnavailableError, match="nothing answered"):
            await client.wait_until_ready(0.1)


def test_a_client_needs_a_running_loop() -> None:
    """Outside an event loop the constructor says so, instead of hanging later."""
    with pytest.raises(RuntimeError, match="no running event loop"):
        AsyncClient()
