"""The house without gRPC, all of it real: files, loader, pool, engine, MLX."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxpool_server.domain import (
    GenerationEvent,
    GenerationFinished,
    GenerationRequest,
    Layout,
    LoadFinished,
    LoadOptions,
    LoadProgress,
    ModelSpec,
    ModelState,
    OutputOptions,
    SamplingParams,
    StopConditions,
    TokenPrompt,
)
from mlxpool_server.engine.engine import Engine
from mlxpool_server.errors import DrainingError
from mlxpool_server.mlx_backend.loaded_model import MlxModel
from mlxpool_server.mlx_backend.loader import MlxLoader
from mlxpool_server.mlx_backend.memory import MlxMemory
from mlxpool_server.pool.catalog import Catalog
from mlxpool_server.pool.generation import Generations
from mlxpool_server.pool.generation_limits import GenerationLimits
from mlxpool_server.pool.model_pool import ModelPool
from mlxpool_server.pool.prompts import PromptReader

# Long enough for any machine: only a test that fails waits for it.
PATIENCE_S = 60.0
PREFILL_TOKENS = 64
MAX_BATCH_SIZE = 4
PROMPT = (3, 1, 4, 1, 5, 9, 2, 6)
# What a test may leave behind: a page for each of a few small arrays.
SLACK_BYTES = 65_536
CLOSED = DrainingError(1.0)


class WatchedLoader(MlxLoader):
    """The real loader. `on_portion` runs on its thread each time a portion has been read."""

    def __init__(self) -> None:
        super().__init__(prefill_step_tokens=PREFILL_TOKENS, default_layout=Layout.STORED)
        self.on_portion: Callable[[], None] = lambda: None

    def load(
        self,
        spec: ModelSpec,
        report: Callable[[LoadProgress], None],
        is_cancelled: Callable[[], bool],
    ) -> MlxModel:
        def watched(progress: LoadProgress) -> None:
            report(progress)
            self.on_portion()

        return super().load(spec, watched, is_cancelled)


class RealHouse:
    """The pool, the engine and the generations over model folders."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self.loader = WatchedLoader()
        self._memory = MlxMemory()
        self.deaths = asyncio.Event()
        self._engine = Engine(
            max_batch_size=MAX_BATCH_SIZE,
            on_death=self.deaths.set,
            on_model_failed=self._on_model_failed,
        )
        self.pool = ModelPool(
            catalog=Catalog.build(ModelSpec(name, folder) for name, folder in folders.items()),
            loader=self.loader,
            engine=self._engine,
            memory=self._memory,
            limit_bytes=1 << 40,
            default_keep_alive_s=300.0,
            heartbeat_s=PATIENCE_S,
            max_batch_size=MAX_BATCH_SIZE,
            prefill_tokens=PREFILL_TOKENS,
        )
        self._prompts = PromptReader(self.loader)
        limits: dict[str, Any] = {
            "max_in_flight": 100,
            "default_max_tokens": None,
            "max_prompt_tokens": None,
            "heartbeat_s": PATIENCE_S,
        }
        self._generations = Generations(
            self.pool, self._engine, self._prompts, GenerationLimits(**limits)
        )

    def _on_model_failed(self, name: str) -> None:
        self.pool.model_failed(name)

    def start(self) -> None:
        self._engine.start()

    async def close(self) -> None:
        await self._engine.stop(CLOSED, PATIENCE_S)
        self._prompts.close()
        async with asyncio.timeout(PATIENCE_S):
            await self.pool.close(CLOSED)

    async def load(self, name: str = "m") -> LoadFinished:
        """Load to the end. Raises: what the load failed with."""
        async with asyncio.timeout(PATIENCE_S):
            events = [event async for event in self.pool.load(name, LoadOptions())]
        last = events[-1]
        assert isinstance(last, LoadFinished)
        return last

    def generate(
        self, model: str = "m", *, temperature: float = 0.0, max_tokens: int = 8
    ) -> AsyncGenerator[GenerationEvent, None]:
        """An answer to PROMPT."""
        return self._generations.generate(
            GenerationRequest(
                model=model,
                prompt=TokenPrompt(PROMPT),
                sampling=SamplingParams(temperature=temperature),
                stop=StopConditions(max_tokens=max_tokens, ignore_eos=True),
                output=OutputOptions(include_token_ids=True),
            )
        )

    async def answer(self, model: str = "m", *, max_tokens: int = 8) -> tuple[int, ...]:
        """The tokens of the greedy answer. Raises: the error that ended it."""
        return await finished(self.generate(model, max_tokens=max_tokens))

    async def unload(self, name: str = "m") -> None:
        async with asyncio.timeout(PATIENCE_S):
            await self.pool.unload(name, force=True)

    async def gone(self, name: str = "m") -> None:
        """Wait until the model's stay is over."""
        residency = self.pool._entries[name].residency
        if residency is not None:
            async with asyncio.timeout(PATIENCE_S):
                await residency.gone.wait()

    async def state(self, name: str = "m") -> ModelState:
        return (await self.pool.get_model(name)).state


async def finished(events: AsyncGenerator[GenerationEvent, None]) -> tuple[int, ...]:
    """Read a generation to its end; return its tokens."""
    async with asyncio.timeout(PATIENCE_S), aclosing(events):
        last = [event async for event in events][-1]
    assert isinstance(last, GenerationFinished)
    return last.token_ids


def active_bytes() -> int:
    """What MLX holds when nothing is left to collect."""
    gc.collect()
    mx.clear_cache()
    return mx.get_active_memory()


@asynccontextmanager
async def real_house(folders: Mapping[str, Path]) -> AsyncGenerator[RealHouse, None]:
    """Open a house. At its end nothing may be held, by the ledger or by MLX."""
    before = active_bytes()
    house = RealHouse(folders)
    house.start()
    try:
        yield house
    finally:
        await house.close()
    assert house.pool.used_bytes == 0
    assert not house.deaths.is_set()
    assert active_bytes() <= before + SLACK_BYTES
