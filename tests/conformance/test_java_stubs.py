"""Java has no client of its own: its stubs are made from the protos and compile."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from conformance.programs import BUILD_TIMEOUT_S
from e2e.server_process import ROOT

FOLDER = ROOT / "clients" / "java"

pytestmark = pytest.mark.timeout(900)


def test_stubs_compile() -> None:
    """Maven makes a class of each service, with the plugin that is installed."""
    if missing := [tool for tool in ("mvn", "javac") if shutil.which(tool) is None]:
        pytest.skip(f"Java: no {' and no '.join(missing)} on this machine")
    installed = subprocess.run(
        [ROOT / "scripts" / "install-grpc-java"], capture_output=True, text=True, check=False
    )
    if installed.returncode == os.EX_UNAVAILABLE:
        pytest.skip(installed.stderr.strip())
    assert installed.returncode == 0, installed.stderr
    shutil.rmtree(FOLDER / "target", ignore_errors=True)
    plugin = ROOT / ".tools" / "protoc-gen-grpc-java"
    maven = ["mvn", "--batch-mode", "--no-transfer-progress", f"-Dgrpc.plugin={plugin}", "compile"]
    done = subprocess.run(
        maven, cwd=FOLDER, capture_output=True, text=True, check=False, timeout=BUILD_TIMEOUT_S
    )
    assert done.returncode == 0, done.stdout
    classes = {file.stem for file in (FOLDER / "target/classes/mlxpool/v1").glob("*.class")}
    assert {"ModelServiceGrpc", "MemoryServiceGrpc", "GenerateResponse"} <= classes
