"""A fast BLAS for MLX's Linux CPU build, loaded before MLX looks for its own.

PyPI's MLX wheel for Linux links the reference BLAS. Symbols that an earlier library made global
win over it, so loading OpenBLAS first replaces it: 5 GFLOP/s become 135 on two cores. This module
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
from dataclasses import dataclass
from pathlib import Path

from mlxpool_server.mlx_backend.cpu_quota import usable_cpus
from mlxpool_server.mlx_backend.user_cache import cache_folder

_WHEEL = "cmeel-openblas"
_FORTRAN = "libgfortran.so.5"
_PATCH_TIMEOUT_S = 60


@dataclass(frozen=True, slots=True)
class OpenBlas:
    """What MLX's matrix products run on.

    `problem` says why the reference BLAS stays, and is None when OpenBLAS was loaded; `path` and
    `config` are then set, and `threads` is the most that one product uses.
    """

    path: Path | None = None
    config: str = ""
    threads: int = 0
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class _Candidate:
    """`load_first` are the libraries `path` needs and the dynamic linker would not find."""

    path: Path
    load_first: tuple[Path, ...] = ()


def load_openblas(library: Path | None = None, threads: int | None = None) -> OpenBlas | None:
    """Load OpenBLAS for the whole process; return None where MLX does not need it.

    It is needed on Linux with MLX's CPU wheel. Where `library` names none, the system's is taken,
    else the one of the `cmeel-openblas` wheel. Never fails for want of a library: the returned
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
    finders = (lambda: _Candidate(library),) if library else _FINDERS
    problems: list[str] = []
    for find in finders:
        try:
            if candidate := find():
                return _load(candidate, threads)
        except (OSError, subprocess.SubprocessError) as error:
            problems.append(str(error))
    return OpenBlas(problem="; ".join(problems) or f"neither the system nor {_WHEEL} has it")


def _uses_cpu_wheel() -> bool:
    if not sys.platform.startswith("linux"):
        return False
    installed = {name for name in ("mlx-cpu", "mlx-cuda-12", "mlx-cuda-13") if _files(name)}
    return installed == {"mlx-cpu"}


def _system() -> _Candidate | None:
    name = ctypes.util.find_library("openblas")
    return _Candidate(Path(name)) if name else None


def _wheel() -> _Candidate | None:
    """The wheel's library as it is: loads where the system has the Fortran runtime."""
    library = _wheel_library()
    return _Candidate(library) if library else None


def _wheel_with_bundled_fortran() -> _Candidate | None:
    """A copy of the wheel's library that uses the Fortran runtime inside MLX's wheel."""
    library = _wheel_library()
    bundled = [path for path in _files("mlx-cpu") if path.parent.name == "mlx_cpu.libs"]
    fortran = next((path for path in bundled if path.name.startswith("libgfortran-")), None)
    if library is None or fortran is None:
        return None
    # The arm64 wheel has no libquadmath; where there is one, libgfortran needs it.
    quadmath = [path for path in bundled if path.name.startswith("libquadmath-")]
    return _Candidate(_patched_copy(library, fortran.name), (*quadmath, fortran))


def _wheel_library() -> Path | None:
    # libopenblas.so and .so.0 are whole copies of the same file.
    return next((path for path in _files(_WHEEL) if path.name == "libopenblas.so.0.3"), None)


def _files(distribution: str) -> list[Path]:
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [Path(str(file.locate())) for file in files]


_FINDERS = (_system, _wheel, _wheel_with_bundled_fortran)


def _patched_copy(library: Path, fortran: str) -> Path:
    version = importlib.metadata.version(_WHEEL)
    key = f"{version}-{library.stat().st_size}-{fortran.partition('.so')[0]}"
    copy = cache_folder() / "openblas" / f"libopenblas-{key}.so"
    if copy.exists():
        return copy
    copy.parent.mkdir(parents=True, exist_ok=True)
    # The finished file appears at once, so another process never loads half of one.
    with tempfile.TemporaryDirectory(dir=copy.parent, prefix=".patching-") as folder:
        draft = Path(folder) / copy.name
        shutil.copyfile(library, draft)
        command = [_patchelf(), "--replace-needed", _FORTRAN, fortran, str(draft)]
        subprocess.run(command, check=True, capture_output=True, timeout=_PATCH_TIMEOUT_S)  # noqa: S603
        draft.replace(copy)
    return copy


def _patchelf() -> str:
    # Not on PATH when the virtual environment is used without being activated.
    beside = Path(sysconfig.get_path("scripts")) / "patchelf"
    found = str(beside) if beside.exists() else shutil.which("patchelf")
    if found is None:
        raise FileNotFoundError(f"{_FORTRAN} is missing, and so is patchelf to do without it")
    return found


def _load(candidate: _Candidate, threads: int | None) -> OpenBlas:
    for path in candidate.load_first:
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(candidate.path), mode=ctypes.RTLD_GLOBAL)
    if not hasattr(library, "cblas_sgemm") or not hasattr(library, "openblas_get_config"):
        raise OSError(f"{candidate.path}: no cblas_sgemm of OpenBLAS in it")
    library.openblas_get_config.restype = ctypes.c_char_p
    if not os.environ.get("OPENBLAS_NUM_THREADS"):
        library.openblas_set_num_threads(threads or usable_cpus())
    return OpenBlas(
        path=candidate.path,
        config=library.openblas_get_config().decode(errors="replace").strip(),
        threads=library.openblas_get_num_threads(),
    )
