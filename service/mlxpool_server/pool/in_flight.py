"""The generations that have begun and are not over: by whom, since when, for how long."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from dataclasses import dataclass

from mlxpool_server.domain import (
    FinishReason,
    GenerationFinished,
    GenerationRequest,
    GenerationTimings,
    Priority,
    TokenUsage,
)
from mlxpool_server.errors import GenerationIdInUseError, GenerationNotFoundError
from mlxpool_server.pool.lease import Lease


@dataclass(slots=True)
class InFlight:
    # Its owner and its id.
    key: tuple[str, str]
    lease: Lease
    received_at: float
    # math.inf: never.
    expires_at: float
    priority: Priority
    # The adapter's, for one that wants one.
    adapter_lease: Lease | None = None
    is_cancelled: bool = False
    slot: int | None = None
    # Its generation is over; its reader may not know yet.
    has_ended: bool = False
    # When it has waited too long for its turn.
    queued_until: float = math.inf

    @property
    def leases(self) -> tuple[Lease, ...]:
        """Of all that it needs in memory."""
        return (self.lease,) if self.adapter_lease is None else (self.lease, self.adapter_lease)

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

    def finished_unrun(
        self, prompt_tokens: int, load_s: float, reason: FinishReason
    ) -> GenerationFinished:
        """The end of one that never came to the engine."""
        return GenerationFinished(
            finish_reason=reason,
            text="",
            usage=TokenUsage(prompt_tokens=prompt_tokens, completion_tokens=0),
            timings=GenerationTimings(load_s=load_s, total_s=time.monotonic() - self.received_at),
        )


class InFlightTable:
    """By owner and id. Event loop only."""

    def __init__(self) -> None:
        self._generations: dict[tuple[str, str], InFlight] = {}
        self._is_empty = asyncio.Event()
        self._is_empty.set()

    def __len__(self) -> int:
        return len(self._generations)

    def add(self, request: GenerationRequest, lease: Lease) -> InFlight:
        """Raises: GenerationIdInUseError."""
        generation_id = request.generation_id or str(uuid.uuid4())
        key = request.owner, generation_id
        if key in self._generations:
            raise GenerationIdInUseError(generation_id)
        now = time.monotonic()
        duration_s = request.stop.max_duration_s
        expires_at = math.inf if duration_s is None else now + duration_s
        generation = InFlight(key, lease, now, expires_at, request.priority)
        self._generations[key] = generation
        self._is_empty.clear()
        return generation

    def remove(self, generation: InFlight) -> None:
        del self._generations[generation.key]
        if not self._generations:
            self._is_empty.set()

    def find(self, generation_id: str, owner: str | None) -> list[InFlight]:
        """The owner's of this id; with `owner` None everyone's.

        Raises: GenerationNotFoundError, also for one of another owner.
        """
        owners = {each for each, _ in self._generations} if owner is None else {owner}
        found = [
            self._generations[key]
            for each in owners
            if (key := (each, generation_id)) in self._generations
        ]
        if not found:
            raise GenerationNotFoundError(generation_id)
        return found

    def others(self, generation: InFlight) -> list[Priority]:
        """Who else runs or waits on its model, by priority."""
        return [
            each.priority
            for each in self._generations.values()
            if each is not generation
            and not each.has_ended
            and each.lease.spec is generation.lease.spec
        ]

    async def wait_empty(self) -> None:
        await self._is_empty.wait()
