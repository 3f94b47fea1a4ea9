"""A request's hold on a model: while it lasts, the model is not evicted."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from types import TracebackType
from typing import TYPE_CHECKING, Self

from mlxpool_server.domain import LoadPhase, LoadProgress, ModelSpec, ModelState
from mlxpool_server.engine.backend import LoadedAdapter, LoadedModel
from mlxpool_server.pool.entry import Entry
from mlxpool_server.pool.residency import Residency

if TYPE_CHECKING:
    from mlxpool_server.pool.model_pool import ModelPool


class Lease:
    """Taken before the prompt is rendered, given back when the stream ends. Event loop only."""

    def __init__(self, pool: ModelPool, entry: Entry) -> None:
        self._pool = pool
        self._entry = entry
        self._residency: Residency | None = None
        self._is_held = False

    def __enter__(self) -> Self:
        self._is_held = True
        self._entry.num_leases += 1
        self._entry.touch()
        self._entry.clear_expiry()
        residency = self._entry.residency
        if residency is not None and residency.state is not ModelState.UNLOADING:
            self._bind(residency)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.give_back()

    def give_back(self) -> None:
        """Before the `with` block ends, when the model is not needed any more."""
        if not self._is_held:
            return
        self._is_held = False
        self._entry.num_leases -= 1
        self._entry.touch()
        if self._residency is not None:
            self._residency.return_lease()
        self._pool.lease_returned(self._entry)

    @property
    def spec(self) -> ModelSpec:
        return self._entry.spec

    @property
    def is_loaded(self) -> bool:
        return self._residency is not None and self._residency.state is ModelState.READY

    def check(self) -> None:
        """Raises: the error of an unload by force; call it right before using the model."""
        if self._residency is not None and self._residency.error is not None:
            raise self._residency.error

    @property
    def adapter(self) -> LoadedAdapter | None:
        """Of an adapter's lease, once it is loaded."""
        held = None if self._residency is None else self._residency.model
        return None if held is None or isinstance(held, LoadedModel) else held

    @property
    def num_in_flight(self) -> int:
        """Requests on this model now, this one included."""
        return self._entry.num_leases

    async def loading(self, wait_s: Callable[[], float]) -> AsyncGenerator[LoadProgress, None]:
        """Start or join the load; yield its progress until the model can be used.

        Progress comes on each change, on `wake`, and after `wait_s()` of silence.
        Raises: what the load failed with, for everyone who waits for it.
        """
        while self._residency is None:
            residency = self._entry.residency
            if residency is None:
                self._bind(self._pool.start_load(self._entry))
            elif residency.state is ModelState.UNLOADING:
                await residency.changed.wait(wait_s())
                yield LoadProgress(LoadPhase.QUEUED)
            else:
                self._bind(residency)
        async with aclosing(watch(self._residency, wait_s)) as progress:
            async for change in progress:
                yield change

    def wake(self) -> None:
        """Make a `loading` that waits yield now, so that its reader can look around."""
        if self._entry.residency is not None:
            self._entry.residency.changed.notify()

    def _bind(self, residency: Residency) -> None:
        self._residency = residency
        residency.take_lease()


async def watch(
    residency: Residency, wait_s: Callable[[], float]
) -> AsyncGenerator[LoadProgress, None]:
    """Yield a load's progress until it ended: on each change, and after `wait_s()` of silence.

    Raises: what the load failed with.
    """
    shown: LoadProgress | None = None
    while residency.state is ModelState.LOADING:
        # A change may come while the reader holds the last one: compare before waiting.
        if residency.progress is shown:
            await residency.changed.wait(wait_s())
        shown = residency.progress
        if residency.state is ModelState.LOADING:
            yield shown
    if residency.load_time is None and residency.error is not None:
        raise residency.error
