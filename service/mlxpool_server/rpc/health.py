"""grpc.health.v1.Health: what it says of the server, its services and its models, and when."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mlxpool_server.errors import ModelNotFoundError
from mlxpool_server.pool.broadcast import Broadcast

SERVICES = ("", "mlxpool.v1.ModelService", "mlxpool.v1.MemoryService")
# A watcher looks up by itself as often: nothing depends on it.
WATCH_INTERVAL_S = 60.0

Context = aio.ServicerContext[Any, Any]
_Response = health_pb2.HealthCheckResponse


async def _no_models(name: str) -> bool:
    raise ModelNotFoundError(name)


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # it ships no type information
    """All our services live and die together: they stand on one engine. Models fail one by one.

    Not grpcio's own servicer: that one sends under a lock, so that a watcher who does not read
    keeps the status from changing, and the server from stopping.
    """

    def __init__(
        self,
        is_model_usable: Callable[[str], Awaitable[bool]] = _no_models,
        changed: Broadcast | None = None,
    ) -> None:
        """`is_model_usable` raises ModelNotFoundError; `changed` says when its answers changed."""
        self._is_serving = False
        self._is_model_usable = is_model_usable
        self._changed = changed or Broadcast()

    @property
    def is_serving(self) -> bool:
        return self._is_serving

    def set_serving(self, *, is_serving: bool) -> None:
        if is_serving != self._is_serving:
            self._is_serving = is_serving
            self._changed.notify()

    async def Check(self, request: Any, context: Context) -> Any:
        response = await self._response(request.service)
        if response.status == _Response.SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service or model")
        return response

    async def List(self, request: Any, context: Context) -> Any:
        statuses = {service: await self._response(service) for service in SERVICES}
        return health_pb2.HealthListResponse(statuses=statuses)

    async def Watch(self, request: Any, context: Context) -> AsyncGenerator[Any, None]:
        """An unknown service may come to be later: the protocol wants its watcher to wait."""
        shown = None
        while True:
            # Taken before the look, so that no change is missed while it looks.
            change = self._changed.next()
            response = await self._response(request.service)
            # A change may come while a message is being sent: compare before waiting.
            if response == shown:
                await change.wait(WATCH_INTERVAL_S)
            else:
                shown = response
                yield response

    async def _response(self, service: str) -> Any:
        """Services win: a model with the name of one is seen by its aliases only."""
        is_serving = self._is_serving
        if service not in SERVICES:
            try:
                is_serving = await self._is_model_usable(service) and self._is_serving
            except ModelNotFoundError:
                return _Response(status=_Response.SERVICE_UNKNOWN)
        return _Response(status=_Response.SERVING if is_serving else _Response.NOT_SERVING)
