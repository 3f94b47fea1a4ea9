"""One log line a call, and the same facts for those who observe calls."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager

import structlog

from mlxpool_server.rpc import call_log
from mlxpool_server.rpc.interceptors.wrap import Around, Context
from mlxpool_server.rpc.observer import CallObserver, EndedCall

log = structlog.get_logger(__name__)

# The two ends count a deadline from slightly different moments.
DEADLINE_SLACK_S = 0.05
# W3C's names.
TRACE_CONTEXT = ("traceparent", "tracestate", "baggage")


def logged(observers: Sequence[CallObserver] = ()) -> Around:
    """Log the method, how it ended and what the servicer noted, never a prompt or text."""

    @asynccontextmanager
    async def around(method: str, context: Context) -> AsyncGenerator[None, None]:
        call = call_log.begin()
        started_at, start_time = time.monotonic(), time.time()
        # Asked now: after a GeneratorExit the context's call is freed, and asking crashes.
        peer = context.peer()
        limit_s = context.time_remaining()
        metadata = _trace_context(context) if observers else ()
        status = "OK"
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            # The caller hung up, or its deadline passed: grpc cancels us either way.
            is_late = _is_late(limit_s, time.monotonic() - started_at)
            status = "DEADLINE_EXCEEDED" if is_late else "CANCELLED"
            raise
        except BaseException:
            status = "INTERNAL"
            raise
        finally:
            fields = {"status": status} | call.facts
            duration_s = time.monotonic() - started_at
            fields["duration_s"] = round(duration_s, 4)
            log.info("rpc.finished", method=method.rpartition("/")[2], peer=peer, **fields)
            ended = EndedCall(
                method=method.removeprefix("/"),
                status=str(fields["status"]),
                start_time=start_time,
                duration_s=duration_s,
                reason=str(fields.get("reason", "")),
                facts=call.facts,
                metadata=metadata,
                finished=call.finished,
            )
            for observer in observers:
                observer.call_ended(ended)

    return around


def _trace_context(context: Context) -> tuple[tuple[str, str | bytes], ...]:
    """Of the caller's metadata, what observers are for: never its API key."""
    metadata = context.invocation_metadata() or ()
    return tuple((name, value) for name, value in metadata if name in TRACE_CONTEXT)


def _is_late(limit_s: float | None, elapsed_s: float) -> bool:
    return limit_s is not None and elapsed_s >= limit_s - DEADLINE_SLACK_S
