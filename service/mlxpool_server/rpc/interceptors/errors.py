"""Errors become statuses here, and nowhere else."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import structlog
from grpc import aio

from mlxpool_server.errors import MlxpoolError
from mlxpool_server.rpc import call_log
from mlxpool_server.rpc.interceptors.wrap import Context
from mlxpool_server.rpc.status import INTERNAL_STATUS, RpcStatus, status_of

log = structlog.get_logger(__name__)


@asynccontextmanager
async def errors_to_status(method: str, context: Context) -> AsyncGenerator[None, None]:
    """Abort with the error's status; what nobody foresaw is INTERNAL without its text."""
    try:
        yield
    except aio.AbortError:
        raise
    except MlxpoolError as error:
        await _abort(context, status_of(error))
    except Exception:
        log.exception("rpc.crashed", method=method)
        await _abort(context, INTERNAL_STATUS)


async def _abort(context: Context, status: RpcStatus) -> None:
    # Not the message: a template's own words may quote the prompt.
    call_log.add(status=status.code.name, reason=status.reason)
    await context.abort(status.code, status.message, status.trailing_metadata())
