"""Metrics and traces, from the settings; neither is there unless they say so."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import structlog

from mlxpool_server.domain import DeviceInfo
from mlxpool_server.errors import ModelNotFoundError, SettingsError
from mlxpool_server.metrics import Instruments, MetricsEndpoint, Sample
from mlxpool_server.pool.model_pool import ModelPool
from mlxpool_server.rpc.access.gate import Gate
from mlxpool_server.rpc.access.roles import METRICS
from mlxpool_server.rpc.observer import CallObserver
from mlxpool_server.settings import Settings
from mlxpool_server.version import __version__

if TYPE_CHECKING:
    from mlxpool_server.tracing import Traces

log = structlog.get_logger(__name__)


class Telemetry:
    """Event loop only. `instruments` is None without metrics."""

    def __init__(self, settings: Settings, device: DeviceInfo) -> None:
        """Raises: SettingsError when traces are wanted and their packages are missing."""
        self._address = settings.metrics_listen
        self._pool: ModelPool | None = None
        self._endpoint: MetricsEndpoint | None = None
        self.instruments: Instruments | None = None
        if self._address is not None:
            self.instruments = Instruments(__version__, device, self._canonical_name)
        self._traces = None if settings.otlp_endpoint is None else _traces(settings.otlp_endpoint)

    @property
    def call_observers(self) -> tuple[CallObserver, ...]:
        observers: list[CallObserver] = []
        if self.instruments is not None:
            observers.append(self.instruments)
        if self._traces is not None:
            observers.append(self._traces.spans)
        return tuple(observers)

    async def start(
        self,
        pool: ModelPool,
        sample: Callable[[], Sample],
        gate: Gate,
        tls: ssl.SSLContext | None,
    ) -> None:
        """Serve the metrics, over TLS unless `tls` is None. Raises: AddressUnavailableError."""
        self._pool = pool
        if self.instruments is not None and self._address is not None:
            self._endpoint = MetricsEndpoint(
                self.instruments.registry, sample, partial(gate.admit, METRICS), tls
            )
            address = await self._endpoint.start(self._address)
            log.info("metrics.listening", address=address)

    async def stop(self) -> None:
        if self._endpoint is not None:
            await self._endpoint.stop()
        if self._traces is not None:
            await asyncio.to_thread(self._traces.close)

    def _canonical_name(self, name: str) -> str:
        if self._pool is None:
            return ""
        try:
            return self._pool.spec(name).name
        except ModelNotFoundError:
            return ""


def _traces(endpoint: str) -> Traces:
    try:
        # Late: its packages are in an extra, and take their time.
        from mlxpool_server.tracing import Traces  # noqa: PLC0415 - see above
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"otlp_endpoint needs packages that are not installed ({error.name}); "
            "pip install 'mlxpool[otel]'"
        ) from None
    return Traces(endpoint, __version__)
