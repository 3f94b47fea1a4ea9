"""The state of one request on the engine thread."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass

from mlxpool_server.domain import (
    FinishReason,
    GenerationDelta,
    GenerationFinished,
    GenerationTimings,
    Priority,
    SamplingParams,
    TokenCandidate,
    TokenLogprob,
    TokenUsage,
)
from mlxpool_server.engine.backend import (
    ChannelSorter,
    Guide,
    LoadedAdapter,
    TextDecoder,
    TokenScores,
)
from mlxpool_server.engine.channel_fold import ChannelFold
from mlxpool_server.engine.stop_matcher import StopMatcher
from mlxpool_server.engine.text_fold import TextFold


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
    # None: no log-probabilities.
    top_logprobs: int | None = None
    # The bytes of a token, for its log-probability.
    piece: Callable[[int], bytes] = lambda _: b""
    # math.inf: never.
    expires_at: float = math.inf
    priority: Priority = Priority.NORMAL
    # None: any token may come.
    guide: Guide | None = None
    # None: the model as it is.
    adapter: LoadedAdapter | None = None
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
        self.accepted_draft_tokens = 0
        self._clock = clock
        self._matcher = StopMatcher(request.stop_sequences)
        self._output = _new_fold(request, self._matcher)
        self._token_ids: list[int] = []
        self._unsent_token_ids: list[int] = []
        self._unsent_logprobs: list[TokenLogprob] = []
        self._num_logprobs = 0
        self._started_at: float | None = None
        self._first_token_at: float | None = None

    @property
    def is_finished(self) -> bool:
        return self.state is SequenceState.FINISHED

    def start(self) -> None:
        self.state = SequenceState.PREFILLING
        self._started_at = self._clock()

    def accept(self, token_id: int, scores: TokenScores | None = None) -> SequenceEvents:
        """Take one generated token; return what the caller should see of it, in order."""
        if scores is not None:
            self._unsent_logprobs.append(self._spelled(token_id, scores))
            self._num_logprobs += 1
        if self._first_token_at is None:
            self._first_token_at = self._clock()
            self.state = SequenceState.DECODING
        self._token_ids.append(token_id)
        self._unsent_token_ids.append(token_id)
        if token_id in self.request.stop_token_ids:
            return self.finish(FinishReason.STOP_SEQUENCE, stop_token_id=token_id)
        if token_id in self.request.eos_token_ids:
            return self.finish(FinishReason.STOP, stop_token_id=token_id)
        self._output.push(token_id, self.request.decoder.push(token_id))
        if self._matcher.matched is not None:
            return self.finish(FinishReason.STOP_SEQUENCE)
        if len(self._token_ids) >= self.request.max_tokens:
            return self.finish(self.request.limit_reason)
        return self._take_delta()

    def finish(self, reason: FinishReason, stop_token_id: int | None = None) -> SequenceEvents:
        """End here. The text that was held back is part of the output, unless it matched."""
        if self._matcher.matched is None:
            text = self.request.decoder.finish()
            self._output.finish(text, is_cut=reason not in _OWN_ENDS)
            if self._matcher.matched is not None:
                reason = FinishReason.STOP_SEQUENCE
        self.state = SequenceState.FINISHED
        wants_all_ids = self.request.final_only and self.request.include_token_ids
        finished = GenerationFinished(
            finish_reason=reason,
            text=self._output.text,
            reasoning=self._output.reasoning,
            unread_parts=self._output.unread_parts,
            usage=TokenUsage(
                prompt_tokens=len(self.request.prompt),
                completion_tokens=len(self._token_ids),
                cached_prompt_tokens=self.cached_prompt_tokens,
                reasoning_tokens=self._output.reasoning_tokens,
                accepted_draft_tokens=self.accepted_draft_tokens,
            ),
            timings=self._timings(),
            stop_sequence=self._matcher.matched or "",
            stop_token_id=stop_token_id,
            token_ids=tuple(self._token_ids) if wants_all_ids else (),
            num_logprobs=self._num_logprobs,
        )
        return (*self._take_delta(), finished)

    def take_forced(self) -> tuple[int, ...]:
        """The tokens that have to come next, because a thought is at its limit; once each."""
        return self._output.take_forced()

    def _take_delta(self) -> tuple[GenerationDelta, ...]:
        if self.request.final_only:
            return ()
        ids = tuple(self._unsent_token_ids) if self.request.include_token_ids else ()
        logprobs = tuple(self._unsent_logprobs)
        deltas = self._output.take(len(self._token_ids), ids, logprobs)
        if deltas:
            self._unsent_token_ids.clear()
            self._unsent_logprobs.clear()
        return deltas

    def _spelled(self, token_id: int, scores: TokenScores) -> TokenLogprob:
        piece = self.request.piece
        return TokenLogprob(
            TokenCandidate(token_id, piece(token_id), scores.logprob),
            tuple(TokenCandidate(other, piece(other), logprob) for other, logprob in scores.top),
        )

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


def _new_fold(request: SequenceRequest, matcher: StopMatcher) -> TextFold | ChannelFold:
    if request.sorter is None:
        return TextFold(matcher)
    return ChannelFold(matcher, request.sorter, request.max_reasoning_tokens, request.reasoning_end)
