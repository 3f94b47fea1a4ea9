"""Every model's tokenizer, read once however many ask, without its weights."""

from __future__ import annotations

import asyncio

from mlxpool_server.domain import ModelSpec
from mlxpool_server.pool.backend import ModelLoader, Tokenizer


class Tokenizers:
    """Event loop only. A failed read is not kept: the next caller tries again."""

    def __init__(self, loader: ModelLoader) -> None:
        self._loader = loader
        self._reads: dict[str, asyncio.Task[Tokenizer]] = {}

    async def get(self, spec: ModelSpec) -> Tokenizer:
        """Raises: LoadFailedError, the same for everyone who waits for this read."""
        read = self._reads.get(spec.name)
        if read is None:
            read = asyncio.get_running_loop().create_task(self._read(spec))
            self._reads[spec.name] = read
            read.add_done_callback(lambda done: self._settle(spec.name, done))
        # A caller who gives up must not cancel the others.
        return await asyncio.shield(read)

    def forget(self, name: str) -> None:
        """The model's files are others now: the next caller reads them."""
        self._reads.pop(name, None)

    async def _read(self, spec: ModelSpec) -> Tokenizer:
        return await asyncio.to_thread(self._loader.load_tokenizer, spec)

    def _settle(self, name: str, read: asyncio.Task[Tokenizer]) -> None:
        if read.cancelled() or read.exception() is not None:
            self._reads.pop(name, None)
