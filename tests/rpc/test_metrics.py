"""What Prometheus reads, over HTTP, from a real server."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from fakes import FakeFiles, FakeModel
from mlxpool.v1 import model_service_pb2 as pb
from mlxpool_server.domain import ModelSpec
from mlxpool_server.errors import AddressUnavailableError
from mlxpool_server.metrics import endpoint as endpoint_module
from rpc.harness import PATIENCE_S, Server, failure_of, release, running_server, text_request, until
from rpc.metrics_reader import fetch, metrics_address, scrape

LISTEN = "127.0.0.1:0"


@pytest_asyncio.fixture
async def measured() -> AsyncIterator[Server]:
    async with running_server(metrics_listen=LISTEN) as server:
        yield server


async def test_off_by_default(server: Server) -> None:
    """Nobody listens for scrapers unless a setting says where."""
    assert not [each for each in server.logs.entries if each["event"] == "metrics.listening"]


async def test_a_request_is_counted(measured: Server) -> None:
    """By model and status, with its tokens and its times."""
    await measured.generate(text_request("four"))
    await measured.log_line("Generate")
    seen = await scrape(measured)
    assert seen("mlxpool_requests_total", model="m", status="OK", reason="") == 1
    assert seen("mlxpool_generations_total", model="m", finish_reason="stop") == 1
    assert seen("mlxpool_prompt_tokens_total", model="m") == 4
    # Four bytes and the end of the text.
    assert seen("mlxpool_completion_tokens_total", model="m") == 5
    assert seen("mlxpool_time_to_first_token_seconds_count", model="m") == 1
    assert seen("mlxpool_time_per_output_token_seconds_count", model="m") == 1
    assert seen("mlxpool_inter_token_latency_seconds_count", model="m") == 3
    assert seen("mlxpool_request_duration_seconds_count", model="m", status="OK") == 1
    method = "mlxpool.v1.ModelService/Generate"
    assert seen("mlxpool_rpc_duration_seconds_count", rpc_method=method, status="OK") == 1
    assert seen("mlxpool_engine_step_duration_seconds_count", model="m") >= 5
    assert seen("mlxpool_loads_total", model="m") == 1
    assert seen("mlxpool_load_duration_seconds_count", model="m") == 1


async def test_the_pool_is_shown() -> None:
    """Running and waiting sequences and who holds which bytes, while they do."""
    files = {"m": FakeFiles(model=FakeModel(is_stepped=True)), "idle": FakeFiles()}
    async with running_server(files, metrics_listen=LISTEN, max_batch_size=1) as server:
        readers = [server.reader(text_request()) for _ in range(2)]
        for reader in readers:
            await reader.next()
        await until(lambda: server.app._pool.use().models[1].running == 1)
        seen = await scrape(server)
        assert seen("mlxpool_running_sequences", model="m") == 1
        assert seen("mlxpool_queued_requests", model="m") == 1
        assert seen("mlxpool_weights_bytes", model="m") == 100
        assert seen("mlxpool_model_state", model="m", state="ready") == 1
        assert seen("mlxpool_model_state", model="idle", state="unloaded") == 1
        assert seen("mlxpool_pool_limit_bytes") == 750
        assert seen("mlxpool_pool_used_bytes") >= 100
        assert seen("mlxpool_max_batch_size") == 1
        assert seen("mlxpool_serving") == 1
        assert seen("mlxpool_mlx_active_bytes") == 40
        (build,) = seen.find("mlxpool_build_info")
        assert build.labels["device_kind"] == "cpu"
        release(files["m"].model, 100)


async def test_what_a_leak_would_show() -> None:
    """Open calls and the loop's tasks rise with a generation, and are back when it has ended."""
    files = {"m": FakeFiles(model=FakeModel(is_stepped=True))}
    async with running_server(files, metrics_listen=LISTEN) as server:
        before = await scrape(server)
        assert before("mlxpool_open_generations") == 0
        reader = server.reader(text_request())
        await reader.next()
        during = await scrape(server)
        assert during("mlxpool_open_generations") == 1
        assert during("mlxpool_asyncio_tasks") > before("mlxpool_asyncio_tasks")
        release(files["m"].model, 100)
        await reader.rest()
        await server.log_line("Generate")
        async with asyncio.timeout(PATIENCE_S):
            while (after := await scrape(server))("mlxpool_asyncio_tasks") > before(
                "mlxpool_asyncio_tasks"
            ):
                pass
        assert after("mlxpool_open_generations") == 0


async def test_evictions_and_failed_loads() -> None:
    """Each is counted for the model that it happened to."""
    files = {
        "a": FakeFiles.of_size(100),
        "b": FakeFiles.of_size(100),
        "bad": FakeFiles(load_error=RuntimeError("torn")),
    }
    async with running_server(files, metrics_listen=LISTEN, pool_memory_limit_bytes=150) as server:
        for name in "ab":
            await server.generate(text_request(model=name))
        await failure_of(server.models.LoadModel(pb.LoadModelRequest(model="bad")))
        seen = await scrape(server)
        assert seen("mlxpool_evictions_total", model="a") == 1
        assert seen("mlxpool_failed_loads_total", model="bad") == 1
        assert seen("mlxpool_loads_total", model="b") == 1


async def test_refusals_have_a_reason(measured: Server) -> None:
    """A name that is not in the catalogue makes no series of its own."""
    for name in ("no-such-model", "nor-this"):
        await failure_of(measured.models.Generate(text_request(model=name)))
    await until(lambda: len(_ended(measured)) == 2)
    seen = await scrape(measured)
    labels = {"status": "NOT_FOUND", "reason": "MODEL_NOT_FOUND"}
    assert seen("mlxpool_requests_total", model="", **labels) == 2
    assert "no-such-model" not in str(seen.samples)


async def test_aliases_count_as_their_model() -> None:
    """Whatever name a refused request used, the label is the catalogue's."""
    specs = (ModelSpec("m", Path("unread"), aliases=("default",)),)
    async with running_server(specs=specs, metrics_listen=LISTEN) as server:
        refused = text_request(model="default", require_loaded=True)
        failure = await failure_of(server.models.Generate(refused))
        assert failure.code is grpc.StatusCode.FAILED_PRECONDITION
        await server.log_line("Generate")
        seen = await scrape(server)
        assert seen("mlxpool_requests_total", model="m", reason="MODEL_NOT_LOADED") == 1


async def test_a_client_that_hangs_up_is_counted() -> None:
    """As CANCELLED, with the tokens that were made for it."""
    files = {"m": FakeFiles(model=FakeModel(is_stepped=True))}
    async with running_server(files, metrics_listen=LISTEN) as server:
        reader = server.reader(text_request("long answer"))
        release(files["m"].model, 4)
        while not (await reader.next()).HasField("delta"):
            pass
        await reader.hang_up()
        release(files["m"].model, 100)
        await server.log_line("Generate")
        await until(lambda: server.app._pool.activity.of("m").finished_generations == 1)
        seen = await scrape(server)
        assert seen("mlxpool_requests_total", model="m", status="CANCELLED") == 1
        assert seen("mlxpool_completion_tokens_total", model="m") >= 1


async def test_openmetrics_is_spoken(measured: Server) -> None:
    """Prometheus asks for it first; the text form is for everyone else."""
    await measured.generate(text_request())
    accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
    url = f"http://{metrics_address(measured)}/metrics"
    content_type, text = await fetch(url, accept=accept)
    assert content_type.startswith("application/openmetrics-text")
    names = {family.name for family in text_string_to_metric_families(text)}
    assert {"mlxpool_requests", "mlxpool_time_to_first_token_seconds"} <= names


@pytest.mark.parametrize(
    ("path", "method", "code"), [("/x", "GET", 404), ("/metrics", "POST", 405)]
)
async def test_only_metrics_are_served(measured: Server, path: str, method: str, code: int) -> None:
    """Everything else is refused, with a status."""
    raw = await _exchange(measured, f"{method} {path} HTTP/1.1\r\n\r\n".encode())
    assert raw.startswith(b"HTTP/1.1 %d " % code)


@pytest.mark.parametrize("request_bytes", [b"", b"\x16\x03\x01\r\n\r\n", b"GET /" + b"a" * 99999])
async def test_garbage_is_survived(measured: Server, request_bytes: bytes) -> None:
    """Whoever sends what is no request gets no answer of use, and the next scrape works."""
    await _exchange(measured, request_bytes)
    assert (await scrape(measured))("mlxpool_serving") == 1


async def test_a_silent_connection_does_not_keep_the_server() -> None:
    """Somebody who connected and never asked is cut off when the server stops."""
    async with running_server(metrics_listen=LISTEN) as server:
        host, _, port = metrics_address(server).rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        endpoint = server.app._telemetry._endpoint
        assert endpoint is not None
        await until(lambda: bool(endpoint._connections))
        server.app.request_stop()
        async with asyncio.timeout(PATIENCE_S):
            assert await reader.read() == b""
        writer.close()


async def test_a_scraper_that_stops_reading_is_cut_off(
    measured: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has not read is not kept for it."""
    monkeypatch.setattr(endpoint_module, "PATIENCE_S", 0.2)
    endpoint = measured.app._telemetry._endpoint
    assert endpoint is not None
    # More than the kernel takes for somebody who does not read.
    text = b"#" * (32 << 20)
    monkeypatch.setattr(endpoint, "_answer", partial(_answer_with, text))
    host, _, port = metrics_address(measured).rpartition(":")
    with socket.create_connection((host, int(port))) as scraper:
        scraper.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        await until(lambda: bool(endpoint._connections))
        await until(lambda: not endpoint._connections)
        scraper.settimeout(PATIENCE_S)
        assert await asyncio.to_thread(_all_of, scraper) < len(text)


async def test_a_port_in_use_stops_the_start(measured: Server) -> None:
    """As with the server's own addresses."""
    taken = metrics_address(measured)
    with pytest.raises(AddressUnavailableError, match=taken):
        async with running_server(metrics_listen=taken):
            pass


async def _answer_with(text: bytes, _head: bytes) -> bytes:
    return text


def _all_of(scraper: socket.socket) -> int:
    """How many bytes come until the connection ends."""
    count = 0
    with contextlib.suppress(ConnectionResetError):
        while received := scraper.recv(1 << 20):
            count += len(received)
    return count


async def _exchange(server: Server, request: bytes) -> bytes:
    host, _, port = metrics_address(server).rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        async with asyncio.timeout(PATIENCE_S):
            writer.write(request)
            writer.write_eof()
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


def _ended(server: Server) -> list[object]:
    return [each for each in server.logs.entries if each["event"] == "rpc.finished"]
