"""A fast BLAS for MLX's Linux CPU build, loaded before MLX looks for its own.

PyPI's MLX wheel for Linux links the reference BLAS. Symbols that an earlier library made global
win over it, so loading OpenBLAS first replaces it: 5 GFLOP/s become 140 on two cores. This module
imports no mlx, because afterwards is too late.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlxpool_server.mlx_backend.cpu_quota import usable_cpus
from mlxpool_server.mlx_backend.user_cache import cache_folder

_WHEEL = "scipy-openblas32"
_PREFIX = "scipy_"
# What MLX takes from a BLAS, and what this module calls.
_GEMM = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")
_CONTROL = ("openblas_get_config", "openblas_get_num_threads", "openblas_set_num_threads")
_RENAME_TIMEOUT_S = 60
# An idle thread waits busily for 2^16 cycles, some tens of microseconds, as between the products of
# one step; OpenBLAS's own 2^26 keep a core from the event loop after each of them.
THREAD_TIMEOUT = ("OPENBLAS_THREAD_TIMEOUT", "16")


@dataclass(frozen=True, slots=True)
class OpenBlas:
    """What MLX's matrix products run on.

    `problem` says why the reference BLAS stays, and is None when OpenBLAS was loaded; `path` and
    `config` are then set, and `threads` is the most that one product uses; `set_threads` lowers it
    and raises it again.
    """

    path: Path | None = None
    config: str = ""
    threads: int = 0
    problem: str | None = None
    # None where the number of threads was asked for, or nothing was loaded.
    set_threads: Callable[[int], None] | None = None


def load_openblas(library: Path | None = None, threads: int | None = None) -> OpenBlas | None:
    """Load OpenBLAS for the whole process; return None where MLX does not need it.

    It is needed on Linux with MLX's CPU wheel. Where `library` names none, the system's is taken,
    else the one of the `scipy-openblas32` wheel. Never fails for want of a library: the returned
    value says what is missing. `OPENBLAS_NUM_THREADS` wins over `threads`, which is by default
    what affinity and the container allow.

    Raises: RuntimeError when MLX was imported before, and has bound its BLAS.
    """
    if not _uses_cpu_wheel():
        return None
    if "mlx.core" in sys.modules:
        message = "load_openblas() must run before the first import of mlx.core"
        raise RuntimeError(message)
    # A library that was asked for and fails is a problem to show, not one to paper over.
    finders = (lambda: library,) if library else (_system_library, _wheel_library)
    problems: list[str] = []
    for find in finders:
        try:
            if path := find():
                return _load(path, threads)
        except (OSError, subprocess.SubprocessError) as error:
            problems.append(str(error))
    return OpenBlas(problem="; ".join(problems) or f"neither the system nor {_WHEEL} has it")


def _uses_cpu_wheel() -> bool:
    if not sys.platform.startswith("linux"):
        return False
    installed = {name for name in ("mlx-cpu", "mlx-cuda-12", "mlx-cuda-13") if _files(name)}
    return installed == {"mlx-cpu"}


def _system_library() -> Path | None:
    name = ctypes.util.find_library("openblas")
    return Path(name) if name else None


def _wheel_library() -> Path | None:
    """The wheel's library under the usual symbol names: a copy in the cache folder, made once."""
    original = next((path for path in _files(_WHEEL) if path.suffix == ".so"), None)
    if original is None:
        return None
    key = f"{importlib.metadata.version(_WHEEL)}-{original.stat().st_size}"
    copy = cache_folder() / "openblas" / f"libopenblas-{key}.so"
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        _copy_renamed(original, copy)
    return copy


def _copy_renamed(original: Path, copy: Path) -> None:
    # The finished file appears at once, so another process never loads half of one.
    with tempfile.TemporaryDirectory(dir=copy.parent, prefix=".making-") as folder:
        names = Path(folder) / "names"
        names.write_text("".join(f"{_PREFIX}{name} {name}\n" for name in (*_GEMM, *_CONTROL)))
        draft = Path(folder) / copy.name
        shutil.copyfile(original, draft)
        command = [_patchelf(), "--rename-dynamic-symbols", str(names), str(draft)]
        subprocess.run(command, check=True, capture_output=True, timeout=_RENAME_TIMEOUT_S)  # noqa: S603  # our own arguments
        draft.replace(copy)


def _patchelf() -> str:
    # Not on PATH when the virtual environment is used without being activated.
    beside = Path(sysconfig.get_path("scripts")) / "patchelf"
    found = str(beside) if beside.exists() else shutil.which("patchelf")
    if found is None:
        raise FileNotFoundError(f"the symbols of {_WHEEL} need patchelf, which is missing")
    return found


def _files(distribution: str) -> list[Path]:
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [Path(str(file.locate())) for file in files]


def _load(path: Path, threads: int | None) -> OpenBlas:
    os.environ.setdefault(*THREAD_TIMEOUT)
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    missing = [name for name in (*_GEMM, *_CONTROL) if not hasattr(library, name)]
    if missing:
        raise OSError(f"{path}: not OpenBLAS, it lacks {', '.join(missing)}")
    library.openblas_get_config.restype = ctypes.c_char_p
    is_asked_for = bool(threads or os.environ.get("OPENBLAS_NUM_THREADS"))
    if not os.environ.get("OPENBLAS_NUM_THREADS"):
        library.openblas_set_num_threads(threads or default_threads(usable_cpus()))
    return OpenBlas(
        path=path,
        config=library.openblas_get_config().decode(errors="replace").strip(),
        threads=library.openblas_get_num_threads(),
        set_threads=None if is_asked_for else library.openblas_set_num_threads,
    )


def default_threads(cpus: int) -> int:
    """All of one or two processors, else one less.

    OpenBLAS's threads wait busily for each other: where the event loop or a neighbour needs one of
    their cores, every product waits for a time slice. On two cores the second is worth that risk.
    """
    return cpus if cpus <= 2 else cpus - 1  # noqa: PLR2004 - measured, see docs/development.md
