"""What an operator lets generations have."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlxpool_server.domain import FinishReason, GenerationRequest, ModelInfo
from mlxpool_server.errors import PromptTooLongError


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

    def most_prompt_tokens(self, info: ModelInfo | None) -> int | None:
        """No longer prompt can pass `max_tokens`. None: any may."""
        limits = [self.max_prompt_tokens, None if info is None else info.context_length]
        return min((limit for limit in limits if limit is not None), default=None)

    def max_tokens(
        self, request: GenerationRequest, prompt_tokens: int, info: ModelInfo
    ) -> tuple[int, FinishReason]:
        """How many tokens may come, and what it is called when they have.

        Raises: PromptTooLongError.
        """
        limit = self.max_prompt_tokens
        if limit is not None and prompt_tokens > limit:
            raise PromptTooLongError(prompt_tokens, limit, "this server's limit")
        room = info.context_length - prompt_tokens
        if room < 1:
            raise PromptTooLongError(prompt_tokens, info.context_length)
        wanted = request.stop.max_tokens or self.default_max_tokens
        if wanted is None or wanted > room:
            return room, FinishReason.CONTEXT_LENGTH
        return wanted, FinishReason.MAX_TOKENS
