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
def program_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Program]]:
    """The running program of a client; one that cannot be built here skips the test."""
    running: dict[str, Program | MissingToolchainError] = {}
    with ExitStack() as stack:

        def start(name: str) -> Program | MissingToolchainError:
            client = CLIENTS[name]
            try:
                command = client.command(tmp_path_factory.mktemp(name))
            except MissingToolchainError as error:
                return error
            return stack.enter_context(Program(command, client.folder, sys.__stderr__))

        def program(name: str) -> Program:
            if name not in running:
                running[name] = start(name)
            found = running[name]
            if isinstance(found, MissingToolchainError):
                pytest.skip(f"the {name} client: {found}")
            return found

        yield program


@pytest.fixture
def program(program_of: Callable[[str], Program], client_name: str) -> Program:
    return program_of(client_name)
