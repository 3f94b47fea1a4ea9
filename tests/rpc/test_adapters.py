"""LoRA adapters over the wire: named, loaded, counted, let go, and refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from google.rpc import error_details_pb2 as details_pb

from fakes import FakeFiles
from fakes.loader import FakeAdapter
from fakes.model import endless
from mlxpool.v1 import memory_service_pb2 as memory_pb
from mlxpool.v1 import model_service_pb2 as pb
from mlxpool_server.domain import ModelSpec
from mlxpool_server.pool.catalog import Catalog
from mlxpool_server.settings import Settings
from rpc.harness import (
    PATIENCE_S,
    Reader,
    Server,
    failure_of,
    final_text,
    release,
    running_server,
    text_request,
    until,
)
from rpc.metrics_reader import scrape

FOLDERS = (("one", Path("adapters/one")), ("two", Path("adapters/two")))
SPEC = ModelSpec("m", Path("unread"), aliases=("default",), adapters=FOLDERS)


@asynccontextmanager
async def server_of(*, is_stepped: bool = False, **settings: Any) -> AsyncGenerator[Server, None]:
    """One model of 100 bytes, and two adapters of 10."""
    files = {"m": FakeFiles.of_size(100, is_stepped=is_stepped)}
    files |= {f"m+{name}": FakeFiles.of_size(10) for name, _ in FOLDERS}
    async with running_server(files, specs=(SPEC,), **settings) as server:
        yield server


async def get(server: Server, adapter: str = "") -> pb.Model:
    request = pb.GetModelRequest(model="default", adapter=adapter)
    return (await server.models.GetModel(request)).model


async def load(server: Server, adapter: str, **fields: Any) -> pb.LoadFinished:
    request = pb.LoadModelRequest(model="m", adapter=adapter, **fields)
    return (await Reader(server.models.LoadModel(request)).rest())[-1].finished


def adapters_seen(server: Server) -> list[str]:
    """Of each generation: which one its row in the batch has."""
    (batch,) = server.model.batches
    return [each.name if isinstance(each, FakeAdapter) else "" for each in batch.adapters]


async def test_each_request_has_its_own() -> None:
    """It comes with the row, and the caller is told; without a name there is none."""
    async with server_of() as server:
        for name in ("one", "", "two", "one"):
            events = await server.generate(text_request("abc", model="default", adapter=name))
            assert events[0].started.adapter == name
            assert events[0].started.model == "m"
            assert final_text(events) == "abc"
        assert adapters_seen(server) == ["m+one", "", "m+two", "m+one"]
        assert server.files["m"].num_loads == 1
        assert server.files["m+one"].num_loads == 1


async def test_an_adapter_that_nobody_configured() -> None:
    """ADAPTER_NOT_FOUND wherever one can be named, with those that there are."""
    async with server_of() as server:
        for call in (
            server.models.Generate(text_request(adapter="three")),
            server.models.GetModel(pb.GetModelRequest(model="m", adapter="three")),
            server.models.LoadModel(pb.LoadModelRequest(model="m", adapter="three")),
            server.models.UnloadModel(pb.UnloadModelRequest(model="m", adapter="three")),
        ):
            failure = await failure_of(call)
            assert (failure.code, failure.reason) == (
                grpc.StatusCode.NOT_FOUND,
                "ADAPTER_NOT_FOUND",
            )
            assert "one, two" in failure.message
            resource = failure.detail(details_pb.ResourceInfo)
            assert (resource.resource_type, resource.resource_name) == ("adapter", "m/three")
        failure = await failure_of(server.models.Generate(text_request(model="m+one")))
        assert failure.reason == "MODEL_NOT_FOUND"
        await server.assert_serves()


async def test_loading_and_unloading_one() -> None:
    """By itself: its model need not be there. It is shown, and its bytes are counted."""
    async with server_of() as server:
        assert list((await get(server)).available_adapters) == ["one", "two"]
        assert (await get(server, "one")).state == pb.MODEL_STATE_UNLOADED
        finished = await load(server, "one")
        assert (finished.model.name, finished.model.adapter) == ("m", "one")
        assert finished.model.resident_bytes == 10
        assert (await get(server)).state == pb.MODEL_STATE_UNLOADED
        listed = (await server.models.ListModels(pb.ListModelsRequest())).models
        assert [(each.name, each.adapter) for each in listed] == [("m", ""), ("m", "one")]
        usage = (await server.memories.GetMemoryUsage(memory_pb.GetMemoryUsageRequest())).usage
        (held,) = usage.models
        assert (held.model, held.adapter, held.resident_bytes) == ("m", "one", 10)
        request = pb.UnloadModelRequest(model="m", adapter="one")
        unloaded = await server.models.UnloadModel(request)
        assert (unloaded.was_loaded, unloaded.freed_bytes) == (True, 10)
        assert not (await server.models.UnloadModel(request)).was_loaded


async def test_one_in_use_is_waited_for() -> None:
    """An unload, by force too, ends no stream: it waits for the last one."""
    async with server_of(is_stepped=True) as server:
        server.model.script = endless
        release(server.model, 4)
        reader = server.reader(text_request("abc", adapter="one"))
        while not (await reader.next()).HasField("delta"):
            pass
        request = pb.UnloadModelRequest(model="m", adapter="one", force=True)
        unload = server.models.UnloadModel(request, timeout=PATIENCE_S)
        while (await get(server, "one")).state != pb.MODEL_STATE_UNLOADING:  # noqa: ASYNC110 - over the wire
            await asyncio.sleep(0.005)
        assert not unload.done()
        await reader.hang_up()
        # The engine lets go of it between two steps: none may wait for the test.
        server.model.run_freely()
        assert (await unload).was_loaded


async def test_idle_ones_make_room() -> None:
    """The least recently used goes first, before the model; nobody goes who is in use."""
    async with server_of(pool_memory_limit_bytes=115) as server:
        await server.generate(text_request("a", adapter="one"))
        await server.generate(text_request("a", adapter="two"))
        assert (await get(server, "one")).state == pb.MODEL_STATE_UNLOADED
        assert (await get(server, "two")).state == pb.MODEL_STATE_READY
        assert (await get(server)).state == pb.MODEL_STATE_READY
        assert server.files["m"].num_loads == 1


async def test_one_that_does_not_load() -> None:
    """Its reason ends the request that wants it, and no other; the model serves on."""
    async with server_of() as server:
        server.files["m+one"].inspect_error = "its adapter does not fit"
        failure = await failure_of(server.models.Generate(text_request("a", adapter="one")))
        assert failure.reason == "LOAD_FAILED"
        assert "does not fit" in failure.message
        await server.assert_serves()
        assert final_text(await server.generate(text_request("b", adapter="two"))) == "b"


async def test_require_loaded_means_both() -> None:
    """MODEL_NOT_LOADED while the adapter is not."""
    async with server_of() as server:
        await server.assert_serves()
        request = text_request("a", adapter="one", require_loaded=True)
        failure = await failure_of(server.models.Generate(request))
        assert failure.reason == "MODEL_NOT_LOADED"
        await load(server, "one")
        assert final_text(await server.generate(request)) == "a"


async def test_a_cancel_while_one_loads() -> None:
    """Ends the wait, as it does while a model loads."""
    async with server_of() as server:
        files = server.files["m+one"]
        files.may_load.clear()
        reader = server.reader(text_request("a", adapter="one", generation_id="g"))
        await until(files.is_loading.is_set)
        await server.models.CancelGeneration(pb.CancelGenerationRequest(generation_id="g"))
        finished = (await reader.rest())[-1].finished
        assert finished.finish_reason == pb.FINISH_REASON_CANCELLED


async def test_a_reload_that_drops_one() -> None:
    """New requests do not find it; the model, which was told of others, is loaded no second time
    while it has any.
    """
    async with server_of() as server:
        await server.generate(text_request("a", adapter="one"))
        spec = ModelSpec("m", Path("unread"), adapters=FOLDERS[1:])
        settings = Settings.model_validate(server.app._settings.model_dump())
        await server.app.reload(settings, Catalog.build([spec]))
        failure = await failure_of(server.models.Generate(text_request("a", adapter="one")))
        assert failure.reason == "ADAPTER_NOT_FOUND"
        assert final_text(await server.generate(text_request("b", adapter="two"))) == "b"
        assert server.files["m"].num_loads == 1


async def test_metric() -> None:
    """Generations by adapter."""
    async with server_of(metrics_listen="127.0.0.1:0") as server:
        for name in ("one", "", "one"):
            await server.generate(text_request("a", adapter=name))
        seen = await scrape(server)
        assert seen("mlxpool_adapter_generations_total", model="m", adapter="one") == 2
