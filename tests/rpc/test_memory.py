"""MemoryService over the wire."""

from __future__ import annotations

import asyncio
import time

import grpc
from google.protobuf.duration_pb2 import Duration

from fakes import FakeFiles
from mlxpool.v1 import memory_service_pb2 as pb
from mlxpool.v1 import model_service_pb2 as model_pb
from rpc.harness import PATIENCE_S, Reader, Server, failure_of, running_server


async def test_usage(server: Server) -> None:
    """Counters, limits and bytes by model are the backend's and the pool's."""
    await Reader(server.models.LoadModel(model_pb.LoadModelRequest(model="m"))).rest()
    usage = (await server.memories.GetMemoryUsage(pb.GetMemoryUsageRequest())).usage
    assert (usage.active_bytes, usage.peak_bytes, usage.cache_bytes) == (40, 80, 50)
    assert (usage.device_bytes, usage.recommended_bytes) == (1000, 1000)
    assert (usage.limits.pool_bytes, usage.limits.memory_bytes) == (750, 2000)
    assert not usage.limits.HasField("wired_bytes")
    (model,) = usage.models
    assert (model.model, model.resident_bytes) == ("m", 100)
    assert abs(usage.sample_time.ToSeconds() - time.time()) < 60


async def test_watch_repeats_and_ends_with_its_reader(server: Server) -> None:
    """Samples come at the interval, clamped to 0.1 s, until the caller leaves."""
    request = pb.WatchMemoryUsageRequest(interval=Duration(nanos=1))
    reader = Reader(server.memories.WatchMemoryUsage(request))
    times = [(await reader.next()).usage.sample_time.ToNanoseconds() for _ in range(3)]
    assert times[2] - times[0] >= 0.19e9
    await reader.hang_up()
    assert (await server.log_line("WatchMemoryUsage"))["status"] == "CANCELLED"


async def test_watch_ends_when_the_server_stops() -> None:
    """It is told DRAINING at once, however long its interval is."""
    async with running_server() as server:
        request = pb.WatchMemoryUsageRequest(interval=Duration(seconds=60))
        reader = Reader(server.memories.WatchMemoryUsage(request))
        await reader.next()
        server.app.request_stop()
        async with asyncio.timeout(0.9):
            failure = await failure_of(reader.call)
        assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        async with asyncio.timeout(PATIENCE_S):
            assert await server.stopped == 0


async def test_set_limits(server: Server) -> None:
    """Only what is set changes; both states come back; an explicit 0 is honoured."""
    limits = pb.MemoryLimits(pool_bytes=500, cache_bytes=0)
    answer = await server.memories.SetMemoryLimits(pb.SetMemoryLimitsRequest(limits=limits))
    assert (answer.previous.pool_bytes, answer.previous.cache_bytes) == (750, 300)
    assert (answer.current.pool_bytes, answer.current.cache_bytes) == (500, 0)
    assert answer.current.memory_bytes == answer.previous.memory_bytes == 2000
    nothing = await server.memories.SetMemoryLimits(pb.SetMemoryLimitsRequest())
    assert nothing.previous == nothing.current == answer.current


async def test_lower_limit_evicts_idle_models() -> None:
    """And says which."""
    files = {"a": FakeFiles(), "b": FakeFiles()}
    async with running_server(files) as server:
        for name in files:
            await Reader(server.models.LoadModel(model_pb.LoadModelRequest(model=name))).rest()
        request = pb.SetMemoryLimitsRequest(limits=pb.MemoryLimits(pool_bytes=150))
        answer = await server.memories.SetMemoryLimits(request)
        assert list(answer.evicted_models) == ["a"]


async def test_clear_cache(server: Server) -> None:
    """Buffers by default; prompts alone leave them."""
    prompts = pb.ClearCacheRequest(kinds=[pb.CACHE_KIND_PROMPTS])
    assert (await server.memories.ClearCache(prompts)).freed_bytes == 0
    assert server.memory.num_clears == 0
    assert (await server.memories.ClearCache(pb.ClearCacheRequest())).freed_bytes == 50
    assert server.memory.num_clears == 1


async def test_reset_peak(server: Server) -> None:
    """The previous peak comes back and the new one starts from what is active."""
    answer = await server.memories.ResetPeakMemory(pb.ResetPeakMemoryRequest())
    assert answer.previous_peak_bytes == 80
    usage = (await server.memories.GetMemoryUsage(pb.GetMemoryUsageRequest())).usage
    assert usage.peak_bytes == 40
