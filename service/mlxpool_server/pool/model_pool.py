"""The model pool, the process's singleton: load once, share, evict under a byte limit.

Event loop only. A model's state is a `Residency`; who may use it, a `Lease`; what it costs, the
`Ledger`. A name's settings live in its `Entry`, which outlasts its stays in memory.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import structlog

from mlxpool_server.domain import (
    LoadFinished,
    LoadOptions,
    LoadPhase,
    LoadProgress,
    ModelInfo,
    ModelMemory,
    ModelState,
    ModelStatus,
    Unloaded,
)
from mlxpool_server.engine.backend import LoadedModel
from mlxpool_server.engine.engine import Engine
from mlxpool_server.errors import (
    GenerationFailedError,
    LoadFailedError,
    LoadSupersededError,
    MemoryInUseError,
    MlxpoolError,
    ModelUnloadedError,
    PoolMemoryLimitError,
)
from mlxpool_server.pool.backend import DeviceMemory, ModelLoader
from mlxpool_server.pool.catalog import Catalog
from mlxpool_server.pool.entry import Entry
from mlxpool_server.pool.lease import Lease, watch
from mlxpool_server.pool.ledger import Ledger
from mlxpool_server.pool.residency import Residency

log = structlog.get_logger(__name__)

T = TypeVar("T")


class ModelPool:
    def __init__(
        self,
        *,
        catalog: Catalog,
        loader: ModelLoader,
        engine: Engine,
        memory: DeviceMemory,
        limit_bytes: int,
        default_keep_alive_s: float,
        heartbeat_s: float,
    ) -> None:
        self._catalog = catalog
        self._loader = loader
        self._engine = engine
        self._memory = memory
        self._ledger = Ledger(limit_bytes)
        self._heartbeat_s = heartbeat_s
        self._entries = {spec.name: Entry(spec, default_keep_alive_s) for spec in catalog}
        # One loader thread: loads queue for it instead of sharing the disk.
        self._loader_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._tasks: set[asyncio.Task[None]] = set()

    # ------------------------------------------------------------ what callers ask

    @property
    def limit_bytes(self) -> int:
        return self._ledger.limit_bytes

    @property
    def used_bytes(self) -> int:
        return self._ledger.used_bytes

    async def list_models(self) -> list[ModelStatus]:
        """Every catalogue entry, by name."""
        return [await self._status(entry) for entry in self._entries.values()]

    async def get_model(self, name: str) -> ModelStatus:
        return await self._status(self._entry(name))

    async def info(self, name: str) -> ModelInfo:
        """What the model's files say. Raises: LoadFailedError when they are no model."""
        entry = self._entry(name)
        info = await self._inspect(entry)
        if info is None:
            raise LoadFailedError(entry.spec.name, "its files are not on this machine")
        return info

    def lease(self, name: str) -> Lease:
        """A `with` block during which the model is not evicted. Raises: ModelNotFoundError."""
        return Lease(self, self._entry(name))

    async def check_fits(self, name: str) -> None:
        """Raises: PoolMemoryLimitError when loading it now could not free enough memory."""
        entry = self._entry(name)
        if entry.residency is None and (info := await self._inspect(entry)) is not None:
            self._choose_victims(entry, info.estimated_bytes, allow_eviction=True)

    async def load(
        self, name: str, options: LoadOptions
    ) -> AsyncGenerator[LoadProgress | LoadFinished, None]:
        """Join or start the model's one load; the caller's leaving does not stop it.

        Raises: PoolMemoryLimitError before anything is evicted; LoadFailedError;
        LoadSupersededError when an unload stopped it.
        """
        entry = self._entry(name)
        if options.validate_only:
            yield await self._foresee(entry, options)
            return
        residency = entry.residency
        while residency is not None and residency.state is ModelState.UNLOADING:
            if not await residency.changed.wait(self._heartbeat_s):
                yield LoadProgress(LoadPhase.QUEUED)
            residency = entry.residency
        is_loaded = residency is not None and residency.state is ModelState.READY
        if residency is None:
            residency = self.start_load(entry, allow_eviction=not options.disallow_eviction)
        self._apply(entry, options)
        async for progress in watch(residency, lambda: self._heartbeat_s):
            yield progress
        yield LoadFinished(
            model=await self._status(entry),
            already_loaded=is_loaded,
            evicted_models=() if is_loaded else residency.evicted_models,
            duration_s=0.0 if is_loaded else residency.load_duration_s,
        )

    async def unload(self, name: str, *, force: bool) -> Unloaded:
        """Drain, then free; `force` ends what runs. A caller who gives up does not stop it."""
        entry = self._entry(name)
        residency = entry.residency
        if residency is None:
            entry.error_message = ""
            return Unloaded(was_loaded=False, freed_bytes=0)
        freed_bytes = self._ledger.held_by(residency)
        if residency.state is ModelState.LOADING:
            residency.cancel(LoadSupersededError(entry.spec.name))
        elif force:
            self._unload_now(entry, ModelUnloadedError(entry.spec.name))
        else:
            self._start_unload(entry)
        await residency.gone.wait()
        was_loaded = residency.load_time is not None
        return Unloaded(was_loaded=was_loaded, freed_bytes=freed_bytes if was_loaded else 0)

    async def set_limit(self, limit_bytes: int) -> tuple[str, ...]:
        """Set the byte limit, evicting idle models; return their names.

        Raises: MemoryInUseError when what is pinned or in use does not fit; nothing changes.
        """
        evictable = self._evictable()
        in_use = self.used_bytes - sum(self._held(entry) for entry in evictable)
        if limit_bytes < in_use:
            raise MemoryInUseError(limit_bytes, in_use)
        victims = self._pick(evictable, self.used_bytes - limit_bytes)
        self._ledger.limit_bytes = limit_bytes
        await self._evict(victims, heir=None)
        return tuple(victim.spec.name for victim in victims)

    def memory_by_model(self) -> tuple[ModelMemory, ...]:
        return tuple(
            ModelMemory(
                model=entry.spec.name,
                resident_bytes=self._held(entry),
                active_kv_bytes=self._engine.stats(entry.spec.name).kv_bytes,
            )
            for entry in self._entries.values()
            if entry.residency is not None
        )

    def set_keep_alive(self, name: str, keep_alive_s: float) -> None:
        """From now on; 0 unloads the model when it becomes idle."""
        self._apply(self._entry(name), LoadOptions(keep_alive_s=keep_alive_s))

    def preload(self) -> None:
        """Start loading what the catalogue marks so; failures are logged, not raised."""
        for entry in self._entries.values():
            if entry.spec.preload and entry.residency is None:
                self.start_load(entry)

    async def close(self, error: MlxpoolError) -> None:
        """Stop loads and forget every model. The engine is stopped by its owner."""
        for entry in self._entries.values():
            entry.clear_expiry()
            if entry.residency is not None:
                entry.residency.cancel(error)
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._loader_thread.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------ what parts of the pool ask

    def start_load(self, entry: Entry, *, allow_eviction: bool = True) -> Residency:
        residency = Residency(entry.spec, allow_eviction=allow_eviction)
        entry.residency = residency
        entry.error_message = ""
        self._start_task(self._load(entry, residency))
        return residency

    def lease_returned(self, entry: Entry) -> None:
        residency = entry.residency
        if residency is None or residency.num_leases > 0:
            return
        if residency.state is ModelState.UNLOADING:
            residency.changed.notify()
        else:
            self._schedule_expiry(entry)

    def model_failed(self, name: str) -> None:
        """The engine gave the model up: free it, so that the next request loads it afresh."""
        entry = self._entries[name]
        entry.error_message = "its generation steps kept failing; the next request loads it again"
        self._unload_now(entry, GenerationFailedError(name))

    # ------------------------------------------------------------ load

    async def _load(self, entry: Entry, residency: Residency) -> None:
        name = entry.spec.name
        error: MlxpoolError
        try:
            info = await self._fetch_and_inspect(entry, residency)
            await self._make_room(entry, residency, info.estimated_bytes)
            model = await self._read_weights(residency)
            self._ledger.hold(residency, model.resident_bytes)
            await self._engine.attach(name, model)
        except MlxpoolError as raised:
            error = raised
        except Exception as raised:  # every waiter must learn of it
            log.exception("model.load_failed", model=name)
            error = LoadFailedError(name, type(raised).__name__)
        else:
            residency.become_ready(model)
            self._log_loaded(residency, info, model)
            if residency.error is not None:
                # The unload came while the engine took the model over.
                self._start_unload(entry)
            self._schedule_expiry(entry)
            return
        # The frames of a failed load hold its weights.
        error.__traceback__ = error.__cause__ = error.__context__ = None
        await self._fail(entry, residency, error)

    def _log_loaded(self, residency: Residency, info: ModelInfo, model: LoadedModel) -> None:
        log.info(
            "model.loaded",
            model=residency.spec.name,
            resident_bytes=model.resident_bytes,
            estimated_bytes=info.estimated_bytes,
            duration_s=round(residency.load_duration_s, 3),
            evicted=residency.evicted_models,
        )

    async def _fetch_and_inspect(self, entry: Entry, residency: Residency) -> ModelInfo:
        report = self._threadsafe_report(residency)
        await self._on_loader_thread(partial(self._loader.fetch, entry.spec, report))
        # Read again: the files may have changed since the catalogue was shown.
        entry.info = await asyncio.to_thread(self._loader.inspect, entry.spec)
        if entry.info is None:
            raise LoadFailedError(entry.spec.name, "its files are not on this machine")
        return entry.info

    async def _make_room(self, entry: Entry, residency: Residency, required_bytes: int) -> None:
        if residency.is_cancelled.is_set():
            raise residency.error or LoadSupersededError(entry.spec.name)
        victims = self._choose_victims(
            entry, required_bytes, allow_eviction=residency.allow_eviction
        )
        residency.required_bytes = required_bytes
        self._ledger.hold(residency, min(self._ledger.free_bytes, required_bytes))
        if victims:
            residency.evicted_models = tuple(victim.spec.name for victim in victims)
            residency.report(LoadProgress(LoadPhase.EVICTING, total_bytes=required_bytes))
            await self._evict(victims, heir=residency)
        residency.report(LoadProgress(LoadPhase.QUEUED, total_bytes=required_bytes))

    async def _read_weights(self, residency: Residency) -> LoadedModel:
        model = await self._on_loader_thread(
            partial(
                self._loader.load,
                residency.spec,
                self._threadsafe_report(residency),
                residency.is_cancelled.is_set,
            )
        )
        if residency.is_cancelled.is_set():
            del model
            raise residency.error or LoadSupersededError(residency.spec.name)
        return model

    async def _fail(self, entry: Entry, residency: Residency, error: MlxpoolError) -> None:
        await self._free_buffers()
        self._ledger.release(residency)
        if isinstance(error, LoadFailedError):
            entry.error_message = error.problem
        log.warning("model.not_loaded", model=entry.spec.name, error=str(error))
        entry.residency = None
        residency.end(ModelState.FAILED, error)

    # ------------------------------------------------------------ unload and evict

    def _start_unload(self, entry: Entry) -> None:
        residency = entry.residency
        if residency is not None and residency.state is ModelState.READY:
            entry.clear_expiry()
            residency.start_unloading()
            self._start_task(self._drain_and_free(entry, residency))

    def _unload_now(self, entry: Entry, error: MlxpoolError) -> None:
        """End what runs with `error`; the leases come back by themselves."""
        residency = entry.residency
        if residency is not None and residency.state in (ModelState.READY, ModelState.UNLOADING):
            residency.cancel(error)
            self._start_unload(entry)

    async def _drain_and_free(self, entry: Entry, residency: Residency) -> None:
        while residency.num_leases > 0 and residency.error is None:
            await residency.changed.wait(self._heartbeat_s)
        error = residency.error or ModelUnloadedError(entry.spec.name)
        # A dead engine holds nothing.
        with contextlib.suppress(GenerationFailedError):
            await self._engine.detach(entry.spec.name, error)
        residency.model = None
        await self._free_buffers()
        heir = residency.heir
        if heir is not None and heir.state is ModelState.LOADING:
            missing_bytes = heir.required_bytes - self._ledger.held_by(heir)
            self._ledger.hand_over(residency, heir, missing_bytes)
        else:
            self._ledger.release(residency)
        entry.residency = None
        residency.end(ModelState.UNLOADED)
        log.info("model.unloaded", model=entry.spec.name)

    def _choose_victims(
        self, entry: Entry, required_bytes: int, *, allow_eviction: bool
    ) -> list[Entry]:
        """Idle models, least recently used first, until `required_bytes` would be free.

        Raises: PoolMemoryLimitError, and then nothing was evicted.
        """
        evictable = self._evictable() if allow_eviction else []
        free = self._ledger.free_bytes
        available = free + sum(self._held(each) for each in evictable)
        if required_bytes > available:
            raise PoolMemoryLimitError(entry.spec.name, required_bytes, available)
        return self._pick(evictable, required_bytes - free)

    def _evictable(self) -> list[Entry]:
        evictable = [entry for entry in self._entries.values() if entry.is_evictable]
        return sorted(evictable, key=lambda entry: entry.last_used_time or 0.0)

    def _pick(self, evictable: list[Entry], missing_bytes: int) -> list[Entry]:
        victims: list[Entry] = []
        for entry in evictable:
            if missing_bytes <= 0:
                break
            victims.append(entry)
            missing_bytes -= self._held(entry)
        return victims

    async def _evict(self, victims: list[Entry], heir: Residency | None) -> None:
        leaving = [victim.residency for victim in victims if victim.residency is not None]
        for residency in leaving:
            residency.heir = heir
        for victim in victims:
            log.info("model.evicted", model=victim.spec.name)
            self._start_unload(victim)
        await asyncio.gather(*(residency.gone.wait() for residency in leaving))

    def _schedule_expiry(self, entry: Entry) -> None:
        residency = entry.residency
        if residency is None or not residency.is_idle or not entry.expires_when_idle:
            entry.clear_expiry()
            return
        loop = asyncio.get_running_loop()
        entry.set_expiry(loop.call_later(entry.keep_alive_s, self._expire, entry))

    def _expire(self, entry: Entry) -> None:
        entry.clear_expiry()
        if entry.is_evictable:
            log.info("model.expired", model=entry.spec.name)
            self._start_unload(entry)

    # ------------------------------------------------------------ small parts

    def _entry(self, name: str) -> Entry:
        return self._entries[self._catalog.resolve(name).name]

    def _held(self, entry: Entry) -> int:
        return self._ledger.held_by(entry.residency)

    def _apply(self, entry: Entry, options: LoadOptions) -> None:
        if options.pinned is not None:
            entry.is_pinned = options.pinned
        if options.keep_alive_s is not None:
            entry.keep_alive_s = options.keep_alive_s
        self._schedule_expiry(entry)

    async def _foresee(self, entry: Entry, options: LoadOptions) -> LoadFinished:
        """What a load would do, done to nothing."""
        victims: list[Entry] = []
        if entry.residency is None:
            info = await self._inspect(entry)
            victims = self._choose_victims(
                entry,
                0 if info is None else info.estimated_bytes,
                allow_eviction=not options.disallow_eviction,
            )
        return LoadFinished(
            model=await self._status(entry),
            already_loaded=entry.residency is not None,
            evicted_models=tuple(victim.spec.name for victim in victims),
            duration_s=0.0,
        )

    async def _inspect(self, entry: Entry) -> ModelInfo | None:
        """Raises: LoadFailedError when the files are no model."""
        if entry.info is None:
            entry.info = await asyncio.to_thread(self._loader.inspect, entry.spec)
        return entry.info

    async def _status(self, entry: Entry) -> ModelStatus:
        try:
            await self._inspect(entry)
        except LoadFailedError as error:
            entry.error_message = error.problem
        return entry.status(self._engine.stats(entry.spec.name), self._held(entry))

    async def _free_buffers(self) -> None:
        await asyncio.to_thread(self._memory.clear_cache)

    async def _on_loader_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._loader_thread, call)

    def _threadsafe_report(self, residency: Residency) -> Callable[[LoadProgress], None]:
        loop = asyncio.get_running_loop()

        def report(progress: LoadProgress) -> None:
            loop.call_soon_threadsafe(residency.report, progress)

        return report

    def _start_task(self, work: Coroutine[None, None, None]) -> None:
        """The pool owns its loads and unloads: no caller's cancel reaches them."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
