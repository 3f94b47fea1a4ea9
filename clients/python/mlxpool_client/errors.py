"""The errors that calls raise: by what went wrong, each also the built-in exception that fits.

`except MlxpoolError` catches them all; `except TimeoutError` or `except LookupError` works too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import grpc


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """What is wrong with one field of a request; `field` is its path in proto names."""

    field: str
    description: str


class MlxpoolError(Exception):
    """A call failed. The attributes are the facts the server sent, empty where it sent none.

    code: the gRPC status. reason: the stable reason of the contract, such as "MODEL_NOT_FOUND".
    message: text for people. metadata: the facts behind the reason, by name.
    field_violations: which fields of the request are wrong.
    retry_after_s: seconds after which the server suggests to try again; None = not said.
    """

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode = grpc.StatusCode.UNKNOWN,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        field_violations: tuple[FieldViolation, ...] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.field_violations = field_violations
        self.retry_after_s = retry_after_s


class InvalidRequestError(MlxpoolError, ValueError):
    """A field of the request is wrong; `field_violations` says which."""


class PromptTooLongError(InvalidRequestError):
    """The prompt leaves no room for an answer in the model's context."""


class BadConstraintError(InvalidRequestError):
    """The schema, pattern or grammar of the request cannot be used."""


class NotFoundError(MlxpoolError, LookupError):
    """The server knows no such thing."""


class ModelNotFoundError(NotFoundError):
    """The server has no model of that name."""


class AdapterNotFoundError(NotFoundError):
    """The model has no adapter of that name."""


class GenerationNotFoundError(NotFoundError):
    """No generation with that id is in flight; it may have finished."""


class GenerationIdInUseError(MlxpoolError):
    """Another generation with that id is in flight."""


class PreconditionError(MlxpoolError):
    """The server's state forbids the call; trying again alone does not help."""


class ModelNotLoadedError(PreconditionError):
    """The request asked not to load the model, and it is not loaded."""


class CapabilityMissingError(PreconditionError):
    """The model cannot do that: chat with a base model, for example."""


class ModelInUseError(PreconditionError):
    """The model is loaded in another way, and in use."""


class MemoryInUseError(PreconditionError):
    """The new limit is below what is pinned or in use."""


class ResourceExhaustedError(MlxpoolError):
    """Something is used up: memory, or the size that a message may have."""


class PoolMemoryLimitError(ResourceExhaustedError, MemoryError):
    """The model or the request does not fit the pool's memory limit."""

    @property
    def required_bytes(self) -> int | None:
        """What it needs; None when the server did not say."""
        return self._bytes("requiredBytes")

    @property
    def available_bytes(self) -> int | None:
        """What is free or could be freed; None when the server did not say."""
        return self._bytes("availableBytes")

    def _bytes(self, key: str) -> int | None:
        text = self.metadata.get(key, "")
        return int(text) if text.isdecimal() else None


class RateLimitedError(ResourceExhaustedError):
    """The API key is over its own limit; `retry_after_s` says when to come back."""


class AbortedError(MlxpoolError):
    """Somebody else's call ended this one."""


class LoadSupersededError(AbortedError):
    """An unload stopped the load."""


class ModelUnloadedError(AbortedError):
    """The model was unloaded by force while it generated."""


class UnavailableError(MlxpoolError, ConnectionError):
    """Nothing answers, the connection broke, or the server cannot take the call just now."""


class QueueFullError(UnavailableError):
    """Too many requests wait already; `retry_after_s` says when to come back."""


class QueueTimeoutError(UnavailableError, TimeoutError):
    """The request waited longer for its turn than the server lets it, and never ran."""


class DeadlineUnmeetableError(UnavailableError, TimeoutError):
    """Refused at once: the queue is longer than `timeout_s`; `retry_after_s` says how long."""


class DrainingError(UnavailableError):
    """The server is shutting down."""


class NotSupportedError(MlxpoolError, NotImplementedError):
    """The server does not do that (yet); `field_violations` names the field, if it is one."""


class AccessDeniedError(MlxpoolError, PermissionError):
    """The server, or something in front of it, does not let this caller in."""


class DeadlineError(MlxpoolError, TimeoutError):
    """The call's `timeout_s` passed first; what a generation had produced is lost."""


class GenerationCancelledError(MlxpoolError):
    """The call was cancelled: by close() from another thread or task, or on the way."""


class ServerError(MlxpoolError, RuntimeError):
    """The server failed; its log says why."""


class LoadFailedError(ServerError):
    """The model's files could not be loaded."""


class GenerationFailedError(ServerError):
    """The engine failed while it generated."""


class IncompleteStreamError(MlxpoolError, EOFError):
    """The stream ended with status OK but without its last event: treat the output as cut off."""
