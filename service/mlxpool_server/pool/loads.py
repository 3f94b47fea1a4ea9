"""How models come: fetch → inspect → make room → read → attach, one task a load."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import structlog

from mlxpool_server.domain import (
    HubSource,
    LoadPhase,
    LoadProgress,
    ModelInfo,
    ModelSpec,
    ModelState,
)
from mlxpool_server.engine.backend import LoadedAdapter, LoadedModel
from mlxpool_server.engine.engine import Engine
from mlxpool_server.errors import (
    LoadFailedError,
    LoadSupersededError,
    MlxpoolError,
)
from mlxpool_server.pool.backend import ModelLoader
from mlxpool_server.pool.entry import Entry
from mlxpool_server.pool.eviction import Eviction
from mlxpool_server.pool.prompt_caches import PromptCaches
from mlxpool_server.pool.residency import Residency
from mlxpool_server.pool.tasks import Tasks
from mlxpool_server.pool.unloads import Unloads

log = structlog.get_logger(__name__)


MAX_DOWNLOADS = 4


class Loads:
    """Event loop only; weights are read on one loader thread: loads take turns on the disk."""

    def __init__(
        self,
        *,
        loader: ModelLoader,
        engine: Engine,
        eviction: Eviction,
        unloads: Unloads,
        prompt_caches: PromptCaches,
        tasks: Tasks,
    ) -> None:
        self._loader = loader
        self._engine = engine
        self._eviction = eviction
        self._unloads = unloads
        self._prompt_caches = prompt_caches
        self._tasks = tasks
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        # Apart, so that a download keeps nobody from being loaded, or from being refused.
        self._fetcher = ThreadPoolExecutor(MAX_DOWNLOADS, thread_name_prefix="fetcher")
        self._refusal: MlxpoolError | None = None

    def start(self, entry: Entry, *, allow_eviction: bool) -> Residency:
        """Raises: what the pool was closed with."""
        if self._refusal is not None:
            raise self._refusal
        residency = Residency(entry.load_spec, allow_eviction=allow_eviction)
        entry.residency = residency
        entry.error_message = ""
        self._tasks.start(self._load(entry, residency))
        return residency

    async def inspect(self, entry: Entry) -> ModelInfo | None:
        """What the files say; None for a hub model that was not fetched yet.

        Raises: LoadFailedError when they are no model.
        """
        if entry.info is None:
            entry.info = await self.inspect_spec(entry.load_spec)
        return entry.info

    async def inspect_spec(self, spec: ModelSpec) -> ModelInfo | None:
        """As `inspect`, of what may never be loaded."""
        return await asyncio.to_thread(self._loader.inspect, spec)

    def refuse(self, error: MlxpoolError) -> None:
        """Start no load from now on."""
        self._refusal = error

    def close(self) -> None:
        for executor in (self._reader, self._fetcher):
            executor.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------ one load

    async def _load(self, entry: Entry, residency: Residency) -> None:
        error = await self._try(entry, residency)
        if error is None:
            self._unloads.schedule_expiry(entry)
            return
        log.warning("model.not_loaded", model=entry.spec.name, error=str(error))
        if residency.state is ModelState.LOADING:
            entry.activity.load_failed(entry.spec.name)
        await self._unloads.free(entry, residency, error)
        if residency.state is ModelState.FAILED and isinstance(error, LoadFailedError):
            entry.error_message = error.problem

    async def _try(self, entry: Entry, residency: Residency) -> MlxpoolError | None:
        """Return the error that every waiter gets. Nothing holds the weights then."""
        try:
            await self._bring_in(entry, residency)
        except MlxpoolError as raised:
            error = raised
            _drop_frames(raised)
        except Exception as raised:  # every waiter must learn of it
            log.exception("model.load_failed", model=entry.spec.name)
            error = LoadFailedError(entry.spec.name, type(raised).__name__)
            _drop_frames(raised)
        else:
            return None
        return error

    async def _bring_in(self, entry: Entry, residency: Residency) -> None:
        info = await self._fetch_and_inspect(entry, residency)
        _check_wanted(residency)
        await self._eviction.make_room(residency, info.load_bytes)
        _check_wanted(residency)
        residency.report(LoadProgress(LoadPhase.QUEUED, total_bytes=info.estimated_bytes))
        model = await self._read_weights(residency)
        _check_wanted(residency)
        # Measured now: the estimate may have been wrong in either direction. The warm-up is over.
        await self._eviction.make_room(residency, model.resident_bytes)
        await self._attach(residency, model)
        residency.become_ready(model)
        entry.become_ready()
        entry.activity.load_finished(entry.spec.name, residency.load_duration_s)
        if info.can_generate and not entry.spec.adapter:
            self._prompt_caches.top_up(entry.spec.name)
        log.info(
            "model.loaded",
            model=entry.spec.name,
            resident_bytes=model.resident_bytes,
            estimated_bytes=info.estimated_bytes,
            estimate_error=_estimate_error(info, model),
            duration_s=round(residency.load_duration_s, 3),
            evicted=residency.evicted_models,
        )

    async def _fetch_and_inspect(self, entry: Entry, residency: Residency) -> ModelInfo:
        for spec in filter(None, (residency.spec, residency.spec.draft)):
            if isinstance(spec.source, HubSource):
                report = _threadsafe_report(residency)
                await _run_on(self._fetcher, partial(self._loader.fetch, spec, report))
        # Read again: the files may have changed since the catalogue was shown.
        info = await self.inspect_spec(residency.spec)
        if info is None:
            raise LoadFailedError(entry.spec.name, "its files are not on this machine")
        entry.info = info
        return info

    async def _read_weights(self, residency: Residency) -> LoadedModel | LoadedAdapter:
        report = _threadsafe_report(residency)
        is_cancelled = residency.is_cancelled.is_set
        loaded: list[LoadedModel | LoadedAdapter] = []
        # Not as the call's result: the loader thread would hold it longer than its caller.
        await _run_on(
            self._reader,
            lambda: loaded.append(self._loader.load(residency.spec, report, is_cancelled)),
        )
        return loaded.pop()

    async def _attach(self, residency: Residency, model: LoadedModel | LoadedAdapter) -> None:
        name = residency.spec.name
        if not isinstance(model, LoadedModel):
            # It comes to the engine with the requests that want it.
            return
        await self._engine.attach(name, model)
        try:
            _check_wanted(residency)
        except MlxpoolError as error:
            # The unload came while the engine took the model over.
            await self._engine.detach(name, error)
            raise


def _estimate_error(info: ModelInfo, model: LoadedModel | LoadedAdapter) -> float:
    """By what share of itself the model is larger than was estimated; negative when smaller."""
    return round(1 - info.estimated_bytes / max(1, model.resident_bytes), 4)


async def _run_on(executor: ThreadPoolExecutor, call: Callable[[], None]) -> None:
    await asyncio.get_running_loop().run_in_executor(executor, call)


def _drop_frames(error: BaseException) -> None:
    """The frames of a failed load, and of what caused it, hold weights."""
    error.__traceback__ = error.__cause__ = error.__context__ = None


def _check_wanted(residency: Residency) -> None:
    """Raises: the error of whoever stopped this load meanwhile."""
    if residency.state is not ModelState.LOADING:
        raise residency.error or LoadSupersededError(residency.spec.name)


def _threadsafe_report(residency: Residency) -> Callable[[LoadProgress], None]:
    loop = asyncio.get_running_loop()

    def report(progress: LoadProgress) -> None:
        loop.call_soon_threadsafe(residency.report, progress)

    return report
