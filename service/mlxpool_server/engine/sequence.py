"""The state of one request on the engine thread."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass

from mlxpool_server.domain import (
    Channel,
    FinishReason,
    GenerationDelta,
    GenerationFinished,
    GenerationTimings,
    OutputPart,
    Priority,
    SamplingParams,
    TokenUsage,
)
from mlxpool_server.engine.backend import ChannelSorter, TextDecoder
from mlxpool_server.engine.output_fold import OutputFold
from mlxpool_server.engine.stop_matcher import StopMatcher


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """One generation, ready to run. Instants are `time.monotonic`."""

    model: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int
    # Why max_tokens ends it: the caller's limit, or the model's context.
    limit_reason: FinishReason
    decoder: TextDecoder
    received_at: float
    submitted_at: float
    load_s: float = 0.0
    eos_token_ids: frozenset[int] = frozenset()
    stop_token_ids: frozenset[int] = frozenset()
    stop_sequences: tuple[str, ...] = ()
    include_token_ids: bool = False
    final_only: bool = False
    # math.inf: never.
    expires_at: float = math.inf
    priority: Priority = Priority.NORMAL
    # None: all of it is text.
    sorter: ChannelSorter | None = None
    # So many tokens of thoughts, then these tokens end them. None: no limit.
    max_reasoning_tokens: int | None = None
    reasoning_end: tuple[int, ...] = ()


# The model had no more to say; after any other end it would have gone on.
_OWN_ENDS = frozenset({FinishReason.STOP})

SequenceEvents = tuple[GenerationDelta | GenerationFinished, ...]


class SequenceState(enum.Enum):
    WAITING = "waiting"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    FINISHED = "finished"


class Sequence:
    """Folds tokens into deltas until one of the request's ends is reached."""

    def __init__(
        self,
        slot: int,
        request: SequenceRequest,
        clock: Callable[[], float],
    ) -> None:
        self.slot = slot
        self.request = request
        self.state = SequenceState.WAITING
        self.cached_prompt_tokens = 0
        self._clock = clock
        self._matcher = StopMatcher(request.stop_sequences)
        self._output = OutputFold()
        self._token_ids: list[int] = []
        self._num_reasoning = 0
        # Those that are to come: a thought is ended once.
        self._num_forced = 0
        self._unsent_token_ids: list[int] = []
        self._started_at: float | None = None
        self._first_token_at: float | None = None

    @property
    def is_finished(self) -> bool:
        return self.state is SequenceState.FINISHED

    def start(self) -> None:
        self.state = SequenceState.PREFILLING
        self._started_at = self._clock()

    def accept(self, token_id: int) -> SequenceEvents:
        """Take one generated token; return what the caller should see of it, in order."""
        if self._first_token_at is None:
            self._first_token_at = self._clock()
            self.state = SequenceState.DECODING
        self._token_ids.append(token_id)
        self._unsent_token_ids.append(token_id)
        if token_id in self.request.stop_token_ids:
            return self.finish(FinishReason.STOP_SEQUENCE, stop_token_id=token_id)
        if token_id in self.request.eos_token_ids:
            return self.finish(FinishReason.STOP, stop_token_id=token_id)
        self._sort(token_id)
        if self._matcher.matched is not None:
            return self.finish(FinishReason.STOP_SEQUENCE)
        if len(self._token_ids) >= self.request.max_tokens:
            return self.finish(self.request.limit_reason)
        return self._take_delta()

    def finish(self, reason: FinishReason, stop_token_id: int | None = None) -> SequenceEvents:
        """End here. The text that was held back is part of the output, unless it matched."""
        if self._matcher.matched is None:
            self._append(self._last_parts(is_cut=reason not in _OWN_ENDS))
            if self._matcher.matched is None:
                self._append_text(self._matcher.finish())
            else:
                reason = FinishReason.STOP_SEQUENCE
        self.state = SequenceState.FINISHED
        wants_all_ids = self.request.final_only and self.request.include_token_ids
        finished = GenerationFinished(
            finish_reason=reason,
            text=self._output.text(Channel.TEXT),
            reasoning=self._output.text(Channel.REASONING),
            unread_parts=self._output.parts_with_calls(),
            usage=TokenUsage(
                prompt_tokens=len(self.request.prompt),
                completion_tokens=len(self._token_ids),
                cached_prompt_tokens=self.cached_prompt_tokens,
                reasoning_tokens=self._num_reasoning,
            ),
            timings=self._timings(),
            stop_sequence=self._matcher.matched or "",
            stop_token_id=stop_token_id,
            token_ids=tuple(self._token_ids) if wants_all_ids else (),
        )
        return (*self._take_delta(), finished)

    def take_forced(self) -> tuple[int, ...]:
        """The tokens that have to come next, because a thought is at its limit; once each."""
        limit, sorter = self.request.max_reasoning_tokens, self.request.sorter
        is_over = (
            limit is not None
            and sorter is not None
            and sorter.is_reasoning
            and self._num_reasoning >= limit
            and not self._num_forced
        )
        if not is_over:
            return ()
        self._num_forced = len(self.request.reasoning_end)
        return self.request.reasoning_end

    def _sort(self, token_id: int) -> None:
        sorter = self.request.sorter
        text = self.request.decoder.push(token_id)
        if sorter is None:
            self._append_text(self._matcher.push(text))
            return
        was_reasoning = sorter.is_reasoning
        parts = sorter.push(token_id, text)
        if self._num_forced:
            self._num_forced -= 1
        elif was_reasoning and sorter.is_reasoning:
            self._num_reasoning += 1
        self._append(parts)

    def _last_parts(self, *, is_cut: bool) -> tuple[OutputPart, ...]:
        text = self.request.decoder.finish()
        if self.request.sorter is not None:
            return self.request.sorter.finish(text, is_cut=is_cut)
        return (OutputPart(Channel.TEXT, text),)

    def _append(self, parts: tuple[OutputPart, ...]) -> None:
        """Stop sequences are looked for in the answer's text, not in thoughts and calls."""
        for part in parts:
            if self._matcher.matched is not None:
                return
            if part.channel is Channel.TEXT:
                self._append_text(self._matcher.push(part.text))
            else:
                self._append_text(self._matcher.finish())
                self._output.append(part)

    def _append_text(self, text: str) -> None:
        if text:
            self._output.append(OutputPart(Channel.TEXT, text))

    def _take_delta(self) -> tuple[GenerationDelta, ...]:
        if self.request.final_only:
            return ()
        ids = tuple(self._unsent_token_ids) if self.request.include_token_ids else ()
        if not (self._output.has_new or ids):
            return ()
        self._unsent_token_ids.clear()
        return self._output.take_new(len(self._token_ids), ids)

    def _timings(self) -> GenerationTimings:
        now = self._clock()
        started = now if self._started_at is None else self._started_at
        first = self._first_token_at
        received = self.request.received_at
        return GenerationTimings(
            queue_s=started - self.request.submitted_at,
            load_s=self.request.load_s,
            prefill_s=(now if first is None else first) - started,
            decode_s=0.0 if first is None else now - first,
            time_to_first_token_s=None if first is None else first - received,
            total_s=now - received,
        )
