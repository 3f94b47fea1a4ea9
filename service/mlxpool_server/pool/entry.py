"""A catalogue entry's life in the pool: its settings in force, and its stay in memory, if any."""

from __future__ import annotations

import asyncio
import math
import time

from mlxpool_server.domain import ModelInfo, ModelSpec, ModelState, ModelStatus
from mlxpool_server.engine.model_runner import RunnerStats
from mlxpool_server.pool.residency import Residency


class Entry:
    """Event loop only."""

    def __init__(self, spec: ModelSpec, default_keep_alive_s: float) -> None:
        self.spec = spec
        self.is_pinned = spec.pinned
        self.keep_alive_s = default_keep_alive_s if spec.keep_alive_s is None else spec.keep_alive_s
        self.residency: Residency | None = None
        self.info: ModelInfo | None = None
        self.error_message = ""
        self.num_leases = 0
        self.last_used_time: float | None = None
        self.expire_time: float | None = None
        self._expiry: asyncio.TimerHandle | None = None

    @property
    def is_evictable(self) -> bool:
        return self.residency is not None and self.residency.is_idle and not self.is_pinned

    @property
    def expires_when_idle(self) -> bool:
        return not self.is_pinned and not math.isinf(self.keep_alive_s)

    def touch(self) -> None:
        self.last_used_time = time.time()

    def set_expiry(self, handle: asyncio.TimerHandle) -> None:
        self.clear_expiry()
        self._expiry = handle
        self.expire_time = time.time() + self.keep_alive_s

    def clear_expiry(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
        self._expiry = None
        self.expire_time = None

    def status(self, stats: RunnerStats, resident_bytes: int) -> ModelStatus:
        residency = self.residency
        if residency is not None:
            state = residency.state
        else:
            state = ModelState.FAILED if self.error_message else ModelState.UNLOADED
        active = min(stats.running, self.num_leases)
        return ModelStatus(
            name=self.spec.name,
            state=state,
            info=self.info,
            aliases=self.spec.aliases,
            error_message=self.error_message,
            resident_bytes=resident_bytes if state is ModelState.READY else 0,
            active_requests=active,
            queued_requests=self.num_leases - active,
            pinned=self.is_pinned,
            load_time=None if residency is None else residency.load_time,
            last_used_time=self.last_used_time,
            expire_time=self.expire_time,
        )
