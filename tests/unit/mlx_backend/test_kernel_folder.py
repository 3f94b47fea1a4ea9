"""Where compiled CUDA kernels are kept."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlxpool_server.mlx_backend import kernel_folder
from mlxpool_server.mlx_backend.kernel_folder import VARIABLE, keep_kernels


@pytest.fixture
def kind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setenv("MLXPOOL_CACHE_DIR", str(tmp_path))
    # So that it is taken back afterwards.
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr(kernel_folder, "device_kind", lambda: "cuda")
    return "cuda"


@pytest.mark.usefixtures("kind")
def test_they_outlive_the_machines_temporary_files(tmp_path: Path) -> None:
    """In this user's cache folder, one folder for each version and device."""
    keep_kernels()
    assert Path(os.environ[VARIABLE]).parent == tmp_path / "kernels"


@pytest.mark.usefixtures("kind")
def test_the_operator_may_name_another_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """What MLX's own variable says stays."""
    monkeypatch.setenv(VARIABLE, "/elsewhere")
    keep_kernels()
    assert os.environ[VARIABLE] == "/elsewhere"


@pytest.mark.usefixtures("kind")
def test_other_devices_have_no_such_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is set on a CPU or on Metal."""
    monkeypatch.setattr(kernel_folder, "device_kind", lambda: "metal")
    keep_kernels()
    assert VARIABLE not in os.environ
