"""MLX's counters and limits, read and set."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from mlxpool_server.domain import MemoryLimits
from mlxpool_server.errors import InvalidFieldError
from mlxpool_server.mlx_backend import memory as memory_module
from mlxpool_server.mlx_backend.memory import MlxMemory, device_kind, system_memory_bytes
from mlxpool_server.mlx_backend.process_memory import resident_bytes

MIB = 2**20


@pytest.fixture
def memory() -> Iterator[MlxMemory]:
    """Its limits are put back."""
    memory = MlxMemory()
    before = memory.limits()
    yield memory
    memory.set_limits(before)


def test_device(memory: MlxMemory) -> None:
    """A size for every device: the CPU's is the system's."""
    device = memory.device()
    assert device.kind == device_kind()
    assert 2**30 < device.memory_bytes <= device.recommended_bytes * 4
    assert device.mlx_version[0].isdigit()
    assert device.name


def test_counters_follow_allocations(memory: MlxMemory) -> None:
    """Active rises and falls with an array; the peak stays until it is reset."""
    before = memory.active_bytes()
    array = mx.zeros((MIB,))
    mx.eval(array)
    assert memory.active_bytes() - before >= 4 * MIB
    del array
    assert memory.active_bytes() - before < 4 * MIB
    assert memory.peak_bytes() >= before + 4 * MIB
    memory.reset_peak()
    assert memory.peak_bytes() < before + 4 * MIB


def test_freed_buffers_are_cached_and_cleared(memory: MlxMemory) -> None:
    """clear_cache returns what MLX kept for reuse."""
    memory.set_limits(MemoryLimits(cache_bytes=64 * MIB))
    array = mx.zeros((MIB,))
    mx.eval(array)
    del array
    assert memory.cache_bytes() >= 4 * MIB
    memory.clear_cache()
    assert memory.cache_bytes() == 0


def test_limits_are_set_and_read(memory: MlxMemory) -> None:
    """Those that are None stay; 0 turns the cache off."""
    before = memory.limits()
    memory.set_limits(MemoryLimits(cache_bytes=0))
    assert memory.limits().cache_bytes == 0
    assert memory.limits().memory_bytes == before.memory_bytes
    memory.set_limits(MemoryLimits(memory_bytes=10 * MIB * 1024))
    assert memory.limits().memory_bytes == 10 * MIB * 1024
    assert memory.limits().cache_bytes == 0


def test_reading_limits_sets_none(memory: MlxMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX tells the cache's limit only by setting it, and buffers freed meanwhile would be lost."""
    memory.set_limits(MemoryLimits(cache_bytes=7 * MIB))
    monkeypatch.setattr(memory_module.mx, "set_cache_limit", None)
    assert memory.limits().cache_bytes == 7 * MIB


def test_defaults(memory: MlxMemory) -> None:
    """The configured cache limit is what is reported."""
    memory.apply_defaults(cache_limit_bytes=5 * MIB)
    assert memory.limits().cache_bytes == 5 * MIB
    memory.apply_defaults(cache_limit_bytes=None)
    assert memory.limits().cache_bytes == 5 * MIB


@pytest.mark.skipif(device_kind() == "metal", reason="Metal has a wired limit")
def test_wired_limit_is_metals(memory: MlxMemory) -> None:
    """Elsewhere it is refused by name, and nothing else of the request is set."""
    before = memory.limits()
    assert before.wired_bytes is None
    with pytest.raises(InvalidFieldError, match=r"limits\.wired_bytes"):
        memory.set_limits(MemoryLimits(cache_bytes=3, wired_bytes=1))
    assert memory.limits() == before


def test_container_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The smallest of machine and cgroup; "max" is no limit."""
    machine = system_memory_bytes()
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory_module, "CGROUP_LIMIT_FILES", (limit, tmp_path / "none"))
    limit.write_text("max\n")
    assert system_memory_bytes() >= machine
    limit.write_text("1048576\n")
    assert system_memory_bytes() == 1048576


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc's alone")
def test_clearing_gives_memory_back_to_the_system(memory: MlxMemory) -> None:
    """What malloc keeps between blocks that are in use, too."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    # Too small to be mapped one by one; the last of them holds the end of the heap.
    blocks = [libc.malloc(64 * 1024) for _ in range(1024)]
    for block in blocks:
        ctypes.memset(block, 1, 64 * 1024)
    for block in blocks[:-1]:
        libc.free(block)
    before = resident_bytes(os.getpid())
    memory.clear_cache()
    after = resident_bytes(os.getpid())
    libc.free(blocks[-1])
    assert before - after > 32 * MIB
