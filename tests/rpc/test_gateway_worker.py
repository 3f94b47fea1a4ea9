"""A worker as the gateway sees it: registration, health, and who gets in."""

from __future__ import annotations

import hashlib
import io
import sys
import zipfile
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from smg_grpc_proto import mlx_engine_pb2 as pb
from smg_grpc_proto.generated import common_pb2 as common_pb

from fakes import EOS, VOCAB_SIZE, FakeFiles
from fakes.certificates import Authority
from fakes.model import echo
from mlxpool_server.domain import GatewayPort, ModelSpec
from mlxpool_server.errors import SettingsError
from mlxpool_server.pool.catalog import Catalog
from mlxpool_server.rpc.access.keys import hash_of, new_key
from rpc.gateway_harness import (
    Worker,
    first_chunk,
    request,
    running_worker,
    status_of,
    stepped_files,
)
from rpc.harness import PATIENCE_S, release, running_server, until
from rpc.metrics_reader import scrape

# More tokens than a test lets go before it looks.
LONG_TEXT = "abc" * 100
OTHER_ENGINES = (
    "sglang.grpc.scheduler.SglangScheduler",
    "vllm.grpc.engine.VllmEngine",
    "trtllm.TrtllmService",
    "tokenspeed.grpc.scheduler.TokenSpeedScheduler",
)


# ---------------------------------------------------------------- registration


@pytest.mark.parametrize("service", OTHER_ENGINES)
async def test_other_engines_are_unimplemented(service: str) -> None:
    """The gateway finds out what a worker is by asking for each engine's health."""
    async with running_worker() as worker:
        probe = worker.channel.unary_unary(f"/{service}/HealthCheck")
        assert await status_of(probe(b"", timeout=PATIENCE_S)) is grpc.StatusCode.UNIMPLEMENTED


async def test_the_contracts_own_services_stay_on_their_ports() -> None:
    """What reaches the gateway's port reaches nothing but its protocol."""
    async with running_worker() as worker:
        call = worker.channel.unary_unary("/mlxpool.v1.ModelService/UnloadModel")
        assert await status_of(call(b"")) is grpc.StatusCode.UNIMPLEMENTED


async def test_model_info() -> None:
    """A clean name and what the files say; no path, so that the gateway asks for the tokenizer."""
    async with running_worker(max_prompt_tokens=500) as worker:
        info = await worker.stub.GetModelInfo(pb.GetModelInfoRequest())
    assert (info.served_model_name, info.is_generation) == ("m", True)
    assert (info.max_context_length, info.max_req_input_len) == (1000, 500)
    assert (info.vocab_size, list(info.eos_token_ids)) == (VOCAB_SIZE, [EOS])
    assert (info.model_type, list(info.architectures)) == ("fake", ["FakeForCausalLM"])
    assert info.model_path == "mlxpool:worker"


async def test_server_info() -> None:
    """How long it has been up, and how many requests run or wait."""
    async with running_worker(stepped_files()) as worker:
        readers = [await first_chunk(worker, request_id=str(number)) for number in range(2)]
        info = await worker.stub.GetServerInfo(pb.GetServerInfoRequest())
        for reader in readers:
            reader.call.cancel()
    assert info.active_requests == 2
    assert info.uptime_seconds > 0


async def chunks_of(worker: Worker) -> list[Any]:
    call = worker.stub.GetTokenizer(common_pb.GetTokenizerRequest())
    return [chunk async for chunk in call]


async def test_the_tokenizer_is_a_zip_in_chunks() -> None:
    """64 KB each, and the SHA-256 of all of it on the last one only."""
    noise = np.random.default_rng(1).bytes(200_000)
    contents = {"tokenizer.json": noise, "chat_template.jinja": b"{{ messages }}"}
    async with running_worker({"m": FakeFiles(tokenizer_files=contents)}) as worker:
        chunks = await chunks_of(worker)
    assert [len(chunk.data) for chunk in chunks[:-1]] == [65536] * 3
    archive = b"".join(chunk.data for chunk in chunks)
    digests = [chunk.sha256 for chunk in chunks]
    assert digests == ["", "", "", hashlib.sha256(archive).hexdigest()]
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        assert {name: opened.read(name) for name in opened.namelist()} == contents


async def test_the_same_tokenizer_has_the_same_fingerprint() -> None:
    """Replicas send the same bytes, whenever they are asked."""
    async with running_worker() as worker:
        assert await chunks_of(worker) == await chunks_of(worker)


# ---------------------------------------------------------------- health


async def test_a_ready_worker_is_healthy() -> None:
    """The model is loaded without a request: published means ready."""
    async with running_worker() as worker:
        assert (await worker.health()).healthy


async def test_a_loading_worker_is_not_healthy_yet() -> None:
    """Requests had better go where the model is."""
    files = FakeFiles()
    files.may_load.clear()
    async with running_worker({"m": files}, is_ready=False) as worker:
        await until(files.is_loading.is_set)
        assert (await worker.health()).message == "the model is being loaded"
        files.may_load.set()
        await until(lambda: bool(worker.server.events("model.loaded")))
        assert (await worker.health()).healthy


async def test_a_worker_whose_model_is_unknown_is_no_worker() -> None:
    """The gateway asks for names once, even of an unhealthy worker: it has to come back later."""
    files = {"m": FakeFiles(inspect_error="its folder has no config.json")}
    async with running_worker(files, is_ready=False) as worker:
        probe = worker.stub.HealthCheck(pb.HealthCheckRequest())
        assert await status_of(probe) is grpc.StatusCode.INTERNAL


async def test_a_failed_model_is_loaded_again() -> None:
    """While health says no, no request comes that would: the probe sees to it."""
    files = FakeFiles(load_error=RuntimeError("no memory"))
    async with running_worker({"m": files}, is_ready=False) as worker:
        await until(lambda: bool(worker.server.events("model.load_failed")))
        files.load_error = None
        assert not (await worker.health()).healthy
        await until(lambda: bool(worker.server.events("model.loaded")))
        assert (await worker.health()).healthy


async def test_an_unloaded_model_is_welcome_to_requests() -> None:
    """An operator's unload is not undone by a probe, and the next request loads the model."""
    async with running_worker() as worker:
        await worker.server.app._pool.unload("m", force=False)
        assert (await worker.health()).healthy
        assert len(worker.server.events("model.loaded")) == 1
        assert (await worker.generate())[-1].HasField("complete")


async def test_a_draining_worker_finishes_what_it_has() -> None:
    """It is unhealthy, new requests go elsewhere, and the stream that runs is completed."""
    async with running_worker(stepped_files(echo)) as worker:
        running = await first_chunk(worker, text=LONG_TEXT, request_id="running")
        worker.server.app.request_stop()
        await until(lambda: bool(worker.server.events("server.draining")))
        assert not (await worker.health()).healthy
        late = worker.stub.Generate(request(request_id="late"))
        assert await status_of(late) is grpc.StatusCode.UNAVAILABLE
        release(worker.server.model, 2 * len(LONG_TEXT))
        assert (await running.rest())[-1].HasField("complete")


# ---------------------------------------------------------------- who gets in


async def test_api_keys_hold_on_this_port_too(tmp_path: Path) -> None:
    """Without a key nobody generates, and the gateway sends none."""
    key, file = new_key(), tmp_path / "keys.toml"
    file.write_text(f'[[keys]]\nname = "k"\nsha256 = "{hash_of(key)}"\nroles = ["inference"]\n')
    async with running_worker(api_keys_file=file) as worker:
        probe = worker.stub.HealthCheck(pb.HealthCheckRequest())
        assert await status_of(probe) is grpc.StatusCode.UNAUTHENTICATED
        assert await status_of(worker.stub.Generate(request())) is grpc.StatusCode.UNAUTHENTICATED
        metadata = (("authorization", f"Bearer {key}"),)
        call = worker.stub.Generate(request(), metadata=metadata)
        assert [response async for response in call][-1].HasField("complete")


async def test_tls_holds_on_this_port_too(tmp_path: Path) -> None:
    """Its certificate is the server's."""
    authority = Authority()
    certificate, key = authority.issue().write(tmp_path)
    credentials = grpc.ssl_channel_credentials(authority.pem)
    async with running_worker(
        credentials=credentials, tls_certificate=certificate, tls_key=key
    ) as worker:
        assert (await worker.health()).healthy


# ---------------------------------------------------------------- operating it


async def test_its_requests_are_counted() -> None:
    """In the same metrics as those of the contract's own service."""
    async with running_worker(metrics_listen="127.0.0.1:0") as worker:
        await worker.generate(text="four")
        await worker.server.log_line("Generate")
        seen = await scrape(worker.server)
    assert seen("mlxpool_requests_total", model="m", status="OK", reason="") == 1
    assert seen("mlxpool_prompt_tokens_total", model="m") == 4


async def test_a_reload_that_removes_the_model() -> None:
    """The gateway learns that the worker is none any more; the port stays until a restart."""
    async with running_worker({"m": FakeFiles(), "n": FakeFiles()}) as worker:
        app = worker.server.app
        settings = app._settings.model_copy(update={"gateway": ()})
        await app.reload(settings, Catalog.build([ModelSpec("n", Path("unread"))]))
        probe = worker.stub.HealthCheck(pb.HealthCheckRequest())
        assert await status_of(probe) is grpc.StatusCode.NOT_FOUND
        (warning,) = worker.server.events("settings.need_restart")
        assert warning["settings"] == ["gateway"]


# ---------------------------------------------------------------- settings that cannot be served


async def refused(*ports: GatewayPort) -> str:
    with pytest.raises(SettingsError) as caught:
        async with running_server(gateway=ports):
            pass
    return str(caught.value)


async def test_a_port_for_a_model_that_nobody_serves() -> None:
    """The start is refused with the names that there are."""
    problem = await refused(GatewayPort("other", "127.0.0.1:0"))
    assert problem == "gateway: no model named 'other'; this server has m; name one of them"


async def test_two_ports_for_one_model() -> None:
    """The start is refused: the gateway would count one worker twice."""
    port = GatewayPort("m", "127.0.0.1:0")
    assert await refused(port, port) == "gateway: 'm' has two ports; remove one"


async def test_a_port_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """The start is refused with the command that installs what is missing."""
    for module in [name for name in sys.modules if name.startswith("mlxpool_server.rpc.gateway")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "smg_grpc_proto", None)
    problem = await refused(GatewayPort("m", "127.0.0.1:0"))
    assert problem.endswith("pip install 'mlxpool[gateway]'")
