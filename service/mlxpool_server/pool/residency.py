"""One stay of one model in memory: the pool's state machine.

    LOADING ── become_ready ──▶ READY ── leave ──▶ UNLOADING ── end ──▶ UNLOADED
       ├─────── leave(error) ─────────────────────────▲
       └─────── fail(error) ──▶ FAILED

A load that is stopped, and a model that drains or is evicted, are UNLOADING until their bytes are
free; who comes meanwhile waits for that and starts a new stay.
"""

from __future__ import annotations

import asyncio
import threading
import time

from mlxpool_server.domain import LoadPhase, LoadProgress, ModelSpec, ModelState
from mlxpool_server.engine.backend import LoadedAdapter, LoadedModel
from mlxpool_server.errors import MlxpoolError
from mlxpool_server.pool.broadcast import Broadcast

_NEXT_STATES = {
    ModelState.LOADING: {ModelState.READY, ModelState.UNLOADING, ModelState.FAILED},
    ModelState.READY: {ModelState.UNLOADING},
    ModelState.UNLOADING: {ModelState.UNLOADED},
}


class Residency:
    """Event loop only, but for `is_cancelled`. In the ledger it is the holder of its bytes."""

    def __init__(self, spec: ModelSpec, *, allow_eviction: bool) -> None:
        self.spec = spec
        self.allow_eviction = allow_eviction
        self.state = ModelState.LOADING
        self.progress = LoadProgress(LoadPhase.QUEUED)
        self.evicted_models: tuple[str, ...] = ()
        self.model: LoadedModel | LoadedAdapter | None = None
        # None: it never became READY.
        self.load_time: float | None = None
        self.load_duration_s = 0.0
        # Requests that count on this stay: a drain waits for them.
        self.num_leases = 0
        # Why it failed, or why it leaves without waiting for its leases.
        self.error: MlxpoolError | None = None
        self.changed = Broadcast()
        self.gone = asyncio.Event()
        # Read by the loader thread between tensors.
        self.is_cancelled = threading.Event()
        self._started_at = time.monotonic()

    @property
    def is_leaving(self) -> bool:
        """Its bytes become free without anybody's doing."""
        is_drained = self.num_leases == 0 or self.error is not None
        return self.state is ModelState.UNLOADING and is_drained

    def report(self, progress: LoadProgress) -> None:
        if self.state is ModelState.LOADING:
            self.progress = progress
            self.changed.notify()

    def become_ready(self, model: LoadedModel | LoadedAdapter) -> None:
        self.model = model
        self.load_time = time.time()
        self.load_duration_s = time.monotonic() - self._started_at
        self._move(ModelState.READY)

    def leave(self, error: MlxpoolError | None = None) -> None:
        """Start to leave; with `error`, even under leases: they get it. A load needs one."""
        if self.state is not ModelState.UNLOADING:
            self._move(ModelState.UNLOADING)
        if error is not None and self.error is None:
            self.error = error
            self.is_cancelled.set()
            self.changed.notify()

    def fail(self, error: MlxpoolError) -> None:
        """The load ended with the error that every waiter gets; nothing is held any more."""
        self.error = error
        self._move(ModelState.FAILED)
        self.gone.set()

    def end(self) -> None:
        """Nothing is held any more."""
        self.model = None
        self._move(ModelState.UNLOADED)
        self.gone.set()

    def take_lease(self) -> None:
        self.num_leases += 1

    def return_lease(self) -> None:
        self.num_leases -= 1
        self.changed.notify()

    async def drained(self, heartbeat_s: float) -> None:
        """Wait until no lease is left, or those that are do not count any more."""
        while not self.is_leaving:
            await self.changed.wait(heartbeat_s)

    def _move(self, state: ModelState) -> None:
        if state not in _NEXT_STATES.get(self.state, ()):
            raise RuntimeError(f"{self.spec.name}: {self.state} cannot become {state}")
        self.state = state
        self.changed.notify()
