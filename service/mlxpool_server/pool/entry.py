"""A catalogue entry's life in the pool: its settings in force, and its stay in memory, if any."""

from __future__ import annotations

import asyncio
import math
import time

from mlxpool_server.domain import ModelInfo, ModelSpec, ModelState, ModelStatus
from mlxpool_server.engine.model_runner import RunnerStats
from mlxpool_server.pool.activity import Activity
from mlxpool_server.pool.broadcast import Broadcast
from mlxpool_server.pool.residency import Residency


class Entry:
    """Event loop only."""

    def __init__(
        self,
        spec: ModelSpec,
        default_keep_alive_s: float,
        activity: Activity | None = None,
        changed: Broadcast | None = None,
    ) -> None:
        """`changed` is told when a request's chances on this model change."""
        self.spec = spec
        self.activity = activity or Activity()
        self._changed = changed or Broadcast()
        self.is_pinned = spec.pinned
        self.default_keep_alive_s = (
            default_keep_alive_s if spec.keep_alive_s is None else spec.keep_alive_s
        )
        # What LoadModel set, and what the last request wants for the idle time after it.
        self.keep_alive_s = self.default_keep_alive_s
        self.next_keep_alive_s: float | None = None
        # As LoadModel named it; None: the catalogue's.
        self.draft: ModelSpec | None = None
        self.residency: Residency | None = None
        # What its files said when they were last read.
        self.info: ModelInfo | None = None
        # It left the catalogue: no new request reaches it, and it goes when it is idle.
        self.is_retired = False
        self._error_message = ""
        # Every request on this model, those too that still render their prompt.
        self.num_leases = 0
        self.last_used_time: float | None = None
        self.expire_time: float | None = None
        # The eviction order; a load counts as a use. No wall clock: that may step back.
        self.used_at = 0.0
        self._expiry: asyncio.TimerHandle | None = None

    @property
    def load_spec(self) -> ModelSpec:
        """What a load brings into memory."""
        return self.spec if self.draft is None else self.spec.with_draft(self.draft)

    @property
    def error_message(self) -> str:
        """Why its last stay failed; the next load or an unload forgets it."""
        return self._error_message

    @error_message.setter
    def error_message(self, text: str) -> None:
        if text != self._error_message:
            self._error_message = text
            self._changed.notify()

    @property
    def is_ready(self) -> bool:
        return self.residency is not None and self.residency.state is ModelState.READY

    @property
    def is_idle(self) -> bool:
        return self.is_ready and self.num_leases == 0

    @property
    def is_evictable(self) -> bool:
        return self.is_idle and not self.is_pinned

    @property
    def expires_when_idle(self) -> bool:
        return not self.is_pinned and not math.isinf(self.idle_limit_s)

    @property
    def idle_limit_s(self) -> float:
        return self.keep_alive_s if self.next_keep_alive_s is None else self.next_keep_alive_s

    def renew(self, spec: ModelSpec, default_keep_alive_s: float) -> None:
        """Take over what the catalogue says by now; where it says what it said, nothing changes."""
        if spec.pinned != self.spec.pinned:
            self.is_pinned = spec.pinned
        keep_alive_s = default_keep_alive_s if spec.keep_alive_s is None else spec.keep_alive_s
        if keep_alive_s != self.default_keep_alive_s:
            self.default_keep_alive_s = self.keep_alive_s = keep_alive_s
        self.spec = spec

    def become_ready(self) -> None:
        self.used_at = time.monotonic()

    def touch(self) -> None:
        self.used_at = time.monotonic()
        self.last_used_time = time.time()

    def set_expiry(self, handle: asyncio.TimerHandle) -> None:
        self.clear_expiry()
        self._expiry = handle
        self.expire_time = time.time() + self.idle_limit_s

    def clear_expiry(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
        self._expiry = None
        self.expire_time = None

    def status(self, stats: RunnerStats, held_bytes: int, problem: str = "") -> ModelStatus:
        """`problem` is why its files cannot be read."""
        residency = self.residency
        error_message = problem or self.error_message
        if residency is not None:
            state = residency.state
        else:
            state = ModelState.FAILED if error_message else ModelState.UNLOADED
        load_time = None if residency is None else residency.load_time
        active = min(stats.running, self.num_leases)
        return ModelStatus(
            name=self.spec.model,
            adapter=self.spec.adapter,
            available_adapters=tuple(name for name, _ in self.spec.adapters),
            state=state,
            info=self.info,
            aliases=self.spec.aliases,
            error_message=error_message,
            # What leaves is charged until it is gone.
            resident_bytes=0 if load_time is None else held_bytes,
            active_requests=active,
            queued_requests=self.num_leases - active,
            pinned=self.is_pinned,
            load_time=load_time,
            last_used_time=self.last_used_time,
            expire_time=self.expire_time,
            activity=self.activity.of(self.spec.name),
        )
