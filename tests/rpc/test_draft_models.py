"""Draft models over the wire: who has which, and what happens when another one is asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc

from fakes import FakeFiles
from mlxpool.v1 import model_service_pb2 as pb
from mlxpool_server.domain import Layout, ModelSpec
from mlxpool_server.pool.catalog import Catalog
from mlxpool_server.settings import Settings
from rpc.harness import Reader, Server, failure_of, release, running_server, text_request


def files() -> dict[str, FakeFiles]:
    return {name: FakeFiles.of_size(size) for name, size in [("m", 100), ("s", 30), ("t", 20)]}


async def load(server: Server, **fields: Any) -> pb.LoadModelResponse:
    call = server.models.LoadModel(pb.LoadModelRequest(model="m", **fields))
    return (await Reader(call).rest())[-1]


async def test_a_load_with_a_draft_model() -> None:
    """Both come into memory as one; the next load without a word has it again."""
    async with running_server(files()) as server:
        await load(server, draft_model="s")
        assert (await load(server, draft_model="s")).finished.already_loaded
        assert (await load(server)).finished.already_loaded
        await server.models.UnloadModel(pb.UnloadModelRequest(model="m"))
        await server.generate(text_request("a"))
        assert server.files["m"].drafts == ["s", "s"]


async def test_another_draft_model_than_the_one_that_is_loaded() -> None:
    """MODEL_IN_USE, also without a load; after an unload it can be had."""
    async with running_server(files()) as server:
        await load(server, draft_model="s")
        for fields in ({}, {"validate_only": True}):
            request = pb.LoadModelRequest(model="m", draft_model="t", **fields)
            failure = await failure_of(server.models.LoadModel(request))
            assert failure.code is grpc.StatusCode.FAILED_PRECONDITION
            assert failure.reason == "MODEL_IN_USE"
            assert "'s'" in failure.message
        await server.models.UnloadModel(pb.UnloadModelRequest(model="m"))
        await load(server, draft_model="t")
        assert server.files["m"].drafts == ["s", "t"]


async def test_a_draft_model_that_is_none() -> None:
    """NOT_FOUND for a name that nobody has, INVALID_FIELD for the model itself."""
    async with running_server(files()) as server:
        request = pb.LoadModelRequest(model="m", draft_model="nobody")
        failure = await failure_of(server.models.LoadModel(request))
        assert (failure.code, failure.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
        request = pb.LoadModelRequest(model="m", draft_model="m")
        failure = await failure_of(server.models.LoadModel(request))
        assert (failure.reason, failure.field) == ("INVALID_FIELD", "draft_model")
        await server.assert_serves()


async def test_both_have_to_fit() -> None:
    """The draft model counts against the limit, in a trial as in a load."""
    async with running_server(files(), pool_memory_limit_bytes=120) as server:
        for fields in ({"validate_only": True}, {}):
            request = pb.LoadModelRequest(model="m", draft_model="s", **fields)
            failure = await failure_of(server.models.LoadModel(request))
            assert failure.reason == "POOL_MEMORY_LIMIT"
        await load(server, draft_model="t")


async def test_an_adapter_has_none() -> None:
    """INVALID_FIELD: nobody would use it, and it is not left out in silence."""
    spec = ModelSpec("m", Path("unread"), adapters=(("one", Path("adapters/one")),))
    small = ModelSpec("s", Path("small"))
    async with running_server(files() | {"m+one": FakeFiles()}, specs=(spec, small)) as server:
        for fields in ({}, {"validate_only": True}):
            request = pb.LoadModelRequest(model="m", adapter="one", draft_model="s", **fields)
            failure = await failure_of(server.models.LoadModel(request))
            assert (failure.reason, failure.field) == ("INVALID_FIELD", "draft_model")


async def test_a_trial_without_a_draft_model_while_an_old_form_leaves() -> None:
    """What a reload replaced still serves a stream: that is no reason to refuse a trial."""
    spec = ModelSpec("m", Path("unread"))
    stepped = {"m": FakeFiles.of_size(100, is_stepped=True)}
    async with running_server(stepped, specs=(spec,)) as server:
        reader = server.reader(text_request("abc"))
        release(server.model, 2)
        while not (await reader.next()).HasField("delta"):
            pass
        settings = Settings.model_validate(server.app._settings.model_dump())
        other = replace(spec, layout=Layout.FLOAT16)
        await server.app.reload(settings, Catalog.build([other]))
        assert list((await load(server, validate_only=True)).finished.evicted_models) == []
        server.model.run_freely()
        await reader.rest()
