"""A real server process with the demo model, for every test in this folder."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from e2e.server_process import ROOT, ServerProcess
from mlxpool_server.mlx_backend.demo_model import ensure_demo_model
from replicas.fleet import SMG


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The converted demo model; made here if it was not made before."""
    return ensure_demo_model(print)


@pytest.fixture(scope="session")
def server_process(
    demo_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("server") / "log.jsonl") as process:
        yield process


@pytest.fixture(scope="session")
def server_address(server_process: ServerProcess) -> str:
    """HOST:PORT of a server whose only model is `demo`."""
    return server_process.address


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """all-MiniLM-L6-v2; fetched here if it was not fetched before."""
    command = [ROOT / "scripts" / "install-minilm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        if os.environ.get("CI") == "true":
            pytest.fail(done.stderr)
        pytest.skip(f"no all-MiniLM-L6-v2: {done.stderr}")
    return Path(done.stdout.strip())


@pytest.fixture(scope="session")
def grpcurl() -> str:
    built = ROOT / ".tools" / "grpcurl"
    found = str(built) if built.exists() else shutil.which("grpcurl")
    if found is None:
        how = "no grpcurl; scripts/install-grpcurl builds it"
        if os.environ.get("CI") == "true":
            pytest.fail(how)
        pytest.skip(how)
    return found


@pytest.fixture(scope="session")
def smg() -> None:
    """Skips where the Shepherd Model Gateway is not installed."""
    if not SMG.exists():
        how = "no gateway; scripts/install-smg installs it"
        if os.environ.get("CI") == "true":
            pytest.fail(how)
        pytest.skip(how)


@pytest.fixture
def channel(server_address: str) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server_address) as channel:
        yield channel
