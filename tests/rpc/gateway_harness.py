"""The real server with a port for the gateway, and calls as the gateway makes them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import grpc
from smg_grpc_proto import mlx_engine_pb2 as pb
from smg_grpc_proto import mlx_engine_pb2_grpc as pb_grpc

from fakes import FakeFiles, FakeModel
from fakes.model import Script, endless
from mlxpool_server.domain import GATEWAY_MAX_DURATION_S, GatewayPort
from rpc.harness import (
    PATIENCE_S,
    Reader,
    Server,
    open_channel,
    release,
    running_server,
    until,
)


class Worker:
    """One running App, and a channel to its port for the gateway."""

    def __init__(self, server: Server, address: str, channel: grpc.aio.Channel) -> None:
        self.server = server
        self.address = address
        self.channel = channel
        self.stub = pb_grpc.MlxEngineStub(channel)

    async def generate(self, **fields: Any) -> list[Any]:
        call = self.stub.Generate(request(**fields), timeout=PATIENCE_S)
        return [response async for response in call]

    async def health(self) -> Any:
        return await self.stub.HealthCheck(pb.HealthCheckRequest(), timeout=PATIENCE_S)


@asynccontextmanager
async def running_worker(
    files: Mapping[str, FakeFiles] | None = None,
    *,
    credentials: grpc.ChannelCredentials | None = None,
    max_duration_s: float = GATEWAY_MAX_DURATION_S,
    is_ready: bool = True,
    **settings: Any,
) -> AsyncGenerator[Worker, None]:
    """Model `m` on the port; `is_ready`: once it is loaded."""
    port = GatewayPort("m", "127.0.0.1:0", max_duration_s)
    async with running_server(
        files, gateway=(port,), credentials=credentials, **settings
    ) as server:
        (listening,) = server.events("gateway.listening")
        async with open_channel(listening["address"], credentials) as channel:
            worker = Worker(server, listening["address"], channel)
            if is_ready:
                await until(lambda: bool(server.events("model.loaded")))
            yield worker


def stepped_files(script: Script = endless) -> dict[str, FakeFiles]:
    """A model that steps only when it is told to, and by default never ends by itself."""
    return {"m": FakeFiles(model=FakeModel(script=script, is_stepped=True), context_length=10**6)}


async def first_chunk(worker: Worker, **fields: Any) -> Reader:
    reader = Reader(worker.stub.Generate(request(**fields)))
    chunk = asyncio.ensure_future(reader.next())

    def step() -> bool:
        release(worker.server.model, 1)
        return chunk.done()

    await until(step)
    assert chunk.result().HasField("chunk")
    return reader


def request(text: str = "hi", **fields: Any) -> Any:
    """As the gateway writes it; `sampling`: what a client asked for besides."""
    sampling = {"top_p": 1.0, "repetition_penalty": 1.0} | fields.pop("sampling", {})
    given = {
        "request_id": "chatcmpl-1",
        "tokenized": pb.TokenizedInput(original_text=text, input_ids=list(text.encode())),
        "sampling_params": pb.SamplingParams(**sampling),
        "stream": True,
    }
    return pb.GenerateRequest(**(given | fields))


def ids_of(responses: list[Any]) -> list[int]:
    return [id_ for each in responses for id_ in each.chunk.token_ids]


def kinds_of(responses: list[Any]) -> list[str | None]:
    return [each.WhichOneof("response") for each in responses]


async def status_of(call: Any) -> grpc.StatusCode:
    """Run a call that has to fail to its end."""
    with contextlib.suppress(grpc.aio.AioRpcError):
        if hasattr(call, "read"):
            async for _ in call:
                pass
        else:
            await call
    code: grpc.StatusCode = await call.code()
    return code
