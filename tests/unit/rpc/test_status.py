"""Every domain error has a status, and its details fit into trailers."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from google.rpc import error_details_pb2 as details_pb
from google.rpc import status_pb2
from hypothesis import given
from hypothesis import strategies as st

from mlxpool_server import errors
from mlxpool_server.rpc.status import (
    INTERNAL_STATUS,
    MAX_TEXT_BYTES,
    RpcStatus,
    shorten,
    status_of,
)

MAX_DETAILS_BYTES = 4096
# Four bytes a character, twelve in a percent-encoded message.
LONG = "😀" * 10_000
CODE = grpc.StatusCode

EXAMPLES: dict[type[errors.MlxpoolError], tuple[errors.MlxpoolError, CODE, str]] = {
    errors.InvalidFieldError: (
        errors.InvalidFieldError(LONG, LONG), CODE.INVALID_ARGUMENT, "INVALID_FIELD",
    ),
    errors.BadConstraintError: (
        errors.BadConstraintError(LONG, LONG, LONG), CODE.INVALID_ARGUMENT, "BAD_CONSTRAINT",
    ),
    errors.NotImplementedFieldError: (
        errors.NotImplementedFieldError(LONG), CODE.UNIMPLEMENTED, "NOT_IMPLEMENTED",
    ),
    errors.PromptTooLongError: (
        errors.PromptTooLongError(9, 8), CODE.INVALID_ARGUMENT, "PROMPT_TOO_LONG",
    ),
    errors.ModelNotFoundError: (
        errors.ModelNotFoundError(LONG, (LONG,)), CODE.NOT_FOUND, "MODEL_NOT_FOUND",
    ),
    errors.GenerationNotFoundError: (
        errors.GenerationNotFoundError(LONG), CODE.NOT_FOUND, "GENERATION_NOT_FOUND",
    ),
    errors.GenerationIdInUseError: (
        errors.GenerationIdInUseError(LONG), CODE.ALREADY_EXISTS, "GENERATION_ID_IN_USE",
    ),
    errors.ModelNotLoadedError: (
        errors.ModelNotLoadedError(LONG), CODE.FAILED_PRECONDITION, "MODEL_NOT_LOADED",
    ),
    errors.AdapterNotFoundError: (
        errors.AdapterNotFoundError(LONG, LONG, (LONG,)), CODE.NOT_FOUND, "ADAPTER_NOT_FOUND",
    ),
    errors.ModelInUseError: (
        errors.ModelInUseError(LONG, LONG), CODE.FAILED_PRECONDITION, "MODEL_IN_USE",
    ),
    errors.CapabilityMissingError: (
        errors.CapabilityMissingError(LONG, LONG, LONG),
        CODE.FAILED_PRECONDITION, "CAPABILITY_MISSING",
    ),
    errors.PoolMemoryLimitError: (
        errors.PoolMemoryLimitError(LONG, 2**62, 2**62),
        CODE.RESOURCE_EXHAUSTED, "POOL_MEMORY_LIMIT",
    ),
    errors.MemoryInUseError: (
        errors.MemoryInUseError(1, 2), CODE.FAILED_PRECONDITION, "MEMORY_IN_USE",
    ),
    errors.LoadFailedError: (errors.LoadFailedError(LONG, LONG), CODE.INTERNAL, "LOAD_FAILED"),
    errors.LoadSupersededError: (
        errors.LoadSupersededError(LONG), CODE.ABORTED, "LOAD_SUPERSEDED",
    ),
    errors.ModelUnloadedError: (errors.ModelUnloadedError(LONG), CODE.ABORTED, "MODEL_UNLOADED"),
    errors.GenerationFailedError: (
        errors.GenerationFailedError(LONG), CODE.INTERNAL, "GENERATION_FAILED",
    ),
    errors.GenerationCancelledError: (
        errors.GenerationCancelledError(LONG), CODE.CANCELLED, "GENERATION_CANCELLED",
    ),
    errors.GenerationTooLateError: (
        errors.GenerationTooLateError(60.0), CODE.DEADLINE_EXCEEDED, "GENERATION_TOO_LATE",
    ),
    errors.GenerationInterruptedError: (
        errors.GenerationInterruptedError(LONG), CODE.ABORTED, "GENERATION_INTERRUPTED",
    ),
    errors.QueueFullError: (errors.QueueFullError(3, 1.5), CODE.UNAVAILABLE, "QUEUE_FULL"),
    errors.DrainingError: (errors.DrainingError(1.5), CODE.UNAVAILABLE, "DRAINING"),
    errors.QueueTimeoutError: (
        errors.QueueTimeoutError(30.0, 1.5), CODE.UNAVAILABLE, "QUEUE_TIMEOUT",
    ),
    errors.DeadlineUnmeetableError: (
        errors.DeadlineUnmeetableError(1.0, 60.0), CODE.UNAVAILABLE, "DEADLINE_UNMEETABLE",
    ),
    errors.ApiKeyMissingError: (
        errors.ApiKeyMissingError(), CODE.UNAUTHENTICATED, "API_KEY_MISSING",
    ),
    errors.ApiKeyInvalidError: (
        errors.ApiKeyInvalidError(), CODE.UNAUTHENTICATED, "API_KEY_INVALID",
    ),
    errors.RoleMissingError: (
        errors.RoleMissingError("a", "LoadModel", ("admin",)),
        CODE.PERMISSION_DENIED, "ROLE_MISSING",
    ),
    errors.RateLimitedError: (
        errors.RateLimitedError("a", 60, 1.5), CODE.RESOURCE_EXHAUSTED, "RATE_LIMITED",
    ),
    errors.TooManyStreamsError: (
        errors.TooManyStreamsError("a", 4, 1.5), CODE.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS",
    ),
}  # fmt: skip
# Raised before there is a server to answer.
AT_START = {errors.SettingsError, errors.DemoModelError, errors.AddressUnavailableError}


def every_error(base: type[errors.MlxpoolError]) -> Iterator[type[errors.MlxpoolError]]:
    for error in base.__subclasses__():
        yield error
        yield from every_error(error)


def details_of(status: RpcStatus) -> tuple[status_pb2.Status, int]:
    trailers = dict(status.trailing_metadata())
    raw = trailers["grpc-status-details-bin"]
    assert isinstance(raw, bytes)
    return status_pb2.Status.FromString(raw), len(raw)


def test_every_error_has_an_example_here() -> None:
    """A new one is added to status_of and to this table together."""
    of_the_package = {
        error
        for error in every_error(errors.MlxpoolError)
        if error.__module__.startswith("mlxpool_server")
    }
    assert of_the_package == set(EXAMPLES) | AT_START


@pytest.mark.parametrize(
    ("error", "code", "reason"), EXAMPLES.values(), ids=[kind.__name__ for kind in EXAMPLES]
)
def test_status(error: errors.MlxpoolError, code: grpc.StatusCode, reason: str) -> None:
    """The contract's code and reason, and details under 4 KiB whatever the caller wrote."""
    status = status_of(error)
    assert (status.code, status.reason) == (code, reason)
    details, size = details_of(status)
    assert size < MAX_DETAILS_BYTES
    assert len(status.message.encode()) <= MAX_TEXT_BYTES
    assert (details.code, details.message) == (code.value[0], status.message)
    info = details_pb.ErrorInfo()
    assert details.details[0].Unpack(info)
    assert (info.domain, info.reason) == ("mlxpool", reason)


@pytest.mark.parametrize(
    "error",
    [errors.QueueFullError(3, 1.5), errors.DrainingError(1.5), errors.QueueTimeoutError(9.0, 1.5)],
)
def test_retry(error: errors.MlxpoolError) -> None:
    """RetryInfo for people, the pushback trailer for grpc's own retries."""
    status = status_of(error)
    details, _ = details_of(status)
    info = details_pb.RetryInfo()
    assert details.details[1].Unpack(info)
    assert info.retry_delay.ToMilliseconds() == 1500
    assert dict(status.trailing_metadata())["grpc-retry-pushback-ms"] == "1500"


def test_a_deadline_that_cannot_be_met_is_not_retried() -> None:
    """RetryInfo says how long the queue is; the pushback tells grpc to give up at once."""
    status = status_of(errors.DeadlineUnmeetableError(1.0, 60.0))
    details, _ = details_of(status)
    info = details_pb.RetryInfo()
    assert details.details[1].Unpack(info)
    assert info.retry_delay.ToMilliseconds() == 60_000
    assert dict(status.trailing_metadata())["grpc-retry-pushback-ms"] == "-1"


@pytest.mark.parametrize(
    ("error", "fact"),
    [
        (errors.RateLimitedError("web", 60, 1.5), ("requestsPerMinute", "60")),
        (errors.TooManyStreamsError("web", 4, 1.5), ("maxStreams", "4")),
    ],
)
def test_a_keys_limit(error: errors.MlxpoolError, fact: tuple[str, str]) -> None:
    """QuotaFailure names the key, RetryInfo says when to come back, ErrorInfo has the limit."""
    details, _ = details_of(status_of(error))
    info, quota, retry = details_pb.ErrorInfo(), details_pb.QuotaFailure(), details_pb.RetryInfo()
    unpacked = zip(details.details, (info, quota, retry), strict=True)
    assert all(packed.Unpack(detail) for packed, detail in unpacked)
    assert quota.violations[0].subject == "key:web"
    assert retry.retry_delay.ToMilliseconds() == 1500
    assert fact in info.metadata.items()


@pytest.mark.parametrize(
    ("error", "field", "text"),
    [
        (errors.InvalidFieldError("prompt.text", "is empty"), "inputs[3].text", "is empty"),
        (errors.NotImplementedFieldError("prompt.chat.x"), "inputs[3].chat.x", "inputs[3].chat.x"),
        (errors.PromptTooLongError(9, 8), "inputs[3]", "inputs[3] has 9 tokens"),
    ],
)
def test_an_inputs_error_names_it(error: errors.MlxpoolError, field: str, text: str) -> None:
    """What is wrong with one of several inputs says which one it is."""
    status = status_of(errors.of_input(error, 3))
    assert status.reason == status_of(error).reason
    (bad_request,) = status.details
    assert isinstance(bad_request, details_pb.BadRequest)
    assert bad_request.field_violations[0].field == field
    assert text in status.message


def test_an_inputs_other_errors_stay() -> None:
    """What is not about one input is as it was."""
    error = errors.ModelNotFoundError("m")
    assert errors.of_input(error, 3) is error


def test_unknown_error_is_internal() -> None:
    """One that nobody gave a status keeps its text to itself."""

    class NewError(errors.MlxpoolError):
        pass

    assert status_of(NewError("secret")) is INTERNAL_STATUS


@given(st.text())
def test_shortened_text_is_valid_and_short(text: str) -> None:
    """Cut between characters."""
    long = text * 50
    short = shorten(long)
    assert len(short.encode()) <= MAX_TEXT_BYTES
    assert long.startswith(short.removesuffix("…"))
    assert shorten(short) == short
