"""One request's tokens become deltas, until one of its ends is reached."""

from __future__ import annotations

from typing import Any

import pytest

from fakes.running_engine import FakeClock, sequence_request
from fakes.tokenizer import EOS
from mlxpool_server.domain import FinishReason, GenerationDelta, GenerationFinished
from mlxpool_server.engine.sequence import Sequence, SequenceEvents

Event = GenerationDelta | GenerationFinished


def _started(clock: FakeClock | None = None, **changes: Any) -> Sequence:
    sequence = Sequence(0, sequence_request(**changes), clock or FakeClock())
    sequence.start()
    return sequence


def _feed(sequence: Sequence, tokens: bytes | list[int]) -> list[Event]:
    """Give it these tokens, or as many as it takes."""
    events: list[Event] = []
    for token in tokens:
        if sequence.is_finished:
            break
        events.extend(sequence.accept(token))
    return events


def _finished(events: list[Event] | SequenceEvents) -> GenerationFinished:
    last = events[-1]
    assert isinstance(last, GenerationFinished)
    return last


def _deltas(events: list[Event] | SequenceEvents) -> list[str]:
    return [event.text for event in events if isinstance(event, GenerationDelta)]


def test_a_delta_comes_with_each_token() -> None:
    """Each token's text is passed on at once, with the count of tokens so far."""
    events = _feed(_started(), b"hi")
    assert events == [GenerationDelta("h", 1), GenerationDelta("i", 2)]


def test_the_end_token_ends_it() -> None:
    """The end-of-sequence token gives STOP and its id, and is no text."""
    finished = _finished(_feed(_started(), [*b"hi", EOS]))
    assert finished.finish_reason is FinishReason.STOP
    assert (finished.text, finished.stop_token_id) == ("hi", EOS)
    assert finished.usage.completion_tokens == 3


def test_ignore_eos_goes_on() -> None:
    """Without end tokens only the other ends count."""
    sequence = _started(eos_token_ids=frozenset(), max_tokens=4)
    finished = _finished(_feed(sequence, [ord("a"), EOS, ord("b"), EOS]))
    assert finished.finish_reason is FinishReason.MAX_TOKENS
    assert finished.text == "ab"


def test_a_stop_token_ends_it() -> None:
    """The caller's stop token gives STOP_SEQUENCE and its id, and is no text."""
    finished = _finished(_feed(_started(stop_token_ids=frozenset({ord("!")})), b"hi!"))
    assert finished.finish_reason is FinishReason.STOP_SEQUENCE
    assert (finished.text, finished.stop_token_id) == ("hi", ord("!"))


def test_a_stop_sequence_is_cut_across_tokens() -> None:
    """A stop sequence that spans tokens is in no delta and not in the text."""
    events = _feed(_started(stop_sequences=("\n\n",)), b"a\nb\n\nc")
    assert "".join(_deltas(events)) == "a\nb"
    finished = _finished(events)
    assert finished.finish_reason is FinishReason.STOP_SEQUENCE
    assert (finished.text, finished.stop_sequence) == ("a\nb", "\n\n")


def test_held_back_text_is_given_at_the_end() -> None:
    """The start of a stop sequence that never came is part of the output."""
    events = _feed(_started(stop_sequences=("END",)), [*b"the EN", EOS])
    assert _finished(events).text == "".join(_deltas(events)) == "the EN"


@pytest.mark.parametrize("reason", [FinishReason.MAX_TOKENS, FinishReason.CONTEXT_LENGTH])
def test_the_token_limit_has_a_reason(reason: FinishReason) -> None:
    """The last token it may have counts, and the reason says whose limit it was."""
    finished = _finished(_feed(_started(max_tokens=2, limit_reason=reason), b"abc"))
    assert finished.finish_reason is reason
    assert (finished.text, finished.usage.completion_tokens) == ("ab", 2)


def test_the_end_token_is_better_than_the_limit() -> None:
    """An end token at the limit is STOP: the answer is complete."""
    finished = _finished(_feed(_started(max_tokens=2), [ord("a"), EOS]))
    assert finished.finish_reason is FinishReason.STOP


def test_an_emoji_comes_whole() -> None:
    """A character split over tokens is passed on with its last token."""
    events = _feed(_started(), [*"é🦊".encode(), EOS])
    assert _deltas(events) == ["é", "🦊"]


def test_a_cut_character_is_replaced_at_the_end() -> None:
    """A character that the limit cuts off becomes U+FFFD in the last delta and in the text."""
    events = _feed(_started(max_tokens=3), "a🦊".encode())
    assert _finished(events).text == "".join(_deltas(events)) == "a\ufffd"


def test_final_only_sends_no_delta() -> None:
    """With final_only the text and, when asked for, the ids come in `finished` alone."""
    sequence = _started(final_only=True, include_token_ids=True)
    (finished,) = _feed(sequence, [*b"hi", EOS])
    assert _finished([finished]).text == "hi"
    assert _finished([finished]).token_ids == (*b"hi", EOS)


def test_token_ids_come_with_deltas() -> None:
    """Every id is in exactly one delta, those too that complete no text; none in `finished`."""
    events = _feed(_started(include_token_ids=True), [*"é".encode(), EOS])
    deltas = [event for event in events if isinstance(event, GenerationDelta)]
    assert [token_id for delta in deltas for token_id in delta.token_ids] == [*"é".encode(), EOS]
    assert [delta.completion_tokens for delta in deltas] == [1, 2, 3]
    assert _finished(events).token_ids == ()


def test_no_ids_unless_asked_for() -> None:
    """Deltas and `finished` hold no ids by default."""
    events = _feed(_started(), [*b"hi", EOS])
    assert not any(event.token_ids for event in events)


def test_timings_are_monotone() -> None:
    """Queue + load + prefill + decode follow the clock, and together they are the total."""
    clock = FakeClock()
    sequence = Sequence(0, sequence_request(received_at=990, submitted_at=996, load_s=6), clock)
    clock.now += 1
    sequence.start()
    clock.now += 2
    sequence.accept(ord("a"))
    clock.now += 3
    timings = _finished(sequence.finish(FinishReason.CANCELLED)).timings
    assert (timings.queue_s, timings.load_s, timings.prefill_s) == (5, 6, 2)
    assert (timings.decode_s, timings.time_to_first_token_s, timings.total_s) == (3, 13, 16)


def test_timings_without_a_token() -> None:
    """A sequence that ended before it ran was queued all the time and has no first token."""
    clock = FakeClock()
    sequence = Sequence(0, sequence_request(received_at=999, submitted_at=999), clock)
    timings = _finished(sequence.finish(FinishReason.TIME_LIMIT)).timings
    assert (timings.queue_s, timings.prefill_s, timings.decode_s) == (1, 0, 0)
    assert timings.time_to_first_token_s is None
    assert timings.total_s == 1
