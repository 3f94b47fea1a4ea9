"""A model on the engine thread: what it has to do, and how its last steps went."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import structlog

from mlxpool_server.engine.embedding_runner import EmbeddingRunner
from mlxpool_server.engine.model_runner import ModelRunner, RunnerStats
from mlxpool_server.errors import MlxpoolError

log = structlog.get_logger(__name__)


class Part(Protocol):
    """What takes steps: a model's generations, or its embeddings."""

    @property
    def has_work(self) -> bool: ...

    def admit(self) -> None: ...

    def step(self) -> None: ...

    def settle(self) -> None: ...

    def rebuild(self) -> None:
        """End everyone with an error and start over."""

    def close(self, error: MlxpoolError) -> None: ...


@dataclass(slots=True)
class Lane:
    name: str
    runner: ModelRunner
    embeddings: EmbeddingRunner
    consecutive_failures: int = 0

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.runner, self.embeddings

    @property
    def has_work(self) -> bool:
        return self.runner.has_work or self.embeddings.has_work

    def stats(self) -> RunnerStats:
        stats, embeddings = self.runner.stats(), self.embeddings
        if not embeddings.has_work:
            return stats
        return replace(
            stats,
            running=stats.running + embeddings.num_jobs,
            kv_bytes=stats.kv_bytes + embeddings.kv_bytes,
        )

    def close(self, error: MlxpoolError) -> None:
        """End everyone with `error`; whatever fails then, nobody is left to wait."""
        for part in self.parts:
            try:
                part.close(error)
            except Exception:  # its callers are told; what it holds goes with it
                log.exception("engine.close_failed", model=self.name)
