"""The servers, and the programs, each started once."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from conformance.programs import CLIENTS, MissingToolchainError, Program
from e2e.server_process import ServerProcess
from fakes.certificates import Authority
from mlxpool_server.mlx_backend.demo_model import ensure_demo_model
from mlxpool_server.rpc.access.keys import hash_of, new_key


@dataclass(frozen=True, slots=True)
class Guarded:
    """A server behind TLS and keys."""

    address: str
    ca: Path
    api_key: str


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--client", choices=CLIENTS, help="only this client of the conformance suite")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "client_name" in metafunc.fixturenames:
        only = metafunc.config.getoption("--client")
        metafunc.parametrize("client_name", [only] if only else list(CLIENTS), scope="session")


@pytest.fixture(scope="session")
def demo_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    ensure_demo_model(print)
    with ServerProcess(tmp_path_factory.mktemp("demo") / "log.jsonl") as process:
        yield process.address


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    ensure_demo_model(print)
    folder = tmp_path_factory.mktemp("guarded")
    authority, api_key = Authority(), new_key()
    certificate, key = authority.issue().write(folder)
    (folder / "ca.crt").write_bytes(authority.pem)
    entry = f'[[keys]]\nname = "mine"\nsha256 = "{hash_of(api_key)}"\nroles = ["inference"]\n'
    (folder / "keys.toml").write_text(entry, encoding="utf-8")
    flags = ("--tls-certificate", certificate, "--tls-key", key)
    keys = ("--api-keys-file", folder / "keys.toml")
    with ServerProcess(folder / "log.jsonl", *map(str, flags + keys)) as process:
        yield Guarded(process.address, folder / "ca.crt", api_key)


@pytest.fixture(scope="session")
def nobody() -> Iterator[str]:
    """An address that is taken, and at which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Builds a client once, into the folder returned; what cannot be built here skips the test."""
    folders: dict[str, Path | MissingToolchainError] = {}

    def folder_of(name: str) -> Path:
        if name not in folders:
            folder = tmp_path_factory.mktemp(name)
            try:
                CLIENTS[name].build_in(folder)
                folders[name] = folder
            except MissingToolchainError as error:
                folders[name] = error
        found = folders[name]
        if isinstance(found, MissingToolchainError):
            pytest.skip(f"the {name} client: {found}")
        return found

    return folder_of


@pytest.fixture
def built(build: Callable[[str], Path], client_name: str) -> Path:
    return build(client_name)


@pytest.fixture(scope="session")
def programs() -> Iterator[tuple[dict[str, Program], ExitStack]]:
    with ExitStack() as stack:
        yield {}, stack


@pytest.fixture
def program(
    programs: tuple[dict[str, Program], ExitStack], built: Path, client_name: str
) -> Program:
    """The client's running program, started once."""
    running, stack = programs
    if client_name not in running:
        client = CLIENTS[client_name]
        command = [word.format(out=built) for word in client.run]
        started = stack.enter_context(Program(command, client.folder, sys.__stderr__))
        running[client_name] = started
    return running[client_name]
