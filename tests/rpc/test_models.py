"""The life of models over the wire: list, get, load, unload, tokenise."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration

from fakes import FakeFiles, FakeModel
from mlxpool.v1 import model_service_pb2 as pb
from rpc.harness import (
    PATIENCE_S,
    Reader,
    Server,
    chat_prompt,
    failure_of,
    release,
    running_server,
    text_request,
    until,
)


async def load(server: Server, name: str = "m", **fields: Any) -> list[pb.LoadModelResponse]:
    call = server.models.LoadModel(pb.LoadModelRequest(model=name, **fields))
    return await Reader(call).rest()


async def get(server: Server, name: str = "m") -> pb.Model:
    return (await server.models.GetModel(pb.GetModelRequest(model=name))).model


async def until_state(server: Server, state: int, name: str = "m") -> pb.Model:
    async with asyncio.timeout(PATIENCE_S):
        while (model := await get(server, name)).state != state:  # noqa: ASYNC110 - over the wire
            await asyncio.sleep(0.005)
    return model


async def test_load_tells_progress_then_finished(server: Server) -> None:
    """Bytes come while it loads; finished has the model as it is now."""
    files = server.files["m"]
    files.may_load.clear()
    reader = Reader(server.models.LoadModel(pb.LoadModelRequest(model="m")))
    while True:
        event = await reader.next()
        if event.progress.completed_bytes:
            break
    assert event.progress.phase == pb.LOAD_PHASE_LOADING
    assert (event.progress.completed_bytes, event.progress.total_bytes) == (50, 100)
    assert (await get(server)).state == pb.MODEL_STATE_LOADING
    files.may_load.set()
    finished = (await reader.rest())[-1].finished
    assert finished.model.state == pb.MODEL_STATE_READY
    assert finished.model.resident_bytes == 100
    assert abs(finished.model.load_time.ToSeconds() - time.time()) < 60
    assert not finished.already_loaded
    assert finished.duration.ToNanoseconds() > 0


async def test_loading_twice(server: Server) -> None:
    """The second load says already_loaded, and changes pinned and keep_alive."""
    await load(server)
    (event,) = await load(server, pinned=True, keep_alive=Duration(seconds=5))
    assert event.finished.already_loaded
    assert (await get(server)).pinned
    assert server.files["m"].num_loads == 1
    await load(server, pinned=False)
    assert not (await get(server)).pinned


async def test_load_goes_on_without_its_watcher(server: Server) -> None:
    """Hanging up stops watching, not loading."""
    files = server.files["m"]
    files.may_load.clear()
    reader = Reader(server.models.LoadModel(pb.LoadModelRequest(model="m")))
    await reader.next()
    await reader.hang_up()
    files.may_load.set()
    await until_state(server, pb.MODEL_STATE_READY)
    assert files.num_loads == 1


async def test_load_heartbeats() -> None:
    """A load that says nothing new repeats itself."""
    files = {"m": FakeFiles()}
    files["m"].may_load.clear()
    async with running_server(files, progress_interval_s=0.05) as server:
        reader = Reader(server.models.LoadModel(pb.LoadModelRequest(model="m")))
        seen = 0
        while seen < 4:
            seen += (await reader.next()).progress.completed_bytes == 50
        await reader.hang_up()


async def test_validate_only_changes_nothing() -> None:
    """It tells which models would go, and none goes."""
    files = {"a": FakeFiles(estimated_bytes=600), "b": FakeFiles(estimated_bytes=600)}
    files["a"].model.resident_bytes = 600
    async with running_server(files, pool_memory_limit_bytes=1000) as server:
        await load(server, "a")
        (event,) = await load(server, "b", validate_only=True)
        assert list(event.finished.evicted_models) == ["a"]
        assert not event.finished.already_loaded
        assert (await get(server, "a")).state == pb.MODEL_STATE_READY
        assert files["b"].num_loads == 0
        request = pb.LoadModelRequest(model="b", validate_only=True, disallow_eviction=True)
        failure = await failure_of(server.models.LoadModel(request))
        assert failure.reason == "POOL_MEMORY_LIMIT"


async def test_load_evicts_what_is_idle() -> None:
    """The end names who went; disallow_eviction fails instead."""
    files = {"a": FakeFiles(estimated_bytes=600), "b": FakeFiles(estimated_bytes=600)}
    for each in files.values():
        each.model.resident_bytes = 600
    async with running_server(files, pool_memory_limit_bytes=1000) as server:
        await load(server, "a")
        request = pb.LoadModelRequest(model="b", disallow_eviction=True)
        failure = await failure_of(server.models.LoadModel(request))
        assert failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        events = await load(server, "b")
        assert list(events[-1].finished.evicted_models) == ["a"]
        assert (await get(server, "a")).state == pb.MODEL_STATE_UNLOADED


async def test_unload(server: Server) -> None:
    """It tells what was freed; nothing to unload is no error."""
    await load(server)
    answer = await server.models.UnloadModel(pb.UnloadModelRequest(model="m"))
    assert (answer.was_loaded, answer.freed_bytes) == (True, 100)
    assert (await get(server)).state == pb.MODEL_STATE_UNLOADED
    answer = await server.models.UnloadModel(pb.UnloadModelRequest(model="m"))
    assert (answer.was_loaded, answer.freed_bytes) == (False, 0)
    await server.assert_serves()


async def test_unload_drains_and_force_does_not_wait() -> None:
    """A plain unload waits for the stream until its deadline; force ends it with ABORTED."""
    files = {"m": FakeFiles(model=FakeModel(is_stepped=True))}
    async with running_server(files) as server:
        reader = server.reader(text_request("x" * 500))
        await reader.next()
        await until(lambda: bool(files["m"].model.batches))
        unload = server.models.UnloadModel(pb.UnloadModelRequest(model="m"), timeout=0.2)
        assert (await failure_of(unload)).code is grpc.StatusCode.DEADLINE_EXCEEDED
        forced = server.models.UnloadModel(pb.UnloadModelRequest(model="m", force=True))
        ended = asyncio.ensure_future(failure_of(reader.call))
        while not ended.done():
            # The engine hears of it between two steps.
            release(files["m"].model, 1)
            await asyncio.sleep(0.005)
        failure = await ended
        assert (failure.code, failure.reason) == (grpc.StatusCode.ABORTED, "MODEL_UNLOADED")
        assert (await forced).was_loaded


async def test_unload_stops_a_load(server: Server) -> None:
    """Whoever watches it gets LOAD_SUPERSEDED."""
    server.files["m"].may_load.clear()
    reader = Reader(server.models.LoadModel(pb.LoadModelRequest(model="m")))
    await reader.next()
    answer = await server.models.UnloadModel(pb.UnloadModelRequest(model="m"))
    assert not answer.was_loaded
    failure = await failure_of(reader.call)
    assert (failure.code, failure.reason) == (grpc.StatusCode.ABORTED, "LOAD_SUPERSEDED")
    server.files["m"].may_load.set()
    await server.assert_serves()


async def test_keep_alive(server: Server) -> None:
    """0s unloads when idle; a later time shows in expire_time; the longest one means never."""
    await load(server, keep_alive=Duration(seconds=3600))
    assert abs((await get(server)).expire_time.ToSeconds() - time.time() - 3600) < 60
    # Longer than Timestamp reaches: JSON printers fail on a later year than 9999.
    await load(server, keep_alive=Duration(seconds=300_000_000_000))
    (await get(server)).expire_time.ToJsonString()
    await load(server, keep_alive=Duration(seconds=315_576_000_000))
    assert not (await get(server)).HasField("expire_time")
    await server.generate(text_request(keep_alive=Duration()))
    await until_state(server, pb.MODEL_STATE_UNLOADED)


async def test_list_pages_and_states() -> None:
    """Pages follow each other in name order, without gaps; states filter."""
    files = {f"m{index}": FakeFiles() for index in range(5)}
    async with running_server(files) as server:
        await load(server, "m3")
        names: list[str] = []
        token = ""
        for _ in range(3):
            request = pb.ListModelsRequest(page_size=2, page_token=token)
            page = await server.models.ListModels(request)
            names += [model.name for model in page.models]
            token = page.next_page_token
        assert names == ["m0", "m1", "m2", "m3", "m4"]
        assert not token
        everything = await server.models.ListModels(pb.ListModelsRequest())
        assert [model.name for model in everything.models] == names
        assert not everything.next_page_token
        ready = pb.ListModelsRequest(states=[pb.MODEL_STATE_READY])
        assert [m.name for m in (await server.models.ListModels(ready)).models] == ["m3"]


async def test_get_model_before_a_load(server: Server) -> None:
    """What the files say is known without loading."""
    model = await get(server)
    assert (model.architecture, model.context_length, model.vocab_size) == ("fake", 1000, 257)
    assert (model.estimated_bytes, model.resident_bytes) == (100, 0)
    assert list(model.capabilities) == [
        pb.MODEL_CAPABILITY_CHAT,
        pb.MODEL_CAPABILITY_EMBEDDINGS,
    ]
    assert not model.HasField("load_time")


async def test_active_and_queued_requests() -> None:
    """They are counted by model while they run and wait."""
    files = {"m": FakeFiles(model=FakeModel(is_stepped=True))}
    async with running_server(files, max_batch_size=1) as server:
        readers = [server.reader(text_request("x" * 50)) for _ in range(3)]
        for reader in readers:
            await reader.next()
        async with asyncio.timeout(PATIENCE_S):
            while True:
                release(files["m"].model, 1)
                model = await get(server)
                if (model.active_requests, model.queued_requests) == (1, 2):
                    break
        for reader in readers:
            await reader.hang_up()


async def test_tokenize_and_count_load_no_weights(server: Server) -> None:
    """They count exactly what Generate runs, from the tokenizer alone."""
    prompt = chat_prompt((pb.ROLE_USER, "hé"))
    request = pb.TokenizeRequest(model="m", prompt=prompt, include_pieces=True)
    tokens = await server.models.Tokenize(request)
    assert tokens.rendered_prompt == "<user>hé"
    assert b"".join(tokens.pieces).decode() == "<user>hé"
    counted = await server.models.CountTokens(pb.CountTokensRequest(model="m", prompt=prompt))
    assert counted.token_count == len(tokens.token_ids) == 9
    plain = await server.models.Tokenize(
        pb.TokenizeRequest(model="m", prompt=pb.Prompt(tokens=pb.TokenIds(ids=[1, 2])))
    )
    assert (list(plain.token_ids), list(plain.pieces), plain.rendered_prompt) == ([1, 2], [], "")
    assert server.files["m"].num_loads == 0
    events = await server.generate(text_request(prompt=prompt))
    assert events[-1].finished.usage.prompt_tokens == 9


async def test_server_info(server: Server) -> None:
    """Versions and device, for support tickets."""
    info = await server.models.GetServerInfo(pb.GetServerInfoRequest())
    assert info.version
    assert (info.mlx_version, info.device_name) == ("0", "fake")
    assert abs(info.start_time.ToSeconds() - time.time()) < 600
