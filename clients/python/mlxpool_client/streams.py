"""The streams of the sync client: iterate them, or ask for their result."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

import grpc

from mlxpool_client.events import Finished, GenerationEvent
from mlxpool_client.fold import Fold, GenerationFold, LoadFold
from mlxpool_client.models import LoadEvent, LoadFinished

EventT = TypeVar("EventT")


class ResponseCall(Protocol):
    """The part of gRPC's call object that a stream needs."""

    def __iter__(self) -> Iterator[object]: ...
    def cancel(self) -> object: ...


class EventStream(Generic[EventT]):
    """An iterator over the events of one call.

    The call is cancelled when the `with` block is left, by close() from any thread, or when the
    object is dropped. Iterating raises MlxpoolError when the call fails, and goes on raising it.
    """

    def __init__(self, call: ResponseCall, fold: Fold[EventT, Any]) -> None:
        self._call = call
        self._fold = fold

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> EventT:
        self._fold.check()
        try:
            for response in self._call:
                event = self._fold.accept(response)
                if event is not None:
                    return event
        except grpc.RpcError as error:
            raise self._fold.fail(error) from error
        self._fold.end()
        raise StopIteration

    def close(self) -> None:
        """Cancel the call unless it is over. A reader then gets GenerationCancelledError."""
        self._fold.close()
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _exhaust(self) -> None:
        for _ in self:
            pass


class Generation(EventStream[GenerationEvent]):
    """A running generation: Started, then any Progress and Delta, then exactly one Finished."""

    def __init__(self, call: ResponseCall) -> None:
        fold = GenerationFold()
        super().__init__(call, fold)
        self._generation = fold

    @property
    def generation_id(self) -> str:
        """The id for cancel_generation(); empty until Started arrived."""
        return self._generation.generation_id

    def result(self) -> Finished:
        """Read to the end and return the last event. Raises: MlxpoolError if the call fails."""
        self._exhaust()
        return self._generation.result()

    def text(self) -> str:
        """Read to the end and return the whole text. Raises: MlxpoolError if the call fails."""
        return self.result().text


class Loading(EventStream[LoadEvent]):
    """A load to watch: any LoadProgress, then exactly one LoadFinished.

    Closing it stops watching, not loading: only unload_model() stops a load.
    """

    def __init__(self, call: ResponseCall) -> None:
        fold = LoadFold()
        super().__init__(call, fold)
        self._load = fold

    def result(self) -> LoadFinished:
        """Read to the end and return the last event. Raises: MlxpoolError if the load fails."""
        self._exhaust()
        return self._load.result()
