"""The files that another program's tokenizer is made from: all it needs, and no more."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlxpool_server.domain import Layout, ModelSpec
from mlxpool_server.errors import LoadFailedError
from mlxpool_server.mlx_backend import tokenizer_files
from mlxpool_server.mlx_backend.checked_loader import CheckedLoader
from mlxpool_server.mlx_backend.loader import MlxLoader
from mlxpool_server.mlx_backend.tokenizer_files import read_tokenizer_files
from tiny_models import write_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "m")


@pytest.fixture
def loader() -> CheckedLoader:
    return CheckedLoader(MlxLoader(prefill_step_tokens=64, default_layout=Layout.FLOAT32))


def problem_of(folder: Path) -> str:
    with pytest.raises(LoadFailedError) as caught:
        read_tokenizer_files("m", folder)
    return caught.value.problem


def test_what_is_read(folder: Path, loader: CheckedLoader) -> None:
    """Tokenizer, template and configuration; neither weights nor code nor other JSON files."""
    for name in (
        "chat_template.jinja",
        "modeling.py",
        "notes.json",
        "model.safetensors.index.json",
    ):
        (folder / name).write_text("{}")
    files = loader.tokenizer_files(ModelSpec("m", folder))
    assert {"tokenizer.json", "config.json", "chat_template.jinja"} <= set(files)
    assert files["tokenizer.json"] == (folder / "tokenizer.json").read_bytes()
    assert not {"modeling.py", "notes.json", "model.safetensors.index.json"} & set(files)
    assert not [name for name in files if name.endswith(".safetensors")]


def test_a_folder_from_a_stranger(folder: Path, loader: CheckedLoader, tmp_path: Path) -> None:
    """A link that leaves the folder is not followed: nothing else of this machine is sent away."""
    (tmp_path / "secret").write_text("secret")
    (folder / "merges.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(LoadFailedError, match="leaves the model's folder"):
        loader.tokenizer_files(ModelSpec("m", folder))


def test_a_missing_folder(tmp_path: Path, loader: CheckedLoader) -> None:
    """It is said, and nothing is sent."""
    with pytest.raises(LoadFailedError, match="does not exist"):
        loader.tokenizer_files(ModelSpec("m", tmp_path / "none"))


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    """An empty archive helps nobody."""
    assert problem_of(tmp_path) == "its folder holds no tokenizer"


def test_too_many_files(folder: Path) -> None:
    """The gateway takes 50."""
    for number in range(51):
        (folder / f"{number}.jinja").touch()
    assert problem_of(folder).endswith("at most 50")


def test_too_many_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateway has a limit, and the memory of this process too."""
    monkeypatch.setattr(tokenizer_files, "MAX_BYTES", 100)
    assert problem_of(folder) == "its tokenizer has more than 100 bytes"


def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    """Only regular files are read."""
    os.mkfifo(folder / "vocab.json")
    assert problem_of(folder) == "its tokenizer cannot be read: is no regular file"
