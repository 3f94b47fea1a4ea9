"""The wheel that users install: its client needs no MLX, and talks to the server.

The first run fetches the client's dependencies; they are kept in pytest's cache folder, so that
later runs need no network.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVER_ONLY = {"mlx", "mlx_lm", "numpy", "pydantic", "structlog", "transformers"}

pytestmark = [pytest.mark.demo_model, pytest.mark.timeout(600)]


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    # PYTHONPATH would show the source tree to the clean environment.
    env = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        command, env=env, cwd="/", capture_output=True, text=True, check=False, timeout=300
    )


def output_of(*command: str | Path) -> str:
    done = run(*command)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    output_of(*pip, "--wheel-dir", folder, ROOT)
    (built,) = folder.glob("mlxpool-*.whl")
    return built


@pytest.fixture(scope="session")
def client_python(
    wheel: Path, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Path:
    """The interpreter of an environment that has only `pip install mlxpool`."""
    assert pytestconfig.cache is not None
    kept = pytestconfig.cache.mkdir("client-wheels")
    folder = tmp_path_factory.mktemp("client")
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "--no-index", "--find-links", kept, wheel]
    if run(*install).returncode != 0:
        output_of(python, "-m", "pip", "download", "--quiet", "--dest", kept, wheel)
        output_of(*install)
    return python


def test_wheel_has_the_packages_and_nothing_else(wheel: Path) -> None:
    """Server, client, stubs with their types, and the licence; no tests, no source roots."""
    names = zipfile.ZipFile(wheel).namelist()
    roots = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert roots == {"mlxpool", "mlxpool_server", "mlxpool_client"}
    assert {f"{root}/py.typed" for root in roots} <= set(names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_client_installs_no_server_packages(client_python: Path) -> None:
    """`pip install mlxpool` brings neither MLX nor what only the server uses."""
    frozen = output_of(client_python, "-m", "pip", "list", "--format=freeze")
    installed = {line.split("==")[0].lower().replace("-", "_") for line in frozen.splitlines()}
    assert "mlxpool" in installed
    assert not installed & SERVER_ONLY


def test_command_line_imports_no_server_packages(client_python: Path) -> None:
    """`mlxpool --help` works with the client alone, even where the server is installed as well."""
    for python in (client_python, Path(sys.executable)):
        done = run(python, "-X", "importtime", python.parent / "mlxpool", "--help")
        assert done.returncode == 0, done.stderr
        assert "serve" in done.stdout
        lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
        imported = {line.rpartition("|")[2].strip().split(".")[0] for line in lines}
        assert "mlxpool_client" in imported
        assert not imported & SERVER_ONLY


def test_installed_client_generates(client_python: Path, server_address: str) -> None:
    """The client from the wheel gets text from a running server."""
    code = f"""
from mlxpool_client import Client
with Client({server_address!r}, timeout_s=100) as client:
    print(client.generate_text("demo", "One, two, three,", max_tokens=4, temperature=0))
"""
    assert output_of(client_python, "-W", "error", "-c", code).strip()
