"""One loaded model's embeddings on the engine thread: who asked, and what became of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from mlxpool_server.domain import Vector
from mlxpool_server.engine.backend import Embedder, EmbeddingJob, LoadedModel
from mlxpool_server.errors import CapabilityMissingError, GenerationFailedError, MlxpoolError

# A job's end, settled on the event loop.
Done = asyncio.Future[tuple[Vector, ...]]
Reply = Callable[[Done, tuple[Vector, ...] | MlxpoolError], None]


class EmbeddingRunner:
    """Engine thread only. What the backend raises is raised; then `rebuild` or `close` it."""

    def __init__(
        self, name: str, model: LoadedModel, *, reply: Reply, is_alone: Callable[[], bool]
    ) -> None:
        """`is_alone`: whether the engine has nothing else to do."""
        self._name = name
        self._model = model
        self._reply = reply
        self._is_alone = is_alone
        # By slot.
        self._jobs: dict[int, Done] = {}
        self._embedder: Embedder | None = model.new_embedder()

    @property
    def has_work(self) -> bool:
        return bool(self._jobs)

    @property
    def num_jobs(self) -> int:
        return len(self._jobs)

    @property
    def kv_bytes(self) -> int:
        return 0 if self._embedder is None else self._embedder.kv_bytes()

    def submit(self, slot: int, job: EmbeddingJob, done: Done) -> None:
        if self._embedder is None:
            remedy = "nothing is known of its hidden states"
            self._reply(done, CapabilityMissingError(self._name, "embeddings", remedy))
            return
        self._jobs[slot] = done
        self._embedder.add(slot, job)

    def abort(self, slot: int) -> None:
        """Forget one whose caller is gone. No harm when it has ended."""
        if self._jobs.pop(slot, None) is not None and self._embedder is not None:
            self._embedder.remove(slot)

    def admit(self) -> None:
        """Everyone is in: a pass takes texts of all of them."""

    def step(self) -> None:
        """One pass. Raises: whatever the backend raises."""
        if self._embedder is None:
            return
        for slot, vectors in self._embedder.step(is_alone=self._is_alone()):
            if (done := self._jobs.pop(slot, None)) is not None:
                self._reply(done, vectors)

    def settle(self) -> None:
        """A pass runs to its end by itself."""

    def rebuild(self) -> None:
        """Fail every job and start over, after something raised.

        Raises: whatever the backend raises; then this model cannot go on.
        """
        self.close(GenerationFailedError(self._name, "embedding"))
        self._embedder = self._model.new_embedder()

    def close(self, error: MlxpoolError) -> None:
        """End every job with `error` and drop what they hold."""
        jobs, self._jobs = self._jobs, {}
        for done in jobs.values():
            self._reply(done, error)
        if self._embedder is not None:
            self._embedder.close()
