"""The engine: one thread that owns every sequence, KV cache and sampler.

In: one inbox, blocking when idle, drained between steps. Out: one call on the event loop a step.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import structlog

from mlxpool_server.domain import FinishReason, GenerationFinished, StepTotals, Vector
from mlxpool_server.engine.backend import EmbeddingJob, LoadedModel
from mlxpool_server.engine.embedding_runner import EmbeddingRunner
from mlxpool_server.engine.fair_lock import FairLock
from mlxpool_server.engine.lane import Lane, Part
from mlxpool_server.engine.messages import (
    Abort,
    AbortEmbed,
    Attach,
    Detach,
    Embed,
    LimitPromptCache,
    Message,
    Stop,
    Submit,
)
from mlxpool_server.engine.model_runner import ModelRunner, RunnerStats
from mlxpool_server.engine.output_stream import OutputStream, StreamItem
from mlxpool_server.engine.sequence import Sequence, SequenceRequest
from mlxpool_server.engine.turns import Turns
from mlxpool_server.errors import GenerationFailedError, MlxpoolError

log = structlog.get_logger(__name__)

# A model whose every step fails, a fresh batch each time, is given up.
MAX_CONSECUTIVE_FAILURES = 3


T = TypeVar("T")

# A question's future, and its answer: a value or an Exception.
_Reply = tuple[asyncio.Future[Any], object]


@dataclass(frozen=True, slots=True)
class _Reader:
    """The event-loop end of a generation that has not ended yet."""

    stream: OutputStream
    model: str


class Engine:
    """The first half is for the event loop's thread; the second runs on the engine thread."""

    def __init__(
        self,
        *,
        max_batch_size: int,
        on_death: Callable[[], None],
        on_model_failed: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        processors: FairLock | None = None,
    ) -> None:
        """`on_death` and `on_model_failed` are called on the event loop.

        `processors` is held during a step; whoever else takes it runs between steps.
        """
        self._max_batch_size = max_batch_size
        self._on_death = on_death
        self._on_model_failed = on_model_failed
        self._clock = clock
        self._processors = processors or FairLock()
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        # The event loop's.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_running = False
        self._slots = itertools.count()
        self._readers: dict[int, _Reader] = {}
        self._ended = asyncio.Event()
        self._pending: dict[asyncio.Future[Any], str] = {}
        # The engine thread's.
        self._lanes: dict[str, Lane] = {}
        # By model and place among its lane's parts.
        self._turns: Turns[tuple[str, int]] = Turns()
        self._num_busy = 0
        self._outbox: list[tuple[int, StreamItem]] = []
        self._replies: list[_Reply] = []
        # From the engine thread to the event loop, both at once.
        self._mail: deque[tuple[list[tuple[int, StreamItem]], list[_Reply]]] = deque()
        self._is_delivery_due = False
        # Written by the engine thread, frozen values, read by anyone.
        self._stats: dict[str, RunnerStats] = {}
        self._step_totals: dict[str, StepTotals] = {}
        self._busy_since: float | None = None
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
        if self._thread.ident is None:
            return True
        self._inbox.put(Stop(error))
        # Not by asyncio's own threads: they may all be stuck, as the engine may be.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._ended.wait()
                # That was its last act.
                self._thread.join()
        # Nobody is left but those whom a thread stuck in its step did not get to.
        self._end_everyone(lambda _model: error)
        return self._ended.is_set()

    async def attach(self, name: str, model: LoadedModel) -> None:
        """Make `model` runnable as `name`. Raises: what building its batch raised."""
        await self._ask(lambda done: Attach(name, model, done), name)

    async def detach(self, name: str, error: MlxpoolError) -> None:
        """End what still runs on `name` with `error` and let go of its model."""
        await self._ask(lambda done: Detach(name, error, done), name)

    async def limit_prompt_cache(self, name: str, num_bytes: int) -> None:
        """Let the model keep so much of earlier prompts; what is above it is gone on return."""
        await self._ask(lambda done: LimitPromptCache(name, num_bytes, done), name)

    async def embed(self, job: EmbeddingJob) -> tuple[Vector, ...]:
        """Return one vector a text. A caller who gives up frees its place before the next pass.

        Raises: GenerationFailedError, CapabilityMissingError, and what the model was ended with.
        """
        slot = next(self._slots)
        try:
            return await self._ask(lambda done: Embed(slot, job, done), job.model)
        except asyncio.CancelledError:
            if self.is_alive:
                self._inbox.put(AbortEmbed(slot, job.model))
            raise

    def submit(self, request: SequenceRequest, stream: OutputStream) -> int:
        """Queue one generation; its events arrive on `stream`. Returns the slot, for `abort`.

        Raises: GenerationFailedError when the engine does not run.
        """
        self._check_alive(request.model)
        slot = next(self._slots)
        self._readers[slot] = _Reader(stream, request.model)
        self._inbox.put(Submit(slot, request))
        return slot

    def abort(self, slot: int, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """End a generation with what it has; no harm when it ended already."""
        if slot in self._readers and self.is_alive:
            self._inbox.put(Abort(slot, reason))

    @property
    def step_age_s(self) -> float:
        """How long the engine has been at its step or message; 0 when it has nothing to do."""
        started_at = self._busy_since
        return 0.0 if started_at is None else self._clock() - started_at

    def stats(self, name: str) -> RunnerStats:
        """What the model was doing at its last step."""
        return self._stats.get(name, RunnerStats())

    def step_totals(self, name: str) -> StepTotals:
        """All steps of the model, over all its stays."""
        return self._step_totals.get(name, StepTotals())

    async def _ask(self, message: Callable[[asyncio.Future[T]], Message], name: str) -> T:
        self._check_alive(name)
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._pending[done] = name
        self._inbox.put(message(done))
        try:
            return await done
        finally:
            self._pending.pop(done, None)

    def _check_alive(self, name: str) -> None:
        if not self.is_alive:
            raise GenerationFailedError(name)

    def _deliver(self) -> None:
        """Hand out what the engine has posted so far; more may come while this runs."""
        self._is_delivery_due = False
        for _ in range(len(self._mail)):
            items, replies = self._mail.popleft()
            for slot, item in items:
                self._deliver_item(slot, item)
            for done, answer in replies:
                _settle(done, answer)

    def _deliver_item(self, slot: int, item: StreamItem) -> None:
        reader = self._readers.get(slot)
        if reader is None:
            return
        reader.stream.put(item)
        if isinstance(item, GenerationFinished | MlxpoolError):
            del self._readers[slot]

    def _mourn(self) -> None:
        """The thread died: nobody may go on waiting for it."""
        self._is_running = False
        self._end_everyone(GenerationFailedError)
        self._on_death()

    def _end_everyone(self, error_for: Callable[[str], MlxpoolError]) -> None:
        for reader in self._readers.values():
            reader.stream.put(error_for(reader.model))
        self._readers.clear()
        for done, name in self._pending.items():
            _settle(done, error_for(name))

    # ------------------------------------------------------------ the engine thread's side

    def _run(self) -> None:
        try:
            while self._take_messages():
                self._step()
                self._flush()
        except BaseException:  # the engine's edge: log, tell, end
            log.exception("engine.died")
            self._call_loop(self._mourn)
        finally:
            self._call_loop(self._ended.set)

    def _take_messages(self) -> bool:
        """Handle what is in the inbox; wait for something when idle. False: stop."""
        while True:
            is_idle = not any(lane.has_work for lane in self._lanes.values())
            if is_idle:
                self._flush()
            try:
                message = self._inbox.get(block=is_idle)
            except queue.Empty:
                self._flush()
                return True
            self._busy_since = self._clock()
            is_stopped = not self._handle(message)
            self._busy_since = None
            if is_stopped:
                return False
            # It may hold a model: gone before anyone is told, and while the engine is idle.
            del message

    def _handle(self, message: Message) -> bool:
        match message:
            case Attach():
                self._attach(message.name, message.model, message.done)
            case Detach():
                self._drop_lane(message.name, message.error)
                self._reply(message.done, None)
            case LimitPromptCache():
                self._limit_prompt_cache(message.name, message.num_bytes)
                self._reply(message.done, None)
            case Submit():
                self._submit(message.slot, message.request)
            case Abort():
                self._abort(message.slot, message.reason)
            case Embed():
                self._embed(message)
            case AbortEmbed():
                self._abort_embed(message.slot, message.model)
            case Stop():
                for name in list(self._lanes):
                    self._drop_lane(name, message.error)
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
            embeddings = EmbeddingRunner(
                name, model, reply=self._reply, is_alone=lambda: self._num_busy == 1
            )
        except Exception as error:  # the loader is told; the engine goes on
            log.exception("engine.attach_failed", model=name)
            self._reply(done, error)
            return
        lane = self._lanes[name] = Lane(name, runner, embeddings)
        for place in range(len(lane.parts)):
            self._turns.add((name, place))
        self._reply(done, None)

    def _submit(self, slot: int, request: SequenceRequest) -> None:
        lane = self._lanes.get(request.model)
        if lane is None:
            self._emit(slot, GenerationFailedError(request.model))
            return
        sequence = Sequence(slot, request, self._clock)
        self._guard(lane, lane.runner, partial(lane.runner.submit, sequence))

    def _limit_prompt_cache(self, name: str, num_bytes: int) -> None:
        lane = self._lanes.get(name)
        if lane is not None:
            self._guard(lane, lane.runner, partial(lane.runner.limit_prompt_cache, num_bytes))

    def _abort(self, slot: int, reason: FinishReason) -> None:
        for lane in self._lanes.values():
            if slot in lane.runner:
                self._guard(lane, lane.runner, partial(lane.runner.abort, slot, reason))
                return

    def _embed(self, message: Embed) -> None:
        job = message.job
        lane = self._lanes.get(job.model)
        if lane is None:
            self._reply(message.done, GenerationFailedError(job.model, "embedding"))
            return
        submit = partial(lane.embeddings.submit, message.slot, job, message.done)
        self._guard(lane, lane.embeddings, submit)

    def _abort_embed(self, slot: int, model: str) -> None:
        lane = self._lanes.get(model)
        if lane is not None:
            self._guard(lane, lane.embeddings, partial(lane.embeddings.abort, slot))

    def _step(self) -> None:
        """One step of the part whose turn it is: a model's generations, or its embeddings."""
        busy = {
            (name, place): part
            for name, lane in self._lanes.items()
            for place, part in enumerate(lane.parts)
            if part.has_work
        }
        turn = self._turns.next(busy)
        if turn is None:
            return
        self._num_busy = len(busy)
        lane, part = self._lanes[turn[0]], busy[turn]
        started_at = self._busy_since = self._clock()
        if self._guard(lane, part, part.admit):
            # Who waits for a long step knows by then that it has begun.
            self._flush()
            with self._processors:
                is_done = self._guard(lane, part, part.step)
                if is_done and self._processors.is_wanted:
                    is_done = self._guard(lane, part, part.settle)
            if is_done:
                lane.consecutive_failures = 0
        duration_s = self._clock() - started_at
        self._turns.spend(turn, duration_s)
        totals = self._step_totals.get(lane.name, StepTotals())
        self._step_totals[lane.name] = StepTotals(totals.count + 1, totals.seconds + duration_s)
        self._busy_since = None

    def _guard(self, lane: Lane, part: Part, action: Callable[[], None]) -> bool:
        """A failure inside a model's part ends those who wait for that, and nothing else."""
        try:
            action()
            self._stats[lane.name] = lane.stats()
        except Exception:  # the cause is logged; the callers get GenerationFailedError
            log.exception("engine.step_failed", model=lane.name)
        else:
            return True
        # Out of the except block: the failed step's frames hold its arrays.
        self._recover(lane, part)
        return False

    def _recover(self, lane: Lane, part: Part) -> None:
        """Let the part start over, or give the model up."""
        lane.consecutive_failures += 1
        if lane.consecutive_failures < MAX_CONSECUTIVE_FAILURES:
            try:
                part.rebuild()
            except Exception:  # this model is lost, the others go on
                log.exception("engine.rebuild_failed", model=lane.name)
            else:
                self._stats.pop(lane.name, None)
                return
        self._drop_lane(lane.name, GenerationFailedError(lane.name))
        self._flush()
        self._call_loop(self._on_model_failed, lane.name)

    def _drop_lane(self, name: str, error: MlxpoolError) -> None:
        """End all that runs on it and let go of its weights: nothing here refers to them then."""
        lane = self._lanes.pop(name, None)
        if lane is None:
            return
        for place in range(len(lane.parts)):
            self._turns.remove((name, place))
        self._stats.pop(name, None)
        lane.close(error)

    def _emit(self, slot: int, item: StreamItem) -> None:
        self._outbox.append((slot, item))

    def _reply(self, done: asyncio.Future[Any], answer: object) -> None:
        self._replies.append((done, answer))

    def _flush(self) -> None:
        if self._outbox or self._replies:
            self._mail.append((self._outbox, self._replies))
            self._outbox, self._replies = [], []
            # One call at a time: an engine faster than the loop must not fill the loop's queue.
            if not self._is_delivery_due:
                self._is_delivery_due = True
                self._call_loop(self._deliver)

    def _call_loop(self, callback: Callable[..., None], *args: object) -> None:
        # A closed loop has nobody left who waits.
        with contextlib.suppress(RuntimeError):
            if self._loop is not None:
                self._loop.call_soon_threadsafe(callback, *args)


def _settle(done: asyncio.Future[Any], answer: object) -> None:
    """Answer a waiter that may have given up."""
    if done.done():
        return
    if isinstance(answer, Exception):
        done.set_exception(answer)
    else:
        done.set_result(answer)
