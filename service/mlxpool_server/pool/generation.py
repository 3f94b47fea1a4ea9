"""One generation's way from request to `finished`: lease, render, admit, load, run."""

from __future__ import annotations

import asyncio
import math
import random
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial

from mlxpool_server.domain import (
    ChatPrompt,
    FinishReason,
    GenerationEvent,
    GenerationFinished,
    GenerationPhase,
    GenerationProgress,
    GenerationRequest,
    GenerationStarted,
    GenerationTimings,
    ModelInfo,
    ModelSpec,
    Priority,
    SamplingParams,
    TokenUsage,
    ToolCall,
)
from mlxpool_server.engine.backend import ChannelSorter
from mlxpool_server.engine.delta_pacer import DeltaPacer
from mlxpool_server.engine.engine import Engine
from mlxpool_server.engine.sequence import SequenceRequest
from mlxpool_server.errors import (
    RETRY_AFTER_S,
    CapabilityMissingError,
    DrainingError,
    GenerationIdInUseError,
    GenerationNotFoundError,
    InvalidFieldError,
    ModelNotLoadedError,
    PromptTooLongError,
    QueueFullError,
    QueueTimeoutError,
)
from mlxpool_server.pool.backend import Tokenizer
from mlxpool_server.pool.lease import Lease
from mlxpool_server.pool.model_pool import ModelPool
from mlxpool_server.pool.prompts import PromptReader, check_token_ids
from mlxpool_server.pool.queue_forecast import QueueForecast
from mlxpool_server.pool.reservations import Reservation
from mlxpool_server.pool.tool_calls import CallReader
from mlxpool_server.pool.turn_stream import TurnStream


@dataclass(frozen=True, slots=True)
class GenerationLimits:
    """`max_in_flight` counts a model's running and waiting requests together."""

    max_in_flight: int
    default_max_tokens: int | None
    max_prompt_tokens: int | None
    heartbeat_s: float
    max_batch_size: int = 32
    # For memory and a place in the batch; math.inf: as long as the caller waits.
    max_queue_wait_s: float = math.inf
    # All streams together.
    max_deltas_per_s: float = math.inf


@dataclass(slots=True)
class _InFlight:
    # Its owner and its id.
    key: tuple[str, str]
    lease: Lease
    received_at: float
    # math.inf: never.
    expires_at: float
    priority: Priority
    is_cancelled: bool = False
    slot: int | None = None
    # Its generation is over; its reader may not know yet.
    has_ended: bool = False
    # When it has waited too long for its turn.
    queued_until: float = math.inf

    def patience_s(self, heartbeat_s: float) -> float:
        """How long a wait may last before this generation wants to be looked at."""
        # A cancel may have come while the reader held the last event: nobody heard its wake-up.
        if self.is_cancelled:
            return 0.0
        wake_at = min(self.expires_at, self.queued_until)
        return min(heartbeat_s, max(0.0, wake_at - time.monotonic()))

    def ended_early(self) -> FinishReason | None:
        """Why it ended before it ran, if it did."""
        if self.is_cancelled:
            return FinishReason.CANCELLED
        if self.expires_at <= time.monotonic():
            return FinishReason.TIME_LIMIT
        return None


@dataclass(frozen=True, slots=True)
class _Admitted:
    """What reading a request found out."""

    prompt: tuple[int, ...]
    tokenizer: Tokenizer
    sampling: SamplingParams
    revision: str
    # None: its output is text, whatever is in it.
    sorter: ChannelSorter | None = None


class Generations:
    """Every generation in flight. Event loop only."""

    def __init__(
        self, pool: ModelPool, engine: Engine, prompts: PromptReader, limits: GenerationLimits
    ) -> None:
        self._pool = pool
        self._engine = engine
        self._prompts = prompts
        self._limits = limits
        self._forecast = QueueForecast(limits.max_batch_size)
        self._pacer = DeltaPacer(limits.max_deltas_per_s)
        # By owner and id.
        self._in_flight: dict[tuple[str, str], _InFlight] = {}
        self._is_draining = False
        self._all_ended = asyncio.Event()
        self._all_ended.set()

    def set_limits(self, limits: GenerationLimits) -> None:
        """For requests from now on."""
        self._limits = limits
        self._pacer.set_limit(limits.max_deltas_per_s)

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        """Yield started → {progress | delta}* → finished. Closing the iterator frees its slot.

        Raises: before the first event, whatever is wrong with the request or does not fit; after
        it, what the load or the engine failed with.
        """
        with self._pool.lease(request.model) as lease:
            generation = self._register(request, lease)
            try:
                async with aclosing(self._run(request, generation)) as events:
                    async for event in events:
                        yield event
            finally:
                self._forget(generation)

    def cancel(self, generation_id: str, owner: str | None = None) -> None:
        """End it, or with `owner` None everyone's of this id, with FINISH_REASON_CANCELLED.

        Raises: GenerationNotFoundError, also for one of another owner.
        """
        owners = {each for each, _ in self._in_flight} if owner is None else {owner}
        found = [key for each in owners if (key := (each, generation_id)) in self._in_flight]
        if not found:
            raise GenerationNotFoundError(generation_id)
        for key in found:
            generation = self._in_flight[key]
            generation.is_cancelled = True
            generation.lease.wake()
            self._pool.reservations.wake()
            self._abort(generation)

    async def drain(self, grace_s: float) -> bool:
        """Refuse new generations and wait for those in flight. False: some are left."""
        self._is_draining = True
        try:
            async with asyncio.timeout(grace_s):
                await self._all_ended.wait()
        except TimeoutError:
            return False
        return True

    # ------------------------------------------------------------ the way of one request

    async def _run(
        self, request: GenerationRequest, generation: _InFlight
    ) -> AsyncGenerator[GenerationEvent, None]:
        lease, name = generation.lease, generation.lease.spec.name
        admitted = await self._admit(request, generation)
        yield GenerationStarted(
            generation.key[1], name, admitted.revision, admitted.sampling.seed or 0
        )
        load_started_at = time.monotonic()
        if generation.ended_early() is None:
            async with aclosing(lease.loading(partial(self._patience_s, generation))) as loading:
                async for load in loading:
                    if generation.ended_early() is not None:
                        break
                    yield GenerationProgress(GenerationPhase.LOADING, load=load)
        load_s = time.monotonic() - load_started_at
        reason = generation.ended_early()
        if reason is not None:
            yield _finished_unrun(generation, len(admitted.prompt), load_s, reason)
            return
        # Known by now, a hub model's too; another one, if its files were replaced.
        info = await self._pool.info(name)
        check_token_ids("prompt", admitted.prompt, info.vocab_size)
        check_token_ids("sampling.logit_bias", admitted.sampling.logit_bias, info.vocab_size)
        sequence = self._sequence(request, generation, admitted, info, load_s)
        calls = self._call_reader(lease.spec, request, admitted)
        async with aclosing(self._generate(generation, sequence, info)) as events:
            async for event in events:
                for each in await calls.read(event):
                    yield each

    async def _generate(
        self, generation: _InFlight, sequence: SequenceRequest, info: ModelInfo
    ) -> AsyncGenerator[GenerationEvent, None]:
        """Wait for memory, then run.

        Raises: QueueTimeoutError when its turn has not come in time.
        """
        generation.queued_until = time.monotonic() + self._limits.max_queue_wait_s
        num_tokens = len(sequence.prompt) + sequence.max_tokens
        reservation = Reservation(sequence.model, info.footprint, num_tokens, len(sequence.prompt))
        reservations = self._pool.reservations
        try:
            patience_s = partial(self._patience_s, generation)
            async with aclosing(reservations.take(reservation, patience_s)) as line:
                async for place in line:
                    if generation.ended_early() is not None:
                        break
                    if generation.queued_until <= time.monotonic():
                        raise self._queue_timeout()
                    yield GenerationProgress(GenerationPhase.QUEUED, queue_position=place)
            generation.lease.check()
            reason = generation.ended_early()
            if reason is not None:
                prompt_tokens = len(sequence.prompt)
                yield _finished_unrun(generation, prompt_tokens, sequence.load_s, reason)
                return
            # A reader may take its time: what the generation held is free when it ends.
            meter = self._pool.activity.meter(sequence.model, generation.received_at)
            stream = TurnStream(
                partial(self._give_back, generation, reservation), meter.see, self._pacer
            )
            generation.slot = self._engine.submit(sequence, stream)
            stream.expect_turn(
                generation.queued_until - time.monotonic(),
                self._queue_timeout(),
                partial(self._abort, generation),
            )
            async with aclosing(stream.events(self._limits.heartbeat_s)) as events:
                async for event in events:
                    yield event
        finally:
            # GeneratorExit arrives here when a send blocks, so abort in `finally`; before the
            # bytes are given to others, who come behind it in the engine's inbox.
            self._abort(generation)
            self._give_back(generation, reservation)

    def _give_back(self, generation: _InFlight, reservation: Reservation) -> None:
        self._pool.reservations.give_back(reservation)
        generation.lease.give_back()
        self._end(generation)

    def _end(self, generation: _InFlight) -> None:
        """Its place is free: the queue moves on. No harm when it was told before."""
        if generation.has_ended:
            return
        generation.has_ended = True
        if generation.slot is not None:
            model = generation.lease.spec.name
            self._forecast.ended(model, len(self._others(generation)))

    def _others(self, generation: _InFlight) -> list[Priority]:
        """Who else runs or waits on its model, by priority."""
        return [
            each.priority
            for each in self._in_flight.values()
            if each is not generation
            and not each.has_ended
            and each.lease.spec is generation.lease.spec
        ]

    def _queue_timeout(self) -> QueueTimeoutError:
        return QueueTimeoutError(self._limits.max_queue_wait_s, RETRY_AFTER_S)

    def _patience_s(self, generation: _InFlight) -> float:
        return generation.patience_s(self._limits.heartbeat_s)

    async def _admit(self, request: GenerationRequest, generation: _InFlight) -> _Admitted:
        """Everything that can refuse the request, before its first event."""
        lease, spec = generation.lease, generation.lease.spec
        if request.require_loaded and not lease.is_loaded:
            raise ModelNotLoadedError(spec.name)
        if lease.num_in_flight > self._limits.max_in_flight:
            raise QueueFullError(lease.num_in_flight - 1, RETRY_AFTER_S)
        if not math.isinf(request.deadline_s):
            others = self._others(generation)
            self._forecast.check(spec.name, request.priority, others, request.deadline_s)
        tokenizer = await self._prompts.tokenizer(spec)
        info = await self._pool.find_info(spec.name)
        most_tokens = self._most_prompt_tokens(info)
        prompt = await self._prompts.read(spec, request.prompt, most_tokens, tokenizer)
        chat = request.prompt if isinstance(request.prompt, ChatPrompt) else None
        _check_reasoning_limit(spec.name, request, tokenizer)
        check_token_ids("sampling.logit_bias", request.sampling.logit_bias, tokenizer.vocab_size)
        check_token_ids("stop.token_ids", request.stop.token_ids, tokenizer.vocab_size)
        # A tokenizer may know more tokens than the model: an id too large crashes the process.
        check_token_ids("prompt", prompt.token_ids, tokenizer.vocab_size)
        if info is not None:
            prompt_tokens = len(prompt.token_ids)
            max_tokens, _ = self._max_tokens(request, prompt_tokens, info)
            self._pool.check_fits(
                Reservation(spec.name, info.footprint, prompt_tokens + max_tokens, prompt_tokens)
            )
        self._pool.set_next_keep_alive(spec.name, request.keep_alive_s)
        return _Admitted(
            prompt=prompt.token_ids,
            tokenizer=tokenizer,
            sampling=_with_seed(request.sampling),
            revision="" if info is None else info.revision,
            sorter=None if chat is None else tokenizer.new_sorter(chat, prompt.text),
        )

    def _most_prompt_tokens(self, info: ModelInfo | None) -> int | None:
        limits = [self._limits.max_prompt_tokens, None if info is None else info.context_length]
        return min((limit for limit in limits if limit is not None), default=None)

    def _call_reader(
        self, spec: ModelSpec, request: GenerationRequest, admitted: _Admitted
    ) -> CallReader:
        async def read(text: str) -> tuple[ToolCall, ...]:
            # Other prompts have no sorter, so nothing in their output is taken for a call.
            chat = request.prompt if isinstance(request.prompt, ChatPrompt) else ChatPrompt(())
            return await self._prompts.read_calls(spec, admitted.tokenizer, text, chat)

        return CallReader(read, partial(self._pool.activity.observer.tool_call, spec.name))

    def _sequence(
        self,
        request: GenerationRequest,
        generation: _InFlight,
        admitted: _Admitted,
        info: ModelInfo,
        load_s: float,
    ) -> SequenceRequest:
        max_tokens, limit_reason = self._max_tokens(request, len(admitted.prompt), info)
        stop, tokenizer = request.stop, admitted.tokenizer
        return SequenceRequest(
            model=generation.lease.spec.name,
            prompt=admitted.prompt,
            sampling=admitted.sampling,
            max_tokens=max_tokens,
            limit_reason=limit_reason,
            decoder=tokenizer.new_decoder(),
            received_at=generation.received_at,
            submitted_at=time.monotonic(),
            load_s=load_s,
            eos_token_ids=frozenset() if stop.ignore_eos else tokenizer.eos_token_ids,
            stop_token_ids=stop.token_ids,
            stop_sequences=stop.sequences,
            include_token_ids=request.output.include_token_ids,
            final_only=request.output.final_only,
            expires_at=generation.expires_at,
            priority=request.priority,
            sorter=admitted.sorter,
            max_reasoning_tokens=stop.max_reasoning_tokens,
            reasoning_end=() if admitted.sorter is None else tokenizer.reasoning_end,
        )

    def _max_tokens(
        self, request: GenerationRequest, prompt_tokens: int, info: ModelInfo
    ) -> tuple[int, FinishReason]:
        """How many tokens may come, and what it is called when they have.

        Raises: PromptTooLongError.
        """
        limit = self._limits.max_prompt_tokens
        if limit is not None and prompt_tokens > limit:
            raise PromptTooLongError(prompt_tokens, limit, "this server's limit")
        room = info.context_length - prompt_tokens
        if room < 1:
            raise PromptTooLongError(prompt_tokens, info.context_length)
        wanted = request.stop.max_tokens or self._limits.default_max_tokens
        if wanted is None or wanted > room:
            return room, FinishReason.CONTEXT_LENGTH
        return wanted, FinishReason.MAX_TOKENS

    def _register(self, request: GenerationRequest, lease: Lease) -> _InFlight:
        if self._is_draining:
            raise DrainingError(RETRY_AFTER_S)
        generation_id = request.generation_id or str(uuid.uuid4())
        key = request.owner, generation_id
        if key in self._in_flight:
            raise GenerationIdInUseError(generation_id)
        now = time.monotonic()
        duration_s = request.stop.max_duration_s
        expires_at = math.inf if duration_s is None else now + duration_s
        generation = _InFlight(key, lease, now, expires_at, request.priority)
        self._in_flight[key] = generation
        self._all_ended.clear()
        return generation

    def _abort(self, generation: _InFlight) -> None:
        if generation.slot is not None:
            self._engine.abort(generation.slot)

    def _forget(self, generation: _InFlight) -> None:
        self._end(generation)
        del self._in_flight[generation.key]
        if not self._in_flight:
            self._all_ended.set()


def _with_seed(sampling: SamplingParams) -> SamplingParams:
    """Every generation has a seed, so that every generation can be repeated."""
    if sampling.seed is not None:
        return sampling
    # Below 2**53, so that every JSON reader can hand it back unharmed.
    return replace(sampling, seed=random.getrandbits(53))


def _check_reasoning_limit(model: str, request: GenerationRequest, tokenizer: Tokenizer) -> None:
    if request.stop.max_reasoning_tokens is None:
        return
    if not isinstance(request.prompt, ChatPrompt):
        raise InvalidFieldError("stop.max_reasoning_tokens", "goes with prompt.chat only")
    if not tokenizer.has_reasoning:
        raise CapabilityMissingError(model, "reasoning", "leave max_reasoning_tokens unset")


def _finished_unrun(
    generation: _InFlight, prompt_tokens: int, load_s: float, reason: FinishReason
) -> GenerationFinished:
    return GenerationFinished(
        finish_reason=reason,
        text="",
        usage=TokenUsage(prompt_tokens=prompt_tokens, completion_tokens=0),
        timings=GenerationTimings(load_s=load_s, total_s=time.monotonic() - generation.received_at),
    )
