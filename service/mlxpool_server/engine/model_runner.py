"""One loaded model on the engine thread: its queue, its batch, its sequences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import structlog

from mlxpool_server.domain import FinishReason, GenerationPhase, GenerationProgress
from mlxpool_server.engine.backend import BatchRunner, LoadedModel
from mlxpool_server.engine.output_stream import OutputStream, StreamItem
from mlxpool_server.engine.scheduler import Scheduler
from mlxpool_server.engine.sequence import Sequence, SequenceState
from mlxpool_server.errors import GenerationFailedError, MlxpoolError

log = structlog.get_logger(__name__)

Emit = Callable[[OutputStream, StreamItem], None]


@dataclass(frozen=True, slots=True)
class RunnerStats:
    running: int = 0
    waiting: int = 0
    kv_bytes: int = 0


class ModelRunner:
    """schedule → run → postprocess, one step at a time. Engine thread only."""

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
        self._batch: BatchRunner = model.new_runner()

    @property
    def has_work(self) -> bool:
        return len(self._scheduler) > 0

    def stats(self) -> RunnerStats:
        return RunnerStats(
            running=self._scheduler.num_running,
            waiting=len(self._scheduler.waiting),
            kv_bytes=self._batch.kv_bytes(),
        )

    def submit(self, sequence: Sequence) -> None:
        self._scheduler.submit(sequence)
        self._tell_queue()

    def step(self) -> None:
        """Advance every running sequence. Raises: whatever the backend raises."""
        self._expire()
        self._admit()
        if self._scheduler.num_running == 0:
            return
        output = self._batch.step()
        for slot, prefilled_tokens in output.prefilled:
            self._tell_prefill(slot, prefilled_tokens)
        finished = [
            sequence
            for slot, token_id in output.tokens
            if (sequence := self._scheduler.running(slot)) is not None
            and self._take(sequence, token_id)
        ]
        self._remove(finished)

    def abort(self, slot: int, reason: FinishReason) -> bool:
        """End one sequence with what it has. False: it is not here (any more)."""
        for sequence in self._scheduler:
            if sequence.slot == slot:
                self._finish(sequence, reason)
                self._remove([sequence])
                return True
        return False

    def rebuild(self) -> None:
        """Fail every sequence and start over with an empty batch, after a step that raised.

        Raises: whatever the backend raises; then this model cannot go on.
        """
        self.close(GenerationFailedError(self._name))
        self._batch = self._model.new_runner()

    def close(self, error: MlxpoolError) -> None:
        """End every sequence with `error` and drop the batch."""
        for sequence in self._scheduler:
            self._emit(sequence.stream, error)
        self._scheduler.remove(list(self._scheduler))
        self._batch.close()

    def _expire(self) -> None:
        now = self._clock()
        expired = [
            sequence
            for sequence in self._scheduler
            if sequence.request.expires_at is not None and sequence.request.expires_at <= now
        ]
        for sequence in expired:
            self._finish(sequence, FinishReason.TIME_LIMIT)
        self._remove(expired)

    def _admit(self) -> None:
        admitted = self._scheduler.admit()
        for sequence in admitted:
            self._batch.add(sequence.slot, sequence.request.prompt, sequence.request.sampling)
            self._tell_prefill(sequence.slot, 0)
        if admitted:
            self._tell_queue()

    def _take(self, sequence: Sequence, token_id: int) -> bool:
        """Fold one token in; True when it ended the sequence."""
        is_first = sequence.state is SequenceState.PREFILLING
        try:
            events = sequence.accept(token_id)
        except Exception:  # one failed sequence fails alone: this is the engine's edge
            log.exception("sequence.failed", model=self._name, slot=sequence.slot)
            self._emit(sequence.stream, GenerationFailedError(self._name))
            return True
        if is_first:
            self._emit(sequence.stream, GenerationProgress(GenerationPhase.DECODING))
        for event in events:
            self._emit(sequence.stream, event)
        return sequence.is_finished

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        for event in sequence.finish(reason):
            self._emit(sequence.stream, event)

    def _remove(self, sequences: list[Sequence]) -> None:
        if not sequences:
            return
        running = self._scheduler.remove(sequences)
        if running:
            self._batch.remove(running)

    def _tell_queue(self) -> None:
        for position, sequence in enumerate(self._scheduler.waiting, start=1):
            progress = GenerationProgress(GenerationPhase.QUEUED, queue_position=position)
            self._emit(sequence.stream, progress)

    def _tell_prefill(self, slot: int, prefilled_tokens: int) -> None:
        sequence = self._scheduler.running(slot)
        if sequence is not None and sequence.state is SequenceState.PREFILLING:
            progress = GenerationProgress(
                GenerationPhase.PREFILLING,
                prefilled_tokens=prefilled_tokens,
                prompt_tokens=len(sequence.request.prompt),
            )
            self._emit(sequence.stream, progress)
