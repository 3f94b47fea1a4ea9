"""What a stream has said so far, free of I/O: both clients feed it, and ask it how it went."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Never, TypeVar

import grpc

from mlxpool_client import convert
from mlxpool_client.errors import GenerationCancelledError, IncompleteStreamError, MlxpoolError
from mlxpool_client.events import Finished, GenerationEvent, Started
from mlxpool_client.memory import MemoryUsage
from mlxpool_client.models import LoadEvent, LoadFinished
from mlxpool_client.status import error_from

EventT = TypeVar("EventT")
LastT = TypeVar("LastT")


class Fold(Generic[EventT, LastT]):
    """The state of one stream: open, then ended, failed or closed for good.

    `to_event` returns None for a message to skip. A stream with a `last` kind of event must have
    sent one before it ends.
    """

    def __init__(
        self, to_event: Callable[[Any], EventT | None], last: type[LastT] | None = None
    ) -> None:
        self._to_event = to_event
        self._last = last
        self._last_event: LastT | None = None
        self._ended = False
        self._failure: MlxpoolError | None = None

    def accept(self, response: object) -> EventT | None:
        """Return the event in `response`, or None when this client is too old to know it."""
        event = self._to_event(response)
        if self._last is not None and isinstance(event, self._last):
            self._last_event = event
        return event

    def check(self) -> None:
        """Raises: what the stream failed with, every time it is asked again."""
        if self._failure is not None:
            raise self._failure

    def end(self) -> None:
        """Note that the stream ended with status OK.

        Raises: IncompleteStreamError when the last event is missing.
        """
        self._ended = True
        if self._last is not None and self._last_event is None:
            name = self._last.__name__
            self._failure = IncompleteStreamError(
                f"the stream ended without its {name} event", code=grpc.StatusCode.OK
            )
        self.check()

    def fail(self, failure: grpc.RpcError) -> MlxpoolError:
        """Note the status, and return the error to raise for it."""
        self._failure = self._failure or error_from(failure)
        return self._failure

    def close(self) -> None:
        """Note that this side gave up; a stream that is over stays as it is."""
        if not self._ended and self._failure is None and self._last_event is None:
            self._failure = GenerationCancelledError(
                "the stream was closed before its end", code=grpc.StatusCode.CANCELLED
            )

    def result(self) -> LastT:
        """Return the last event of a stream that was read to its end."""
        self.check()
        if self._last_event is None:
            raise IncompleteStreamError("the stream has not been read to its end")
        return self._last_event


class GenerationFold(Fold[GenerationEvent, Finished]):
    def __init__(self) -> None:
        super().__init__(convert.generation_event, Finished)
        self.generation_id = ""

    def accept(self, response: object) -> GenerationEvent | None:
        event = super().accept(response)
        if isinstance(event, Started):
            self.generation_id = event.generation_id
        return event


class LoadFold(Fold[LoadEvent, LoadFinished]):
    def __init__(self) -> None:
        super().__init__(convert.load_event, LoadFinished)


class MemoryFold(Fold[MemoryUsage, Never]):
    def __init__(self) -> None:
        super().__init__(convert.memory_sample)
