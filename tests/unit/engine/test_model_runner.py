"""One model's steps: schedule → run → postprocess."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fakes.model import FakeModel
from fakes.running_engine import FakeClock, sequence_request
from fakes.tokenizer import FakeDecoder
from mlxpool_server.domain import (
    FinishReason,
    GenerationDelta,
    GenerationFinished,
    GenerationPhase,
    GenerationProgress,
)
from mlxpool_server.engine.model_runner import ModelRunner, RunnerStats
from mlxpool_server.engine.output_stream import StreamItem
from mlxpool_server.engine.sequence import Sequence
from mlxpool_server.errors import BadConstraintError, GenerationFailedError, ModelUnloadedError


class Bench:
    """A runner and what it emitted, by slot."""

    def __init__(self, max_batch_size: int = 4) -> None:
        self.model = FakeModel()
        self.clock = FakeClock()
        self.emitted: dict[int, list[StreamItem]] = {}
        self.runner = ModelRunner(
            "m", self.model, max_batch_size=max_batch_size, emit=self._emit, clock=self.clock
        )

    def submit(self, slot: int, text: str = "ab", **changes: Any) -> None:
        self.runner.submit(Sequence(slot, sequence_request(text, **changes), self.clock))

    def run(self) -> None:
        while self.runner.has_work:
            self.step()

    def step(self) -> None:
        self.runner.admit()
        self.runner.step()

    def end(self, slot: int) -> StreamItem:
        return self.emitted[slot][-1]

    def finished(self, slot: int) -> GenerationFinished:
        last = self.end(slot)
        assert isinstance(last, GenerationFinished)
        return last

    def _emit(self, slot: int, item: StreamItem) -> None:
        self.emitted.setdefault(slot, []).append(item)


def test_the_events_of_one_request() -> None:
    """Queued, prefilling, decoding, deltas, finished: each phase is told, in order."""
    bench = Bench()
    bench.submit(0, "a")
    bench.run()
    queued, admitted, prefilled, decoding, delta, finished = bench.emitted[0]
    assert queued == GenerationProgress(GenerationPhase.QUEUED, queue_position=1)
    assert admitted == GenerationProgress(GenerationPhase.PREFILLING, prompt_tokens=1)
    assert prefilled == GenerationProgress(
        GenerationPhase.PREFILLING, prefilled_tokens=1, prompt_tokens=1
    )
    assert decoding == GenerationProgress(GenerationPhase.DECODING)
    assert delta == GenerationDelta("a", 1)
    assert isinstance(finished, GenerationFinished)


def test_the_queue_moves_up() -> None:
    """Who waits is told its place, again when someone before it is admitted."""
    bench = Bench(max_batch_size=1)
    for slot in range(3):
        bench.submit(slot, submitted_at=float(slot))
    bench.step()
    assert bench.end(2) == GenerationProgress(GenerationPhase.QUEUED, queue_position=2)


def test_each_row_runs_to_its_own_end() -> None:
    """Rows of one batch leave it at different steps and do not change each other's text."""
    bench = Bench()
    texts = ["a", "bcd", "ef"]
    for slot, text in enumerate(texts):
        bench.submit(slot, text)
    bench.run()
    assert [bench.finished(slot).text for slot in range(3)] == texts
    (batch,) = bench.model.batches
    assert batch.slots == {}
    assert batch.num_steps == len("bcd") + 2


def test_a_row_that_cannot_join_fails_alone() -> None:
    """What the batch refuses ends that sequence with GenerationFailedError, no other."""
    bench = Bench()
    bench.model.add_errors.append(RuntimeError("bad row"))
    bench.submit(0)
    bench.submit(1)
    bench.run()
    assert isinstance(bench.end(0), GenerationFailedError)
    assert bench.finished(1).text == "ab"


def test_a_decoder_that_raises_fails_alone() -> None:
    """A sequence whose text cannot be made fails; its slot is free, its neighbour goes on."""
    bench = Bench()
    bench.submit(0, "xyz", decoder=FakeDecoder(fails_on=ord("y")))
    bench.submit(1, "ab")
    bench.run()
    assert isinstance(bench.end(0), GenerationFailedError)
    assert bench.finished(1).text == "ab"
    assert bench.model.batches[0].slots == {}


class _BrokenFinish(FakeDecoder):
    def finish(self) -> str:
        raise RuntimeError("cannot finish")


@pytest.mark.parametrize("how", ["abort", "expire", "end"])
def test_a_decoder_that_cannot_finish_fails_alone(how: str) -> None:
    """However a sequence ends, an error while it ends is its own."""
    bench = Bench()
    expires_at = bench.clock.now if how == "expire" else math.inf
    bench.submit(0, decoder=_BrokenFinish(), expires_at=expires_at)
    bench.submit(1, "ab")
    if how == "abort":
        bench.runner.abort(0, FinishReason.CANCELLED)
    bench.run()
    assert isinstance(bench.end(0), GenerationFailedError)
    assert bench.finished(1).text == "ab"


def test_an_expired_sequence_keeps_its_text() -> None:
    """TIME_LIMIT ends a running sequence with what it has, and frees its slot."""
    bench = Bench()
    bench.submit(0, "abc", expires_at=bench.clock.now + 1)
    bench.step()
    bench.step()
    bench.clock.now += 1
    bench.step()
    assert bench.finished(0).finish_reason is FinishReason.TIME_LIMIT
    assert bench.finished(0).text == "a"
    assert bench.model.batches[0].slots == {}


def test_an_expired_sequence_that_waits() -> None:
    """TIME_LIMIT also ends a sequence that never ran."""
    bench = Bench(max_batch_size=1)
    bench.submit(0, "abc")
    bench.submit(1, expires_at=bench.clock.now + 1, submitted_at=1.0)
    bench.step()
    bench.clock.now += 1
    bench.step()
    assert bench.finished(1).finish_reason is FinishReason.TIME_LIMIT
    assert bench.finished(1).usage.completion_tokens == 0


def test_close_tells_running_and_waiting() -> None:
    """Every sequence ends with the given error, and the batch is closed."""
    bench = Bench(max_batch_size=1)
    bench.submit(0)
    bench.submit(1, submitted_at=1.0)
    bench.step()
    error = ModelUnloadedError("m")
    bench.runner.close(error)
    assert bench.end(0) is bench.end(1) is error
    assert not bench.runner.has_work
    assert bench.model.batches[0].is_closed


def test_rebuild_starts_over() -> None:
    """After a failed step every sequence has failed and a fresh batch takes the next one."""
    bench = Bench()
    bench.submit(0)
    bench.model.step_errors.append(RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        bench.step()
    bench.runner.rebuild()
    assert isinstance(bench.end(0), GenerationFailedError)
    bench.submit(1, "ab")
    bench.run()
    assert bench.finished(1).text == "ab"
    assert [batch.is_closed for batch in bench.model.batches] == [True, False]


def test_stats_say_what_runs_and_waits() -> None:
    """Rows, queue and KV bytes are those of now."""
    bench = Bench(max_batch_size=1)
    bench.submit(0)
    bench.submit(1, submitted_at=1.0)
    assert bench.runner.stats() == RunnerStats(running=0, waiting=2, kv_bytes=0)
    bench.step()
    assert bench.runner.stats() == RunnerStats(running=1, waiting=1, kv_bytes=10)
    assert 0 in bench.runner
    assert 5 not in bench.runner


def test_a_row_that_the_batch_gives_up_fails_alone() -> None:
    """Its reader gets the reason; the others go on."""
    bench = Bench()
    bench.submit(0, "abc")
    bench.submit(1, "abc")
    bench.step()
    error = BadConstraintError("constraint", "too complex")
    bench.model.slot_errors[0] = error
    bench.run()
    assert bench.end(0) is error
    assert bench.finished(1).text == "abc"


# ---------------------------------------------------------------- drafts that were right


def test_several_tokens_of_one_step() -> None:
    """All of them arrive, in order, and those that were guessed are counted."""
    bench = Bench()
    bench.model.num_drafted = 2
    bench.submit(0, "abcdef")
    bench.run()
    finished = bench.finished(0)
    assert (finished.text, finished.finish_reason) == ("abcdef", FinishReason.STOP)
    # abc, def, end: the drafts behind the end are no part of the answer.
    assert finished.usage.completion_tokens == 7
    assert finished.usage.accepted_draft_tokens == 2 + 2 + 1
    (batch,) = bench.model.batches
    assert batch.num_steps == 1 + 3


@pytest.mark.parametrize(
    ("changes", "text"),
    [({"max_tokens": 2}, "ab"), ({"stop_sequences": ("bc",)}, "a")],
    ids=["max_tokens", "stop_sequences"],
)
def test_what_is_behind_an_end_is_dropped(changes: dict[str, Any], text: str) -> None:
    """A row that ends in the middle of a step's tokens ends there."""
    bench = Bench()
    bench.model.num_drafted = 4
    bench.submit(0, "abcdef", **changes)
    bench.submit(1, "ghijkl")
    bench.run()
    assert bench.finished(0).text == text
    assert bench.finished(1).text == "ghijkl"


def test_a_sequence_that_fails_in_the_middle_fails_once() -> None:
    """Its other tokens of that step go nowhere."""
    bench = Bench()
    bench.model.num_drafted = 3
    bench.submit(0, "abcdef", decoder=FakeDecoder(fails_on=ord("b")))
    bench.run()
    ends = [item for item in bench.emitted[0] if isinstance(item, GenerationFailedError)]
    assert len(ends) == 1
    assert bench.end(0) is ends[0]


def test_nothing_is_guessed_where_tokens_may_be_forced() -> None:
    """A thought at its limit gets its end at the very next token."""
    bench = Bench()
    bench.model.num_drafted = 2
    bench.submit(0, "abcdef", max_reasoning_tokens=3)
    bench.run()
    assert bench.finished(0).usage.accepted_draft_tokens == 0
