"""One Embed's way from request to vectors: lease, read, load, reserve, run."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from contextlib import aclosing

from mlxpool_server.domain import (
    MAX_STRETCH,
    SHORT_TOKENS,
    EmbeddingInfo,
    EmbedRequest,
    EmbedResult,
    ModelInfo,
    Pooling,
    Vector,
)
from mlxpool_server.engine.backend import EmbeddingJob
from mlxpool_server.engine.engine import Engine
from mlxpool_server.errors import (
    RETRY_AFTER_S,
    CapabilityMissingError,
    DrainingError,
    InvalidFieldError,
    PromptTooLongError,
    QueueFullError,
    QueueTimeoutError,
)
from mlxpool_server.pool.generation_limits import GenerationLimits
from mlxpool_server.pool.lease import Lease
from mlxpool_server.pool.model_pool import ModelPool
from mlxpool_server.pool.prompts import PromptReader, check_token_ids
from mlxpool_server.pool.reservations import Reservation

# What most clients receive at most, whatever this server may send.
MAX_REPLY_BYTES = 4 * 1024 * 1024
# Of a reply: each number, what stands before the numbers of one embedding, and the rest.
_NUMBER_BYTES = 4
_HEAD_BYTES = 12
_TAIL_BYTES = 256


class Embeddings:
    """Every Embed in flight. Event loop only."""

    def __init__(
        self,
        pool: ModelPool,
        engine: Engine,
        prompts: PromptReader,
        limits: GenerationLimits,
        max_reply_bytes: int = MAX_REPLY_BYTES,
    ) -> None:
        """`limits`: those of generations that an Embed has, too: how many, how long, how late."""
        self._pool = pool
        self._engine = engine
        self._prompts = prompts
        self._limits = limits
        self._max_reply_bytes = min(max_reply_bytes, MAX_REPLY_BYTES)
        self._num_in_flight = 0
        self._is_empty = asyncio.Event()
        self._is_empty.set()
        self._is_draining = False

    @property
    def num_in_flight(self) -> int:
        return self._num_in_flight

    def set_limits(self, limits: GenerationLimits) -> None:
        """For requests from now on."""
        self._limits = limits

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        """A caller who gives up frees what it holds.

        Raises: whatever is wrong with the request or does not fit, with the index of the input
        that is; what the load or the engine failed with.
        """
        if self._is_draining:
            raise DrainingError(RETRY_AFTER_S)
        self._num_in_flight += 1
        self._is_empty.clear()
        try:
            with self._pool.lease(request.model) as lease:
                return await self._run(request, lease)
        finally:
            self._num_in_flight -= 1
            if not self._num_in_flight:
                self._is_empty.set()

    async def drain(self, grace_s: float) -> bool:
        """Refuse new ones and wait for those in flight. False: some are left."""
        self._is_draining = True
        try:
            async with asyncio.timeout(grace_s):
                await self._is_empty.wait()
        except TimeoutError:
            return False
        return True

    # ------------------------------------------------------------ the way of one request

    async def _run(self, request: EmbedRequest, lease: Lease) -> EmbedResult:
        name = lease.spec.name
        texts = await self._admit(request, lease)
        async with aclosing(lease.loading(lambda: self._limits.heartbeat_s)) as loading:
            async for _ in loading:
                pass
        # Known by now, a hub model's too; another one, if its files were replaced.
        info = await self._pool.info(name)
        pooling = self._check(request, name, info, texts)
        reservation = _reservation(name, info, texts)
        try:
            await self._reserve(reservation)
            lease.check()
            job = EmbeddingJob(name, texts, pooling, request.normalize)
            vectors: tuple[Vector, ...] = await self._engine.embed(job)
        finally:
            self._pool.reservations.give_back(reservation)
        num_tokens = sum(map(len, texts))
        self._pool.activity.observer.embedded(name, len(texts), num_tokens)
        return EmbedResult(vectors, num_tokens)

    async def _admit(self, request: EmbedRequest, lease: Lease) -> tuple[tuple[int, ...], ...]:
        """Everything that can be refused before the model is loaded; return the texts' tokens."""
        spec = lease.spec
        if lease.num_in_flight > self._limits.max_in_flight:
            raise QueueFullError(lease.num_in_flight - 1, RETRY_AFTER_S)
        info = await self._pool.find_info(spec.name)
        most_tokens = None
        if info is not None:
            embedding, _ = _check_ability(request, spec.name, info)
            self._check_count(request, embedding)
            most_tokens, _ = self._longest(info, embedding)
        tokenizer = await self._prompts.tokenizer(spec)
        texts = await self._prompts.read_inputs(spec, request.inputs, most_tokens, tokenizer)
        # A tokenizer may know more tokens than the model: an id too large crashes the process.
        _check_ids(texts, tokenizer.vocab_size)
        if info is not None:
            self._check(request, spec.name, info, texts)
            self._pool.check_fits(_reservation(spec.name, info, texts))
        self._pool.set_next_keep_alive(spec.name, request.keep_alive_s)
        return tuple(texts)

    async def _reserve(self, reservation: Reservation) -> None:
        """Raises: QueueTimeoutError; PoolMemoryLimitError when nobody's end could help."""
        until = time.monotonic() + self._limits.max_queue_wait_s

        def patience_s() -> float:
            return min(self._limits.heartbeat_s, max(0.0, until - time.monotonic()))

        async with aclosing(self._pool.reservations.take(reservation, patience_s)) as line:
            async for _ in line:
                if until <= time.monotonic():
                    raise QueueTimeoutError(self._limits.max_queue_wait_s, RETRY_AFTER_S)

    # ------------------------------------------------------------ what may be refused

    def _check(
        self,
        request: EmbedRequest,
        name: str,
        info: ModelInfo,
        texts: Sequence[tuple[int, ...]],
    ) -> Pooling:
        """Return the pooling to use."""
        embedding, pooling = _check_ability(request, name, info)
        self._check_count(request, embedding)
        longest, what = self._longest(info, embedding)
        for index, text in enumerate(texts):
            if len(text) > longest:
                raise PromptTooLongError(len(text), longest, what, field=f"inputs[{index}]")
        _check_ids(texts, info.vocab_size)
        return pooling

    def _check_count(self, request: EmbedRequest, embedding: EmbeddingInfo) -> None:
        """Raises: InvalidFieldError on the first input whose vector has no room in the reply."""
        vector_bytes = _NUMBER_BYTES * embedding.size + _HEAD_BYTES
        most = max(1, (self._max_reply_bytes - _TAIL_BYTES) // vector_bytes)
        if len(request.inputs) > most:
            problem = (
                f"is one too many: {most} embeddings of {embedding.size} numbers fill a reply; "
                "send the others in another request"
            )
            raise InvalidFieldError(f"inputs[{most}]", problem)

    def _longest(self, info: ModelInfo, embedding: EmbeddingInfo) -> tuple[int, str]:
        """How many tokens a text may have, and whose limit that is."""
        limits = (
            (info.context_length, "the model's context"),
            (embedding.max_tokens or math.inf, "the model's limit"),
            (self._limits.max_prompt_tokens or math.inf, "this server's limit"),
        )
        most, what = min(limits, key=lambda limit: limit[0])
        return int(most), what


def _check_ability(
    request: EmbedRequest, name: str, info: ModelInfo
) -> tuple[EmbeddingInfo, Pooling]:
    """Raises: CapabilityMissingError."""
    embedding = info.embedding
    if embedding is None:
        raise CapabilityMissingError(name, "embeddings", "nothing is known of its hidden states")
    if embedding.problem:
        raise CapabilityMissingError(name, "embeddings", embedding.problem)
    pooling = request.pooling or embedding.pooling
    if pooling is None:
        remedy = "its own is not one of the contract's; name one in pooling"
        raise CapabilityMissingError(name, "known pooling", remedy)
    return embedding, pooling


def _check_ids(texts: Sequence[tuple[int, ...]], vocab_size: int) -> None:
    for index, text in enumerate(texts):
        if max(text) >= vocab_size:
            check_token_ids(f"inputs[{index}]", text, vocab_size)


def _reservation(name: str, info: ModelInfo, texts: Sequence[tuple[int, ...]]) -> Reservation:
    """What its passes take at their largest, padding included."""
    longest = max(map(len, texts))
    padded = sum(max(MAX_STRETCH * len(text), SHORT_TOKENS) for text in texts)
    pass_tokens = 0 if info.embedding is None else info.embedding.pass_tokens
    if not info.can_generate:
        # A text that is longer than a pass goes in whole: only what generates reads it in parts.
        pass_tokens = max(pass_tokens, longest)
    return Reservation(name, info.footprint, longest, padded, pass_tokens)
