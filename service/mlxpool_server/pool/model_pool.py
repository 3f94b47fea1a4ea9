"""The model pool, the process's singleton: load once, share, evict under a byte limit.

Event loop only. A name's settings live in its `Entry`; its stay in memory, with its state, is a
`Residency`; who may use it, a `Lease`; what it costs, the `Ledger`. `Loads` bring models in,
`Eviction` says who has to leave for them, `Unloads` let them go.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing

from mlxpool_server.domain import (
    LoadFinished,
    LoadOptions,
    LoadPhase,
    LoadProgress,
    ModelInfo,
    ModelMemory,
    ModelSpec,
    ModelState,
    ModelStatus,
    ModelUse,
    PoolUse,
    Unloaded,
)
from mlxpool_server.engine.engine import Engine
from mlxpool_server.errors import (
    GenerationFailedError,
    InvalidFieldError,
    LoadFailedError,
    LoadSupersededError,
    MlxpoolError,
    ModelInUseError,
    ModelUnloadedError,
)
from mlxpool_server.pool.activity import Activity
from mlxpool_server.pool.backend import DeviceMemory, ModelLoader
from mlxpool_server.pool.broadcast import Broadcast
from mlxpool_server.pool.catalog import Catalog
from mlxpool_server.pool.entries import Entries
from mlxpool_server.pool.entry import Entry
from mlxpool_server.pool.eviction import Eviction
from mlxpool_server.pool.lease import Lease, watch
from mlxpool_server.pool.ledger import Ledger
from mlxpool_server.pool.loads import Loads
from mlxpool_server.pool.observer import PoolObserver
from mlxpool_server.pool.prompt_caches import PromptCaches
from mlxpool_server.pool.reservations import Reservation, Reservations
from mlxpool_server.pool.residency import Residency
from mlxpool_server.pool.tasks import Tasks
from mlxpool_server.pool.unloads import Unloads


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
        max_batch_size: int,
        prefill_tokens: int,
        prompt_cache_share: float = 0.0,
        observer: PoolObserver | None = None,
        changed: Broadcast | None = None,
    ) -> None:
        """`prefill_tokens`: the most prompt tokens that one step of one model works on.

        `prompt_cache_share`: of the limit, what a model may keep of earlier prompts. `changed` is
        told when a model's chances to be generated on change.
        """
        self._engine = engine
        self._heartbeat_s = heartbeat_s
        self.activity = Activity(observer)
        self._changed = changed or Broadcast()
        self._ledger = Ledger(limit_bytes)
        self._tasks = Tasks()
        self._entries = Entries(
            catalog,
            default_keep_alive_s,
            activity=self.activity,
            changed=self._changed,
            tasks=self._tasks,
            heartbeat_s=heartbeat_s,
        )
        self._prompt_caches = PromptCaches(self._ledger, engine, self._tasks, prompt_cache_share)
        self._unloads = Unloads(
            engine=engine,
            memory=memory,
            ledger=self._ledger,
            tasks=self._tasks,
            prompt_caches=self._prompt_caches,
            heartbeat_s=heartbeat_s,
        )
        self._eviction = Eviction(
            self._entries.values(), self._ledger, self._unloads, self._prompt_caches
        )
        self.reservations = Reservations(
            self._ledger,
            self._eviction,
            max_batch_size=max_batch_size,
            prefill_tokens=prefill_tokens,
        )
        self._loads = Loads(
            loader=loader,
            engine=engine,
            eviction=self._eviction,
            unloads=self._unloads,
            prompt_caches=self._prompt_caches,
            tasks=self._tasks,
        )

    # ------------------------------------------------------------ looking

    def spec(self, name: str) -> ModelSpec:
        """The model with this name or alias. Raises: ModelNotFoundError."""
        return self._entries.resolve(name).spec

    async def is_usable(self, name: str) -> bool:
        """Whether a generation on it has a chance. Raises: ModelNotFoundError."""
        # The state says so only once its memory is free.
        return not (await self.get_model(name)).error_message

    def load_number(self, name: str) -> int | None:
        """Which of the model's loads is in memory, by the catalogue's name; None: none is."""
        is_ready = name in self._entries and self._entries[name].is_ready
        return self.activity.of(name).loads if is_ready else None

    def use(self) -> PoolUse:
        """What is held and done at this moment; waits for nobody."""
        models = tuple(self._model_use(entry) for entry in self._entries.values())
        return PoolUse(self._ledger.limit_bytes, self._ledger.used_bytes, models)

    @property
    def limit_bytes(self) -> int:
        return self._ledger.limit_bytes

    @property
    def used_bytes(self) -> int:
        return self._ledger.used_bytes

    async def list_models(self) -> list[ModelStatus]:
        """Every model of the catalogue, by name, and the adapters that are in memory."""
        served = [
            entry
            for entry in self._entries.values()
            if not entry.is_retired and (not entry.spec.adapter or entry.residency is not None)
        ]
        return [await self._status(entry) for entry in served]

    async def get_model(self, name: str, adapter: str = "") -> ModelStatus:
        """Raises: ModelNotFoundError, AdapterNotFoundError."""
        return await self._status(self._entries.resolve(name, adapter))

    async def find_info(self, name: str) -> ModelInfo | None:
        """What the model's files say; None for a hub model that was not fetched yet.

        Raises: LoadFailedError when they are no model.
        """
        return await self._loads.inspect(self._entries.known(name))

    async def info(self, name: str) -> ModelInfo:
        """As `find_info`. Raises: LoadFailedError also when the files were not fetched yet."""
        info = await self.find_info(name)
        if info is None:
            raise LoadFailedError(name, "its files are not on this machine")
        return info

    def check_fits(self, wanted: Reservation) -> None:
        """Raises: PoolMemoryLimitError when the model cannot be loaded now, or this generation
        would not fit even alone. Its info has to be known: ask `find_info` first.
        """
        entry = self._entries.known(wanted.model)
        info = entry.info
        if info is None:
            return
        # A load in flight holds more than what stays.
        held_bytes = self._ledger.held_by(entry.residency) if entry.is_ready else 0
        weights_bytes = held_bytes or info.estimated_bytes
        self.reservations.check_possible(wanted, weights_bytes)
        if entry.residency is None:
            self._eviction.choose_victims(entry.spec.name, info.load_bytes)

    def memory_by_model(self) -> tuple[ModelMemory, ...]:
        return tuple(
            ModelMemory(
                model=entry.spec.model,
                adapter=entry.spec.adapter,
                resident_bytes=self._ledger.held_by(entry.residency),
                active_kv_bytes=self._engine.stats(name).kv_bytes,
                prompt_cache_bytes=self._engine.stats(name).prompt_cache_bytes,
            )
            for name, entry in self._entries.items()
            if entry.residency is not None
        )

    # ------------------------------------------------------------ using and changing

    def lease(self, name: str, adapter: str = "") -> Lease:
        """A `with` block during which the model, or the adapter, is not evicted.

        Raises: ModelNotFoundError, AdapterNotFoundError.
        """
        return Lease(self, self._entries.resolve(name, adapter))

    async def load(
        self, name: str, options: LoadOptions
    ) -> AsyncGenerator[LoadProgress | LoadFinished, None]:
        """Join or start the model's one load; the caller's leaving does not stop it.

        Raises: PoolMemoryLimitError before anything is evicted; LoadFailedError;
        LoadSupersededError when an unload stopped it; ModelNotFoundError of the draft model, too,
        and ModelInUseError when the model is in memory with another one.
        """
        entry = self._entries.resolve(name, options.adapter)
        draft = self._entries.resolve(options.draft_model).spec if options.draft_model else None
        if options.validate_only:
            wanted = _wanted(entry, draft)
            victims = await self._foresee(
                entry, wanted, allow_eviction=not options.disallow_eviction
            )
            yield LoadFinished(await self._status(entry), entry.is_ready, victims, duration_s=0.0)
            return
        while (residency := entry.residency) and residency.state is ModelState.UNLOADING:
            if not await residency.changed.wait(self._heartbeat_s):
                yield LoadProgress(LoadPhase.QUEUED)
        if not entry.load_spec.is_held_as(_wanted(entry, draft)):
            # For this load and those to come.
            entry.draft, entry.info = draft, None
        is_loaded = entry.is_ready
        residency = entry.residency or self.start_load(
            entry, allow_eviction=not options.disallow_eviction
        )
        was_pinned = entry.is_pinned
        self._apply(entry, options)
        try:
            async with aclosing(watch(residency, lambda: self._heartbeat_s)) as progress:
                async for change in progress:
                    yield change
        except MlxpoolError:
            entry.is_pinned = was_pinned
            raise
        yield LoadFinished(
            model=await self._status(entry),
            already_loaded=is_loaded,
            evicted_models=() if is_loaded else residency.evicted_models,
            duration_s=0.0 if is_loaded else residency.load_duration_s,
        )

    async def unload(self, name: str, *, adapter: str = "", force: bool) -> Unloaded:
        """Drain, then free; `force` ends what runs on a model, and waits for an adapter's users.

        A caller who gives up does not stop it.
        """
        entry = self._entries.resolve(name, adapter)
        residency = entry.residency
        if residency is None:
            entry.error_message = ""
            return Unloaded(was_loaded=False, freed_bytes=0)
        was_loaded = residency.load_time is not None
        freed_bytes = self._ledger.held_by(residency) if was_loaded else 0
        error: MlxpoolError | None = None
        if residency.state is ModelState.LOADING:
            error = LoadSupersededError(entry.spec.name)
        elif force and not entry.spec.adapter:
            error = ModelUnloadedError(entry.spec.name)
        self._unloads.start(entry, error)
        await residency.gone.wait()
        return Unloaded(was_loaded, freed_bytes)

    async def set_limit(self, limit_bytes: int) -> tuple[str, ...]:
        """Set the byte limit, evicting idle models; return their names.

        Raises: MemoryInUseError when what is pinned or in use does not fit; nothing changes.
        """
        return await self._eviction.set_limit(limit_bytes)

    async def clear_prompt_caches(self) -> int:
        """Forget what earlier prompts left; return how many bytes that was."""
        return await self._prompt_caches.clear()

    def set_next_keep_alive(self, name: str, keep_alive_s: float | None) -> None:
        """For the idle time after this request; 0 unloads then, None is what LoadModel set."""
        entry = self._entries.known(name)
        entry.next_keep_alive_s = keep_alive_s
        self._unloads.schedule_expiry(entry)

    def preload(self) -> None:
        """Start loading what the catalogue marks so; failures are logged, not raised."""
        self._preload(self._entries.values())

    def ensure_loading(self, name: str) -> None:
        """Start its load unless it is in memory or on its way; a failure is logged, not raised.

        Raises: ModelNotFoundError.
        """
        entry = self._entries.resolve(name)
        if entry.residency is None:
            self.start_load(entry)

    def set_catalog(self, catalog: Catalog, default_keep_alive_s: float) -> None:
        """Serve these models from now on; what runs on one that is gone ends in peace."""
        added = self._entries.set_catalog(catalog, default_keep_alive_s, self._unloads)
        self._preload(added)

    async def close(self, error: MlxpoolError) -> None:
        """Stop loads, let every model go and start no load again; waiters get `error`.

        The engine is stopped by its owner, before or after.
        """
        self._entries.close()
        self._loads.refuse(error)
        for entry in list(self._entries.values()):
            self._unloads.start(entry, error)
        await self._tasks.wait()
        self._loads.close()

    # ------------------------------------------------------------ what parts of the house tell

    def start_load(self, entry: Entry, *, allow_eviction: bool = True) -> Residency:
        return self._loads.start(entry, allow_eviction=allow_eviction)

    def lease_returned(self, entry: Entry) -> None:
        can_generate = entry.info is not None and entry.info.can_generate
        if entry.is_ready and can_generate and not entry.spec.adapter:
            self._prompt_caches.top_up(entry.spec.name)
        self._unloads.schedule_expiry(entry)
        if entry.is_retired:
            self._changed.notify()

    def model_failed(self, name: str) -> None:
        """The engine gave the model up: free it, so that the next request loads it afresh."""
        entry = self._entries[name]
        entry.error_message = "its generation steps kept failing; the next request loads it again"
        self._unloads.start(entry, GenerationFailedError(name))

    # ------------------------------------------------------------ small parts

    def _preload(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            if entry.spec.preload and entry.residency is None:
                self.start_load(entry)

    def _model_use(self, entry: Entry) -> ModelUse:
        name = entry.spec.name
        stats = self._engine.stats(name)
        status = entry.status(stats, self._ledger.held_by(entry.residency))
        return ModelUse(
            name=name,
            state=status.state,
            running=status.active_requests,
            queued=status.queued_requests,
            # What leaves is charged until it is gone, and what comes from its start.
            weights_bytes=self._ledger.held_by(entry.residency),
            kv_bytes=stats.kv_bytes,
            prompt_cache_bytes=stats.prompt_cache_bytes,
            reserved_bytes=self.reservations.held_bytes(name),
            steps=self._engine.step_totals(name),
            activity=status.activity,
        )

    def _apply(self, entry: Entry, options: LoadOptions) -> None:
        if options.pinned is not None:
            entry.is_pinned = options.pinned
        # As the contract says: unset is the default, not what an earlier call set.
        standing = options.keep_alive_s
        entry.keep_alive_s = entry.default_keep_alive_s if standing is None else standing
        entry.next_keep_alive_s = None
        self._unloads.schedule_expiry(entry)

    async def _foresee(
        self, entry: Entry, wanted: ModelSpec, *, allow_eviction: bool
    ) -> tuple[str, ...]:
        """Whom a load would evict; nobody is. Raises: PoolMemoryLimitError, LoadFailedError."""
        info = None if entry.residency else await self._loads.inspect_spec(wanted)
        if info is None or entry.residency is not None:
            return ()
        victims = self._eviction.choose_victims(
            entry.spec.name, info.load_bytes, allow_eviction=allow_eviction
        )
        return tuple(victim.spec.name for victim in victims)

    async def _status(self, entry: Entry) -> ModelStatus:
        problem = ""
        try:
            await self._loads.inspect(entry)
        except LoadFailedError as error:
            problem = error.problem
        stats = self._engine.stats(entry.spec.name)
        return entry.status(stats, self._ledger.held_by(entry.residency), problem)


def _wanted(entry: Entry, draft: ModelSpec | None) -> ModelSpec:
    """What a load would bring into memory, with this draft model, or with what there is.

    Raises: InvalidFieldError; ModelInUseError when the model is in memory without it.
    """
    if draft is None:
        return entry.load_spec
    if entry.spec.adapter:
        raise InvalidFieldError("draft_model", "goes with a model, not with its adapter")
    if draft.name == entry.spec.name:
        raise InvalidFieldError("draft_model", "is the model itself; name a smaller one")
    wanted, residency = entry.spec.with_draft(draft), entry.residency
    if residency is not None and not residency.spec.is_held_as(wanted):
        raise ModelInUseError(entry.spec.name, residency.spec.draft_model)
    return wanted
