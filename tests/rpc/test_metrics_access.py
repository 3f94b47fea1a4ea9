"""Who may read the metrics: the same certificates and keys guard them as guard the calls."""

from __future__ import annotations

import asyncio
import ssl
import urllib.error
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from fakes.certificates import Authority, Pair
from mlxpool_server.rpc.access.keys import hash_of, new_key
from rpc.harness import PATIENCE_S, Server, running_server
from rpc.metrics_reader import fetch, metrics_address

KEYS = {role: new_key() for role in ("inference", "observer", "admin")}


def entry(role: str, limits: str = "") -> str:
    head = f'[[keys]]\nname = "{role}"\nsha256 = "{hash_of(KEYS[role])}"\n'
    return f'{head}roles = ["{role}"]\n{limits}\n'


@asynccontextmanager
async def with_keys(folder: Path, limits: str = "") -> AsyncGenerator[Server, None]:
    """`limits` are the observer's."""
    file = folder / "keys.toml"
    file.write_text(entry("inference") + entry("observer", limits) + entry("admin"))
    async with running_server(metrics_listen="127.0.0.1:0", api_keys_file=file) as server:
        yield server


@asynccontextmanager
async def with_tls(
    folder: Path, authority: Authority, **settings: Any
) -> AsyncGenerator[Server, None]:
    certificate, key = authority.issue().write(folder)
    async with running_server(
        metrics_listen="127.0.0.1:0", tls_certificate=certificate, tls_key=key, **settings
    ) as server:
        yield server


def trusting(authority: Authority, folder: Path, client: Pair | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=authority.pem.decode())
    if client is not None:
        certificate, key = client.write(folder, "client")
        context.load_cert_chain(certificate, key)
    return context


async def refusal(server: Server, **headers: str) -> urllib.error.HTTPError:
    with pytest.raises(urllib.error.HTTPError) as caught:
        await fetch(f"http://{metrics_address(server)}/metrics", **headers)
    caught.value.close()
    return caught.value


async def scrapes(server: Server, tls: ssl.SSLContext) -> bool:
    """Whether a new connection gets the metrics."""
    try:
        _, text = await fetch(f"https://{metrics_address(server)}/metrics", tls=tls)
    except OSError:
        return False
    return "mlxpool_serving 1.0" in text


@pytest.mark.parametrize("role", ["observer", "admin"])
async def test_readers_get_them(tmp_path: Path, role: str) -> None:
    """A key with the role of an observer or an admin."""
    async with with_keys(tmp_path) as server:
        bearer = f"Bearer {KEYS[role]}"
        _, text = await fetch(f"http://{metrics_address(server)}/metrics", Authorization=bearer)
        assert "mlxpool_serving 1.0" in text


async def test_strangers_get_401(tmp_path: Path) -> None:
    """Without a key, and with a wrong one; the answer says how to send one, and nothing else."""
    async with with_keys(tmp_path) as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEYS["admin"]}):
            error = await refusal(server, **headers)
            assert (error.code, error.headers["www-authenticate"]) == (401, "Bearer")
        unread = await refusal_of_path(server, "/")
        assert unread.startswith(b"HTTP/1.1 401 ")


async def refusal_of_path(server: Server, path: str) -> bytes:
    host, _, port = metrics_address(server).rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    async with asyncio.timeout(PATIENCE_S):
        writer.write(f"GET {path} HTTP/1.1\r\n\r\n".encode())
        answer = await reader.read()
    writer.close()
    return answer


async def test_two_keys_are_none(tmp_path: Path) -> None:
    """As in the metadata of a call: which of the two counts would be a guess."""
    async with with_keys(tmp_path) as server:
        host, _, port = metrics_address(server).rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        line = f"Authorization: Bearer {KEYS['observer']}\r\n"
        writer.write(f"GET /metrics HTTP/1.1\r\n{line}{line}\r\n".encode())
        async with asyncio.timeout(PATIENCE_S):
            assert (await reader.read()).startswith(b"HTTP/1.1 401 ")
        writer.close()


async def test_an_inference_key_gets_403(tmp_path: Path) -> None:
    """Metrics are for those who observe; the refusal is in the log with the key's name."""
    async with with_keys(tmp_path) as server:
        error = await refusal(server, Authorization=f"Bearer {KEYS['inference']}")
        assert error.code == 403
        (line,) = (each for each in server.logs.entries if each["event"] == "metrics.refused")
        assert (line["status"], line["key"]) == (403, "inference")


async def test_a_keys_rate_holds(tmp_path: Path) -> None:
    """A scrape is a request like others: over requests_per_minute it gets 429 with a time."""
    async with with_keys(tmp_path, "requests_per_minute = 1") as server:
        bearer = f"Bearer {KEYS['observer']}"
        await fetch(f"http://{metrics_address(server)}/metrics", Authorization=bearer)
        error = await refusal(server, Authorization=bearer)
        assert error.code == 429
        assert 1 <= int(error.headers["retry-after"]) <= 60


async def test_tls(tmp_path: Path) -> None:
    """With a certificate, metrics are served over TLS only."""
    authority = Authority()
    async with with_tls(tmp_path, authority) as server:
        assert await scrapes(server, trusting(authority, tmp_path))
        assert not await scrapes(server, trusting(Authority("another"), tmp_path))
        with pytest.raises(OSError):
            await fetch(f"http://{metrics_address(server)}/metrics")


async def test_mutual_tls(tmp_path: Path) -> None:
    """Where clients need certificates, scrapers do, too."""
    authority, clients = Authority(), Authority("clients")
    ca_file = tmp_path / "clients.crt"
    ca_file.write_bytes(clients.pem)
    async with with_tls(tmp_path, authority, tls_client_ca=ca_file) as server:
        scraper = clients.issue("a scraper")
        assert await scrapes(server, trusting(authority, tmp_path, scraper))
        assert not await scrapes(server, trusting(authority, tmp_path))
        stranger = Authority("strangers").issue("a stranger")
        assert not await scrapes(server, trusting(authority, tmp_path, stranger))


async def test_new_certificates_are_used(tmp_path: Path) -> None:
    """The server's pair and the clients' authority, both at the next connection."""
    old, new = Authority("old"), Authority("new")
    ca_file = tmp_path / "clients.crt"
    ca_file.write_bytes(old.pem)
    async with with_tls(tmp_path, old, tls_client_ca=ca_file) as server:
        assert await scrapes(server, trusting(old, tmp_path, old.issue()))
        new.issue().write(tmp_path)
        ca_file.write_bytes(new.pem)
        assert await scrapes(server, trusting(new, tmp_path, new.issue()))
        assert not await scrapes(server, trusting(new, tmp_path, old.issue()))
        assert not await scrapes(server, trusting(old, tmp_path, new.issue()))
