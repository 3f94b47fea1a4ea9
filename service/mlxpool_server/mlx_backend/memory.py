"""The device's memory and MLX's own counters and limits."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from mlxpool_server.domain import DeviceInfo, MemoryLimits
from mlxpool_server.errors import InvalidFieldError

CGROUP_LIMIT_FILES = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)

# glibc's: other C libraries have none.
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


class MlxMemory:
    """Any thread: these calls take MLX's allocator lock and no stream."""

    def __init__(self, processors: AbstractContextManager[None] | None = None) -> None:
        """`processors` is held while buffers are freed: on a CPU that waits for what runs there,
        and would take over its errors.
        """
        self._processors = processors or nullcontext()
        # MLX tells these limits only when they are set, and setting one moves memory: ask once.
        self._cache_bytes = _ask(mx.set_cache_limit)
        self._wired_bytes = _ask(mx.set_wired_limit) if device_kind() == "metal" else None

    def device(self) -> DeviceInfo:
        facts = mx.device_info()
        kind = device_kind()
        memory_bytes = int(facts.get("memory_size") or facts.get("total_memory") or 0)
        if kind == "cpu" or not memory_bytes:
            memory_bytes = system_memory_bytes()
        return DeviceInfo(
            kind=kind,
            name=str(facts.get("device_name", "")),
            architecture=str(facts.get("architecture", "")),
            memory_bytes=memory_bytes,
            recommended_bytes=int(facts.get("max_recommended_working_set_size") or memory_bytes),
            mlx_version=version("mlx"),
            mlx_lm_version=version("mlx-lm"),
        )

    def active_bytes(self) -> int:
        return mx.get_active_memory()

    def peak_bytes(self) -> int:
        return mx.get_peak_memory()

    def cache_bytes(self) -> int:
        return mx.get_cache_memory()

    def limits(self) -> MemoryLimits:
        return MemoryLimits(
            memory_bytes=mx.get_memory_limit(),
            cache_bytes=self._cache_bytes,
            wired_bytes=self._wired_bytes,
        )

    def set_limits(self, limits: MemoryLimits) -> None:
        """Raises: InvalidFieldError when the device has no such limit or refuses the value."""
        if limits.wired_bytes is not None:
            if device_kind() != "metal":
                raise InvalidFieldError("limits.wired_bytes", "only Metal has a wired limit")
            try:
                mx.set_wired_limit(limits.wired_bytes)
            except (ValueError, RuntimeError) as error:
                raise InvalidFieldError("limits.wired_bytes", str(error)) from error
            self._wired_bytes = limits.wired_bytes
        with self._processors:
            if limits.memory_bytes is not None:
                mx.set_memory_limit(limits.memory_bytes)
            if limits.cache_bytes is not None:
                mx.set_cache_limit(limits.cache_bytes)
                self._cache_bytes = limits.cache_bytes

    def apply_defaults(self, cache_limit_bytes: int | None) -> None:
        """Set what MLX does not choose well by itself, once, before anything is loaded."""
        # What mlx-lm sets around each generation, set once: several batches share it here.
        wired_bytes = self.device().recommended_bytes if device_kind() == "metal" else None
        self.set_limits(MemoryLimits(cache_bytes=cache_limit_bytes, wired_bytes=wired_bytes))

    def clear_cache(self) -> None:
        # A model's modules may refer to each other in circles.
        gc.collect()
        with self._processors:
            mx.clear_cache()
        # On a CPU, MLX's buffers are malloc's, which keeps much of what is freed between others.
        if _malloc_trim is not None:
            _malloc_trim(0)

    def reset_peak(self) -> None:
        mx.reset_peak_memory()


def device_kind() -> str:
    """cpu, cuda or metal."""
    if mx.default_device() != mx.Device(mx.gpu):
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def system_memory_bytes() -> int:
    """What this machine has, or less when a container limits it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [int(text) for file in CGROUP_LIMIT_FILES if (text := _read_text(file)).isdigit()]
    return min([total, *limits])


def _read_text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _ask(set_limit: Callable[[int], int]) -> int:
    previous = set_limit(0)
    set_limit(previous)
    return previous
