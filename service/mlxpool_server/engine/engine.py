"""The engine: one thread that owns every sequence, KV cache and sampler.

In: one inbox, blocking when idle, drained between steps. Out: one call on the event loop a step.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from mlxpool_server.domain import FinishReason
from mlxpool_server.engine.backend import LoadedModel
from mlxpool_server.engine.model_runner import ModelRunner, RunnerStats
from mlxpool_server.engine.output_stream import OutputStream, StreamItem
from mlxpool_server.engine.sequence import Sequence, SequenceRequest
from mlxpool_server.errors import GenerationFailedError, MlxpoolError

log = structlog.get_logger(__name__)

# A model whose every step fails, a fresh batch each time, is given up.
MAX_CONSECUTIVE_FAILURES = 3


@dataclass(frozen=True, slots=True)
class _Attach:
    name: str
    model: LoadedModel
    done: asyncio.Future[None]


@dataclass(frozen=True, slots=True)
class _Detach:
    name: str
    error: MlxpoolError
    done: asyncio.Future[None]


@dataclass(frozen=True, slots=True)
class _Submit:
    slot: int
    request: SequenceRequest
    stream: OutputStream


@dataclass(frozen=True, slots=True)
class _Abort:
    slot: int
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class _Stop:
    error: MlxpoolError


_Message = _Attach | _Detach | _Submit | _Abort | _Stop


@dataclass(slots=True)
class _Lane:
    """A model's runner, and how its last steps went."""

    runner: ModelRunner
    consecutive_failures: int = field(default=0)


class Engine:
    """Methods without `_` are for the event loop's thread; the rest runs on the engine thread."""

    def __init__(
        self,
        *,
        max_batch_size: int,
        on_death: Callable[[], None],
        on_model_failed: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_batch_size = max_batch_size
        self._on_death = on_death
        self._on_model_failed = on_model_failed
        self._clock = clock
        self._inbox: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._lanes: dict[str, _Lane] = {}
        self._turns: list[str] = []
        self._slots = itertools.count()
        self._outbox: list[tuple[OutputStream, StreamItem]] = []
        self._stats: dict[str, RunnerStats] = {}
        self._streams: dict[int, tuple[OutputStream, str]] = {}
        self._pending: set[asyncio.Future[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_running = False
        # A daemon, so that an engine stuck inside a step cannot keep a process from ending.
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ------------------------------------------------------------ the event loop's side

    @property
    def is_alive(self) -> bool:
        return self._is_running and self._thread.is_alive()

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._is_running = True
        self._thread.start()

    async def stop(self, error: MlxpoolError, timeout_s: float) -> bool:
        """End every stream with `error` and join the thread. False: it did not end in time."""
        self._is_running = False
        self._inbox.put(_Stop(error))
        await asyncio.to_thread(self._thread.join, timeout_s)
        return not self._thread.is_alive()

    async def attach(self, name: str, model: LoadedModel) -> None:
        """Make `model` runnable as `name`. Raises: what building its batch raised."""
        done = self._new_pending()
        self._send(_Attach(name, model, done), name)
        await done

    async def detach(self, name: str, error: MlxpoolError) -> None:
        """End what still runs on `name` with `error` and let go of its model."""
        done = self._new_pending()
        self._send(_Detach(name, error, done), name)
        await done

    def submit(self, request: SequenceRequest, stream: OutputStream) -> int:
        """Queue one generation; its events arrive on `stream`. Returns the slot, for `abort`."""
        slot = next(self._slots)
        self._streams[slot] = (stream, request.model)
        self._send(_Submit(slot, request, stream), request.model)
        return slot

    def abort(self, slot: int, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """End a generation with what it has; no harm when it ended already."""
        if self._streams.pop(slot, None) is not None and self.is_alive:
            self._inbox.put(_Abort(slot, reason))

    def stats(self, name: str) -> RunnerStats:
        """What the model was doing at its last step."""
        return self._stats.get(name, RunnerStats())

    def _new_pending(self) -> asyncio.Future[None]:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pending.add(done)
        done.add_done_callback(self._pending.discard)
        return done

    def _send(self, message: _Message, name: str) -> None:
        if not self.is_alive:
            raise GenerationFailedError(name)
        self._inbox.put(message)

    def _deliver(self, items: list[tuple[OutputStream, StreamItem]]) -> None:
        for stream, item in items:
            stream.put(item)

    def _mourn(self) -> None:
        """The thread died: nobody may go on waiting for it."""
        self._is_running = False
        for stream, name in self._streams.values():
            stream.put(GenerationFailedError(name))
        self._streams.clear()
        for done in list(self._pending):
            _settle(done, GenerationFailedError("engine"))
        self._on_death()

    # ------------------------------------------------------------ the engine thread's side

    def _run(self) -> None:
        try:
            while self._take_messages():
                self._step()
                self._flush()
        except BaseException:  # the engine's edge: log, tell, end
            log.exception("engine.died")
            self._call_loop(self._mourn)

    def _take_messages(self) -> bool:
        """Handle what is in the inbox; wait for something when idle. False: stop."""
        while True:
            is_idle = not any(lane.runner.has_work for lane in self._lanes.values())
            try:
                message = self._inbox.get(block=is_idle)
            except queue.Empty:
                return True
            if not self._handle(message):
                return False
            self._flush()

    def _handle(self, message: _Message) -> bool:
        match message:
            case _Attach(name, model, done):
                self._attach(name, model, done)
            case _Detach(name, error, done):
                self._detach(name, error, done)
            case _Submit(slot, request, stream):
                self._submit(slot, request, stream)
            case _Abort(slot, reason):
                for name, lane in self._lanes.items():
                    if lane.runner.abort(slot, reason):
                        self._publish(name, lane)
                        break
            case _Stop(error):
                for lane in self._lanes.values():
                    lane.runner.close(error)
                self._lanes.clear()
                self._flush()
                return False
        return True

    def _attach(self, name: str, model: LoadedModel, done: asyncio.Future[None]) -> None:
        try:
            runner = ModelRunner(
                name,
                model,
                max_batch_size=self._max_batch_size,
                emit=self._emit,
                clock=self._clock,
            )
        except Exception as error:  # noqa: BLE001 - the loader is told; the engine goes on
            self._call_loop(_settle, done, error)
            return
        self._lanes[name] = _Lane(runner)
        self._turns.append(name)
        self._call_loop(_settle, done, None)

    def _detach(self, name: str, error: MlxpoolError, done: asyncio.Future[None]) -> None:
        lane = self._lanes.pop(name, None)
        if lane is not None:
            self._turns.remove(name)
            lane.runner.close(error)
            self._stats.pop(name, None)
        self._flush()
        self._call_loop(_settle, done, None)

    def _submit(self, slot: int, request: SequenceRequest, stream: OutputStream) -> None:
        lane = self._lanes.get(request.model)
        if lane is None:
            self._emit(stream, GenerationFailedError(request.model))
            return
        lane.runner.submit(Sequence(slot, request, stream, self._clock))
        self._publish(request.model, lane)

    def _step(self) -> None:
        """One step of the model whose turn it is."""
        for index, name in enumerate(self._turns):
            lane = self._lanes[name]
            if lane.runner.has_work:
                self._turns.append(self._turns.pop(index))
                self._step_lane(name, lane)
                if name in self._lanes:
                    self._publish(name, lane)
                return

    def _step_lane(self, name: str, lane: _Lane) -> None:
        try:
            lane.runner.step()
        except Exception:  # the step failed: its streams fail, the model gets a fresh batch
            log.exception("engine.step_failed", model=name)
            lane.consecutive_failures += 1
            self._recover(name, lane)
        else:
            lane.consecutive_failures = 0

    def _recover(self, name: str, lane: _Lane) -> None:
        try:
            lane.runner.rebuild()
        except Exception:  # this model is lost, the others go on
            log.exception("engine.rebuild_failed", model=name)
            lane.consecutive_failures = MAX_CONSECUTIVE_FAILURES
        if lane.consecutive_failures >= MAX_CONSECUTIVE_FAILURES:
            del self._lanes[name]
            self._turns.remove(name)
            self._stats.pop(name, None)
            self._call_loop(self._on_model_failed, name)

    def _publish(self, name: str, lane: _Lane) -> None:
        self._stats[name] = lane.runner.stats()

    def _emit(self, stream: OutputStream, item: StreamItem) -> None:
        self._outbox.append((stream, item))

    def _flush(self) -> None:
        if self._outbox:
            items, self._outbox = self._outbox, []
            self._call_loop(self._deliver, items)

    def _call_loop(self, callback: Callable[..., None], *args: object) -> None:
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(callback, *args)


def _settle(done: asyncio.Future[None], error: Exception | None) -> None:
    """Answer a waiter that may have given up."""
    if done.done():
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)
