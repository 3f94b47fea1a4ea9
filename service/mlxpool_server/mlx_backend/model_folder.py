"""What a model folder may be before anything in it is read: it may come from anybody."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlxpool_server.errors import LoadFailedError

MIB = 1024 * 1024
# The largest tokenizer.json known has 33 MB; a config.json with a setting for each layer, 1 MB.
MAX_VOCABULARY_BYTES = 256 * MIB
MAX_TEXT_BYTES = 32 * MIB
MAX_TEMPLATE_BYTES = 4 * MIB
MAX_FILES = 10_000
# No model has so many, and each is built before it is compared with the weights.
MAX_LAYERS = 1000

_VOCABULARIES = re.compile(r"tokenizer\.json|.*\.(model|tiktoken)|(vocab|merges)\..*")
_TEMPLATES = re.compile(r".*\.jinja2?")
_WEIGHTS = re.compile(r".*\.safetensors")
_TEXTS = re.compile(r".*\.(json|txt)")
_LAYERS = re.compile(r"(num|n)_(\w+_)?layers?|num_layers|n_layers?")


def check_folder(name: str, folder: Path) -> None:
    """Look at every file's kind, size and links, and at config.json's layers; read no other file.

    Raises: LoadFailedError with the file and what is wrong with it.
    """
    try:
        roots = _roots(folder)
        for number, entry in enumerate(_files(folder), start=1):
            problem = _problem(entry, roots)
            if number > MAX_FILES:
                raise LoadFailedError(name, f"its folder has more than {MAX_FILES} files")
            if problem:
                raise LoadFailedError(name, f"{os.path.relpath(entry.path, folder)} {problem}")
    except OSError as error:
        problem = f"its folder cannot be read: {error.strerror or error}"
        raise LoadFailedError(name, problem) from error
    _check_layers(name, folder)


def _roots(folder: Path) -> tuple[Path, ...]:
    """Where links may lead: into the folder, and from a snapshot of the hub's into its blobs."""
    root = folder.resolve(strict=True)
    blobs = root.parent.parent / "blobs"
    if root.parent.name == "snapshots" and blobs.is_dir():
        return root, blobs.resolve()
    return (root,)


def _files(folder: Path | str) -> Iterator[os.DirEntry[str]]:
    """Everything but real folders, which are gone through; a linked folder is a file here."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _files(entry.path)
            else:
                yield entry


def _problem(entry: os.DirEntry[str], roots: tuple[Path, ...]) -> str:
    if entry.is_symlink():
        try:
            target = Path(entry.path).resolve(strict=True)
        except (OSError, RuntimeError):
            return "is a link that leads nowhere"
        if not any(target.is_relative_to(root) for root in roots):
            return "is a link that leaves the model's folder"
    status = entry.stat()
    if stat.S_ISDIR(status.st_mode):
        # Inside, and visited under its own name.
        return ""
    if not stat.S_ISREG(status.st_mode):
        return "is no regular file"
    limit = _limit_bytes(entry.name)
    if limit is not None and status.st_size > limit:
        return f"has {status.st_size} bytes; at most {limit} are read"
    return ""


def _limit_bytes(file_name: str) -> int | None:
    """None: weights, whose headers are checked by their own reader, and what is never opened."""
    if _WEIGHTS.fullmatch(file_name):
        return None
    if _VOCABULARIES.fullmatch(file_name):
        return MAX_VOCABULARY_BYTES
    if _TEMPLATES.fullmatch(file_name):
        return MAX_TEMPLATE_BYTES
    return MAX_TEXT_BYTES if _TEXTS.fullmatch(file_name) else None


def _check_layers(name: str, folder: Path) -> None:
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        # Whoever reads it next says so.
        return
    parts: list[Any] = [config]
    while parts:
        part = parts.pop()
        if isinstance(part, list):
            parts.extend(part)
        if not isinstance(part, dict):
            continue
        for key, value in part.items():
            if isinstance(value, int | float) and value > MAX_LAYERS and _LAYERS.fullmatch(key):
                problem = f"its config.json has {key} = {value}; at most {MAX_LAYERS} are built"
                raise LoadFailedError(name, problem)
        parts.extend(part.values())
