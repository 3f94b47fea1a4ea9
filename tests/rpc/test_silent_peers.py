"""Connections whose other end says nothing any more, or never did: they are closed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from rpc.harness import PATIENCE_S, Server, running_server
from soak import http2

SETTLED = http2.hello() + http2.frame(http2.SETTINGS, flags=http2.ACK)


@pytest_asyncio.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Server]:
    """Asks whoever is silent for half a second, and waits as long."""
    monkeypatch.setattr("mlxpool_server.rpc.server.SILENCE_S", 0.5)
    monkeypatch.setattr("mlxpool_server.rpc.server.ANSWER_S", 0.5)
    async with running_server() as server:
        yield server


@pytest.mark.parametrize(
    "beginning",
    [b"", http2.PREFACE[:10], http2.PREFACE, http2.hello(), SETTLED, SETTLED + http2.call(1)],
    ids=[
        "nothing",
        "half a preface",
        "no settings",
        "no acknowledgement",
        "settled",
        "half a call",
    ],
)
async def test_silent_connection_is_closed(server: Server, beginning: bytes) -> None:
    """Whatever it began with, and though its end stays open."""
    host, _, port = server.address.rpartition(":")
    async with asyncio.timeout(PATIENCE_S):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(beginning)
        while await reader.read(1 << 16):
            pass
    writer.close()
    await server.assert_serves()
