"""Real weight files that break while the real loader reads them."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_lm.utils
import pytest

from faults.broken_files import (
    SHARDS,
    SHRINKING,
    cut_behind_header,
    delete,
    overwrite_in_place,
    replace,
    split_in_two,
)
from faults.real_pool import (
    SLACK_BYTES,
    active_bytes,
    finished,
    real_house,
)
from mlxpool_server.domain import GenerationDelta, ModelState
from mlxpool_server.errors import LoadFailedError
from mlxpool_server.mlx_backend import loader as loader_module
from tiny_models import write_model

# Several portions of weights: the loader reads 16 MiB at a time.
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 8192, "num_hidden_layers": 4}
# Many small arrays: many reads under way when the first one fails.
DEEP: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 32}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    folders = {
        "wide": write_model(root / "wide", **WIDE),
        "deep": write_model(root / "deep", **DEEP),
    }
    for folder in folders.values():
        split_in_two(folder)
    return folders


class Model:
    """A model folder that can be broken and mended."""

    def __init__(self, original: Path, folder: Path) -> None:
        self._original = original
        self.folder = shutil.copytree(original, folder)

    @property
    def shard(self) -> Path:
        return self.folder / SHARDS[1]

    def mend(self) -> None:
        shutil.copytree(self._original, self.folder, dirs_exist_ok=True)


@pytest.fixture
def wide(originals: dict[str, Path], tmp_path: Path) -> Model:
    return Model(originals["wide"], tmp_path / "wide")


@pytest.fixture
def deep(originals: dict[str, Path], tmp_path: Path) -> Model:
    return Model(originals["deep"], tmp_path / "deep")


@pytest.fixture
def once_opened(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Have something happen once, when a load has opened the files and read no weights yet."""
    todo: list[Callable[[], None]] = []

    def load_model(*args: Any, **options: Any) -> Any:
        opened = mlx_lm.utils.load_model(*args, **options)
        while todo:
            todo.pop()()
        return opened

    monkeypatch.setattr(loader_module, "load_model", load_model)
    return todo.append


async def test_shard_that_breaks_half_way(wide: Model) -> None:
    """Every waiter gets the same error, nothing is kept, and the mended file loads."""
    held: list[int] = []
    before = active_bytes()

    def break_once() -> None:
        if not held:
            held.append(active_bytes() - before)
            cut_behind_header(wide.shard)

    async with real_house({"m": wide.folder}) as house:
        expected = await house.answer()
        await house.unload()
        house.loader.on_portion = break_once
        waiters = [house.load(), house.load(), house.answer(), house.load()]
        errors = await asyncio.gather(*waiters, return_exceptions=True)
        assert held[0] > 1 << 20
        assert all(isinstance(error, LoadFailedError) for error in errors)
        assert len({str(error) for error in errors}) == 1
        assert "Unable to read" in str(errors[0])
        assert house.pool.used_bytes == 0
        assert active_bytes() <= before + SLACK_BYTES
        assert await house.state() is ModelState.FAILED
        wide.mend()
        assert await house.answer() == expected


@pytest.mark.parametrize("break_", SHRINKING.values(), ids=SHRINKING.keys())
async def test_file_that_shrinks_after_it_was_opened(
    deep: Model, once_opened: Callable[[Callable[[], None]], None], break_: Callable[[Path], None]
) -> None:
    """A short read is an error and no garbage, and leaves no error behind for the next load."""
    async with real_house({"m": deep.folder}) as house:
        expected = await house.answer()
        for _ in range(5):
            await house.unload()
            once_opened(lambda: break_(deep.shard))
            with pytest.raises(LoadFailedError, match="Unable to read"):
                await house.load()
            assert house.pool.used_bytes == 0
            deep.mend()
            await house.load()
        assert await house.answer() == expected


@pytest.mark.parametrize("change", [overwrite_in_place, replace, delete])
async def test_file_that_changes_while_it_is_read(
    deep: Model, once_opened: Callable[[Callable[[], None]], None], change: Callable[[Path], None]
) -> None:
    """Old and new weights mixed are no model, though every read went well."""
    async with real_house({"m": deep.folder}) as house:
        expected = await house.answer()
        await house.unload()
        once_opened(lambda: change(deep.shard))
        with pytest.raises(LoadFailedError, match="changed while"):
            await house.load()
        assert house.pool.used_bytes == 0
        deep.mend()
        assert await house.answer() == expected


async def test_stream_beside_a_load_that_fails(wide: Model, deep: Model) -> None:
    """Another model's stream goes on undisturbed while a load dies."""
    async with real_house({"m": wide.folder, "other": deep.folder}) as house:
        expected = await house.answer("other", max_tokens=100)
        house.loader.on_portion = lambda: cut_behind_header(wide.shard)
        stream = house.generate("other", max_tokens=100)
        async for event in stream:
            if isinstance(event, GenerationDelta):
                break
        with pytest.raises(LoadFailedError):
            await house.load()
        assert await finished(stream) == expected
