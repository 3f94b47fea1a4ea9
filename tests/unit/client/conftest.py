# ruff: noqa: N802 - gRPC dictates the names of the servicers' methods
"""A fake server that speaks the real contract over a real socket, for both clients."""

from __future__ import annotations

import io
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from mlxpool.v1 import memory_service_pb2 as memory_pb
from mlxpool.v1 import memory_service_pb2_grpc as memory_rpc
from mlxpool.v1 import model_service_pb2 as pb
from mlxpool.v1 import model_service_pb2_grpc as model_rpc
from mlxpool_client import Client
from mlxpool_client.cli import main

# A held call that nobody ends fails its test instead of hanging it.
PATIENCE_S = 20


@dataclass(frozen=True)
class Failure:
    """How a call ends badly, with the details of the contract."""

    code: grpc.StatusCode
    reason: str = ""
    message: str = "it failed"
    metadata: dict[str, str] = field(default_factory=dict)
    details: tuple[Message, ...] = ()

    def abort(self, context: grpc.ServicerContext) -> None:
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        details = self.details
        if self.reason:
            info = error_details_pb2.ErrorInfo(
                domain="mlxpool", reason=self.reason, metadata=self.metadata
            )
            details = (info, *details)
        for detail in details:
            status.details.add().Pack(detail)
        context.abort_with_status(rpc_status.to_status(status))


def hello() -> list[pb.GenerateResponse]:
    """Return the events of an ordinary generation."""
    message = pb.ChatMessage(
        role=pb.ROLE_ASSISTANT, content=[pb.ContentPart(text="Hello"), pb.ContentPart(text=" you")]
    )
    finished = pb.GenerationFinished(
        finish_reason=pb.FINISH_REASON_STOP,
        message=message,
        stop_token_id=2,
        usage=pb.TokenUsage(prompt_tokens=5, cached_prompt_tokens=3, completion_tokens=3),
    )
    finished.timings.time_to_first_token.FromMilliseconds(250)
    finished.timings.decode.FromMilliseconds(500)
    finished.timings.total.FromMilliseconds(750)
    return [
        pb.GenerateResponse(
            started=pb.GenerationStarted(generation_id="g1", model="demo", seed=42)
        ),
        pb.GenerateResponse(
            progress=pb.GenerationProgress(
                phase=pb.GENERATION_PHASE_PREFILLING, prefilled_tokens=4, prompt_tokens=5
            )
        ),
        pb.GenerateResponse(delta=pb.GenerationDelta(text="Hello", completion_tokens=1)),
        pb.GenerateResponse(delta=pb.GenerationDelta(text=" you", completion_tokens=3)),
        pb.GenerateResponse(finished=finished),
    ]


def demo_model() -> pb.Model:
    model = pb.Model(
        name="demo",
        state=pb.MODEL_STATE_READY,
        capabilities=[pb.MODEL_CAPABILITY_CHAT],
        context_length=2048,
        estimated_bytes=3 << 29,
        resident_bytes=1 << 30,
        active_requests=1,
        queued_requests=2,
        pinned=True,
    )
    model.last_used_time.GetCurrentTime()
    return model


class FakeModels(model_rpc.ModelServiceServicer):
    """Answers as scripted, and remembers what it was asked."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.models = [demo_model()]
        # The next calls fail with these, one each, before they say anything.
        self.failures: list[Failure] = []
        self.generation = hello()
        # How Generate ends after its events: OK unless set.
        self.final_failure: Failure | None = None
        # Generate stays open after its events until the client goes.
        self.hold = False
        self.generation_ended = threading.Event()
        self.load = [
            pb.LoadModelResponse(
                progress=pb.LoadProgress(
                    phase=pb.LOAD_PHASE_LOADING, completed_bytes=1 << 20, total_bytes=1 << 22
                )
            ),
            pb.LoadModelResponse(
                finished=pb.LoadFinished(model=demo_model(), evicted_models=["old"])
            ),
        ]
        self.tokenization = pb.TokenizeResponse(
            token_ids=[7, 8], pieces=[b"Hi", b"\xe2\x82"], rendered_prompt="<user>Hi"
        )

    def enter(self, request: Message, context: grpc.ServicerContext) -> None:
        self.requests.append(request)
        if self.failures:
            self.failures.pop(0).abort(context)

    def Generate(
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        self.enter(request, context)
        context.add_callback(self.generation_ended.set)
        yield from self.generation
        if self.hold:
            self.generation_ended.wait(PATIENCE_S)
        if self.final_failure is not None:
            self.final_failure.abort(context)

    def CancelGeneration(
        self, request: pb.CancelGenerationRequest, context: grpc.ServicerContext
    ) -> pb.CancelGenerationResponse:
        self.enter(request, context)
        return pb.CancelGenerationResponse()

    def ListModels(
        self, request: pb.ListModelsRequest, context: grpc.ServicerContext
    ) -> pb.ListModelsResponse:
        """One model a page."""
        self.enter(request, context)
        index = int(request.page_token or 0)
        has_more = index + 1 < len(self.models)
        return pb.ListModelsResponse(
            models=self.models[index : index + 1],
            next_page_token=str(index + 1) if has_more else "",
        )

    def GetModel(
        self, request: pb.GetModelRequest, context: grpc.ServicerContext
    ) -> pb.GetModelResponse:
        self.enter(request, context)
        return pb.GetModelResponse(model=self.models[0])

    def LoadModel(
        self, request: pb.LoadModelRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.LoadModelResponse]:
        self.enter(request, context)
        yield from self.load

    def UnloadModel(
        self, request: pb.UnloadModelRequest, context: grpc.ServicerContext
    ) -> pb.UnloadModelResponse:
        self.enter(request, context)
        return pb.UnloadModelResponse(was_loaded=True, freed_bytes=1 << 30)

    def Tokenize(
        self, request: pb.TokenizeRequest, context: grpc.ServicerContext
    ) -> pb.TokenizeResponse:
        self.enter(request, context)
        return self.tokenization

    def CountTokens(
        self, request: pb.CountTokensRequest, context: grpc.ServicerContext
    ) -> pb.CountTokensResponse:
        self.enter(request, context)
        return pb.CountTokensResponse(token_count=2)

    def Embed(self, request: pb.EmbedRequest, context: grpc.ServicerContext) -> pb.EmbedResponse:
        self.enter(request, context)
        return pb.EmbedResponse(
            embeddings=[pb.Embedding(values=[0.5, -2.0]) for _ in request.inputs],
            usage=pb.TokenUsage(prompt_tokens=5),
        )

    def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: grpc.ServicerContext
    ) -> pb.GetServerInfoResponse:
        self.enter(request, context)
        return pb.GetServerInfoResponse(version="0.1.0", mlx_version="0.32.4", device_name="cpu")


class FakeMemory(memory_rpc.MemoryServiceServicer):
    """One model that holds 1 GiB of a pool of 4 GiB."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.failures: list[Failure] = []
        self.usage = memory_pb.MemoryUsage(
            active_bytes=1 << 30,
            peak_bytes=2 << 30,
            cache_bytes=1 << 20,
            limits=memory_pb.MemoryLimits(pool_bytes=4 << 30, cache_bytes=0),
            device_bytes=16 << 30,
            models=[
                memory_pb.ModelMemory(model="demo", resident_bytes=1 << 30, active_kv_bytes=1 << 20)
            ],
        )
        self.usage.sample_time.GetCurrentTime()

    def enter(self, request: Message, context: grpc.ServicerContext) -> None:
        self.requests.append(request)
        if self.failures:
            self.failures.pop(0).abort(context)

    def GetMemoryUsage(
        self, request: memory_pb.GetMemoryUsageRequest, context: grpc.ServicerContext
    ) -> memory_pb.GetMemoryUsageResponse:
        self.enter(request, context)
        return memory_pb.GetMemoryUsageResponse(usage=self.usage)

    def WatchMemoryUsage(
        self, request: memory_pb.WatchMemoryUsageRequest, context: grpc.ServicerContext
    ) -> Iterator[memory_pb.WatchMemoryUsageResponse]:
        """Two samples with an unknown message between; then the server goes."""
        self.enter(request, context)
        yield memory_pb.WatchMemoryUsageResponse(usage=self.usage)
        yield memory_pb.WatchMemoryUsageResponse()
        yield memory_pb.WatchMemoryUsageResponse(usage=self.usage)

    def SetMemoryLimits(
        self, request: memory_pb.SetMemoryLimitsRequest, context: grpc.ServicerContext
    ) -> memory_pb.SetMemoryLimitsResponse:
        self.enter(request, context)
        return memory_pb.SetMemoryLimitsResponse(
            previous=self.usage.limits, current=request.limits, evicted_models=["old"]
        )

    def ClearCache(
        self, request: memory_pb.ClearCacheRequest, context: grpc.ServicerContext
    ) -> memory_pb.ClearCacheResponse:
        self.enter(request, context)
        return memory_pb.ClearCacheResponse(freed_bytes=1 << 20)

    def ResetPeakMemory(
        self, request: memory_pb.ResetPeakMemoryRequest, context: grpc.ServicerContext
    ) -> memory_pb.ResetPeakMemoryResponse:
        self.enter(request, context)
        return memory_pb.ResetPeakMemoryResponse(previous_peak_bytes=2 << 30)


@dataclass(frozen=True)
class FakeServer:
    target: str
    models: FakeModels
    memory: FakeMemory
    # Test modules cannot import this one; they make failures through the fixture.
    failure: type[Failure] = Failure


@pytest.fixture
def server() -> Iterator[FakeServer]:
    models, memory = FakeModels(), FakeMemory()
    grpc_server = grpc.server(
        futures.ThreadPoolExecutor(max_workers=8), options=[("grpc.so_reuseport", 0)]
    )
    model_rpc.add_ModelServiceServicer_to_server(models, grpc_server)
    memory_rpc.add_MemoryServiceServicer_to_server(memory, grpc_server)
    port = grpc_server.add_insecure_port("127.0.0.1:0")
    grpc_server.start()
    yield FakeServer(f"127.0.0.1:{port}", models, memory)
    grpc_server.stop(grace=None).wait(PATIENCE_S)


@pytest.fixture
def client(server: FakeServer) -> Iterator[Client]:
    with Client(server.target, timeout_s=PATIENCE_S) as client:
        yield client


@pytest.fixture
def nobody() -> Iterator[str]:
    """Return a target where nothing listens, and nothing else can start to."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


@dataclass(frozen=True)
class Outcome:
    """What a run of the command left behind."""

    code: int
    out: str
    err: str


class Screen(io.StringIO):
    """A terminal, for a stream that asks whether it is one."""

    def isatty(self) -> bool:
        return True


class Interrupting(io.StringIO):
    """An output whose reader presses Ctrl-C, once, when it sees "Hello"."""

    def __init__(self) -> None:
        super().__init__()
        self.has_interrupted = False

    def write(self, text: str) -> int:
        count = super().write(text)
        if "Hello" in text and not self.has_interrupted:
            self.has_interrupted = True
            signal.raise_signal(signal.SIGINT)
        return count


@dataclass
class Shell:
    """Runs the command against the fake server, in a pipe or on a terminal."""

    target: str
    capsys: pytest.CaptureFixture[str]
    monkeypatch: pytest.MonkeyPatch

    def __call__(self, *argv: str) -> Outcome:
        code = main(["--target", self.target, *argv])
        out, err = self.capsys.readouterr()
        return Outcome(code, out, err)

    def interrupted(self, *argv: str) -> Outcome:
        output = Interrupting()
        self.monkeypatch.setattr("sys.stdout", output)
        # Started in the background, by a CI say, a process ignores SIGINT.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            outcome = self(*argv)
        finally:
            signal.signal(signal.SIGINT, before)
        return Outcome(outcome.code, output.getvalue(), outcome.err)

    def on_a_terminal(self, *argv: str, keys: str = "") -> Outcome:
        screen, errors = Screen(), Screen()
        self.monkeypatch.setattr("sys.stdin", Screen(keys))
        self.monkeypatch.setattr("sys.stdout", screen)
        self.monkeypatch.setattr("sys.stderr", errors)
        code = main(["--target", self.target, *argv])
        return Outcome(code, screen.getvalue(), errors.getvalue())

    def type(self, text: str) -> None:
        """Make `text` the standard input, as a pipe does."""
        self.monkeypatch.setattr("sys.stdin", io.StringIO(text))


@pytest.fixture
def shell(
    server: FakeServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Shell:
    monkeypatch.delenv("MLXPOOL_TARGET", raising=False)
    for name in ("FORCE_COLOR", "NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    return Shell(server.target, capsys, monkeypatch)
