"""Every model's tokenizer, read once however many ask, without its weights."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from mlxpool_server.domain import ModelSpec
from mlxpool_server.pool.backend import ModelLoader, Tokenizer


class Tokenizers:
    """Event loop only. A failed read is not kept: the next caller tries again."""

    def __init__(self, loader: ModelLoader, is_loaded: Callable[[str], bool]) -> None:
        """`is_loaded`: whether the model is in memory, and with it the files as they were."""
        self._loader = loader
        self._is_loaded = is_loaded
        # With the files' stamp from before they were read.
        self._reads: dict[str, asyncio.Task[tuple[object, Tokenizer]]] = {}

    async def get(self, spec: ModelSpec) -> Tokenizer:
        """Read it anew when its files have changed since, unless the model is in memory.

        Raises: LoadFailedError, the same for everyone who waits for this read.
        """
        read = self._reads.get(spec.name)
        if read is not None and read.done() and not self._is_loaded(spec.name):
            stamp, _ = read.result()
            now = await asyncio.to_thread(self._loader.tokenizer_stamp, spec)
            # Somebody else may have seen it meanwhile.
            if now != stamp and self._reads.get(spec.name) is read:
                self.forget(spec.name)
        read = self._reads.get(spec.name)
        if read is None:
            read = asyncio.get_running_loop().create_task(self._read(spec))
            self._reads[spec.name] = read
            read.add_done_callback(lambda done: self._settle(spec.name, done))
        # A caller who gives up must not cancel the others.
        _, tokenizer = await asyncio.shield(read)
        return tokenizer

    def forget(self, name: str) -> None:
        """The model's files are others now: the next caller reads them."""
        self._reads.pop(name, None)

    async def _read(self, spec: ModelSpec) -> tuple[object, Tokenizer]:
        def read() -> tuple[object, Tokenizer]:
            return self._loader.tokenizer_stamp(spec), self._loader.load_tokenizer(spec)

        return await asyncio.to_thread(read)

    def _settle(self, name: str, read: asyncio.Task[tuple[object, Tokenizer]]) -> None:
        has_failed = read.cancelled() or read.exception() is not None
        if has_failed and self._reads.get(name) is read:
            del self._reads[name]
