"""SIGHUP: the configuration is read again, and applied if all of it is right."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from mlxpool_server.errors import MlxpoolError
from mlxpool_server.pool.catalog import Catalog
from mlxpool_server.settings import Settings

log = structlog.get_logger(__name__)


class Reloads:
    """Event loop only. One at a time; signals that come meanwhile are answered by one more."""

    def __init__(
        self,
        read: Callable[[], tuple[Settings, Catalog]],
        apply: Callable[[Settings, Catalog], Awaitable[None]],
    ) -> None:
        """`read` runs on a thread. Both raise MlxpoolError, and then nothing has changed."""
        self._read = read
        self._apply = apply
        self._requested = asyncio.Event()

    def request(self) -> None:
        self._requested.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._requested.wait()
            self._requested.clear()
            try:
                await self._apply(*await asyncio.to_thread(self._read))
            except MlxpoolError as error:
                log.error("settings.not_reloaded", problem=str(error))  # noqa: TRY400 - the text says it all
            except Exception:  # the edge: the server goes on as it was
                log.exception("settings.not_reloaded")
