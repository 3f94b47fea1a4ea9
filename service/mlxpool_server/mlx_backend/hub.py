"""Models from the Hugging Face hub, through its client's own cache and token."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from tqdm import tqdm  # type: ignore[import-untyped]  # it ships no type information

from mlxpool_server.domain import HubSource, LoadPhase, LoadProgress
from mlxpool_server.errors import LoadFailedError

# No code: what a repository brings of it is never fetched.
TOKENIZER_FILES = ("*.json", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja")
MODEL_FILES = (*TOKENIZER_FILES, "model*.safetensors")

Report = Callable[[LoadProgress], None]


def cached_folder(source: HubSource, patterns: tuple[str, ...]) -> Path | None:
    """Where the repository's files of these patterns are on this machine, if they are; no network.

    As far as the cache knows: where it kept no list of the repository's files, some may be missing.
    """
    try:
        return Path(
            snapshot_download(
                source.repo_id,
                revision=source.revision,
                allow_patterns=list(patterns),
                local_files_only=True,
            )
        )
    except LocalEntryNotFoundError:
        return None


def download(
    name: str, source: HubSource, patterns: tuple[str, ...], report: Report | None = None
) -> Path:
    """Fetch what is not in the cache yet. Raises: LoadFailedError."""
    try:
        return Path(
            snapshot_download(
                source.repo_id,
                revision=source.revision,
                allow_patterns=list(patterns),
                tqdm_class=_bar_class(report or (lambda _: None)),
            )
        )
    except Exception as error:  # the hub client's errors have no common base
        problem = " ".join(str(error).split())[:300] or type(error).__name__
        raise LoadFailedError(name, f"the hub did not give it: {problem}") from error


def _bar_class(report: Report) -> type:
    """A progress bar that reports the bytes so far and draws nothing."""

    class ReportedBar(tqdm):  # type: ignore[misc]  # as above
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # It counts only while it has something to draw on.
            super().__init__(*args, **(kwargs | {"file": io.StringIO(), "disable": False}))

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            """Draw nothing: the log is no terminal."""

        def update(self, n: float | None = 1) -> None:
            super().update(n)
            if self.unit == "B":
                total = int(self.total or 0)
                report(LoadProgress(LoadPhase.DOWNLOADING, min(int(self.n), total), total))

    return ReportedBar
