"""Weight files in two shards, and what a disk can do to them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def split_in_two(folder: Path) -> None:
    """Deal the tensors out to two shards in turn: whatever is read next, both have a part of it."""
    whole = folder / "model.safetensors"
    weights = mx.load(str(whole))
    assert isinstance(weights, dict)
    names = sorted(weights)
    for number, shard in enumerate(SHARDS):
        part = {name: weights[name] for name in names[number::2]}
        mx.save_safetensors(str(folder / shard), part, metadata={"format": "mlx"})
    whole.unlink()


def cut_behind_header(file: Path) -> None:
    """As a disk that lost the data: the header stays as it was."""
    with file.open("rb") as opened:
        header_bytes = 8 + int.from_bytes(opened.read(8), "little")
    os.truncate(file, header_bytes)


def cut_last_byte(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def overwrite_in_place(file: Path) -> None:
    """Other values under the same header, in a file of the same size."""
    raw = bytearray(file.read_bytes())
    data_at = 8 + int.from_bytes(raw[:8], "little")
    raw[data_at:] = bytes(len(raw) - data_at)
    with file.open("r+b") as opened:
        opened.write(raw)


def replace(file: Path) -> None:
    """What a download does: a new file takes over the name."""
    other = file.with_suffix(".new")
    other.write_bytes(b"not the same")
    other.replace(file)


def delete(file: Path) -> None:
    file.unlink()


SHRINKING: dict[str, Callable[[Path], None]] = {
    "data gone": cut_behind_header,
    "last byte gone": cut_last_byte,
    "emptied": empty,
}
