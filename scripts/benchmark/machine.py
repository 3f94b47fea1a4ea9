"""Where and with what a benchmark ran."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmark.servers import openblas
from mlxpool_server.mlx_backend.cpu_quota import usable_cpus
from mlxpool_server.version import __version__

_PACKAGES = ("mlx", "mlx-lm", "grpcio", "protobuf", "transformers")
_TIMEOUT_S = 20.0


def describe_machine(root: Path) -> dict[str, object]:
    blas = openblas()
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cpus": usable_cpus() if sys.platform.startswith("linux") else os.cpu_count(),
        "memory_gib": round(_memory_bytes() / 2**30, 1),
        "gpu": _gpu(),
        "python": platform.python_version(),
        "mlxpool": __version__,
        "commit": _commit(root),
        "versions": {name: _version(name) for name in _PACKAGES},
        "blas": blas.config if blas and blas.path else (blas.problem if blas else None),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gpu() -> str | None:
    return _output(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])


def _commit(root: Path) -> str | None:
    commit = _output(["git", "-C", str(root), "rev-parse", "--short", "HEAD"])
    changed = _output(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    return f"{commit} with changes" if commit and changed else commit


def _output(command: list[str]) -> str | None:
    try:
        output = subprocess.check_output(
            command, text=True, stderr=subprocess.DEVNULL, timeout=_TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return output.strip() or None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
