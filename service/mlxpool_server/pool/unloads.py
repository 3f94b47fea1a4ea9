"""How models leave: drain → detach → free, and the timers of those that are idle."""

from __future__ import annotations

import asyncio

import structlog

from mlxpool_server.domain import ModelState
from mlxpool_server.engine.engine import Engine
from mlxpool_server.errors import DrainingError, MlxpoolError, ModelUnloadedError
from mlxpool_server.pool.backend import DeviceMemory
from mlxpool_server.pool.entry import Entry
from mlxpool_server.pool.ledger import Ledger
from mlxpool_server.pool.prompt_caches import PromptCaches
from mlxpool_server.pool.residency import Residency
from mlxpool_server.pool.tasks import Tasks

log = structlog.get_logger(__name__)


class Unloads:
    """Event loop only."""

    def __init__(
        self,
        *,
        engine: Engine,
        memory: DeviceMemory,
        ledger: Ledger,
        tasks: Tasks,
        prompt_caches: PromptCaches,
        heartbeat_s: float,
    ) -> None:
        self._engine = engine
        self._memory = memory
        self._ledger = ledger
        self._tasks = tasks
        self._prompt_caches = prompt_caches
        self._heartbeat_s = heartbeat_s

    def start(self, entry: Entry, error: MlxpoolError | None = None) -> None:
        """Let a model go when its leases are back; with `error`, at once: what runs gets it.

        A load needs an error; it stops at its next tensor, and its own task frees what it holds.
        """
        residency = entry.residency
        if residency is None:
            return
        entry.clear_expiry()
        was_ready = residency.state is ModelState.READY
        residency.leave(error)
        if was_ready:
            self._tasks.start(self._drain_and_free(entry, residency))

    async def free(
        self, entry: Entry, residency: Residency, error: MlxpoolError | None = None
    ) -> None:
        """Nothing refers to the weights any more: return their memory, then tell everyone."""
        try:
            await asyncio.to_thread(self._memory.clear_cache)
        except Exception:  # the bytes are free all the same, and people wait
            log.exception("memory.clear_failed", model=entry.spec.name)
        self._prompt_caches.release(entry.spec.name)
        self._ledger.release(residency)
        entry.residency = None
        if residency.state is ModelState.LOADING and error is not None:
            residency.fail(error)
        else:
            residency.end()

    def schedule_expiry(self, entry: Entry) -> None:
        """Start the idle timer anew, or stop it when the model is in use or stays for ever."""
        entry.clear_expiry()
        if entry.is_idle and entry.expires_when_idle:
            loop = asyncio.get_running_loop()
            entry.set_expiry(loop.call_later(entry.idle_limit_s, self._expire, entry))

    async def _drain_and_free(self, entry: Entry, residency: Residency) -> None:
        name = entry.spec.name
        await residency.drained(self._heartbeat_s)
        try:
            await self._engine.detach(name, residency.error or ModelUnloadedError(name))
        except MlxpoolError:
            # When the server stops, its engine has stopped before.
            if not isinstance(residency.error, DrainingError):
                log.warning("model.not_detached", model=name, reason="the engine does not run")
        residency.model = None
        await self.free(entry, residency)
        log.info("model.unloaded", model=name)

    def _expire(self, entry: Entry) -> None:
        entry.clear_expiry()
        if entry.is_evictable:
            log.info("model.expired", model=entry.spec.name)
            self.start(entry)
