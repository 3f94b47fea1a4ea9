"""The composition root: builds everything, starts and stops it in order."""

from __future__ import annotations

import asyncio
import gc
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence

import structlog

from mlxpool_server.domain import DeviceInfo, MemoryLimits, ModelSpec
from mlxpool_server.engine.engine import Engine
from mlxpool_server.engine.fair_lock import FairLock
from mlxpool_server.errors import RETRY_AFTER_S, AddressUnavailableError, DrainingError
from mlxpool_server.front_door import certificates_for, gate_for, warn_of_exposure
from mlxpool_server.gateway_ports import GatewayPorts, Served, check_gateway_models
from mlxpool_server.metrics import Sample
from mlxpool_server.mlx_backend.demo_model import ensure_demo_model
from mlxpool_server.mlx_backend.openblas import OpenBlas, load_openblas
from mlxpool_server.pool.backend import DeviceMemory, ModelLoader
from mlxpool_server.pool.broadcast import Broadcast
from mlxpool_server.pool.catalog import Catalog
from mlxpool_server.pool.embedding import Embeddings
from mlxpool_server.pool.generation import Generations
from mlxpool_server.pool.generation_limits import GenerationLimits
from mlxpool_server.pool.memory import PoolMemory
from mlxpool_server.pool.model_pool import ModelPool
from mlxpool_server.pool.prompts import PromptReader
from mlxpool_server.reload import Reloads
from mlxpool_server.rpc.convert.requests import RequestLimits
from mlxpool_server.rpc.health import Health
from mlxpool_server.rpc.memory_service import MemoryService
from mlxpool_server.rpc.model_service import ModelService
from mlxpool_server.rpc.server import bind, build_server
from mlxpool_server.settings import Settings, changed_settings, merged_settings
from mlxpool_server.telemetry import Telemetry

log = structlog.get_logger(__name__)

HEALTH_INTERVAL_S = 5.0
# How long the engine may take for the step it is in when the server stops.
ENGINE_STOP_S = 5.0
# How long calls that are no generations (watchers, loads) may linger after the drain.
CALLS_STOP_S = 1.0
# How long a load may take to notice that it is no longer wanted.
POOL_CLOSE_S = 5.0
# The exit code when the engine was stuck for engine_exit_s.
EXIT_STUCK = os.EX_SOFTWARE
# How soon the engine gets the interpreter back after it has waited for a CPU's step: Python's own
# 5 ms are as long as a small model's. On a GPU they are better: see docs/performance.md.
CPU_SWITCH_INTERVAL_S = 0.5e-3


class App:
    """One server process: an event loop, an engine thread, a loader thread."""

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        loader: ModelLoader,
        memory: DeviceMemory,
        processors: FairLock | None = None,
    ) -> None:
        """`processors`: what the engine and the loader take in turn on a CPU.

        Raises: SettingsError for certificates and API keys that cannot be used.
        """
        self._settings = settings
        self._catalog = catalog
        self._certificates = certificates_for(settings)
        self._gate = gate_for(settings)
        self._device = device = memory.device()
        self._telemetry = Telemetry(settings, device)
        models_changed = Broadcast()
        self._engine = Engine(
            max_batch_size=settings.max_batch_size,
            on_death=self._on_engine_death,
            on_model_failed=self._on_model_failed,
            processors=processors,
        )
        self._pool = ModelPool(
            catalog=catalog,
            loader=loader,
            engine=self._engine,
            memory=memory,
            limit_bytes=_pool_limit_bytes(settings, device),
            default_keep_alive_s=settings.default_keep_alive_s,
            heartbeat_s=settings.progress_interval_s,
            max_batch_size=settings.max_batch_size,
            prefill_tokens=settings.prefill_step_tokens,
            prompt_cache_share=settings.prompt_cache_share,
            observer=self._telemetry.instruments,
            changed=models_changed,
        )
        self._prompts = PromptReader(loader, self._pool.load_number)
        self._generations = Generations(
            self._pool, self._engine, self._prompts, _generation_limits(settings)
        )
        self._embeddings = Embeddings(
            self._pool,
            self._engine,
            self._prompts,
            _generation_limits(settings),
            settings.max_message_bytes,
        )
        self._health = Health(self._pool.is_usable, models_changed)
        self._memory = PoolMemory(self._pool, memory)
        self._memory_service = MemoryService(self._memory)
        self._model_service = ModelService(
            pool=self._pool,
            generations=self._generations,
            embeddings=self._embeddings,
            prompts=self._prompts,
            limits=_request_limits(settings),
            device=device,
            start_time=time.time(),
        )
        self._server = build_server(
            model_service=self._model_service,
            memory_service=self._memory_service,
            health=self._health,
            gate=self._gate,
            max_message_bytes=settings.max_message_bytes,
            observers=self._telemetry.call_observers,
        )
        check_gateway_models(settings.gateway, catalog)
        self._gateway_ports = GatewayPorts(
            settings.gateway,
            Served(self._pool, self._generations, self._prompts, self._health),
            gate=self._gate,
            max_message_bytes=settings.max_message_bytes,
            observers=self._telemetry.call_observers,
        )
        self._stop_requested = asyncio.Event()
        self._exit_code = 0
        log.info(
            "server.device",
            kind=device.kind,
            device=device.name,
            memory_bytes=device.memory_bytes,
            pool_limit_bytes=self._pool.limit_bytes,
            mlx=device.mlx_version,
            mlx_lm=device.mlx_lm_version,
        )

    async def start(self) -> tuple[str, ...]:
        """Serve; return the addresses, with the ports the kernel picked.

        Raises: AddressUnavailableError.
        """
        warn_of_exposure(self._settings)
        tls = None if self._certificates is None else self._certificates.context()
        addresses = bind(self._server, self._settings.listen, self._certificates)
        gateway_addresses = self._gateway_ports.bind(self._certificates)
        await self._telemetry.start(self._pool, self._sample, self._gate, tls)
        self._engine.start()
        await self._server.start()
        self._pool.preload()
        await self._gateway_ports.start()
        self._health.set_serving(is_serving=True)
        log.info("server.listening", addresses=addresses)
        for model, address in gateway_addresses.items():
            log.info("gateway.listening", model=model, address=address)
        return addresses

    async def run_until_stopped(self) -> int:
        """Wait for `request_stop` or the engine's death; return the exit code.

        Meanwhile health says whether the engine gets on, and one that is stuck for too long ends
        the wait with EXIT_STUCK.
        """
        while self._exit_code != EXIT_STUCK:
            settings = self._settings
            try:
                async with asyncio.timeout(min(HEALTH_INTERVAL_S, settings.engine_stuck_s)):
                    await self._stop_requested.wait()
            except TimeoutError:
                self._watch_engine()
            else:
                break
        return self._exit_code

    def _watch_engine(self) -> None:
        age_s = self._engine.step_age_s
        is_stuck = age_s > self._settings.engine_stuck_s
        if is_stuck and self._health.is_serving:
            log.error("engine.stuck", step_age_s=round(age_s, 1))
        self._health.set_serving(is_serving=not is_stuck)
        if age_s > self._settings.engine_exit_s:
            log.critical("server.engine_stuck", step_age_s=round(age_s, 1))
            self._exit_code = EXIT_STUCK

    def request_stop(self) -> None:
        self._stop_requested.set()

    async def reload(self, settings: Settings, catalog: Catalog) -> None:
        """Take over what may change while the server runs, all of it or nothing.

        Raises: MemoryInUseError when the pool's new limit is below what is in use.
        """
        changed = changed_settings(self._settings, settings)
        merged = merged_settings(self._settings, settings)
        needs_restart = sorted(changed & changed_settings(settings, merged))
        # First, because it alone can be refused.
        await self._memory.set_limits(self._changed_limits(merged))
        for spec in catalog:
            if spec.name in self._catalog and self._catalog.resolve(spec.name) != spec:
                self._prompts.forget(spec.name)
        self._pool.set_catalog(catalog, merged.default_keep_alive_s)
        self._generations.set_limits(_generation_limits(merged))
        self._embeddings.set_limits(_generation_limits(merged))
        self._model_service.set_limits(_request_limits(merged))
        before, after = ({spec.name for spec in each} for each in (self._catalog, catalog))
        self._settings, self._catalog = merged, catalog
        log.info(
            "settings.reloaded",
            changed=sorted(changed.difference(needs_restart)),
            added=sorted(after - before),
            removed=sorted(before - after),
        )
        if needs_restart:
            log.warning("settings.need_restart", settings=needs_restart)

    def _changed_limits(self, settings: Settings) -> MemoryLimits:
        """Only those that the settings change: SetMemoryLimits may have set others."""
        pool_bytes = _pool_limit_bytes(settings, self._device)
        cache_bytes = settings.mlx_cache_limit_bytes
        is_same_pool = pool_bytes == _pool_limit_bytes(self._settings, self._device)
        is_same_cache = cache_bytes == self._settings.mlx_cache_limit_bytes
        return MemoryLimits(
            pool_bytes=None if is_same_pool else pool_bytes,
            cache_bytes=None if is_same_cache else cache_bytes,
        )

    def _sample(self) -> Sample:
        return Sample(
            pool=self._pool.use(),
            memory=self._memory.usage(),
            is_serving=self._health.is_serving,
            step_age_s=self._engine.step_age_s,
            max_batch_size=self._settings.max_batch_size,
            open_generations=self._generations.num_in_flight,
            asyncio_tasks=len(asyncio.all_tasks()),
        )

    async def stop(self) -> bool:
        """NOT_SERVING → refuse new work → drain → stop the engine, the server, the pool.

        False: a thread is stuck, in a step, a load or a prompt, and will not end with the process.
        """
        self._health.set_serving(is_serving=False)
        log.info("server.draining", in_flight=self._num_in_flight)
        # What waits for a stuck engine will not end by itself.
        grace_s = 0.0 if self._exit_code == EXIT_STUCK else self._settings.drain_grace_s
        is_drained = all(
            await asyncio.gather(self._generations.drain(grace_s), self._embeddings.drain(grace_s))
        )
        if not is_drained:
            log.warning("server.drain_timed_out", in_flight=self._num_in_flight)
        error = DrainingError(RETRY_AFTER_S)
        is_engine_stopped = await self._engine.stop(error, ENGINE_STOP_S)
        self._memory_service.close()
        # Together: the server takes no new calls, and those that watch a load learn how it ended.
        _, is_pool_closed = await asyncio.gather(
            asyncio.gather(self._server.stop(CALLS_STOP_S), self._gateway_ports.stop(CALLS_STOP_S)),
            self._close_pool(error),
        )
        # After the calls that may still ask for one.
        self._prompts.close()
        await self._telemetry.stop()
        log.info(
            "server.stopped",
            drained=is_drained,
            engine_stopped=is_engine_stopped,
            pool_closed=is_pool_closed,
        )
        return is_engine_stopped and is_pool_closed and self._prompts.is_idle

    @property
    def _num_in_flight(self) -> int:
        return self._generations.num_in_flight + self._embeddings.num_in_flight

    async def _close_pool(self, error: DrainingError) -> bool:
        try:
            async with asyncio.timeout(POOL_CLOSE_S):
                await self._pool.close(error)
        except TimeoutError:
            return False
        return True

    def _on_model_failed(self, name: str) -> None:
        self._pool.model_failed(name)

    def _on_engine_death(self) -> None:
        """Nothing can be generated any more: whoever supervises the process starts a new one."""
        log.critical("server.engine_died")
        self._health.set_serving(is_serving=False)
        self._exit_code = 1
        self.request_stop()


def run(settings: Settings, read_settings: Callable[[], Settings]) -> int:
    """Serve until a signal; return the exit code (see docs/configuration.md).

    `read_settings` reads them anew, for SIGHUP. Raises: SettingsError, DemoModelError.
    """
    blas = load_openblas(settings.blas_library, settings.blas_threads)
    if blas is not None and blas.problem is not None:
        log.warning("blas.reference", problem=blas.problem)
    elif blas is not None:
        log.info("blas.loaded", path=str(blas.path), config=blas.config, threads=blas.threads)
    catalog = _build_catalog(settings)
    try:
        return asyncio.run(_serve(settings, catalog, read_settings, blas))
    except AddressUnavailableError as error:
        log.error("server.failed", problem=str(error))  # noqa: TRY400 - the text says it all
        return os.EX_UNAVAILABLE


def _build_catalog(settings: Settings) -> Catalog:
    specs: Sequence[ModelSpec] = settings.models
    if settings.serves_demo_model:
        folder = ensure_demo_model(lambda line: log.info("demo_model.progress", step=line))
        specs = (ModelSpec("demo", folder),)
    catalog = Catalog.build(specs, settings.models_dir)
    for skipped in catalog.skipped:
        log.warning("catalog.skipped", folder=str(skipped.folder), reason=skipped.reason)
    log.info("catalog.models", models=[spec.name for spec in catalog])
    return catalog


def _generation_limits(settings: Settings) -> GenerationLimits:
    return GenerationLimits(
        max_in_flight=settings.max_batch_size + settings.max_queued_requests,
        default_max_tokens=settings.default_max_tokens,
        max_prompt_tokens=settings.max_prompt_tokens,
        heartbeat_s=settings.progress_interval_s,
        max_batch_size=settings.max_batch_size,
        max_queue_wait_s=settings.max_queue_wait_s or math.inf,
        max_deltas_per_s=settings.max_deltas_per_s,
    )


def _request_limits(settings: Settings) -> RequestLimits:
    return RequestLimits(settings.max_stop_sequences, settings.max_stop_sequence_chars)


def _pool_limit_bytes(settings: Settings, device: DeviceInfo) -> int:
    share = int(device.recommended_bytes * settings.pool_memory_share)
    return settings.pool_memory_limit_bytes or share


async def _serve(
    settings: Settings,
    catalog: Catalog,
    read_settings: Callable[[], Settings],
    blas: OpenBlas | None,
) -> int:
    # Late: MLX binds its BLAS when it is imported.
    from mlxpool_server.mlx_backend.checked_loader import CheckedLoader  # noqa: PLC0415 - see above
    from mlxpool_server.mlx_backend.loader import MlxLoader  # noqa: PLC0415 - see above
    from mlxpool_server.mlx_backend.memory import MlxMemory, device_kind  # noqa: PLC0415 - see above

    processors = None
    if device_kind() == "cpu":
        processors = FairLock()
        sys.setswitchinterval(CPU_SWITCH_INTERVAL_S)
    memory = MlxMemory(processors)
    loader = MlxLoader(
        prefill_step_tokens=settings.prefill_step_tokens,
        default_layout=settings.default_layout,
        processors=processors,
        blas=blas,
        pool_limit_bytes=_pool_limit_bytes(settings, memory.device()),
        warm_up=settings.warm_up,
    )
    memory.apply_defaults(cache_limit_bytes=settings.mlx_cache_limit_bytes)
    app = App(settings, catalog, CheckedLoader(loader), memory, processors)
    _stop_on_signals(app)

    def read() -> tuple[Settings, Catalog]:
        fresh = read_settings()
        return fresh, _build_catalog(fresh)

    reloads = Reloads(read, app.reload)
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reloads.request)
    await app.start()
    reloading = asyncio.create_task(reloads.run())
    # What is imported by now stays: full collections, which stop every thread, need not visit it.
    gc.collect()
    gc.freeze()
    exit_code = await app.run_until_stopped()
    reloading.cancel()
    if not await app.stop():
        # Python would wait for the stuck thread, and the caller of the signal for us.
        os._exit(exit_code)
    return exit_code


def _stop_on_signals(app: App) -> None:
    """The first SIGTERM or SIGINT drains, the second ends the process at once."""
    loop = asyncio.get_running_loop()
    received: list[int] = []

    def on_signal(number: int) -> None:
        received.append(number)
        if len(received) > 1:
            log.warning("server.stopped_at_once", signal=number)
            os._exit(128 + number)
        log.info("server.stopping", signal=number)
        app.request_stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
