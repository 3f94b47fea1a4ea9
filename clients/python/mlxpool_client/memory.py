"""The server's memory. Everything is bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datetime import datetime


@dataclass(frozen=True, slots=True)
class MemoryLimits:
    """None: not available on the server's device.

    pool_bytes: the pool's own limit, which admission and eviction enforce.
    memory_bytes, cache_bytes, wired_bytes: MLX's own limits; memory_bytes is a guideline, no cap.
    """

    pool_bytes: int | None = None
    memory_bytes: int | None = None
    cache_bytes: int | None = None
    wired_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class ModelMemory:
    model: str
    adapter: str = ""
    resident_bytes: int = 0
    prompt_cache_bytes: int = 0
    # KV caches of the generations in flight.
    active_kv_bytes: int = 0


@dataclass(frozen=True, slots=True)
class MemoryUsage:
    """One sample: `active`, `peak` and `cache` are MLX's counters of the server's process."""

    sample_time: datetime | None
    active_bytes: int
    peak_bytes: int
    cache_bytes: int
    limits: MemoryLimits
    device_bytes: int
    recommended_bytes: int
    models: tuple[ModelMemory, ...] = ()


@dataclass(frozen=True, slots=True)
class LimitsChange:
    """What a change of limits replaced, and which models had to leave."""

    previous: MemoryLimits
    current: MemoryLimits
    evicted_models: tuple[str, ...] = ()
