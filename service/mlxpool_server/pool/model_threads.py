"""Threads for what a model's files may make slow: its template, its tokenizer, reading them.

Each model has threads of its own: whoever is slow keeps them, and only its own callers wait.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from mlxpool_server.errors import RETRY_AFTER_S, QueueTimeoutError

T = TypeVar("T")

MAX_THREADS = 2


@dataclass(frozen=True, slots=True)
class _Threads:
    """One model's. Whoever has a place in `free` finds a thread of the executor idle."""

    executor: ThreadPoolExecutor
    free: asyncio.Semaphore


class TooSlowError(Exception):
    """The call has run for as long as it may; its thread goes on with it."""


class ModelThreads:
    """Event loop only."""

    def __init__(self, limit_s: float) -> None:
        """`limit_s`: for each call, with its wait for a thread."""
        self.limit_s = limit_s
        self._threads: dict[str, _Threads] = {}
        # Calls that nobody waits for any more.
        self._left: list[Future[Any]] = []

    @property
    def is_idle(self) -> bool:
        """False: a thread is busy, for nobody, and would keep the process from its end."""
        return all(call.done() for call in self._left)

    def close(self) -> None:
        """Wait for nobody: a template may still take its time."""
        for threads in self._threads.values():
            threads.executor.shutdown(wait=False, cancel_futures=True)

    def forget(self, name: str) -> None:
        """The model's files are others now: those that are stuck in the old are not the new's."""
        if (threads := self._threads.pop(name, None)) is not None:
            threads.executor.shutdown(wait=False)

    async def run(self, name: str, call: Callable[[], T]) -> T:
        """Run it on one of the model's threads.

        Raises: what `call` raises; TooSlowError; QueueTimeoutError when it had no thread in time.
        """
        threads = self._threads.get(name)
        if threads is None:
            executor = ThreadPoolExecutor(MAX_THREADS, f"files of {name}")
            threads = self._threads[name] = _Threads(executor, asyncio.Semaphore(MAX_THREADS))
        running: Future[T] | None = None
        try:
            async with asyncio.timeout(self.limit_s) as timeout:
                # An executor's own queue would keep the calls of those who gave up.
                await threads.free.acquire()
                running = threads.executor.submit(call)
                running.add_done_callback(_release(threads.free))
                return await asyncio.wrap_future(running)
        except TimeoutError:
            if not timeout.expired():
                raise
            if running is None:
                raise QueueTimeoutError(self.limit_s, RETRY_AFTER_S) from None
            raise TooSlowError from None
        finally:
            if running is not None and not running.done():
                self._left = [each for each in (*self._left, running) if not each.done()]


def _release(free: asyncio.Semaphore) -> Callable[[object], None]:
    loop = asyncio.get_running_loop()

    def release(_: object) -> None:
        # A closed loop has nobody left who waits.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(free.release)

    return release
