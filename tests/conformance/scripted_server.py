"""A real gRPC server that does what a case tells it: refusals, strange messages, large ones."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import grpc
from google.protobuf import json_format
from google.protobuf.any_pb2 import Any as Packed
from google.rpc import error_details_pb2 as details_pb
from google.rpc import status_pb2

from mlxpool.v1 import model_service_pb2 as pb

PATIENCE_S = 60
# The largest response of the cases, and some.
MAX_BYTES = 64 * 2**20


class Attempt(dict[str, Any]):
    """What to do at one call; the keys are those of a case's `attempts`."""

    def responses(self, kind: type[Any]) -> Iterator[bytes]:
        for response in self.get("responses", ()):
            if "wire" in response:
                yield base64.b64decode(response["wire"])
            else:
                yield json_format.ParseDict(response, kind()).SerializeToString()

    def trailers(self) -> tuple[tuple[str, str | bytes], ...]:
        trailers: list[tuple[str, str | bytes]] = []
        if "pushback_ms" in self:
            trailers.append(("grpc-retry-pushback-ms", str(self["pushback_ms"])))
        if "details" in self:
            trailers.append(("grpc-status-details-bin", base64.b64decode(self["details"])))
        elif "reason" in self:
            trailers.append(("grpc-status-details-bin", self._status().SerializeToString()))
        return tuple(trailers)

    @property
    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode[self.get("code", "OK")]

    @property
    def message(self) -> str:
        return str(self.get("message", "scripted"))

    def _status(self) -> status_pb2.Status:
        info = details_pb.ErrorInfo(
            reason=self["reason"],
            domain=self.get("domain", "mlxpool"),
            metadata=self.get("metadata", {}),
        )
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        details = [info]
        if "retry_after_s" in self:
            retry = details_pb.RetryInfo()
            retry.retry_delay.FromNanoseconds(int(self["retry_after_s"] * 1e9))
            details.append(retry)
        for detail in details:
            packed = Packed()
            packed.Pack(detail)
            status.details.append(packed)
        return status


class ScriptedServer:
    """Serves one case; `requests` are the calls it got, `left` is set when a caller hung up."""

    def __init__(self, attempts: list[dict[str, Any]]) -> None:
        self._attempts = [Attempt(attempt) for attempt in attempts]
        self.requests: list[Any] = []
        self.left = threading.Event()
        self._executor = ThreadPoolExecutor(max_workers=4)
        options = [("grpc.max_send_message_length", MAX_BYTES), ("grpc.so_reuseport", 0)]
        self._server = grpc.server(self._executor, options=options)
        handlers = {
            name: grpc.unary_stream_rpc_method_handler(
                self._play(response), request.FromString, lambda raw: raw
            )
            for name, request, response in (
                ("Generate", pb.GenerateRequest, pb.GenerateResponse),
                ("LoadModel", pb.LoadModelRequest, pb.LoadModelResponse),
            )
        }
        generic = grpc.method_handlers_generic_handler("mlxpool.v1.ModelService", handlers)
        self._server.add_generic_rpc_handlers((generic,))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.stop(grace=None).wait(PATIENCE_S)
        self._executor.shutdown()

    def _play(self, response: type[Any]) -> Any:
        def play(request: Any, context: grpc.ServicerContext) -> Iterator[bytes]:
            self.requests.append(request)
            attempt = self._attempts[min(len(self.requests), len(self._attempts)) - 1]
            if attempt.get("hang"):
                # First of all: grpc stops asking for responses when the caller leaves.
                context.add_callback(self.left.set)
            yield from attempt.responses(response)
            if attempt.get("hang"):
                self.left.wait(PATIENCE_S)
                return
            if attempt.code is not grpc.StatusCode.OK:
                context.set_trailing_metadata(attempt.trailers())
                context.abort(attempt.code, attempt.message)

        return play
