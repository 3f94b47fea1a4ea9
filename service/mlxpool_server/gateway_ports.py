"""The ports for the gateway, from the settings: a gRPC server each, all on the same pool."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog
from grpc import aio

from mlxpool_server.domain import GatewayPort
from mlxpool_server.errors import ModelNotFoundError, SettingsError
from mlxpool_server.pool.catalog import Catalog
from mlxpool_server.pool.generation import Generations
from mlxpool_server.pool.model_pool import ModelPool
from mlxpool_server.pool.prompts import PromptReader
from mlxpool_server.rpc.access.gate import Gate
from mlxpool_server.rpc.health import Health
from mlxpool_server.rpc.observer import CallObserver
from mlxpool_server.rpc.server import bind
from mlxpool_server.rpc.tls import Certificates

if TYPE_CHECKING:
    from mlxpool_server.rpc.gateway.engine_service import EngineService

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Served:
    """What every port stands on."""

    pool: ModelPool
    generations: Generations
    prompts: PromptReader
    health: Health


class GatewayPorts:
    """Event loop only."""

    def __init__(
        self,
        ports: Sequence[GatewayPort],
        served: Served,
        *,
        gate: Gate,
        max_message_bytes: int,
        observers: Sequence[CallObserver],
    ) -> None:
        """Raises: SettingsError when there are ports and their package is missing."""
        self._pool = served.pool
        self._servers: dict[GatewayPort, aio.Server] = {}
        if not ports:
            return
        try:
            # Late: its stubs are in an extra.
            from mlxpool_server.rpc.gateway.server import build_gateway_server  # noqa: PLC0415
        except ModuleNotFoundError as error:
            raise SettingsError(
                f"gateway needs a package that is not installed ({error.name}); "
                "pip install 'mlxpool[gateway]'"
            ) from None
        for port in ports:
            self._servers[port] = build_gateway_server(
                _service(port, served),
                gate=gate,
                max_message_bytes=max_message_bytes,
                observers=observers,
            )

    def bind(self, certificates: Certificates | None) -> dict[str, str]:
        """Return the address of each model. Raises: AddressUnavailableError."""
        return {
            port.model: bind(server, (port.listen,), certificates)[0]
            for port, server in self._servers.items()
        }

    async def start(self) -> None:
        """Serve, and load what is served: a gateway sends requests to whoever has the model."""
        for port, server in self._servers.items():
            await server.start()
            self._pool.ensure_loading(port.model)

    async def stop(self, grace_s: float) -> None:
        await asyncio.gather(*(server.stop(grace_s) for server in self._servers.values()))


def check_gateway_models(ports: Sequence[GatewayPort], catalog: Catalog) -> None:
    """Raises: SettingsError for a model that nobody serves, or that two ports serve."""
    models = [port.model for port in ports]
    for number, model in enumerate(models):
        try:
            catalog.resolve(model)
        except ModelNotFoundError as error:
            raise SettingsError(f"gateway: {error}; name one of them") from None
        if model in models[:number]:
            raise SettingsError(f"gateway: {model!r} has two ports; remove one")


def _service(port: GatewayPort, served: Served) -> EngineService:
    from mlxpool_server.rpc.gateway.engine_service import EngineService  # noqa: PLC0415 - as above
    from mlxpool_server.rpc.gateway.readiness import Readiness  # noqa: PLC0415 - as above

    return EngineService(
        port,
        pool=served.pool,
        generations=served.generations,
        prompts=served.prompts,
        readiness=Readiness(
            port.model, pool=served.pool, generations=served.generations, health=served.health
        ),
        start_time=time.time(),
    )
