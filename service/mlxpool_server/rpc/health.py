"""grpc.health.v1.Health: what it says, and when."""

from __future__ import annotations

from grpc_health.v1 import health, health_pb2

SERVICES = ("", "mlxpool.v1.ModelService", "mlxpool.v1.MemoryService")


class Health:
    """All our services live and die together: they stand on one engine."""

    def __init__(self) -> None:
        self.servicer = health.aio.HealthServicer()

    async def set_serving(self, *, is_serving: bool) -> None:
        response = health_pb2.HealthCheckResponse
        status = response.SERVING if is_serving else response.NOT_SERVING
        for service in SERVICES:
            await self.servicer.set(service, status)
