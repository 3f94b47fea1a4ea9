"""Every reason of the contract becomes its own error, with the facts that came along."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2

import mlxpool_client as mp
from mlxpool_client.status import error_from

if TYPE_CHECKING:
    from tests.unit.client.conftest import FakeServer

CODE = grpc.StatusCode
REASONS = [
    (CODE.INVALID_ARGUMENT, "INVALID_FIELD", mp.InvalidRequestError, ValueError),
    (CODE.INVALID_ARGUMENT, "PROMPT_TOO_LONG", mp.PromptTooLongError, ValueError),
    (CODE.INVALID_ARGUMENT, "BAD_CONSTRAINT", mp.BadConstraintError, ValueError),
    (CODE.NOT_FOUND, "MODEL_NOT_FOUND", mp.ModelNotFoundError, LookupError),
    (CODE.NOT_FOUND, "ADAPTER_NOT_FOUND", mp.AdapterNotFoundError, LookupError),
    (CODE.NOT_FOUND, "GENERATION_NOT_FOUND", mp.GenerationNotFoundError, LookupError),
    (CODE.ALREADY_EXISTS, "GENERATION_ID_IN_USE", mp.GenerationIdInUseError, Exception),
    (CODE.FAILED_PRECONDITION, "MODEL_NOT_LOADED", mp.ModelNotLoadedError, Exception),
    (CODE.FAILED_PRECONDITION, "CAPABILITY_MISSING", mp.CapabilityMissingError, Exception),
    (CODE.FAILED_PRECONDITION, "MODEL_IN_USE", mp.ModelInUseError, Exception),
    (CODE.FAILED_PRECONDITION, "MEMORY_IN_USE", mp.MemoryInUseError, Exception),
    (CODE.RESOURCE_EXHAUSTED, "POOL_MEMORY_LIMIT", mp.PoolMemoryLimitError, MemoryError),
    (CODE.ABORTED, "LOAD_SUPERSEDED", mp.LoadSupersededError, Exception),
    (CODE.ABORTED, "MODEL_UNLOADED", mp.ModelUnloadedError, Exception),
    (CODE.UNIMPLEMENTED, "NOT_IMPLEMENTED", mp.NotSupportedError, NotImplementedError),
    (CODE.INTERNAL, "LOAD_FAILED", mp.LoadFailedError, RuntimeError),
    (CODE.INTERNAL, "GENERATION_FAILED", mp.GenerationFailedError, RuntimeError),
    # What gRPC itself and proxies send has no reason.
    (CODE.DEADLINE_EXCEEDED, "", mp.DeadlineError, TimeoutError),
    (CODE.CANCELLED, "", mp.GenerationCancelledError, Exception),
    (CODE.UNAUTHENTICATED, "", mp.AccessDeniedError, PermissionError),
    (CODE.RESOURCE_EXHAUSTED, "", mp.ResourceExhaustedError, Exception),
    # A newer server may have reasons that this client does not know.
    (CODE.FAILED_PRECONDITION, "SOMETHING_NEW", mp.PreconditionError, Exception),
    (CODE.UNKNOWN, "", mp.ServerError, RuntimeError),
]


@pytest.mark.parametrize(("code", "reason", "kind", "builtin"), REASONS)
def test_each_reason_has_its_error(
    client: mp.Client,
    server: FakeServer,
    *,
    code: grpc.StatusCode,
    reason: str,
    kind: type[mp.MlxpoolError],
    builtin: type[Exception],
) -> None:
    """The error is of the reason's kind and of the built-in one that fits; the facts are kept."""
    server.models.failures = [server.failure(code, reason, "why", {"model": "demo"})]
    with pytest.raises(kind, match="why") as caught:
        client.get_model("demo")
    error = caught.value
    assert type(error) is kind
    assert isinstance(error, builtin)
    assert (error.code, error.reason, error.message) == (code, reason, "why")
    assert error.metadata == ({"model": "demo"} if reason else {})


@pytest.mark.parametrize(
    ("reason", "kind"), [("QUEUE_FULL", mp.QueueFullError), ("DRAINING", mp.DrainingError)]
)
def test_unavailable_says_when_to_come_back(
    client: mp.Client, server: FakeServer, reason: str, kind: type[mp.UnavailableError]
) -> None:
    """RetryInfo becomes retry_after_s, in seconds."""
    retry = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=1, nanos=500_000_000))
    failure = server.failure(CODE.UNAVAILABLE, reason, details=(retry,))
    server.models.failures = [failure] * 4
    with pytest.raises(kind) as caught:
        client.get_model("demo")
    assert caught.value.retry_after_s == 1.5
    assert isinstance(caught.value, ConnectionError)


def test_field_violations_are_kept(client: mp.Client, server: FakeServer) -> None:
    """BadRequest becomes field_violations, with the field's path."""
    bad = error_details_pb2.BadRequest()
    bad.field_violations.add(field="sampling.top_p", description="must be at most 1")
    failure = server.failure(CODE.INVALID_ARGUMENT, "INVALID_FIELD", details=(bad,))
    server.models.failures = [failure]
    with pytest.raises(mp.InvalidRequestError) as caught:
        client.get_model("demo")
    assert caught.value.field_violations == (
        mp.FieldViolation("sampling.top_p", "must be at most 1"),
    )


def test_memory_facts_are_numbers(client: mp.Client, server: FakeServer) -> None:
    """A memory limit says how much was needed and how much there is; None if it is not said."""
    facts = {"requiredBytes": "10", "availableBytes": "soon"}
    server.models.failures = [
        server.failure(CODE.RESOURCE_EXHAUSTED, "POOL_MEMORY_LIMIT", metadata=facts)
    ]
    with pytest.raises(mp.PoolMemoryLimitError) as caught:
        client.get_model("demo")
    assert caught.value.required_bytes == 10
    assert caught.value.available_bytes is None


def test_reasons_of_other_domains_do_not_count(client: mp.Client, server: FakeServer) -> None:
    """An ErrorInfo of a proxy in front is not taken for one of ours."""
    info = error_details_pb2.ErrorInfo(domain="proxy.example", reason="MODEL_NOT_FOUND")
    server.models.failures = [server.failure(CODE.NOT_FOUND, details=(info,))]
    with pytest.raises(mp.NotFoundError) as caught:
        client.get_model("demo")
    assert type(caught.value) is mp.NotFoundError
    assert caught.value.reason == ""


def test_a_status_without_details_is_typed_by_its_code() -> None:
    """What knows no google.rpc details, a proxy for example, is mapped by its code alone."""
    error = error_from(grpc.aio.AioRpcError(CODE.PERMISSION_DENIED))
    assert isinstance(error, mp.AccessDeniedError)
    assert error.message == "PERMISSION_DENIED"


def test_mangled_details_do_not_hide_the_status() -> None:
    """Trailers that cannot be parsed leave the code and the message."""
    trailers = grpc.aio.Metadata(("grpc-status-details-bin", b"\xff\xff\xff"))
    failure = grpc.aio.AioRpcError(CODE.ABORTED, trailing_metadata=trailers, details="odd")
    error = error_from(failure)
    assert isinstance(error, mp.AbortedError)
    assert error.message == "odd"


def test_errors_survive_pickling() -> None:
    """An error can cross a process boundary with its facts."""
    error = mp.QueueFullError("full", code=CODE.UNAVAILABLE, reason="QUEUE_FULL", retry_after_s=2.0)
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert type(copy) is mp.QueueFullError
    assert (str(copy), copy.reason, copy.retry_after_s) == ("full", "QUEUE_FULL", 2.0)
