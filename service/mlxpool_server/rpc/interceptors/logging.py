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


@asynccontextmanager
async def logged(method: str, context: Context) -> AsyncGenerator[None, None]:
    """Log the method, how it ended and what the servicer noted, never a prompt or text."""
    facts = call_log.begin()
    started_at = time.monotonic()
    status = "OK"
    try:
        yield
    except (asyncio.CancelledError, GeneratorExit):
        # The caller hung up, or its deadline passed.
        status = "CANCELLED"
        raise
    except BaseException:
        status = "INTERNAL"
        raise
    finally:
        fields = {"status": status} | facts
        fields["duration_s"] = round(time.monotonic() - started_at, 4)
        log.info("rpc.finished", method=method.rpartition("/")[2], peer=context.peer(), **fields)
