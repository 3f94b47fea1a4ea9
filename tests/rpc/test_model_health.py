"""Health by model name, and of an engine that is stuck."""

from __future__ import annotations

import os
from pathlib import Path

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fakes import FakeFiles, FakeModel
from mlxpool.v1 import model_service_pb2 as pb
from mlxpool_server import app as app_module
from mlxpool_server.domain import ModelSpec
from mlxpool_server.engine.engine import MAX_CONSECUTIVE_FAILURES
from rpc.harness import (
    PATIENCE_S,
    Reader,
    Server,
    failure_of,
    release,
    running_server,
    text_request,
    until,
)

STATUS = health_pb2.HealthCheckResponse


async def check(server: Server, service: str) -> int:
    stub = health_pb2_grpc.HealthStub(server.channel)
    request = health_pb2.HealthCheckRequest(service=service)
    return (await stub.Check(request, timeout=PATIENCE_S)).status


def watch(server: Server, service: str) -> Reader:
    stub = health_pb2_grpc.HealthStub(server.channel)
    return Reader(stub.Watch(health_pb2.HealthCheckRequest(service=service)))


async def test_a_model_that_can_be_generated_on_serves() -> None:
    """Loaded or not: a request loads it. Its aliases say the same."""
    specs = (ModelSpec("m", Path("unread"), aliases=("default",)),)
    async with running_server(specs=specs) as server:
        assert [await check(server, name) for name in ("m", "default")] == [STATUS.SERVING] * 2
        await server.assert_serves()
        assert await check(server, "m") == STATUS.SERVING


async def test_a_name_that_is_no_model_is_unknown(server: Server) -> None:
    """Check answers NOT_FOUND, and Watch SERVICE_UNKNOWN, as the protocol says."""
    with pytest.raises(aio.AioRpcError) as error:
        await check(server, "nobody")
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
    assert (await watch(server, "nobody").next()).status == STATUS.SERVICE_UNKNOWN


async def test_a_model_whose_load_failed_does_not_serve() -> None:
    """A watcher learns of it at once, and of the load that succeeds later; the server serves."""
    files = {"m": FakeFiles(load_error=RuntimeError("torn"))}
    async with running_server(files) as server:
        watcher = watch(server, "m")
        assert (await watcher.next()).status == STATUS.SERVING
        await failure_of(server.models.LoadModel(pb.LoadModelRequest(model="m")))
        assert (await watcher.next()).status == STATUS.NOT_SERVING
        assert [await check(server, name) for name in ("m", "")] == [
            STATUS.NOT_SERVING,
            STATUS.SERVING,
        ]
        files["m"].load_error = None
        await server.assert_serves()
        assert (await watcher.next()).status == STATUS.SERVING


async def test_a_model_whose_files_are_none_does_not_serve() -> None:
    """Nobody has to ask for a load to find out."""
    async with running_server({"m": FakeFiles(inspect_error="no config.json")}) as server:
        assert await check(server, "m") == STATUS.NOT_SERVING


async def test_a_failed_runner_is_restarted() -> None:
    """A step that fails costs its streams; the model gets a fresh batch and still serves."""
    files = {"m": FakeFiles()}
    async with running_server(files) as server:
        files["m"].model.step_errors.append(RuntimeError("once"))
        await failure_of(server.models.Generate(text_request()))
        assert await check(server, "m") == STATUS.SERVING
        await server.assert_serves()
        assert len(files["m"].model.batches) == 2


async def test_a_model_that_keeps_failing_does_not_serve_until_it_is_loaded_anew() -> None:
    """Its runner is given up after some failures in a row; the next request loads it again."""
    files = {"m": FakeFiles()}
    async with running_server(files) as server:
        files["m"].model.step_errors += [RuntimeError("again")] * MAX_CONSECUTIVE_FAILURES
        watcher = watch(server, "m")
        assert (await watcher.next()).status == STATUS.SERVING
        for _ in range(MAX_CONSECUTIVE_FAILURES):
            await failure_of(server.models.Generate(text_request()))
        assert (await watcher.next()).status == STATUS.NOT_SERVING
        assert await check(server, "") == STATUS.SERVING
        await server.assert_serves()
        assert (await watcher.next()).status == STATUS.SERVING


async def test_a_stuck_engine_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that takes too long turns everything NOT_SERVING, and its end SERVING again."""
    monkeypatch.setattr(app_module, "HEALTH_INTERVAL_S", 0.01)
    files = {"m": FakeFiles(model=FakeModel(is_stepped=True))}
    async with running_server(files, engine_stuck_s=0.05) as server:
        whole, model = watch(server, ""), watch(server, "m")
        for watcher in (whole, model):
            assert (await watcher.next()).status == STATUS.SERVING
        running = server.reader(text_request("stuck"))
        await running.next()
        for watcher in (whole, model):
            assert (await watcher.next()).status == STATUS.NOT_SERVING
        assert [each for each in server.logs.entries if each["event"] == "engine.stuck"]
        files["m"].model.run_freely()
        for watcher in (whole, model):
            assert (await watcher.next()).status == STATUS.SERVING
        await running.rest()


async def test_an_engine_stuck_for_too_long_ends_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a code of its own, without waiting for streams that cannot end; they are told."""
    for name in ("ENGINE_STOP_S", "POOL_CLOSE_S", "CALLS_STOP_S", "HEALTH_INTERVAL_S"):
        monkeypatch.setattr(app_module, name, 0.05)
    files = {"m": FakeFiles(model=FakeModel(is_stepped=True))}
    settings = {"engine_stuck_s": 0.05, "engine_exit_s": 0.1, "drain_grace_s": 3600.0}
    async with running_server(files, **settings) as server:
        failure = await failure_of(server.models.Generate(text_request()))
        assert failure.code is grpc.StatusCode.UNAVAILABLE
        assert server.stopped is not None
        assert await server.stopped == os.EX_SOFTWARE
        release(files["m"].model, 100)
        await until(lambda: not server.app._engine._thread.is_alive())
