"""SIGHUP: what a running server takes over, and that a wrong configuration changes nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from fakes import FakeFiles, FakeModel
from mlxpool.v1 import memory_service_pb2 as memory_pb
from mlxpool.v1 import model_service_pb2 as pb
from mlxpool_server.domain import KvQuantization, Layout, ModelSpec
from mlxpool_server.errors import MemoryInUseError, SettingsError
from mlxpool_server.pool.catalog import Catalog
from mlxpool_server.reload import Reloads
from mlxpool_server.settings import Settings
from rpc.harness import (
    PATIENCE_S,
    Server,
    failure_of,
    final_text,
    release,
    running_server,
    text_request,
    until,
)


def spec(name: str, folder: str = "unread", **fields: Any) -> ModelSpec:
    return ModelSpec(name, Path(folder) / name, **fields)


async def reload(server: Server, *specs: ModelSpec, **settings: Any) -> None:
    """As if the configuration said this now."""
    fields = server.app._settings.model_dump() | settings
    fresh = Settings.model_validate(fields)
    async with asyncio.timeout(PATIENCE_S):
        await server.app.reload(fresh, Catalog.build(specs or (spec("m"),)))


async def names(server: Server) -> set[str]:
    return {each.name for each in (await server.models.ListModels(pb.ListModelsRequest())).models}


def logged(server: Server, event: str) -> list[Any]:
    return [each for each in server.logs.entries if each["event"] == event]


async def test_an_added_model_can_be_used() -> None:
    """And is loaded at once if the catalogue says preload."""
    files = {"m": FakeFiles(), "new": FakeFiles()}
    async with running_server(files, specs=(spec("m"),)) as server:
        refused = await failure_of(server.models.Generate(text_request(model="new")))
        assert refused.code is grpc.StatusCode.NOT_FOUND
        await reload(server, spec("m"), spec("new", preload=True, aliases=("alias",)))
        assert await names(server) == {"m", "new"}
        await until(lambda: files["new"].num_loads == 1)
        events = await server.generate(text_request("by alias", model="alias"))
        assert final_text(events) == "by alias"
        (line,) = logged(server, "settings.reloaded")
        assert (line["added"], line["removed"]) == (["new"], [])


async def test_an_idle_model_that_is_removed_goes() -> None:
    """Its memory is free, and its name is not found any more."""
    files = {"m": FakeFiles(), "old": FakeFiles()}
    async with running_server(files) as server:
        await server.generate(text_request(model="old"))
        await reload(server, spec("m"))
        await until(lambda: bool(logged(server, "model.removed")))
        assert server.app._pool.used_bytes == 0
        refused = await failure_of(server.models.Generate(text_request(model="old")))
        assert refused.code is grpc.StatusCode.NOT_FOUND
        await server.assert_serves()


async def test_a_removed_model_in_use_stays_until_it_is_idle() -> None:
    """What runs on it ends as if nothing had happened; new requests are refused."""
    files = {"m": FakeFiles(), "old": FakeFiles(model=FakeModel(is_stepped=True))}
    async with running_server(files) as server:
        running = server.reader(text_request("to the end", model="old"))
        await running.next()
        await reload(server, spec("m"))
        assert await names(server) == {"m"}
        refused = await failure_of(server.models.Generate(text_request(model="old")))
        assert refused.code is grpc.StatusCode.NOT_FOUND
        assert not logged(server, "model.removed")
        release(files["old"].model, 100)
        assert final_text(await running.rest()) == "to the end"
        await until(lambda: bool(logged(server, "model.removed")))
        assert server.app._pool.used_bytes == 0


async def test_a_request_that_waits_for_a_load_survives_the_removal() -> None:
    """It counts as use, too."""
    files = {"m": FakeFiles(), "old": FakeFiles()}
    files["old"].may_load.clear()
    async with running_server(files) as server:
        waiting = server.reader(text_request("patient", model="old"))
        await asyncio.to_thread(files["old"].is_loading.wait, PATIENCE_S)
        await reload(server, spec("m"))
        files["old"].may_load.set()
        assert final_text(await waiting.rest()) == "patient"
        await until(lambda: bool(logged(server, "model.removed")))


async def test_a_removed_model_can_come_back() -> None:
    """Before what runs on it has ended, too: it never left, then."""
    files = {"m": FakeFiles(), "old": FakeFiles(model=FakeModel(is_stepped=True))}
    async with running_server(files) as server:
        running = server.reader(text_request("still there", model="old"))
        await running.next()
        await reload(server, spec("m"))
        await reload(server, spec("m"), spec("old"))
        assert await names(server) == {"m", "old"}
        files["old"].model.run_freely()
        assert final_text(await running.rest()) == "still there"
        assert final_text(await server.generate(text_request("x", model="old"))) == "x"
        assert files["old"].num_loads == 1
        assert not logged(server, "model.removed")


async def test_other_files_are_loaded_anew() -> None:
    """The next request after the change gets the model of the new folder, and its tokenizer."""
    files = {"m": FakeFiles()}
    async with running_server(files) as server:
        await server.assert_serves()
        await reload(server, spec("m", "elsewhere"))
        await server.assert_serves()
        assert files["m"].num_loads == 2
        assert files["m"].num_tokenizer_reads == 2


@pytest.mark.parametrize(
    "change",
    [
        {"layout": Layout.FLOAT16},
        {"kv_quantization": KvQuantization(8)},
        {"prompt_lookup_tokens": 4},
    ],
)
async def test_another_form_in_memory_is_loaded_anew(change: dict[str, Any]) -> None:
    """The weights' layout or the KV cache's bits: what is in memory has the old ones."""
    files = {"m": FakeFiles()}
    async with running_server(files) as server:
        await server.assert_serves()
        await reload(server, spec("m", **change))
        await server.assert_serves()
        assert files["m"].num_loads == 2


async def test_an_unchanged_catalogue_leaves_models_alone() -> None:
    """What is loaded stays loaded, and what LoadModel set stays set."""
    files = {"m": FakeFiles()}
    async with running_server(files) as server:
        request = pb.LoadModelRequest(model="m", pinned=True)
        assert [event async for event in server.models.LoadModel(request)]
        await reload(server)
        model = (await server.models.GetModel(pb.GetModelRequest(model="m"))).model
        assert (model.state, model.pinned) == (pb.MODEL_STATE_READY, True)
        assert files["m"].num_loads == 1


async def test_limits_hold_for_the_next_request(server: Server) -> None:
    """Those of requests and of the pool."""
    await reload(server, max_prompt_tokens=3, max_stop_sequences=0, pool_memory_limit_bytes=500)
    too_long = await failure_of(server.models.Generate(text_request("four")))
    assert too_long.code is grpc.StatusCode.INVALID_ARGUMENT
    stop = pb.StopConditions(sequences=["x"])
    too_many = await failure_of(server.models.Generate(text_request("abc", stop=stop)))
    assert too_many.code is grpc.StatusCode.INVALID_ARGUMENT
    usage = (await server.memories.GetMemoryUsage(memory_pb.GetMemoryUsageRequest())).usage
    assert usage.limits.pool_bytes == 500
    (line,) = logged(server, "settings.reloaded")
    assert line["changed"] == ["max_prompt_tokens", "max_stop_sequences", "pool_memory_limit_bytes"]


async def test_a_limit_set_by_a_call_stays(server: Server) -> None:
    """A reload that does not change the setting does not undo SetMemoryLimits."""
    limits = memory_pb.MemoryLimits(pool_bytes=300)
    await server.memories.SetMemoryLimits(memory_pb.SetMemoryLimitsRequest(limits=limits))
    await reload(server, max_prompt_tokens=100)
    assert server.app._pool.limit_bytes == 300


async def test_a_limit_that_cannot_be_met_changes_nothing() -> None:
    """The pool's new limit is below what a pinned model takes: nothing else changes either."""
    files = {"m": FakeFiles(), "new": FakeFiles()}
    async with running_server(files, specs=(spec("m", pinned=True),)) as server:
        await server.assert_serves()
        with pytest.raises(MemoryInUseError):
            await reload(server, spec("m", pinned=True), spec("new"), pool_memory_limit_bytes=50)
        assert await names(server) == {"m"}
        assert server.app._pool.limit_bytes == 750


async def test_what_needs_a_restart_is_named(server: Server) -> None:
    """The log says which settings wait for one; they stay as they were."""
    await reload(server, max_batch_size=7, log_level="debug", drain_grace_s=1.0)
    (line,) = logged(server, "settings.need_restart")
    assert line["settings"] == ["log_level", "max_batch_size"]
    assert server.app._settings.max_batch_size == 32
    assert server.app._settings.drain_grace_s == 1.0


async def test_a_bad_file_changes_nothing(server: Server) -> None:
    """The log says why, and the next reload works."""
    answers: list[Any] = [
        SettingsError("models_dir: no such folder"),
        ZeroDivisionError("unforeseen"),
        (
            server.app._settings.model_copy(update={"max_prompt_tokens": 9}),
            Catalog.build([spec("m")]),
        ),
    ]

    def read() -> tuple[Settings, Catalog]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        settings, catalog = answer
        return settings, catalog

    reloads = Reloads(read, server.app.reload)
    task = asyncio.create_task(reloads.run())
    for count in (1, 2):
        reloads.request()
        await until(lambda count=count: len(logged(server, "settings.not_reloaded")) == count)
    assert logged(server, "settings.not_reloaded")[0]["problem"] == "models_dir: no such folder"
    assert server.app._settings.max_prompt_tokens is None
    reloads.request()
    await until(lambda: bool(logged(server, "settings.reloaded")))
    assert server.app._settings.max_prompt_tokens == 9
    task.cancel()
