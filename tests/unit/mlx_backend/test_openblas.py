"""Each case runs in its own process: a BLAS that was loaded stays, and so does MLX."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlxpool_server.mlx_backend.openblas import default_threads, load_openblas

WITHOUT_SYSTEM_LIBRARY = "import ctypes.util; ctypes.util.find_library = lambda name: None\n"
LOAD = """
import dataclasses, json, sys
from pathlib import Path
from mlxpool_server.mlx_backend.openblas import load_openblas
blas = load_openblas({arguments})
"""
# asdict() would copy the library's function.
REPORT = (
    "if blas: blas = dataclasses.replace(blas, set_threads=blas.set_threads and 'can be set')\n"
    "print(json.dumps(blas and dataclasses.asdict(blas), default=str))\n"
)


def _has(distribution: str) -> bool:
    try:
        return bool(importlib.metadata.version(distribution))
    except importlib.metadata.PackageNotFoundError:
        return False


needs_wheels = pytest.mark.skipif(
    not (sys.platform == "linux" and _has("mlx-cpu") and _has("scipy-openblas32")),
    reason="OpenBLAS is for MLX's CPU wheel on Linux",
)


def start(code: str, cache: Path, **environment: str) -> subprocess.Popen[str]:
    env = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=env
        | {"PYTHONPATH": os.pathsep.join(sys.path), "MLXPOOL_CACHE_DIR": str(cache)}
        | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> Any:
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert not errors
    return json.loads(output)


def load(cache: Path, arguments: str = "", after: str = REPORT, **environment: str) -> Any:
    code = WITHOUT_SYSTEM_LIBRARY + LOAD.format(arguments=arguments) + after
    return finish(start(code, cache, **environment))


@needs_wheels
def test_wheel_library_loads_without_system_libraries(tmp_path: Path) -> None:
    """With no OpenBLAS on the system, the wheel's library loads, under the usual names."""
    blas = load(tmp_path)
    assert blas["problem"] is None
    # Built for every CPU of the architecture, not for the one of the build machine.
    assert "DYNAMIC_ARCH" in blas["config"]
    assert blas["threads"] >= 1


@needs_wheels
def test_products_are_right_and_use_openblas(tmp_path: Path) -> None:
    """A product of ones is right, and the process has OpenBLAS mapped."""
    after = """
import mlx.core as mx
product = mx.ones((64, 512)) @ mx.ones((512, 64))
maps = Path("/proc/self/maps").read_text()
print(json.dumps([product.min().item(), product.max().item(), "libopenblas" in maps]))
"""
    assert load(tmp_path, after=after) == [512.0, 512.0, True]


@needs_wheels
def test_copy_is_made_once(tmp_path: Path) -> None:
    """A second process uses the copy that the first one made."""
    load(tmp_path)
    (copy,) = (tmp_path / "openblas").iterdir()
    made_at = copy.stat().st_mtime_ns
    assert load(tmp_path)["path"] == str(copy)
    assert copy.stat().st_mtime_ns == made_at


@needs_wheels
def test_two_processes_may_start_at_once(tmp_path: Path) -> None:
    """Two first starts at the same time both get OpenBLAS and leave no draft behind."""
    code = WITHOUT_SYSTEM_LIBRARY + LOAD.format(arguments="") + REPORT
    processes = [start(code, tmp_path) for _ in range(2)]
    assert [finish(process)["problem"] for process in processes] == [None, None]
    assert not list(tmp_path.glob("openblas/.making-*"))


@needs_wheels
def test_one_core_stays_free_where_there_are_three_or_more() -> None:
    """OpenBLAS takes all of one or two processors, else one less."""
    assert [default_threads(cpus) for cpus in (1, 2, 3, 8)] == [1, 2, 2, 7]


def test_threads_are_what_was_asked_for(tmp_path: Path) -> None:
    """The number of threads is the caller's."""
    assert load(tmp_path, "threads=1")["threads"] == 1


@needs_wheels
@pytest.mark.parametrize(("asked", "used"), [({}, "16"), ({"OPENBLAS_THREAD_TIMEOUT": "20"}, "20")])
def test_idle_threads_soon_sleep(tmp_path: Path, asked: dict[str, str], used: str) -> None:
    """OpenBLAS reads how long they wait busily when it is loaded; the environment wins."""
    code = LOAD.format(arguments="") + "import os; print(json.dumps(os.environ[THREAD_TIMEOUT[0]]))"
    code = code.replace("import load_openblas", "import THREAD_TIMEOUT, load_openblas")
    assert finish(start(code, tmp_path, **asked)) == used


@needs_wheels
def test_environment_wins_over_threads(tmp_path: Path) -> None:
    """OPENBLAS_NUM_THREADS, which OpenBLAS documents, wins over the caller's number."""
    assert load(tmp_path, "threads=2", OPENBLAS_NUM_THREADS="1")["threads"] == 1


@needs_wheels
@pytest.mark.parametrize("library", ["/nowhere/libopenblas.so", "libm.so.6"])
def test_named_library_that_is_none_is_a_problem(tmp_path: Path, library: str) -> None:
    """A named library that is missing, or is no OpenBLAS, is reported and not replaced."""
    blas = load(tmp_path, f"library=Path({library!r})")
    assert library in blas["problem"]
    assert blas["path"] is None


@needs_wheels
def test_unwritable_cache_is_a_problem_not_a_crash(tmp_path: Path) -> None:
    """A cache folder that cannot be made leaves the reference BLAS and the reason."""
    file = tmp_path / "file"
    file.touch()
    blas = load(file)
    assert str(file) in blas["problem"]


@needs_wheels
def test_loading_after_mlx_is_a_programming_error(tmp_path: Path) -> None:
    """Once MLX is imported it has bound its BLAS, so loading another raises."""
    code = "import mlx.core\n" + LOAD.format(arguments="")
    process = start(code, tmp_path)
    _, errors = process.communicate(timeout=60)
    assert "RuntimeError: load_openblas() must run before" in errors


def test_other_platforms_need_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """On macOS nothing is loaded, whatever was imported before."""
    monkeypatch.setattr(sys, "platform", "darwin")
    assert load_openblas() is None
