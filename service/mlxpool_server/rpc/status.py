"""Domain errors to gRPC statuses with google.rpc details: the only place that picks a status."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.message import Message
from google.rpc import error_details_pb2 as details_pb
from google.rpc import status_pb2

from mlxpool_server import errors

DOMAIN = "mlxpool"
# Many peers limit all trailers to 8 KiB; texts come from requests and model files, and the message
# travels percent-encoded besides: three times as long where it is not ASCII.
MAX_TEXT_BYTES = 512
# A pushback below zero tells grpc not to retry.
NEVER = -1


@dataclass(frozen=True, slots=True)
class RpcStatus:
    code: grpc.StatusCode
    reason: str
    message: str
    details: Sequence[Message] = ()
    metadata: dict[str, str] = field(default_factory=dict)
    # None: grpc's own rules decide. NEVER: it gives up at once.
    pushback_ms: int | None = None

    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """The details as clients of every language look for them."""
        info = details_pb.ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=self.metadata)
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        for detail in (info, *self.details):
            packed = Any()
            packed.Pack(detail)
            status.details.append(packed)
        trailers: list[tuple[str, str | bytes]] = [
            ("grpc-status-details-bin", status.SerializeToString())
        ]
        if self.pushback_ms is not None:
            trailers.append(("grpc-retry-pushback-ms", str(self.pushback_ms)))
        return tuple(trailers)


def status_of(error: errors.MlxpoolError) -> RpcStatus:  # noqa: C901, PLR0911, PLR0912 - a table
    """Every error has a status; one that is unknown here is INTERNAL without its text."""
    message = shorten(str(error))
    code = grpc.StatusCode
    match error:
        case errors.InvalidFieldError(field=path, problem=problem):
            return RpcStatus(
                code.INVALID_ARGUMENT, "INVALID_FIELD", message, [_bad_request(path, problem)]
            )
        case errors.BadConstraintError(field=path, problem=problem, place=place):
            return RpcStatus(
                code.INVALID_ARGUMENT,
                "BAD_CONSTRAINT",
                message,
                [_bad_request(path, problem)],
                {"place": shorten(place)} if place else {},
            )
        case errors.PromptTooLongError(field=path):
            return RpcStatus(
                code.INVALID_ARGUMENT,
                "PROMPT_TOO_LONG",
                message,
                [_bad_request(path, message)],
                {
                    "promptTokens": str(error.prompt_tokens),
                    "limitTokens": str(error.limit_tokens),
                },
            )
        case errors.NotImplementedFieldError(field=path):
            return RpcStatus(
                code.UNIMPLEMENTED, "NOT_IMPLEMENTED", message, [_bad_request(path, message)]
            )
        case errors.ModelNotFoundError(model=name):
            return RpcStatus(
                code.NOT_FOUND, "MODEL_NOT_FOUND", message, [_resource("model", name, message)]
            )
        case errors.GenerationNotFoundError(generation_id=name):
            detail = _resource("generation", name, message)
            return RpcStatus(code.NOT_FOUND, "GENERATION_NOT_FOUND", message, [detail])
        case errors.GenerationIdInUseError():
            return RpcStatus(code.ALREADY_EXISTS, "GENERATION_ID_IN_USE", message)
        case errors.ModelNotLoadedError():
            return RpcStatus(code.FAILED_PRECONDITION, "MODEL_NOT_LOADED", message)
        case errors.AdapterNotFoundError(model=model, adapter=adapter):
            detail = _resource("adapter", f"{model}/{adapter}", message)
            return RpcStatus(code.NOT_FOUND, "ADAPTER_NOT_FOUND", message, [detail])
        case errors.ModelInUseError():
            return RpcStatus(code.FAILED_PRECONDITION, "MODEL_IN_USE", message)
        case errors.CapabilityMissingError():
            return RpcStatus(code.FAILED_PRECONDITION, "CAPABILITY_MISSING", message)
        case errors.MemoryInUseError():
            return RpcStatus(
                code.FAILED_PRECONDITION,
                "MEMORY_IN_USE",
                message,
                metadata={
                    "limitBytes": str(error.limit_bytes),
                    "inUseBytes": str(error.in_use_bytes),
                },
            )
        case errors.PoolMemoryLimitError():
            return RpcStatus(
                code.RESOURCE_EXHAUSTED,
                "POOL_MEMORY_LIMIT",
                message,
                [_quota(error.model, message)],
                {
                    "requiredBytes": str(error.required_bytes),
                    "availableBytes": str(error.available_bytes),
                },
            )
        case errors.LoadSupersededError():
            return RpcStatus(code.ABORTED, "LOAD_SUPERSEDED", message)
        case errors.ModelUnloadedError():
            return RpcStatus(code.ABORTED, "MODEL_UNLOADED", message)
        case errors.GenerationCancelledError():
            return RpcStatus(code.CANCELLED, "GENERATION_CANCELLED", message)
        case errors.GenerationTooLateError():
            return RpcStatus(code.DEADLINE_EXCEEDED, "GENERATION_TOO_LATE", message)
        case errors.GenerationInterruptedError():
            return RpcStatus(code.ABORTED, "GENERATION_INTERRUPTED", message)
        case errors.QueueFullError(retry_after_s=wait_s):
            return _try_again(code.UNAVAILABLE, "QUEUE_FULL", message, wait_s)
        case errors.DrainingError(retry_after_s=wait_s):
            return _try_again(code.UNAVAILABLE, "DRAINING", message, wait_s)
        case errors.QueueTimeoutError(retry_after_s=wait_s):
            return _try_again(code.UNAVAILABLE, "QUEUE_TIMEOUT", message, wait_s)
        case errors.DeadlineUnmeetableError(expected_wait_s=wait_s):
            # The same deadline would be refused again: a retry would only sleep until it passes.
            return RpcStatus(
                code.UNAVAILABLE,
                "DEADLINE_UNMEETABLE",
                message,
                [_retry(wait_s)],
                {"expectedWaitMs": str(int(wait_s * 1000))},
                pushback_ms=NEVER,
            )
        case errors.ApiKeyMissingError():
            return RpcStatus(code.UNAUTHENTICATED, "API_KEY_MISSING", message)
        case errors.ApiKeyInvalidError():
            return RpcStatus(code.UNAUTHENTICATED, "API_KEY_INVALID", message)
        case errors.RoleMissingError(roles=roles):
            return RpcStatus(
                code.PERMISSION_DENIED, "ROLE_MISSING", message, metadata={"roles": ",".join(roles)}
            )
        case errors.RateLimitedError(key_name=name, retry_after_s=wait_s):
            return _over_limit(
                "RATE_LIMITED", name, message, wait_s, requestsPerMinute=error.requests_per_minute
            )
        case errors.TooManyStreamsError(key_name=name, retry_after_s=wait_s):
            return _over_limit(
                "TOO_MANY_STREAMS", name, message, wait_s, maxStreams=error.max_streams
            )
        case errors.LoadFailedError():
            return RpcStatus(code.INTERNAL, "LOAD_FAILED", message)
        case errors.GenerationFailedError():
            return RpcStatus(code.INTERNAL, "GENERATION_FAILED", message)
        case _:
            return INTERNAL_STATUS


INTERNAL_STATUS = RpcStatus(
    grpc.StatusCode.INTERNAL, "INTERNAL", "the server failed; its log has the cause"
)


def shorten(text: str) -> str:
    """Cut to MAX_TEXT_BYTES of UTF-8, between characters."""
    raw = text.encode("utf-8", "replace")
    if len(raw) <= MAX_TEXT_BYTES:
        return raw.decode()
    ellipsis = "…"
    return raw[: MAX_TEXT_BYTES - len(ellipsis.encode())].decode("utf-8", "ignore") + ellipsis


def _try_again(code: grpc.StatusCode, reason: str, message: str, wait_s: float) -> RpcStatus:
    return RpcStatus(code, reason, message, [_retry(wait_s)], pushback_ms=int(wait_s * 1000))


def _over_limit(
    reason: str, key_name: str, message: str, wait_s: float, **limits: int
) -> RpcStatus:
    """A key's own limit, not the server's: RESOURCE_EXHAUSTED, which grpc does not retry."""
    return RpcStatus(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        reason,
        message,
        [_quota(f"key:{key_name}", message), _retry(wait_s)],
        {name: str(limit) for name, limit in limits.items()},
        pushback_ms=int(wait_s * 1000),
    )


def _bad_request(path: str, problem: str) -> details_pb.BadRequest:
    violation = details_pb.BadRequest.FieldViolation(
        field=shorten(path), description=shorten(problem)
    )
    return details_pb.BadRequest(field_violations=[violation])


def _resource(kind: str, name: str, description: str) -> details_pb.ResourceInfo:
    return details_pb.ResourceInfo(
        resource_type=kind, resource_name=shorten(name), description=description
    )


def _quota(subject: str, description: str) -> details_pb.QuotaFailure:
    violation = details_pb.QuotaFailure.Violation(subject=shorten(subject), description=description)
    return details_pb.QuotaFailure(violations=[violation])


def _retry(wait_s: float) -> details_pb.RetryInfo:
    info = details_pb.RetryInfo()
    info.retry_delay.FromMilliseconds(int(wait_s * 1000))
    return info
