"""What is counted and timed of a generation, as its items come from the engine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fakes.running_engine import FakeClock
from mlxpool_server.domain import (
    Channel,
    FinishReason,
    GenerationDelta,
    GenerationFinished,
    GenerationPhase,
    GenerationProgress,
    GenerationTimings,
    OutputPart,
    TokenUsage,
)
from mlxpool_server.errors import GenerationFailedError
from mlxpool_server.pool.activity import Activity, Meter

DECODING = GenerationProgress(GenerationPhase.DECODING)


class Notes:
    """An observer that writes everything down."""

    def __init__(self) -> None:
        self.first_tokens: list[float] = []
        self.inter_tokens: list[float] = []
        self.finished: list[GenerationFinished] = []
        self.loads: list[float] = []

    def first_token(self, model: str, seconds: float) -> None:
        self.first_tokens.append(seconds)

    def inter_token(self, model: str, seconds: float) -> None:
        self.inter_tokens.append(seconds)

    def generation_finished(self, model: str, finished: GenerationFinished) -> None:
        self.finished.append(finished)

    def constrained(self, model: str, kind: str) -> None:
        """None here."""

    def tool_call(self, model: str, num_calls: int) -> None:
        """None here."""

    def load_finished(self, model: str, seconds: float) -> None:
        self.loads.append(seconds)


class Measured:
    """One generation that came at 1000 on a clock that a test moves."""

    def __init__(self) -> None:
        self.notes = Notes()
        self.clock = FakeClock()
        self.activity = Activity(self.notes)
        self.meter = Meter(self.activity, "m", self.clock.now, self.clock)

    def after(self, seconds: float, item: object) -> None:
        self.clock.now += seconds
        self.meter.see(item)  # type: ignore[arg-type]  # tests send every kind of item


def finished(completion_tokens: int, cached_prompt_tokens: int = 0) -> GenerationFinished:
    usage = TokenUsage(10, completion_tokens, cached_prompt_tokens)
    return GenerationFinished(FinishReason.STOP, "", usage, GenerationTimings())


def calling(reason: FinishReason) -> GenerationFinished:
    """The end of a generation with a call that nobody has read."""
    parts = (OutputPart(Channel.CALL, "f", "(f)"),)
    return replace(finished(3), finish_reason=reason, unread_parts=parts)


@pytest.fixture
def measured() -> Measured:
    return Measured()


def test_a_stream_is_timed(measured: Measured) -> None:
    """The first token from the request on, the others from text to text, by token."""
    measured.after(2.0, DECODING)
    measured.after(0.0, GenerationDelta("a", 1))
    measured.after(0.5, GenerationDelta("b", 2))
    # Two tokens made this one: the first of them completed no text.
    measured.after(1.0, GenerationDelta("c", 4))
    assert measured.notes.first_tokens == [2.0]
    assert measured.notes.inter_tokens == [0.5, 0.5]


def test_tokens_count_as_they_come(measured: Measured) -> None:
    """Those of a running generation too, and each once."""
    measured.after(0.0, DECODING)
    assert measured.activity.of("m").completion_tokens == 1
    measured.after(0.0, GenerationDelta("abc", 3))
    assert measured.activity.of("m").completion_tokens == 3
    measured.after(0.0, finished(5))
    counts = measured.activity.of("m")
    assert (counts.completion_tokens, counts.prompt_tokens) == (5, 10)
    assert (counts.finished_generations, counts.first_tokens) == (1, 1)


def test_an_answer_in_one_piece_has_no_latency_between_tokens(measured: Measured) -> None:
    """Without deltas nobody saw one."""
    measured.after(1.0, DECODING)
    measured.after(9.0, finished(50))
    assert measured.notes.inter_tokens == []
    assert measured.activity.of("m").completion_tokens == 50


def test_a_generation_that_never_ran_has_no_first_token(measured: Measured) -> None:
    """What was cancelled in the queue is finished all the same."""
    measured.after(1.0, GenerationProgress(GenerationPhase.QUEUED, queue_position=1))
    measured.after(1.0, finished(0))
    assert measured.notes.first_tokens == []
    assert measured.activity.of("m").finished_generations == 1


def test_a_failed_generation_keeps_what_it_made(measured: Measured) -> None:
    """Its tokens were generated; it did not finish."""
    measured.after(0.0, DECODING)
    measured.after(0.0, GenerationDelta("ab", 2))
    measured.after(0.0, GenerationFailedError("m"))
    counts = measured.activity.of("m")
    assert (counts.completion_tokens, counts.finished_generations) == (2, 0)


def test_cached_prompts_are_hits(measured: Measured) -> None:
    """However many of its tokens were there."""
    measured.after(0.0, finished(0, cached_prompt_tokens=4))
    measured.after(0.0, finished(0))
    counts = measured.activity.of("m")
    assert (counts.prompt_cache_hits, counts.cached_prompt_tokens) == (1, 4)


def test_a_call_decides_the_reason(measured: Measured) -> None:
    """Until it is read nobody knows how the generation ended; its tokens count at once."""
    unread = calling(FinishReason.STOP)
    measured.after(0.0, unread)
    assert measured.notes.finished == []
    assert measured.activity.of("m").finished_generations == 1
    read = replace(unread, finish_reason=FinishReason.TOOL_CALLS, unread_parts=())
    measured.meter.read(read)
    measured.meter.leave()
    assert measured.notes.finished == [read]


def test_a_call_that_nobody_reads(measured: Measured) -> None:
    """It counts as the engine ended it, whether its reader left before or after that."""
    unread = calling(FinishReason.STOP)
    measured.after(0.0, unread)
    measured.meter.leave()
    measured.meter.leave()
    assert measured.notes.finished == [unread]
    left = Measured()
    left.meter.leave()
    left.after(0.0, unread)
    assert left.notes.finished == [unread]


def test_a_call_that_is_cut_off(measured: Measured) -> None:
    """No call makes a reason of another end."""
    cut = calling(FinishReason.MAX_TOKENS)
    measured.after(0.0, cut)
    assert measured.notes.finished == [cut]


def test_models_are_counted_apart() -> None:
    """And one that did nothing has done nothing."""
    activity = Activity()
    activity.load_finished("a", 1.0)
    activity.load_failed("b")
    activity.evicted("b")
    assert (activity.of("a").loads, activity.of("b").loads) == (1, 0)
    assert (activity.of("b").failed_loads, activity.of("b").evictions) == (1, 1)
    assert activity.of("c").loads == 0
