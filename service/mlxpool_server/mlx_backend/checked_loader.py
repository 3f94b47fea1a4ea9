"""A loader that looks at a model's folder before the one inside it reads anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from mlxpool_server.domain import HubSource, LoadProgress, ModelInfo, ModelSpec
from mlxpool_server.engine.backend import LoadedAdapter, LoadedModel
from mlxpool_server.mlx_backend.hub import MODEL_FILES, TOKENIZER_FILES, cached_folder, download
from mlxpool_server.mlx_backend.model_folder import check_folder
from mlxpool_server.pool.backend import ModelLoader, Tokenizer


class CheckedLoader:
    """As ModelLoader; every method raises LoadFailedError for a folder that may not be read."""

    def __init__(self, loader: ModelLoader) -> None:
        self._loader = loader

    def fetch(self, spec: ModelSpec, report: Callable[[LoadProgress], None]) -> None:
        self._loader.fetch(spec, report)

    def inspect(self, spec: ModelSpec) -> ModelInfo | None:
        _check(spec, MODEL_FILES)
        return self._loader.inspect(spec)

    def tokenizer_stamp(self, spec: ModelSpec) -> object:
        return self._loader.tokenizer_stamp(spec)

    def load_tokenizer(self, spec: ModelSpec) -> Tokenizer:
        if not _check(spec, TOKENIZER_FILES) and isinstance(spec.source, HubSource):
            # Here, so that there is a moment between fetching and reading.
            check_folder(spec.name, download(spec.name, spec.source, TOKENIZER_FILES))
        return self._loader.load_tokenizer(spec)

    def tokenizer_files(self, spec: ModelSpec) -> Mapping[str, bytes]:
        _check(spec, TOKENIZER_FILES)
        return self._loader.tokenizer_files(spec)

    def load(
        self,
        spec: ModelSpec,
        report: Callable[[LoadProgress], None],
        is_cancelled: Callable[[], bool],
    ) -> LoadedModel | LoadedAdapter:
        _check(spec, MODEL_FILES)
        return self._loader.load(spec, report, is_cancelled)


def _check(spec: ModelSpec, patterns: tuple[str, ...]) -> bool:
    """False: its files are not on this machine."""
    folder = spec.source if isinstance(spec.source, Path) else cached_folder(spec.source, patterns)
    if folder is None or not folder.is_dir():
        return False
    check_folder(spec.name, folder)
    if spec.adapter_folder is not None and spec.adapter_folder.is_dir():
        check_folder(spec.name, spec.adapter_folder)
    return True
