"""Start, overload, failure and shutdown of the whole server, and what health says about it."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2 as details_pb
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fakes import FakeFiles, FakeModel
from mlxpool.v1 import model_service_pb2 as pb
from mlxpool_server import app as app_module
from mlxpool_server.errors import AddressUnavailableError
from mlxpool_server.pool.queue_forecast import QueueForecast
from rpc.harness import (
    MAX_DETAILS_BYTES,
    PATIENCE_S,
    Failure,
    Reader,
    Server,
    failure_of,
    final_text,
    release,
    running_server,
    text_request,
    until,
)

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
SERVICES = ("", "mlxpool.v1.ModelService", "mlxpool.v1.MemoryService")


def watch_health(server: Server, service: str = "") -> Reader:
    stub = health_pb2_grpc.HealthStub(server.channel)
    return Reader(stub.Watch(health_pb2.HealthCheckRequest(service=service)))


async def health_of(server: Server, service: str) -> int:
    stub = health_pb2_grpc.HealthStub(server.channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status


async def exit_code(server: Server) -> int:
    async with asyncio.timeout(PATIENCE_S):
        assert server.stopped is not None
        return await server.stopped


def assert_try_again(failure: Failure, reason: str) -> None:
    assert (failure.code, failure.reason) == (UNAVAILABLE, reason)
    assert failure.detail(details_pb.RetryInfo).retry_delay.ToMilliseconds() > 0
    assert int(failure.pushback_ms or 0) > 0
    assert failure.details_bytes < MAX_DETAILS_BYTES


@pytest.mark.parametrize("service", SERVICES)
async def test_serving_while_it_runs(server: Server, service: str) -> None:
    """Every service of ours, and the whole."""
    assert await health_of(server, service) == SERVING


async def test_unknown_service_has_no_health(server: Server) -> None:
    """As the protocol says."""
    with pytest.raises(aio.AioRpcError) as error:
        await health_of(server, "mlxpool.v1.Nothing")
    assert error.value.code() is grpc.StatusCode.NOT_FOUND


async def test_drain() -> None:
    """What runs ends by itself; new work is refused with DRAINING; health says NOT_SERVING."""
    files = {"m": FakeFiles(model=FakeModel(is_stepped=True))}
    async with running_server(files) as server:
        running = server.reader(text_request("finish me"))
        await running.next()
        server.app.request_stop()
        watcher = watch_health(server, "mlxpool.v1.ModelService")
        while (await watcher.next()).status != NOT_SERVING:
            pass
        assert [await health_of(server, service) for service in SERVICES] == [NOT_SERVING] * 3
        refused = await failure_of(server.models.Generate(text_request()))
        assert_try_again(refused, "DRAINING")
        release(files["m"].model, 100)
        events = await running.rest()
        assert final_text(events) == "finish me"
        assert await running.call.code() is grpc.StatusCode.OK
        assert await exit_code(server) == 0


async def test_drain_that_takes_too_long() -> None:
    """After the grace time what still runs is told DRAINING, and the server ends."""
    files = {"m": FakeFiles(model=FakeModel(is_stepped=True))}
    async with running_server(files, drain_grace_s=0.1) as server:
        running = server.reader(text_request("too long"))
        await running.next()
        await until(lambda: bool(files["m"].model.batches))
        server.app.request_stop()
        await asyncio.sleep(0.2)
        release(files["m"].model, 1)
        failure = await failure_of(running.call)
        assert (failure.code, failure.reason) == (UNAVAILABLE, "DRAINING")
        assert await exit_code(server) == 0


async def test_stop_during_a_load() -> None:
    """The load is given up, its watcher hears of it, and the server ends."""
    files = {"m": FakeFiles()}
    files["m"].may_load.clear()
    async with running_server(files, drain_grace_s=0.1) as server:
        reader = Reader(server.models.LoadModel(pb.LoadModelRequest(model="m")))
        await reader.next()
        await asyncio.to_thread(files["m"].is_loading.wait, PATIENCE_S)
        server.app.request_stop()
        failure = await failure_of(reader.call)
        assert (failure.code, failure.reason) == (UNAVAILABLE, "DRAINING")
        assert failure.domain == "mlxpool"
        assert await exit_code(server) == 0


async def test_stuck_engine_does_not_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that never ends: stop() says so after its timeouts instead of hanging."""
    monkeypatch.setattr(app_module, "ENGINE_STOP_S", 0.1)
    monkeypatch.setattr(app_module, "POOL_CLOSE_S", 0.1)
    monkeypatch.setattr(app_module, "CALLS_STOP_S", 0.1)
    files = {"m": FakeFiles(model=FakeModel(is_stepped=True))}
    async with running_server(files, drain_grace_s=0.1) as server:
        reader = server.reader(text_request())
        await reader.next()
        await until(lambda: bool(files["m"].model.batches and files["m"].model.batches[0].slots))
        server.app.request_stop()
        await exit_code(server)
        stopped = [each for each in server.logs.entries if each["event"] == "server.stopped"]
        assert stopped[0]["engine_stopped"] is False


async def test_engine_death() -> None:
    """Streams fail with INTERNAL, health says NOT_SERVING, the exit code is 1."""

    class Death(BaseException):
        """What no handler of an Exception stops."""

    files = {"m": FakeFiles(model=FakeModel(is_stepped=True))}
    async with running_server(files) as server:
        watcher = watch_health(server)
        assert (await watcher.next()).status == SERVING
        reader = server.reader(text_request())
        await reader.next()
        files["m"].model.step_errors.append(Death("secret"))  # type: ignore[arg-type]
        release(files["m"].model, 10)
        failure = await failure_of(reader.call)
        assert (failure.code, failure.reason) == (
            grpc.StatusCode.INTERNAL,
            "GENERATION_FAILED",
        )
        assert "secret" not in failure.message
        assert (await watcher.next()).status == NOT_SERVING
        assert await exit_code(server) == 1


async def test_failed_step(server: Server) -> None:
    """Its streams fail with INTERNAL without the cause's text; the next ones run."""
    server.files["m"].model.step_errors.append(RuntimeError("secret"))
    failure = await failure_of(server.models.Generate(text_request()))
    assert (failure.code, failure.reason) == (grpc.StatusCode.INTERNAL, "GENERATION_FAILED")
    assert "secret" not in failure.message
    line = await server.log_line("Generate")
    assert (line["status"], line["reason"]) == ("INTERNAL", "GENERATION_FAILED")
    await server.assert_serves()


async def test_unforeseen_error(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """INTERNAL without the exception's text; the log has it."""

    def crash() -> None:
        raise ZeroDivisionError("secret")

    server.may_crash = True
    monkeypatch.setattr(server.memory, "reset_peak", crash)
    from mlxpool.v1 import memory_service_pb2 as memory_pb  # noqa: PLC0415 - only here

    failure = await failure_of(server.memories.ResetPeakMemory(memory_pb.ResetPeakMemoryRequest()))
    assert (failure.code, failure.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert failure.domain == "mlxpool"
    assert "secret" not in failure.message
    (crashed,) = (each for each in server.logs.entries if each["event"] == "rpc.crashed")
    assert crashed["exc_info"]
    assert (await server.log_line("ResetPeakMemory"))["status"] == "INTERNAL"


async def test_queue_full() -> None:
    """What does not fit into batch and queue is refused at once, and the rest runs."""
    files = {"m": FakeFiles(model=FakeModel(is_stepped=True))}
    async with running_server(files, max_batch_size=1, max_queued_requests=1) as server:
        readers = [server.reader(text_request(str(index))) for index in range(2)]
        for reader in readers:
            await reader.next()
        refused = await failure_of(server.models.Generate(text_request()))
        assert_try_again(refused, "QUEUE_FULL")
        release(files["m"].model, 100)
        assert [final_text(await reader.rest()) for reader in readers] == ["0", "1"]
        await server.assert_serves()


async def test_queue_timeout() -> None:
    """A request whose turn does not come in time is told so after `started`; the others run."""
    files = {"m": FakeFiles(model=FakeModel(is_stepped=True))}
    async with running_server(files, max_batch_size=1, max_queue_wait_s=0.1) as server:
        running = server.reader(text_request("first"))
        await running.next()
        await until(files["m"].model.is_waiting.is_set)
        waiting = server.reader(text_request("second"))
        assert (await waiting.next()).HasField("started")
        assert_try_again(await failure_of(waiting.call), "QUEUE_TIMEOUT")
        release(files["m"].model, 100)
        assert final_text(await running.rest()) == "first"
        await server.assert_serves()


async def test_deadline_unmeetable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused at once and not retried: the caller's deadline is shorter than the queue."""
    files = {"m": FakeFiles(model=FakeModel(is_stepped=True))}
    async with running_server(files, max_batch_size=1) as server:
        readers = [server.reader(text_request(str(index))) for index in range(2)]
        for reader in readers:
            await reader.next()
        monkeypatch.setattr(QueueForecast, "wait_s", lambda *_: 1000.0)
        refused = await failure_of(server.models.Generate(text_request(), timeout=PATIENCE_S))
        assert (refused.code, refused.reason) == (UNAVAILABLE, "DEADLINE_UNMEETABLE")
        assert refused.detail(details_pb.RetryInfo).retry_delay.seconds == 1000
        assert refused.pushback_ms == "-1"
        # Who sets no deadline waits.
        patient = server.reader(text_request("patient"))
        assert (await patient.next()).HasField("started")
        release(files["m"].model, 100)
        for reader, text in zip((*readers, patient), ("0", "1", "patient"), strict=True):
            assert final_text(await reader.rest()) == text


async def test_a_port_has_one_server(server: Server) -> None:
    """The second one fails instead of taking half of the calls."""
    with pytest.raises(AddressUnavailableError, match=server.address):
        async with running_server(listen=(server.address,)):
            pass
    await server.assert_serves()


async def test_a_socket_has_one_server(tmp_path: Path) -> None:
    """Left alone, grpc takes a unix socket away from the server that listens on it."""
    address = f"unix:{tmp_path}/mlxpool.sock"
    async with running_server(listen=(address,)) as server:
        await server.assert_serves()
        with pytest.raises(AddressUnavailableError, match=r"mlxpool\.sock"):
            async with running_server(listen=(address,)):
                pass
        await server.assert_serves()


async def test_a_dead_servers_socket_is_taken(tmp_path: Path) -> None:
    """A file that a killed server left behind does not stop the next one."""
    path = tmp_path / "left.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    assert path.exists()
    async with running_server(listen=(f"unix:{path}",)) as server:
        await server.assert_serves()


async def test_two_addresses(tmp_path: Path) -> None:
    """One server answers on all of its addresses, and names the ports it got."""
    listen = ("127.0.0.1:0", f"unix:{tmp_path}/too.sock", "127.0.0.1:0")
    async with running_server(listen=listen) as server:
        (line,) = (each for each in server.logs.entries if each["event"] == "server.listening")
        assert len(set(line["addresses"])) == 3
        for address in line["addresses"]:
            async with aio.insecure_channel(address) as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                assert (await stub.Check(health_pb2.HealthCheckRequest())).status == SERVING


async def test_a_clean_stop_warns_of_nothing(server: Server) -> None:
    """Nor when a model is loaded: that its engine has stopped first is the order of things."""
    await server.generate(text_request())
    server.app.request_stop()
    assert await exit_code(server) == 0
    assert not [each for each in server.logs.entries if each["log_level"] != "info"]
