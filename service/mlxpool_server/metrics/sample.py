"""What a scrape reads besides the histograms: frozen values of one moment."""

from __future__ import annotations

from dataclasses import dataclass

from mlxpool_server.domain import MemoryUsage, PoolUse


@dataclass(frozen=True, slots=True)
class Sample:
    pool: PoolUse
    memory: MemoryUsage
    # As health says of the whole server.
    is_serving: bool
    # How long the engine has been at its step; 0 between two.
    step_age_s: float
    max_batch_size: int
    # Generate calls that have not ended, those included whose reader is behind.
    open_generations: int
    # Of the event loop, the one included that answers the scrape.
    asyncio_tasks: int
