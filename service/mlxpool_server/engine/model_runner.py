"""One loaded model on the engine thread: its queue, its batch, its sequences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import structlog

from mlxpool_server.domain import FinishReason, GenerationPhase, GenerationProgress
from mlxpool_server.engine.backend import BatchRunner, LoadedModel, StepOutput, TokenScores
from mlxpool_server.engine.output_stream import StreamItem
from mlxpool_server.engine.scheduler import Scheduler
from mlxpool_server.engine.sequence import Sequence, SequenceEvents, SequenceState
from mlxpool_server.errors import GenerationFailedError, MlxpoolError

log = structlog.get_logger(__name__)

# (slot, what its reader should get).
Emit = Callable[[int, StreamItem], None]


@dataclass(frozen=True, slots=True)
class RunnerStats:
    running: int = 0
    waiting: int = 0
    kv_bytes: int = 0
    prompt_cache_bytes: int = 0


class ModelRunner:
    """schedule → run → postprocess, one step at a time. Engine thread only.

    A sequence that fails by itself fails alone; what the batch raises is raised, and then only
    `rebuild` or `close` make sense.
    """

    def __init__(
        self,
        name: str,
        model: LoadedModel,
        *,
        max_batch_size: int,
        emit: Emit,
        clock: Callable[[], float],
    ) -> None:
        self._name = name
        self._model = model
        self._scheduler = Scheduler(max_batch_size)
        self._emit = emit
        self._clock = clock
        self._prompt_cache_limit_bytes = 0
        self._batch: BatchRunner = model.new_runner()

    def __contains__(self, slot: int) -> bool:
        return slot in self._scheduler

    @property
    def has_work(self) -> bool:
        return len(self._scheduler) > 0

    def stats(self) -> RunnerStats:
        return RunnerStats(
            running=self._scheduler.num_running,
            waiting=len(self._scheduler.waiting),
            kv_bytes=self._batch.kv_bytes(),
            prompt_cache_bytes=self._batch.prompt_cache_bytes(),
        )

    def submit(self, sequence: Sequence) -> None:
        self._scheduler.submit(sequence)
        self._tell_queue()

    def admit(self) -> None:
        """End whose time is up, and take who waits into the batch. Raises: as `step`."""
        self._expire()
        admitted = self._scheduler.admit()
        for sequence in admitted:
            try:
                request = sequence.request
                self._batch.add(
                    sequence.slot,
                    request.prompt,
                    request.sampling,
                    request.guide,
                    request.top_logprobs,
                    max_tokens=request.max_tokens,
                    may_be_forced=request.max_reasoning_tokens is not None,
                    adapter=request.adapter,
                )
            except Exception:  # it never joined the batch, so it fails alone
                log.exception("sequence.not_added", model=self._name, slot=sequence.slot)
                self._emit(sequence.slot, GenerationFailedError(self._name))
                self._scheduler.remove([sequence])
            else:
                self._force(sequence)
                self._tell_prefill(sequence.slot, 0)
        if admitted:
            self._tell_queue()

    def step(self) -> None:
        """Advance every running sequence. Raises: whatever the backend raises."""
        if self._scheduler.num_running == 0:
            return
        output = self._batch.step()
        for slot, cached_tokens in output.cached:
            if (cached := self._scheduler.running(slot)) is not None:
                cached.cached_prompt_tokens = cached_tokens
        for slot, prefilled_tokens in output.prefilled:
            self._tell_prefill(slot, prefilled_tokens)
        ended = self._take_tokens(output)
        for slot, error in output.failed:
            if (failed := self._scheduler.running(slot)) is not None:
                self._emit(slot, error)
                ended.append(failed)
        self._remove(ended)

    def settle(self) -> None:
        """Wait for what the last step began. Raises: as `step`."""
        self._batch.settle()

    def limit_prompt_cache(self, num_bytes: int) -> None:
        self._prompt_cache_limit_bytes = num_bytes
        self._batch.limit_prompt_cache(num_bytes)

    def abort(self, slot: int, reason: FinishReason) -> None:
        """End one sequence with what it has."""
        ended = [sequence for sequence in self._scheduler if sequence.slot == slot]
        for sequence in ended:
            self._fold(sequence, partial(sequence.finish, reason))
        self._remove(ended)

    def rebuild(self) -> None:
        """Fail every sequence and start over with an empty batch, after something raised.

        Raises: whatever the backend raises; then this model cannot go on.
        """
        self.close(GenerationFailedError(self._name))
        self._batch = self._model.new_runner()
        self._batch.limit_prompt_cache(self._prompt_cache_limit_bytes)

    def close(self, error: MlxpoolError) -> None:
        """End every sequence with `error` and drop the batch."""
        everyone = list(self._scheduler)
        for sequence in everyone:
            self._emit(sequence.slot, error)
        self._scheduler.remove(everyone)
        self._batch.close()

    def _expire(self) -> None:
        now = self._clock()
        expired = [sequence for sequence in self._scheduler if sequence.request.expires_at <= now]
        for sequence in expired:
            self._fold(sequence, partial(sequence.finish, FinishReason.TIME_LIMIT))
        self._remove(expired)

    def _take_tokens(self, output: StepOutput) -> list[Sequence]:
        """Return those whom one of their tokens ended; what came behind it is dropped."""
        ended: list[Sequence] = []
        drafted = dict(output.drafted)
        for slot, token_id in output.tokens:
            sequence = self._scheduler.running(slot)
            if sequence is None or (ended and sequence in ended):
                continue
            if drafted.get(slot, 0) > 0:
                drafted[slot] -= 1
                sequence.accepted_draft_tokens += 1
            if self._take(sequence, token_id, output.scores.get(slot)):
                ended.append(sequence)
        return ended

    def _take(self, sequence: Sequence, token_id: int, scores: TokenScores | None) -> bool:
        """Take one token in; True when that ended the sequence."""
        is_first = sequence.state is SequenceState.PREFILLING
        if is_first:
            self._emit(sequence.slot, GenerationProgress(GenerationPhase.DECODING))
        if self._fold(sequence, partial(sequence.accept, token_id, scores)):
            return True
        self._force(sequence)
        return False

    def _force(self, sequence: Sequence) -> None:
        if sequence.request.max_reasoning_tokens is None:
            return
        if token_ids := sequence.take_forced():
            self._batch.force(sequence.slot, token_ids)

    def _fold(self, sequence: Sequence, fold: Callable[[], SequenceEvents]) -> bool:
        """Pass on what `fold` makes of the sequence; True when it ended, by an error too."""
        try:
            events = fold()
        except Exception:  # one failed sequence fails alone: this is the engine's edge
            log.exception("sequence.failed", model=self._name, slot=sequence.slot)
            self._emit(sequence.slot, GenerationFailedError(self._name))
            return True
        for event in events:
            self._emit(sequence.slot, event)
        return sequence.is_finished

    def _remove(self, sequences: list[Sequence]) -> None:
        running = self._scheduler.remove(sequences)
        if running:
            self._batch.remove(running)

    def _tell_queue(self) -> None:
        for position, sequence in enumerate(self._scheduler.waiting, start=1):
            progress = GenerationProgress(GenerationPhase.QUEUED, queue_position=position)
            self._emit(sequence.slot, progress)

    def _tell_prefill(self, slot: int, prefilled_tokens: int) -> None:
        sequence = self._scheduler.running(slot)
        if sequence is not None and sequence.state is SequenceState.PREFILLING:
            progress = GenerationProgress(
                GenerationPhase.PREFILLING,
                prefilled_tokens=prefilled_tokens,
                prompt_tokens=len(sequence.request.prompt),
            )
            self._emit(slot, progress)
