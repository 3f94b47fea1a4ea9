"""Servers for the tests in this folder."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager

import pytest
import pytest_asyncio

from rpc.harness import Server, running_server

ServerMaker = Callable[..., AbstractAsyncContextManager[Server]]


@pytest_asyncio.fixture
async def server() -> AsyncIterator[Server]:
    """Model `m` answers with its prompt and loads at once."""
    async with running_server() as running:
        yield running


@pytest.fixture
def serve() -> ServerMaker:
    """For tests that choose models and settings themselves."""
    return running_server
