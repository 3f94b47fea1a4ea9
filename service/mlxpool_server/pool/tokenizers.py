"""Every model's tokenizer, read once however many ask, without its weights."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from mlxpool_server.domain import ModelSpec
from mlxpool_server.errors import LoadFailedError
from mlxpool_server.pool.backend import ModelLoader, Tokenizer
from mlxpool_server.pool.model_threads import ModelThreads, TooSlowError
from mlxpool_server.pool.tokenizer_archive import archive

T = TypeVar("T")

# A folder of a network may be slow, and the files of a hub may have to be fetched first.
LIMIT_S = 120.0


class Tokenizers:
    """Event loop only. A failed read is not kept: the next caller tries again."""

    def __init__(
        self,
        loader: ModelLoader,
        load_number: Callable[[str], int | None],
        limit_s: float = LIMIT_S,
    ) -> None:
        """`limit_s`: for each look at the files, with its wait for a thread.

        `load_number`: which of a model's loads is in memory, with the files as they were then.

        None when it is not in memory.
        """
        self._loader = loader
        self._threads = ModelThreads(limit_s)
        self._load_number = load_number
        # The loads that a tokenizer was compared with.
        self._checked: dict[str, int] = {}
        # With the files' stamp from before they were read.
        self._reads: dict[str, asyncio.Task[tuple[object, Tokenizer]]] = {}

    async def get(self, spec: ModelSpec) -> Tokenizer:
        """Read it anew when its files have changed since, once for each load of the model.

        Raises: LoadFailedError, the same for everyone who waits for this read; QueueTimeoutError.
        """
        read = self._reads.get(spec.name)
        load = self._load_number(spec.name)
        is_checked = load is not None and self._checked.get(spec.name) == load
        if load is not None:
            self._checked[spec.name] = load
        if read is not None and read.done() and not is_checked:
            stamp, _ = read.result()
            now = await self._on_thread(spec, partial(self._loader.tokenizer_stamp, spec))
            # Somebody else may have seen it meanwhile.
            if now != stamp and self._reads.get(spec.name) is read:
                del self._reads[spec.name]
        read = self._reads.get(spec.name)
        if read is None:
            read = asyncio.get_running_loop().create_task(self._read(spec))
            self._reads[spec.name] = read
            read.add_done_callback(lambda done: self._settle(spec.name, done))
        # A caller who gives up must not cancel the others.
        _, tokenizer = await asyncio.shield(read)
        return tokenizer

    async def archive(self, spec: ModelSpec) -> bytes:
        """Return its files as a ZIP. Raises: LoadFailedError, QueueTimeoutError."""
        return await self._on_thread(spec, lambda: archive(self._loader.tokenizer_files(spec)))

    @property
    def is_idle(self) -> bool:
        """False: a thread reads for nobody, and would keep the process from its end."""
        return self._threads.is_idle

    def close(self) -> None:
        self._threads.close()

    def forget(self, name: str) -> None:
        """The model's files are others now: the next caller reads them."""
        self._reads.pop(name, None)
        self._threads.forget(name)

    async def _read(self, spec: ModelSpec) -> tuple[object, Tokenizer]:
        def read() -> tuple[object, Tokenizer]:
            return self._loader.tokenizer_stamp(spec), self._loader.load_tokenizer(spec)

        return await self._on_thread(spec, read)

    async def _on_thread(self, spec: ModelSpec, call: Callable[[], T]) -> T:
        try:
            return await self._threads.run(spec.name, call)
        except TooSlowError:
            problem = f"its tokenizer takes longer than {self._threads.limit_s:g} s to read"
            raise LoadFailedError(spec.name, problem) from None

    def _settle(self, name: str, read: asyncio.Task[tuple[object, Tokenizer]]) -> None:
        has_failed = read.cancelled() or read.exception() is not None
        if has_failed and self._reads.get(name) is read:
            del self._reads[name]
