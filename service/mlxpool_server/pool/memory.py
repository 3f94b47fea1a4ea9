"""Memory of the process as MemoryService shows and sets it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

from mlxpool_server.domain import LimitsChange, MemoryLimits, MemoryUsage
from mlxpool_server.pool.backend import DeviceMemory
from mlxpool_server.pool.model_pool import ModelPool


class PoolMemory:
    """Event loop only. Reading MLX's counters waits for nobody."""

    def __init__(self, pool: ModelPool, device_memory: DeviceMemory) -> None:
        self._pool = pool
        self._device_memory = device_memory
        self._device = device_memory.device()

    def usage(self) -> MemoryUsage:
        return MemoryUsage(
            sample_time=time.time(),
            active_bytes=self._device_memory.active_bytes(),
            peak_bytes=self._device_memory.peak_bytes(),
            cache_bytes=self._device_memory.cache_bytes(),
            limits=self._limits(),
            device_bytes=self._device.memory_bytes,
            recommended_bytes=self._device.recommended_bytes,
            models=self._pool.memory_by_model(),
        )

    async def set_limits(self, limits: MemoryLimits) -> LimitsChange:
        """Set the limits that are not None, all or none.

        Raises: MemoryInUseError when the pool's is below what is pinned or in use;
        InvalidFieldError when the device refuses one.
        """
        previous = self._limits()
        evicted: tuple[str, ...] = ()
        # It may wait for a step to end.
        await asyncio.to_thread(self._device_memory.set_limits, limits)
        try:
            if limits.pool_bytes is not None:
                evicted = await self._pool.set_limit(limits.pool_bytes)
        except BaseException:
            await asyncio.to_thread(self._device_memory.set_limits, previous)
            raise
        return LimitsChange(previous, self._limits(), evicted)

    async def clear(self, *, buffers: bool, prompts: bool) -> int:
        """Return freed buffers to the system, forget earlier prompts; return the bytes freed."""
        # Measured first: what prompts held becomes a freed buffer.
        buffer_bytes = self._device_memory.cache_bytes()
        freed = await self._pool.clear_prompt_caches() if prompts else 0
        if buffers:
            await asyncio.to_thread(self._device_memory.clear_cache)
            freed += max(0, buffer_bytes - self._device_memory.cache_bytes())
        return freed

    def reset_peak(self) -> int:
        """Return the peak so far and start it anew from what is active."""
        previous = self._device_memory.peak_bytes()
        self._device_memory.reset_peak()
        return previous

    def _limits(self) -> MemoryLimits:
        return replace(self._device_memory.limits(), pool_bytes=self._pool.limit_bytes)
