"""The composition root: builds everything, starts and stops it in order."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import time
from collections.abc import Sequence

import structlog

from mlxpool_server.domain import ModelSpec
from mlxpool_server.engine.engine import Engine
from mlxpool_server.errors import AddressUnavailableError, DrainingError
from mlxpool_server.mlx_backend.demo_model import ensure_demo_model
from mlxpool_server.mlx_backend.openblas import load_openblas
from mlxpool_server.pool.backend import DeviceMemory, ModelLoader
from mlxpool_server.pool.catalog import Catalog
from mlxpool_server.pool.generation import GenerationLimits, Generations
from mlxpool_server.pool.memory import PoolMemory
from mlxpool_server.pool.model_pool import ModelPool
from mlxpool_server.pool.prompts import PromptReader
from mlxpool_server.rpc.convert.requests import RequestLimits
from mlxpool_server.rpc.health import Health
from mlxpool_server.rpc.memory_service import MemoryService
from mlxpool_server.rpc.model_service import ModelService
from mlxpool_server.rpc.server import bind, build_server
from mlxpool_server.settings import Settings

log = structlog.get_logger(__name__)

# Prompts of one model that are prefilled together.
PREFILL_ROWS = 8
HEALTH_INTERVAL_S = 5.0
# A step that takes longer is stuck. The first ones on a GPU compile kernels: 47 s have been seen.
STUCK_STEP_S = 180.0
# How long the engine may take for the step it is in when the server stops.
ENGINE_STOP_S = 5.0
# How long calls that are no generations (watchers, loads) may linger after the drain.
CALLS_STOP_S = 1.0
# How long a load may take to notice that it is no longer wanted.
POOL_CLOSE_S = 5.0


class App:
    """One server process: an event loop, an engine thread, a loader thread."""

    def __init__(
        self, settings: Settings, catalog: Catalog, loader: ModelLoader, memory: DeviceMemory
    ) -> None:
        self._settings = settings
        device = memory.device()
        self._engine = Engine(
            max_batch_size=settings.max_batch_size,
            on_death=self._on_engine_death,
            on_model_failed=self._on_model_failed,
        )
        self._pool = ModelPool(
            catalog=catalog,
            loader=loader,
            engine=self._engine,
            memory=memory,
            limit_bytes=settings.pool_memory_limit_bytes
            or int(device.recommended_bytes * settings.pool_memory_share),
            default_keep_alive_s=settings.default_keep_alive_s,
            heartbeat_s=settings.progress_interval_s,
            max_batch_size=settings.max_batch_size,
            prefill_tokens=settings.prefill_step_tokens * _prefill_rows(settings),
        )
        self._prompts = PromptReader(loader)
        self._generations = Generations(
            self._pool,
            self._engine,
            self._prompts,
            GenerationLimits(
                max_in_flight=settings.max_batch_size + settings.max_queued_requests,
                default_max_tokens=settings.default_max_tokens,
                max_prompt_tokens=settings.max_prompt_tokens,
                heartbeat_s=settings.progress_interval_s,
            ),
        )
        self._health = Health()
        self._memory_service = MemoryService(PoolMemory(self._pool, memory))
        self._server = build_server(
            model_service=ModelService(
                catalog=catalog,
                pool=self._pool,
                generations=self._generations,
                prompts=self._prompts,
                limits=RequestLimits(settings.max_stop_sequences, settings.max_stop_sequence_chars),
                device=device,
                start_time=time.time(),
            ),
            memory_service=self._memory_service,
            health=self._health,
            max_message_bytes=settings.max_message_bytes,
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
        addresses = bind(self._server, self._settings.listen)
        self._engine.start()
        await self._server.start()
        self._pool.preload()
        await self._health.set_serving(is_serving=True)
        log.info("server.listening", addresses=addresses)
        return addresses

    async def run_until_stopped(self) -> int:
        """Wait for `request_stop` or the engine's death; return the exit code.

        Meanwhile health says whether the engine gets on.
        """
        while True:
            try:
                async with asyncio.timeout(HEALTH_INTERVAL_S):
                    await self._stop_requested.wait()
            except TimeoutError:
                is_stuck = self._engine.step_age_s > STUCK_STEP_S
                await self._health.set_serving(is_serving=not is_stuck)
            else:
                return self._exit_code

    def request_stop(self) -> None:
        self._stop_requested.set()

    async def stop(self) -> bool:
        """NOT_SERVING → refuse new work → drain → stop the engine, the server, the pool.

        False: a thread is stuck, in a step or a load, and will not end with the process.
        """
        await self._health.set_serving(is_serving=False)
        log.info("server.draining", in_flight=self._generations.num_in_flight)
        is_drained = await self._generations.drain(self._settings.drain_grace_s)
        if not is_drained:
            log.warning("server.drain_timed_out", in_flight=self._generations.num_in_flight)
        error = DrainingError(retry_after_s=1.0)
        is_engine_stopped = await self._engine.stop(error, ENGINE_STOP_S)
        self._memory_service.close()
        self._prompts.close()
        # Together: the server takes no new calls, and those that watch a load learn how it ended.
        _, is_pool_closed = await asyncio.gather(
            self._server.stop(CALLS_STOP_S), self._close_pool(error)
        )
        log.info(
            "server.stopped",
            drained=is_drained,
            engine_stopped=is_engine_stopped,
            pool_closed=is_pool_closed,
        )
        return is_engine_stopped and is_pool_closed

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
        self._exit_code = 1
        self.request_stop()


def run(settings: Settings) -> int:
    """Serve until a signal; return the exit code (see docs/configuration.md)."""
    blas = load_openblas(settings.blas_library, settings.blas_threads)
    if blas is not None and blas.problem is not None:
        log.warning("blas.reference", problem=blas.problem)
    elif blas is not None:
        log.info("blas.loaded", path=str(blas.path), config=blas.config, threads=blas.threads)
    catalog = _build_catalog(settings)
    try:
        return asyncio.run(_serve(settings, catalog))
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


async def _serve(settings: Settings, catalog: Catalog) -> int:
    # Late: MLX binds its BLAS when it is imported.
    from mlxpool_server.mlx_backend.loader import MlxLoader  # noqa: PLC0415 - see above
    from mlxpool_server.mlx_backend.memory import MlxMemory  # noqa: PLC0415 - see above

    loader = MlxLoader(
        max_batch_size=settings.max_batch_size,
        prefill_rows=_prefill_rows(settings),
        prefill_step_tokens=settings.prefill_step_tokens,
        default_layout=settings.default_layout,
    )
    memory = MlxMemory()
    memory.apply_defaults(cache_limit_bytes=settings.mlx_cache_limit_bytes)
    app = App(settings, catalog, loader, memory)
    _stop_on_signals(app)
    await app.start()
    # What is imported by now stays: full collections, which stop every thread, need not visit it.
    gc.collect()
    gc.freeze()
    exit_code = await app.run_until_stopped()
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


def _prefill_rows(settings: Settings) -> int:
    return min(PREFILL_ROWS, settings.max_batch_size)
