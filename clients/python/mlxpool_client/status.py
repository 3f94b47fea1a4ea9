"""From a gRPC status and its google.rpc details to the error a call raises."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from mlxpool_client import errors

if TYPE_CHECKING:
    from google.rpc import status_pb2

DOMAIN = "mlxpool"

_BY_REASON: dict[str, type[errors.MlxpoolError]] = {
    "INVALID_FIELD": errors.InvalidRequestError,
    "PROMPT_TOO_LONG": errors.PromptTooLongError,
    "BAD_CONSTRAINT": errors.BadConstraintError,
    "MODEL_NOT_FOUND": errors.ModelNotFoundError,
    "ADAPTER_NOT_FOUND": errors.AdapterNotFoundError,
    "GENERATION_NOT_FOUND": errors.GenerationNotFoundError,
    "GENERATION_ID_IN_USE": errors.GenerationIdInUseError,
    "MODEL_NOT_LOADED": errors.ModelNotLoadedError,
    "CAPABILITY_MISSING": errors.CapabilityMissingError,
    "MODEL_IN_USE": errors.ModelInUseError,
    "MEMORY_IN_USE": errors.MemoryInUseError,
    "POOL_MEMORY_LIMIT": errors.PoolMemoryLimitError,
    "LOAD_SUPERSEDED": errors.LoadSupersededError,
    "MODEL_UNLOADED": errors.ModelUnloadedError,
    "QUEUE_FULL": errors.QueueFullError,
    "QUEUE_TIMEOUT": errors.QueueTimeoutError,
    "DEADLINE_UNMEETABLE": errors.DeadlineUnmeetableError,
    "DRAINING": errors.DrainingError,
    "RATE_LIMITED": errors.RateLimitedError,
    "TOO_MANY_STREAMS": errors.RateLimitedError,
    "NOT_IMPLEMENTED": errors.NotSupportedError,
    "LOAD_FAILED": errors.LoadFailedError,
    "GENERATION_FAILED": errors.GenerationFailedError,
}

# For statuses without a reason (from gRPC itself or a proxy) or with one from a newer server.
_BY_CODE: dict[grpc.StatusCode, type[errors.MlxpoolError]] = {
    grpc.StatusCode.CANCELLED: errors.GenerationCancelledError,
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequestError,
    grpc.StatusCode.OUT_OF_RANGE: errors.InvalidRequestError,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineError,
    grpc.StatusCode.NOT_FOUND: errors.NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: errors.GenerationIdInUseError,
    grpc.StatusCode.PERMISSION_DENIED: errors.AccessDeniedError,
    grpc.StatusCode.UNAUTHENTICATED: errors.AccessDeniedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.ResourceExhaustedError,
    grpc.StatusCode.FAILED_PRECONDITION: errors.PreconditionError,
    grpc.StatusCode.ABORTED: errors.AbortedError,
    grpc.StatusCode.UNIMPLEMENTED: errors.NotSupportedError,
    grpc.StatusCode.INTERNAL: errors.ServerError,
    grpc.StatusCode.UNKNOWN: errors.ServerError,
    grpc.StatusCode.DATA_LOSS: errors.ServerError,
    grpc.StatusCode.UNAVAILABLE: errors.UnavailableError,
}


@dataclass(slots=True)
class _Details:
    reason: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    field_violations: tuple[errors.FieldViolation, ...] = ()
    retry_after_s: float | None = None


def error_from(failure: grpc.RpcError) -> errors.MlxpoolError:
    """Return the typed error for a failed call, of either kind of channel."""
    code = failure.code()
    try:
        details = _details(rpc_status.from_call(failure))
    except (ValueError, DecodeError):
        # Mangled on the way: the code and the message remain.
        details = _Details()
    kind = _BY_REASON.get(details.reason) or _BY_CODE.get(code, errors.MlxpoolError)
    return kind(
        failure.details() or code.name,
        code=code,
        reason=details.reason,
        metadata=details.metadata,
        field_violations=details.field_violations,
        retry_after_s=details.retry_after_s,
    )


def _details(status: status_pb2.Status | None) -> _Details:
    details = _Details()
    for packed in status.details if status is not None else ():
        info = error_details_pb2.ErrorInfo()
        request = error_details_pb2.BadRequest()
        retry = error_details_pb2.RetryInfo()
        if packed.Is(info.DESCRIPTOR) and packed.Unpack(info) and info.domain == DOMAIN:
            details.reason = info.reason
            details.metadata = dict(info.metadata)
        elif packed.Is(request.DESCRIPTOR) and packed.Unpack(request):
            details.field_violations = tuple(
                errors.FieldViolation(violation.field, violation.description)
                for violation in request.field_violations
            )
        elif packed.Is(retry.DESCRIPTOR) and packed.Unpack(retry):
            delay = retry.retry_delay
            details.retry_after_s = delay.seconds + delay.nanos / 1e9
    return details
