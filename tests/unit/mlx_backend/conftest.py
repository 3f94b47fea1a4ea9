"""A tiny model for tests that do not care which."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlxpool_server.domain import Layout, ModelSpec
from mlxpool_server.mlx_backend.loaded_model import MlxModel
from mlxpool_server.mlx_backend.loader import MlxLoader
from tiny_models import write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def model(folder: Path) -> MlxModel:
    loader = MlxLoader(prefill_step_tokens=16, default_layout=Layout.FLOAT32)
    return loader.load(ModelSpec("tiny", folder), lambda _: None, lambda: False)
