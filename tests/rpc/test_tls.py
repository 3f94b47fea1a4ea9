"""TLS and mutual TLS over real sockets, with files that change while the server runs."""

from __future__ import annotations

import os
import ssl
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fakes.certificates import Authority, Pair
from mlxpool_server.errors import SettingsError
from mlxpool_server.rpc.tls import Certificates, TlsFiles
from rpc.harness import PATIENCE_S, Server, open_channel, running_server
from rpc.metrics_reader import fetch, metrics_address


def credentials(authority: Authority, client: Pair | None = None) -> grpc.ChannelCredentials:
    if client is None:
        return grpc.ssl_channel_credentials(authority.pem)
    return grpc.ssl_channel_credentials(authority.pem, client.key, client.certificate)


async def connects(
    address: str, channel_credentials: grpc.ChannelCredentials | None = None
) -> bool:
    """Whether a new connection is answered."""
    async with open_channel(address, channel_credentials) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        except aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            return False
        return True


def events_of(server: Server, event: str) -> list[Any]:
    return [entry for entry in server.logs.entries if entry["event"] == event]


@asynccontextmanager
async def tls_server(
    folder: Path, authority: Authority, client: Pair | None = None, **settings: Any
) -> AsyncGenerator[Server, None]:
    certificate, key = authority.issue().write(folder)
    async with running_server(
        credentials=credentials(authority, client),
        tls_certificate=certificate,
        tls_key=key,
        **settings,
    ) as server:
        yield server


async def test_tls(tmp_path: Path) -> None:
    """Who trusts the certificate is served; plaintext and who does not trust it are not."""
    authority = Authority()
    async with tls_server(tmp_path, authority) as server:
        await server.assert_serves()
        assert not await connects(server.address)
        assert not await connects(server.address, credentials(Authority("another")))


async def test_mutual_tls(tmp_path: Path) -> None:
    """Only clients with a certificate of the clients' authority get in."""
    authority, clients = Authority(), Authority("clients")
    ca_file = tmp_path / "clients.crt"
    ca_file.write_bytes(clients.pem)
    client = clients.issue("a client")
    async with tls_server(tmp_path, authority, client, tls_client_ca=ca_file) as server:
        await server.assert_serves()
        assert not await connects(server.address, credentials(authority))
        stranger = Authority("strangers").issue("a stranger")
        assert not await connects(server.address, credentials(authority, stranger))


async def test_a_unix_socket_stays_plaintext(tmp_path: Path) -> None:
    """The file system guards it."""
    listen = ("127.0.0.1:0", f"unix:{tmp_path}/mlxpool.sock")
    async with tls_server(tmp_path, Authority(), listen=listen) as server:
        await server.assert_serves()
        assert await connects(listen[1])


async def test_a_new_pair_is_used_without_a_restart(tmp_path: Path) -> None:
    """New connections get it; the ones that stand go on."""
    old, new = Authority("old"), Authority("new")
    async with tls_server(tmp_path, old) as server:
        await server.assert_serves()
        new.issue().write(tmp_path)
        assert await connects(server.address, credentials(new))
        assert not await connects(server.address, credentials(old))
        assert len(events_of(server, "tls.reloaded")) == 1
        # The stubs' own connection, from before.
        await server.assert_serves()


async def test_two_addresses(tmp_path: Path) -> None:
    """Both are served, and both get a new pair."""
    old, new = Authority("old"), Authority("new")
    listen = ("127.0.0.1:0", "localhost:0")
    async with tls_server(tmp_path, old, listen=listen) as server:
        (listening,) = events_of(server, "server.listening")
        for address in listening["addresses"]:
            assert await connects(address, credentials(old))
        new.issue().write(tmp_path)
        for address in listening["addresses"]:
            assert await connects(address, credentials(new))


async def test_whoever_notices_a_new_pair_first(tmp_path: Path) -> None:
    """Calls get it even when a scraper's connection was the one that had it read."""
    old, new = Authority("old"), Authority("new")
    async with tls_server(tmp_path, old, metrics_listen="127.0.0.1:0") as server:
        new.issue().write(tmp_path)
        context = ssl.create_default_context(cadata=new.pem.decode())
        await fetch(f"https://{metrics_address(server)}/metrics", tls=context)
        assert await connects(server.address, credentials(new))
        assert len(events_of(server, "tls.reloaded")) == 1


async def test_a_new_client_authority_is_used_without_a_restart(tmp_path: Path) -> None:
    """Certificates of the old one are no good any more."""
    authority, old, new = Authority(), Authority("old clients"), Authority("new clients")
    ca_file = tmp_path / "clients.crt"
    ca_file.write_bytes(old.pem)
    client = old.issue("a client")
    async with tls_server(tmp_path, authority, client, tls_client_ca=ca_file) as server:
        await server.assert_serves()
        ca_file.write_bytes(new.pem)
        assert await connects(server.address, credentials(authority, new.issue("newer")))
        assert not await connects(server.address, credentials(authority, client))


async def test_a_broken_pair_changes_nothing(tmp_path: Path) -> None:
    """The old one goes on; the log says why, once; the next good pair is taken."""
    old, new = Authority("old"), Authority("new")
    async with tls_server(tmp_path, old) as server:
        # As between the two writes of somebody who replaces both: a pair that does not match.
        (tmp_path / "tls.crt").write_bytes(new.issue().certificate)
        assert await connects(server.address, credentials(old))
        assert await connects(server.address, credentials(old))
        (problem,) = events_of(server, "tls.not_reloaded")
        assert "key values mismatch" in problem["problem"]
        (tmp_path / "tls.key").unlink()
        assert await connects(server.address, credentials(old))
        new.issue().write(tmp_path)
        assert await connects(server.address, credentials(new))


async def test_a_swapped_link_is_a_change(tmp_path: Path) -> None:
    """Kubernetes replaces the folder behind a link, with files as old as it likes."""
    old, new = Authority("old"), Authority("new")
    for name, authority in (("one", old), ("two", new)):
        (tmp_path / name).mkdir()
        for file in authority.issue().write(tmp_path / name):
            os.utime(file, ns=(1, 1))
    link = tmp_path / "current"
    link.symlink_to("one")
    files = {"tls_certificate": link / "tls.crt", "tls_key": link / "tls.key"}
    async with running_server(credentials=credentials(old), **files) as server:
        await server.assert_serves()
        (tmp_path / "next").symlink_to("two")
        (tmp_path / "next").rename(link)
        assert await connects(server.address, credentials(new))


# ---------------------------------------------------------------- at the start


def certificate_problem(files: TlsFiles) -> str:
    with pytest.raises(SettingsError) as caught:
        Certificates(files)
    return str(caught.value)


@pytest.mark.parametrize("missing", ["tls.crt", "tls.key"])
def test_a_missing_file(tmp_path: Path, missing: str) -> None:
    """The error names the setting and the file."""
    certificate, key = Authority().issue().write(tmp_path)
    (tmp_path / missing).unlink()
    setting = {"tls.crt": "tls_certificate", "tls.key": "tls_key"}[missing]
    problem = certificate_problem(TlsFiles(certificate, key))
    assert problem == f"{setting} {tmp_path / missing}: No such file or directory"


def test_a_pair_that_does_not_match(tmp_path: Path) -> None:
    """The error says so."""
    authority = Authority()
    certificate, _ = authority.issue().write(tmp_path, "one")
    _, key = authority.issue().write(tmp_path, "two")
    assert "key values mismatch" in certificate_problem(TlsFiles(certificate, key))


def test_files_that_are_no_pem(tmp_path: Path) -> None:
    """Neither the pair nor the clients' authority."""
    certificate, key = Authority().issue().write(tmp_path)
    junk = tmp_path / "junk"
    junk.write_bytes(b"\x00\xff junk")
    assert "are no pair of PEM files" in certificate_problem(TlsFiles(junk, key))
    assert "holds no PEM" in certificate_problem(TlsFiles(certificate, key, junk))


@pytest.mark.parametrize("name", ["tls.crt", "tls.key", "ca.crt"])
def test_a_pipe_in_place_of_a_file(tmp_path: Path, name: str) -> None:
    """It is not waited for: handshakes look at these files."""
    certificate, key = Authority().issue().write(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    authority = tmp_path / name if name == "ca.crt" else None
    problem = certificate_problem(TlsFiles(certificate, key, authority))
    assert problem.endswith(f"{tmp_path / name} is no regular file")


def test_a_key_with_a_password(tmp_path: Path) -> None:
    """Nobody is asked for it on the terminal."""
    certificate, key = Authority().issue(password=b"secret").write(tmp_path)
    assert "write it without one" in certificate_problem(TlsFiles(certificate, key))
