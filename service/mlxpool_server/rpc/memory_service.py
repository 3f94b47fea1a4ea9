"""MemoryService: convert, await, convert."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from grpc import aio

from mlxpool.v1 import memory_service_pb2 as pb
from mlxpool.v1 import memory_service_pb2_grpc as pb_grpc
from mlxpool_server.errors import RETRY_AFTER_S, DrainingError
from mlxpool_server.pool.memory import PoolMemory
from mlxpool_server.rpc.convert import requests, responses

Context = aio.ServicerContext[Any, Any]


class MemoryService(pb_grpc.MemoryServiceServicer):
    def __init__(self, memory: PoolMemory) -> None:
        self._memory = memory
        self._is_closed = asyncio.Event()

    def close(self) -> None:
        """End the watchers: they would outlast any grace time."""
        self._is_closed.set()

    async def GetMemoryUsage(
        self, request: pb.GetMemoryUsageRequest, context: Context
    ) -> pb.GetMemoryUsageResponse:
        return pb.GetMemoryUsageResponse(usage=responses.memory_usage(self._memory.usage()))

    async def WatchMemoryUsage(
        self, request: pb.WatchMemoryUsageRequest, context: Context
    ) -> AsyncGenerator[pb.WatchMemoryUsageResponse, None]:
        interval_s = requests.watch_interval_s(request)
        while True:
            usage = responses.memory_usage(self._memory.usage())
            yield pb.WatchMemoryUsageResponse(usage=usage)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await self._is_closed.wait()
                raise DrainingError(RETRY_AFTER_S)

    async def SetMemoryLimits(
        self, request: pb.SetMemoryLimitsRequest, context: Context
    ) -> pb.SetMemoryLimitsResponse:
        change = await self._memory.set_limits(requests.memory_limits(request))
        return responses.limits_change(change)

    async def ClearCache(
        self, request: pb.ClearCacheRequest, context: Context
    ) -> pb.ClearCacheResponse:
        kinds = requests.cache_kinds(request)
        freed = await self._memory.clear(
            buffers=pb.CACHE_KIND_BUFFERS in kinds, prompts=pb.CACHE_KIND_PROMPTS in kinds
        )
        return pb.ClearCacheResponse(freed_bytes=freed)

    async def ResetPeakMemory(
        self, request: pb.ResetPeakMemoryRequest, context: Context
    ) -> pb.ResetPeakMemoryResponse:
        return pb.ResetPeakMemoryResponse(previous_peak_bytes=self._memory.reset_peak())
