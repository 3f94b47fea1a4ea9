"""Counters and limits that nothing moves by itself."""

from __future__ import annotations

from dataclasses import replace

from mlxpool_server.domain import DeviceInfo, MemoryLimits


class FakeMemory:
    def __init__(self, memory_bytes: int = 1000) -> None:
        self._device = DeviceInfo(
            kind="cpu",
            name="fake",
            architecture="none",
            memory_bytes=memory_bytes,
            recommended_bytes=memory_bytes,
            mlx_version="0",
            mlx_lm_version="0",
        )
        self._limits = MemoryLimits(memory_bytes=2000, cache_bytes=300)
        self.cached = 50
        self.peak = 80
        self.num_clears = 0

    def device(self) -> DeviceInfo:
        return self._device

    def active_bytes(self) -> int:
        return 40

    def peak_bytes(self) -> int:
        return self.peak

    def cache_bytes(self) -> int:
        return self.cached

    def limits(self) -> MemoryLimits:
        return self._limits

    def set_limits(self, limits: MemoryLimits) -> None:
        if limits.memory_bytes is not None:
            self._limits = replace(self._limits, memory_bytes=limits.memory_bytes)
        if limits.cache_bytes is not None:
            self._limits = replace(self._limits, cache_bytes=limits.cache_bytes)

    def clear_cache(self) -> None:
        self.num_clears += 1
        self.cached = 0

    def reset_peak(self) -> None:
        self.peak = self.active_bytes()
