"""One stay of one model in memory, from the decision to load it until its bytes are free."""

from __future__ import annotations

import asyncio
import threading
import time

from mlxpool_server.domain import LoadPhase, LoadProgress, ModelSpec, ModelState
from mlxpool_server.engine.backend import LoadedModel
from mlxpool_server.errors import MlxpoolError
from mlxpool_server.pool.broadcast import Broadcast


class Residency:
    """LOADING → READY → UNLOADING → gone, or LOADING → gone with an error. Event loop only."""

    def __init__(self, spec: ModelSpec, *, allow_eviction: bool) -> None:
        self.spec = spec
        self.allow_eviction = allow_eviction
        self.state = ModelState.LOADING
        self.progress = LoadProgress(LoadPhase.QUEUED)
        self.required_bytes = 0
        self.changed = Broadcast()
        self.evicted_models: tuple[str, ...] = ()
        self.model: LoadedModel | None = None
        self.load_time: float | None = None
        self.load_duration_s = 0.0
        self.num_leases = 0
        # Why it is gone, or why its generations end before it is.
        self.error: MlxpoolError | None = None
        # The load that waits for these bytes.
        self.heir: Residency | None = None
        self.gone = asyncio.Event()
        # Read by the loader thread between tensors.
        self.is_cancelled = threading.Event()
        self._started_at = time.monotonic()

    @property
    def is_idle(self) -> bool:
        return self.state is ModelState.READY and self.num_leases == 0

    def report(self, progress: LoadProgress) -> None:
        if self.state is ModelState.LOADING:
            self.progress = progress
            self.changed.notify()

    def become_ready(self, model: LoadedModel) -> None:
        self.model = model
        self.state = ModelState.READY
        self.load_time = time.time()
        self.load_duration_s = time.monotonic() - self._started_at
        self.changed.notify()

    def cancel(self, error: MlxpoolError) -> None:
        """End this stay with `error`: a load stops at its next tensor, a drain does not wait."""
        self.error = error
        self.is_cancelled.set()
        self.changed.notify()

    def start_unloading(self) -> None:
        self.state = ModelState.UNLOADING
        self.changed.notify()

    def end(self, state: ModelState, error: MlxpoolError | None = None) -> None:
        """Nothing is held any more: UNLOADED, or FAILED with the error every waiter gets."""
        self.state = state
        self.error = error or self.error
        self.model = None
        self.gone.set()
        self.changed.notify()
