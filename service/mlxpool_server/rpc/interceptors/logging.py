"""One log line a call."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import structlog

from mlxpool_server.rpc import call_log
from mlxpool_server.rpc.interceptors.wrap import Context

log = structlog.get_logger(__name__)

# The two ends count a deadline from slightly different moments.
DEADLINE_SLACK_S = 0.05


@asynccontextmanager
async def logged(method: str, context: Context) -> AsyncGenerator[None, None]:
    """Log the method, how it ended and what the servicer noted, never a prompt or text."""
    facts = call_log.begin()
    started_at = time.monotonic()
    # Asked now: after a GeneratorExit the context's call is freed, and asking crashes the process.
    peer = context.peer()
    limit_s = context.time_remaining()
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
        fields = {"status": status} | facts
        fields["duration_s"] = round(time.monotonic() - started_at, 4)
        log.info("rpc.finished", method=method.rpartition("/")[2], peer=peer, **fields)


def _is_late(limit_s: float | None, elapsed_s: float) -> bool:
    return limit_s is not None and elapsed_s >= limit_s - DEADLINE_SLACK_S
