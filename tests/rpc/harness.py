"""The real server on a port the kernel picked, with a backend that tests drive."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import structlog
from google.protobuf.message import Message
from google.rpc import error_details_pb2 as details_pb
from google.rpc import status_pb2
from grpc import aio
from structlog.testing import LogCapture

from fakes import FakeFiles, FakeLoader, FakeMemory
from mlxpool.v1 import memory_service_pb2_grpc as memory_grpc
from mlxpool.v1 import model_service_pb2 as pb
from mlxpool.v1 import model_service_pb2_grpc as model_grpc
from mlxpool_server.app import App
from mlxpool_server.domain import ModelSpec
from mlxpool_server.pool.catalog import Catalog
from mlxpool_server.settings import Settings

# Many peers limit trailers to 8 KiB; the contract promises half of it.
MAX_DETAILS_BYTES = 4096
PATIENCE_S = 20.0


class Server:
    """One running App, its backend, and stubs on a channel to it."""

    def __init__(
        self,
        app: App,
        *,
        address: str,
        channel: aio.Channel,
        files: Mapping[str, FakeFiles],
        memory: FakeMemory,
        logs: LogCapture,
    ) -> None:
        self.app = app
        self.address = address
        self.channel = channel
        self.files = files
        self.memory = memory
        self.logs = logs
        self.models = model_grpc.ModelServiceStub(channel)
        self.memories = memory_grpc.MemoryServiceStub(channel)
        self.stopped: asyncio.Task[int] | None = None
        # A test that provokes an unforeseen error says so.
        self.may_crash = False

    @property
    def model(self) -> Any:
        """The model that requests use unless a test says otherwise."""
        return self.files["m"].model

    def reader(self, request: pb.GenerateRequest, **options: Any) -> Reader:
        return Reader(self.models.Generate(request, **options))

    async def generate(self, request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
        return [event async for event in self.models.Generate(request, timeout=PATIENCE_S)]

    async def assert_serves(self) -> None:
        """The next request is answered as if nothing had happened."""
        events = await self.generate(text_request("still here"))
        assert events[-1].finished.finish_reason == pb.FINISH_REASON_STOP
        assert text_of(events) == "still here"

    def events(self, event: str) -> list[Mapping[str, Any]]:
        """The log lines of this event so far."""
        return [entry for entry in self.logs.entries if entry["event"] == event]

    async def log_line(self, method: str) -> Mapping[str, Any]:
        """The one line of the call to `method`; it is written shortly after the call ended."""
        lines = await self._log_lines(method)
        assert len(lines) == 1, lines
        return lines[0]

    async def _log_lines(self, method: str) -> list[Mapping[str, Any]]:
        def found() -> list[Any]:
            return [
                entry
                for entry in self.logs.entries
                if entry["event"] == "rpc.finished" and entry["method"] == method
            ]

        await until(lambda: bool(found()))
        return found()


@asynccontextmanager
async def running_server(
    files: Mapping[str, FakeFiles] | None = None,
    *,
    memory: FakeMemory | None = None,
    specs: tuple[ModelSpec, ...] = (),
    credentials: grpc.ChannelCredentials | None = None,
    **settings: Any,
) -> AsyncGenerator[Server, None]:
    """Start an App as app._serve does, and stop it at the end if the test did not.

    `credentials`: for the channel of the stubs; None: plaintext.
    """
    files = {"m": FakeFiles()} if files is None else files
    memory = memory or FakeMemory()
    logs = LogCapture()
    structlog.configure(processors=[structlog.contextvars.merge_contextvars, logs])
    specs = specs or tuple(ModelSpec(name, Path("unread") / name) for name in files)
    app = App(
        Settings(**({"listen": ("127.0.0.1:0",), "drain_grace_s": 5.0} | settings)),
        Catalog.build(specs),
        FakeLoader(files),
        memory,
    )
    (address, *_) = await app.start()

    async def serve() -> int:
        exit_code = await app.run_until_stopped()
        await app.stop()
        return exit_code

    try:
        async with open_channel(address, credentials) as channel:
            server = Server(
                app, address=address, channel=channel, files=files, memory=memory, logs=logs
            )
            server.stopped = asyncio.get_running_loop().create_task(serve())
            yield server
            crashes = [entry for entry in logs.entries if entry["event"] == "rpc.crashed"]
            assert server.may_crash or not crashes, crashes
    finally:
        for each in files.values():
            each.may_load.set()
            release(each.model, 10_000)
        app.request_stop()
        async with asyncio.timeout(PATIENCE_S):
            await server.stopped
        structlog.reset_defaults()


def open_channel(address: str, credentials: grpc.ChannelCredentials | None = None) -> aio.Channel:
    """A channel with a connection of its own: gRPC shares them between like channels."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    if credentials is None:
        return aio.insecure_channel(address, options)
    return aio.secure_channel(address, credentials, options)


class Reader:
    """Reads a streaming call event by event."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self._events = aiter(call)

    async def next(self) -> Any:
        async with asyncio.timeout(PATIENCE_S):
            return await anext(self._events)

    async def rest(self) -> list[Any]:
        async with asyncio.timeout(PATIENCE_S):
            return [event async for event in self._events]

    async def hang_up(self) -> None:
        """Leave without reading on."""
        self.call.cancel()
        with contextlib.suppress(asyncio.CancelledError, aio.AioRpcError):
            await self.rest()


def release(model: Any, steps: int) -> None:
    """Let a stepped model do this many steps."""
    if model.steps is not None:
        model.steps.release(steps)


async def until(condition: Callable[[], bool]) -> None:
    """Wait, with a deadline, for something that another thread or task will do."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - the fakes live on other threads
            await asyncio.sleep(0.002)


# ---------------------------------------------------------------- requests


def text_request(text: str = "hi", **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(**({"model": "m", "prompt": pb.Prompt(text=text)} | fields))


def chat_prompt(*turns: tuple[int, str]) -> pb.Prompt:
    messages = [
        pb.ChatMessage(role=role, content=[pb.ContentPart(text=text)]) for role, text in turns
    ]
    return pb.Prompt(chat=pb.ChatPrompt(messages=messages))


# ---------------------------------------------------------------- answers


def kinds_of(events: list[pb.GenerateResponse]) -> list[str | None]:
    return [event.WhichOneof("event") for event in events]


def text_of(events: list[pb.GenerateResponse]) -> str:
    return "".join(event.delta.text for event in events if event.HasField("delta"))


def final_text(events: list[pb.GenerateResponse]) -> str:
    return "".join(part.text for part in events[-1].finished.message.content)


@dataclass(frozen=True)
class Failure:
    """How a call failed, with its details as any client would read them."""

    code: grpc.StatusCode
    message: str
    reason: str = ""
    domain: str = ""
    metadata: Mapping[str, str] | None = None
    field: str = ""
    details: tuple[Message, ...] = ()
    details_bytes: int = 0
    pushback_ms: str | None = None

    def detail(self, kind: type[Message]) -> Any:
        return next(each for each in self.details if isinstance(each, kind))


async def outcome(call: Any) -> Failure | None:
    """Run a unary or streaming call to its end; how it failed, or None."""
    try:
        if hasattr(call, "read"):
            async for _ in call:
                pass
        else:
            await call
    except aio.AioRpcError as error:
        return read_failure(error)
    except asyncio.CancelledError:
        if await call.code() is grpc.StatusCode.CANCELLED:
            return Failure(grpc.StatusCode.CANCELLED, await call.details() or "")
        raise
    return None


async def failure_of(call: Any) -> Failure:
    """The same for a call that has to fail."""
    failure = await outcome(call)
    if failure is None:
        raise AssertionError("the call succeeded")
    return failure


def read_failure(error: aio.AioRpcError) -> Failure:
    trailers = dict(error.trailing_metadata() or ())
    raw = trailers.get("grpc-status-details-bin", b"")
    status = status_pb2.Status.FromString(raw)
    details = []
    for packed in status.details:
        detail = getattr(details_pb, packed.TypeName().rpartition(".")[2])()
        packed.Unpack(detail)
        details.append(detail)
    info = next((each for each in details if isinstance(each, details_pb.ErrorInfo)), None)
    bad = next((each for each in details if isinstance(each, details_pb.BadRequest)), None)
    return Failure(
        code=error.code(),
        message=error.details() or "",
        reason=info.reason if info else "",
        domain=info.domain if info else "",
        metadata=dict(info.metadata) if info else {},
        field=bad.field_violations[0].field if bad else "",
        details=tuple(details),
        details_bytes=len(raw),
        pushback_ms=trailers.get("grpc-retry-pushback-ms"),
    )
