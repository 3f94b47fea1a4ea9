"""Whether a worker wants requests now."""

from __future__ import annotations

from mlxpool_server.domain import ModelState
from mlxpool_server.pool.generation import Generations
from mlxpool_server.pool.model_pool import ModelPool
from mlxpool_server.rpc.health import Health


class Readiness:
    """One model's. Event loop only."""

    def __init__(
        self, model: str, *, pool: ModelPool, generations: Generations, health: Health
    ) -> None:
        self._model = model
        self._pool = pool
        self._generations = generations
        self._health = health

    async def problem(self) -> str:
        """Why requests had better go elsewhere; empty when they are welcome.

        A model that has failed is loaded again: while this says no, no request comes to do it.
        Raises: ModelNotFoundError; LoadFailedError for files that are no model, or not here yet:
        the gateway learns names and sizes once, so it must not begin before they are known.
        """
        status = await self._pool.get_model(self._model)
        await self._pool.info(status.name)
        num_in_flight = status.active_requests + status.queued_requests
        if not self._health.is_serving:
            return "the server is shutting down, or its engine is stuck"
        if status.state is ModelState.FAILED:
            self._pool.ensure_loading(self._model)
            return status.error_message
        if status.state is ModelState.LOADING:
            return "the model is being loaded"
        if num_in_flight >= self._generations.max_in_flight:
            return f"{num_in_flight} requests are running or waiting already"
        return ""
