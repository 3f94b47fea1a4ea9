"""A real pool on a real engine thread, with fake models: the house without gRPC and MLX."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from fakes.loader import FakeFiles, FakeLoader
from fakes.memory import FakeMemory
from fakes.running_engine import PATIENCE_S
from mlxpool_server.domain import (
    EmbedRequest,
    EmbedResult,
    GenerationEvent,
    GenerationFinished,
    GenerationProgress,
    GenerationRequest,
    GenerationStarted,
    LoadFinished,
    LoadOptions,
    ModelSpec,
    ModelState,
    Prompt,
    TextPrompt,
)
from mlxpool_server.engine.engine import Engine
from mlxpool_server.errors import DrainingError
from mlxpool_server.pool import model_pool
from mlxpool_server.pool.broadcast import Broadcast
from mlxpool_server.pool.catalog import Catalog
from mlxpool_server.pool.embedding import MAX_REPLY_BYTES, Embeddings
from mlxpool_server.pool.entry import Entry
from mlxpool_server.pool.generation import Generations
from mlxpool_server.pool.generation_limits import GenerationLimits
from mlxpool_server.pool.ledger import Ledger
from mlxpool_server.pool.prompts import PromptReader
from mlxpool_server.pool.residency import Residency
from mlxpool_server.pool.unloads import Unloads

CLOSED = DrainingError(1.0)


class WatchedLedger(Ledger):
    """Notes each moment at which more is held than the limit."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(limit_bytes)
        self.most_bytes = 0
        self.moved = Broadcast()
        self.violations: list[str] = []

    def _set(self, holder: object, num_bytes: int) -> None:
        super()._set(holder, num_bytes)
        self.most_bytes = max(self.most_bytes, self.used_bytes)
        self.moved.notify()
        if self.used_bytes > self.limit_bytes:
            self.violations.append(f"{self.used_bytes} held, {self.limit_bytes} allowed")


@dataclass
class Timer:
    """An expiry that only a test fires."""

    delay_s: float
    callback: Callable[..., object]
    args: tuple[object, ...]
    is_pending: bool = True

    def cancel(self) -> None:
        self.is_pending = False

    def fire(self) -> None:
        if self.is_pending:
            self.is_pending = False
            self.callback(*self.args)


class Stream:
    """One generation, read event by event."""

    def __init__(self, generations: Generations, request: GenerationRequest) -> None:
        self._events = generations.generate(request)

    async def next(self) -> GenerationEvent:
        async with asyncio.timeout(PATIENCE_S):
            return await anext(self._events)

    async def until(self, kind: type[Any]) -> Any:
        async with asyncio.timeout(PATIENCE_S):
            while not isinstance(event := await anext(self._events), kind):
                pass
            return event

    async def phase(self, phase: object) -> None:
        """Wait until it says that it is in `phase`."""
        async with asyncio.timeout(PATIENCE_S):
            while (await self.until(GenerationProgress)).phase is not phase:
                pass

    async def rest(self) -> list[GenerationEvent]:
        async with asyncio.timeout(PATIENCE_S), aclosing(self._events) as events:
            return [event async for event in events]

    async def started(self) -> GenerationStarted:
        """The first event. Raises: what refuses the request."""
        first = await self.next()
        assert isinstance(first, GenerationStarted)
        return first

    async def finished(self) -> GenerationFinished:
        """Read to the end. Raises: the error that ended it."""
        last = (await self.rest())[-1]
        assert isinstance(last, GenerationFinished)
        return last

    async def close(self) -> None:
        """What a client's hanging up does."""
        await self._events.aclose()


class House:
    """The pool, the engine and the generations, and the knobs of what is fake."""

    def __init__(
        self,
        files: Mapping[str, FakeFiles],
        specs: tuple[ModelSpec, ...],
        limit_bytes: int,
        **options: Any,
    ) -> None:
        self.files = files
        self.memory = FakeMemory()
        self.timers: list[Timer] = []
        self.deaths = asyncio.Event()
        loader = FakeLoader(files)
        named = {spec.name: spec for spec in specs}
        self.catalog = Catalog.build(
            named.get(name, ModelSpec(name, Path("unread"))) for name in files
        )
        max_batch_size = options.pop("max_batch_size", 4)
        self.engine = Engine(
            max_batch_size=max_batch_size,
            on_death=self.deaths.set,
            on_model_failed=self._on_model_failed,
        )
        with mock.patch.object(model_pool, "Ledger", WatchedLedger):
            self.pool = model_pool.ModelPool(
                catalog=self.catalog,
                loader=loader,
                engine=self.engine,
                memory=self.memory,
                limit_bytes=limit_bytes,
                default_keep_alive_s=options.pop("default_keep_alive_s", 300.0),
                heartbeat_s=options.get("heartbeat_s", PATIENCE_S),
                max_batch_size=max_batch_size,
                prefill_tokens=1000,
                prompt_cache_share=options.pop("prompt_cache_share", 0.0),
            )
        self.prompts = PromptReader(loader, self.pool.load_number)
        limits = {
            "max_in_flight": 100,
            "default_max_tokens": None,
            "max_prompt_tokens": None,
            "heartbeat_s": PATIENCE_S,
            "max_batch_size": max_batch_size,
        }
        max_reply_bytes = options.pop("max_reply_bytes", MAX_REPLY_BYTES)
        all_limits = GenerationLimits(**(limits | options))
        self.generations = Generations(self.pool, self.engine, self.prompts, all_limits)
        self.embeddings = Embeddings(
            self.pool, self.engine, self.prompts, all_limits, max_reply_bytes
        )

    def _on_model_failed(self, name: str) -> None:
        self.pool.model_failed(name)

    # ------------------------------------------------------------ doing

    async def load(self, name: str = "m", **options: Any) -> LoadFinished:
        """Load to the end. Raises: what the load failed with."""
        async with asyncio.timeout(PATIENCE_S):
            events = [event async for event in self.pool.load(name, LoadOptions(**options))]
        last = events[-1]
        assert isinstance(last, LoadFinished)
        return last

    def start_load(self, name: str = "m", **options: Any) -> asyncio.Task[LoadFinished]:
        return asyncio.ensure_future(self.load(name, **options))

    async def loading(self, name: str = "m") -> Residency:
        """Wait until the loader thread reads this model's weights; it waits for `may_load`."""
        assert await asyncio.to_thread(self.files[name].is_loading.wait, PATIENCE_S)
        residency = self.entry(name).residency
        assert residency is not None
        return residency

    async def unload(self, name: str = "m", *, force: bool = False) -> Any:
        async with asyncio.timeout(PATIENCE_S):
            return await self.pool.unload(name, force=force)

    def generate(self, text: str = "abc", model: str = "m", **changes: Any) -> Stream:
        """A generation that echoes `text`, or another `prompt`."""
        fields = {"prompt": TextPrompt(text)} | changes
        return Stream(self.generations, GenerationRequest(model=model, **fields))

    async def embed(self, *inputs: str | Prompt, model: str = "m", **fields: Any) -> EmbedResult:
        prompts = tuple(TextPrompt(each) if isinstance(each, str) else each for each in inputs)
        async with asyncio.timeout(PATIENCE_S):
            return await self.embeddings.embed(EmbedRequest(model, prompts, **fields))

    async def answer(self, text: str = "abc", model: str = "m", **changes: Any) -> str:
        return (await self.generate(text, model, **changes).finished()).text

    def expire(self) -> None:
        """Let the time of every idle model come."""
        for timer in self.timers:
            timer.fire()

    # ------------------------------------------------------------ looking

    def entry(self, name: str = "m") -> Entry:
        return self.pool._entries[name]

    def residency(self, name: str = "m") -> Residency:
        residency = self.entry(name).residency
        assert residency is not None
        return residency

    @property
    def ledger(self) -> WatchedLedger:
        ledger = self.pool._ledger
        assert isinstance(ledger, WatchedLedger)
        return ledger

    async def held(self, num_bytes: int) -> None:
        """Wait until as many bytes are held as that."""
        async with asyncio.timeout(PATIENCE_S):
            while self.pool.used_bytes != num_bytes:
                await self.ledger.moved.wait(PATIENCE_S)

    @property
    def resident(self) -> set[str]:
        """Who is READY."""
        return {name for name, entry in self.pool._entries.items() if entry.is_ready}

    async def state(self, name: str = "m") -> ModelState:
        return (await self.pool.get_model(name)).state

    async def gone(self, name: str = "m") -> None:
        """Wait until the model's stay is over."""
        residency = self.entry(name).residency
        if residency is not None:
            async with asyncio.timeout(PATIENCE_S):
                await residency.gone.wait()

    # ------------------------------------------------------------ the end

    async def close(self) -> None:
        """Stop as the app does, with every gate open."""
        for files in self.files.values():
            files.may_load.set()
            files.tokenizer.may_encode.set()
            files.may_read_tokenizer.set()
            files.model.run_freely()
        await self.engine.stop(CLOSED, PATIENCE_S)
        async with asyncio.timeout(PATIENCE_S):
            await self.pool.close(CLOSED)

    def assert_clean(self) -> None:
        """Nothing is held, reserved, leased or in flight; the limit was never passed."""
        assert self.ledger.violations == []
        assert self.pool.used_bytes == 0
        assert self.ledger._claims == []
        assert all(entry.residency is None for entry in self.pool._entries.values())
        assert all(entry.num_leases == 0 for entry in self.pool._entries.values())
        assert self.generations.num_in_flight == 0
        assert self.embeddings.num_in_flight == 0
        assert self.engine._readers == {}
        assert self.engine._pending == {}
        names = [thread.name for thread in threading.enumerate()]
        assert "engine" not in names


@asynccontextmanager
async def running_house(
    files: Mapping[str, FakeFiles] | None = None,
    *,
    specs: tuple[ModelSpec, ...] = (),
    limit_bytes: int = 1000,
    has_real_timers: bool = False,
    **options: Any,
) -> AsyncGenerator[House, None]:
    """Open a house; at its end everything in it has to be clean.

    `specs` say more about some of the `files`; `options` are those of GenerationLimits and
    max_batch_size, default_keep_alive_s, heartbeat_s, prompt_cache_share, max_reply_bytes.
    """
    house = House({"m": FakeFiles()} if files is None else files, specs, limit_bytes, **options)
    loop = asyncio.get_running_loop()
    call_later = loop.call_later

    def catch_expiries(delay: float, callback: Any, *args: Any, **more: Any) -> Any:
        is_expiry = getattr(callback, "__func__", None) is Unloads._expire
        if has_real_timers or not is_expiry:
            return call_later(delay, callback, *args, **more)
        house.timers.append(Timer(delay, callback, args))
        return house.timers[-1]

    house.engine.start()
    with mock.patch.object(loop, "call_later", catch_expiries):
        try:
            yield house
        finally:
            await house.close()
    house.assert_clean()
