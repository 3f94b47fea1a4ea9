"""The streams of the aio client: iterate them with `async for`, or await their result."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

import grpc

from mlxpool_client.events import Finished, GenerationEvent
from mlxpool_client.fold import Fold, GenerationFold, LoadFold
from mlxpool_client.models import LoadEvent, LoadFinished

EventT = TypeVar("EventT")


class AsyncResponseCall(Protocol):
    """The part of gRPC's aio call object that a stream needs."""

    def __aiter__(self) -> AsyncIterator[object]: ...
    def cancel(self) -> bool: ...
    def done(self) -> bool: ...


class AsyncEventStream(Generic[EventT]):
    """An async iterator over the events of one call.

    The call is cancelled when the `async with` block is left, by close(), when the task that
    reads it is cancelled, or when the object is dropped. Iterating raises MlxpoolError when the
    call fails, and goes on raising it.
    """

    def __init__(self, call: AsyncResponseCall, fold: Fold[EventT, Any]) -> None:
        self._call = call
        self._fold = fold

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> EventT:
        self._fold.check()
        try:
            async for response in self._call:
                event = self._fold.accept(response)
                if event is not None:
                    return event
        except grpc.RpcError as error:
            raise self._fold.fail(error) from error
        except asyncio.CancelledError:
            # gRPC reports a close() by another task as if this task had been cancelled.
            if not _is_cancelled():
                self._fold.check()
            self.close()
            raise
        self._fold.end()
        raise StopAsyncIteration

    def close(self) -> None:
        """Cancel the call unless it is over. A reader then gets GenerationCancelledError."""
        self._fold.close()
        self._call.cancel()

    async def aclose(self) -> None:
        """As close(), for contextlib.aclosing."""
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # gRPC's call and its iterator refer to each other: alone they would wait for the cycle
        # collector, and the server would go on generating.
        if not self._call.done():
            self._call.cancel()

    async def _exhaust(self) -> None:
        async for _ in self:
            pass


class AsyncGeneration(AsyncEventStream[GenerationEvent]):
    """A running generation: Started, then any Progress and Delta, then exactly one Finished."""

    def __init__(self, call: AsyncResponseCall) -> None:
        fold = GenerationFold()
        super().__init__(call, fold)
        self._generation = fold

    @property
    def generation_id(self) -> str:
        """The id for cancel_generation(); empty until Started arrived."""
        return self._generation.generation_id

    async def result(self) -> Finished:
        """Read to the end and return the last event. Raises: MlxpoolError if the call fails."""
        await self._exhaust()
        return self._generation.result()

    async def text(self) -> str:
        """Read to the end and return the whole text. Raises: MlxpoolError if the call fails."""
        return (await self.result()).text


class AsyncLoading(AsyncEventStream[LoadEvent]):
    """A load to watch: any LoadProgress, then exactly one LoadFinished.

    Closing it stops watching, not loading: only unload_model() stops a load.
    """

    def __init__(self, call: AsyncResponseCall) -> None:
        fold = LoadFold()
        super().__init__(call, fold)
        self._load = fold

    async def result(self) -> LoadFinished:
        """Read to the end and return the last event. Raises: MlxpoolError if the load fails."""
        await self._exhaust()
        return self._load.result()


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
