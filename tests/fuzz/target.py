"""The server under fuzz: real gRPC on a free port, a fake backend, and what must hold."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor
from grpc import aio
from grpc_channelz.v1 import channelz_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from fakes import FakeFiles, FakeTokenizer
from mlxpool.v1 import memory_service_pb2 as memory_pb
from mlxpool.v1 import model_service_pb2 as pb
from rpc.harness import Server, running_server, until

FILES = (pb, memory_pb, health_pb2, reflection_pb2, channelz_pb2)
METHODS: dict[str, MethodDescriptor] = {
    f"/{service.full_name}/{method.name}": method
    for file in FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
OWN = tuple(name for name in METHODS if name.startswith("/mlxpool."))
# A call that is over sooner or later by itself is over by then; one that is not, hangs.
HANG_S = 20.0
# These last until the caller leaves; only their first message comes at once.
WATCHES = ("/mlxpool.v1.MemoryService/WatchMemoryUsage", "/grpc.health.v1.Health/Watch")
MAX_MESSAGES = 200
POOL_BYTES = 1000


@dataclass(frozen=True)
class Reader:
    """How a caller behaves: it leaves after so many messages, or has a deadline."""

    leaves_after: int | None = None
    deadline_s: float = HANG_S


class Target:
    """One server and the loop that it lives on, which runs while a case does."""

    def __init__(self, runner: asyncio.Runner, server: Server) -> None:
        self._runner = runner
        self.server = server
        self._num_tasks = 0
        self.run(self._settle())
        self._num_tasks = self.run(self._count_tasks())

    def run(self, case: Coroutine[Any, Any, Any]) -> Any:
        return self._runner.run(case)

    def try_bytes(self, method: str, request: bytes, reader: Reader) -> grpc.StatusCode:
        """Send it, read as the reader does, and check all that must hold afterwards."""
        return self.run(self._case(method, request, reader))  # type: ignore[no-any-return]  # the loop's

    async def _case(self, method: str, request: bytes, reader: Reader) -> grpc.StatusCode:
        self.server.logs.entries.clear()
        code = await self._call(method, request, reader)
        failures = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS}
        is_load_failure = code is grpc.StatusCode.INTERNAL and self._has_reason("LOAD_FAILED")
        assert code not in failures or is_load_failure, (code, self.server.logs.entries)
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            assert reader.deadline_s < HANG_S, "it hangs"
        crashes = [entry for entry in self.server.logs.entries if entry["event"] == "rpc.crashed"]
        assert not crashes
        await self._settle()
        return code

    def _has_reason(self, reason: str) -> bool:
        """INTERNAL by design: the model `bad` cannot be loaded."""
        return any(entry.get("reason") == reason for entry in self.server.logs.entries)

    async def _call(self, method: str, request: bytes, reader: Reader) -> grpc.StatusCode:
        channel, kind = self.server.channel, METHODS[method]
        call: Any
        if kind.client_streaming:
            call = channel.stream_stream(method)(iter([request]), timeout=reader.deadline_s)
        elif kind.server_streaming:
            call = channel.unary_stream(method)(request, timeout=reader.deadline_s)
        else:
            call = channel.unary_unary(method)(request, timeout=reader.deadline_s)
        limit = reader.leaves_after
        if method in WATCHES:
            limit = min(1, 1 if limit is None else limit)
        try:
            if not hasattr(call, "read"):
                if limit == 0:
                    call.cancel()
                await call
            else:
                for _ in range(MAX_MESSAGES if limit is None else limit):
                    if await call.read() is aio.EOF:
                        break
                else:
                    call.cancel()
            return await call.code()  # type: ignore[no-any-return]  # untyped
        except aio.AioRpcError as error:
            return error.code()
        except asyncio.CancelledError:
            return grpc.StatusCode.CANCELLED

    async def _settle(self) -> None:
        """Nothing is leaked, and the next request is answered as if nothing had happened."""
        app = self.server.app
        await until(lambda: app._generations.num_in_flight == 0)
        await until(lambda: not app._engine._readers)
        await until(lambda: all(entry.num_leases == 0 for entry in app._pool._entries.values()))
        uses = app._pool.reservations._uses.values()
        assert not any(use.granted or use.waiting for use in uses)
        limits = memory_pb.MemoryLimits(pool_bytes=POOL_BYTES)
        await self.server.memories.SetMemoryLimits(memory_pb.SetMemoryLimitsRequest(limits=limits))
        await self.server.models.UnloadModel(pb.UnloadModelRequest(model="m", force=True))
        await self.server.assert_serves()
        if self._num_tasks:
            await until(lambda: len(asyncio.all_tasks()) <= self._num_tasks)

    async def _count_tasks(self) -> int:
        """At rest; the one that counts is one of them, as in a case."""
        await until(lambda: self.server.app._generations.num_in_flight == 0)
        await asyncio.sleep(0.1)
        return len(asyncio.all_tasks())


@contextmanager
def running_target() -> Iterator[Target]:
    files = {
        "m": FakeFiles(tokenizer=FakeTokenizer(speaks_format=True)),
        "bad": FakeFiles(load_error=RuntimeError("cannot be loaded")),
        "slow": FakeFiles.of_size(500),
    }
    with asyncio.Runner() as runner:
        server_run = running_server(files, max_batch_size=2, max_queued_requests=4)
        server = runner.run(server_run.__aenter__())
        try:
            yield Target(runner, server)
        finally:
            runner.run(server_run.__aexit__(None, None, None))
