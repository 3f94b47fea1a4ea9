"""Who runs next on one model."""

from __future__ import annotations

from fakes.running_engine import FakeClock, sequence_request
from mlxpool_server.domain import Priority
from mlxpool_server.engine.scheduler import HEAD_START_S, Scheduler
from mlxpool_server.engine.sequence import Sequence, SequenceState


def _sequence(
    slot: int, submitted_at: float = 0.0, priority: Priority = Priority.NORMAL
) -> Sequence:
    request = sequence_request(submitted_at=submitted_at, priority=priority)
    return Sequence(slot, request, FakeClock())


def _order(*sequences: Sequence) -> list[int]:
    scheduler = Scheduler(1)
    for sequence in sequences:
        scheduler.submit(sequence)
    return [sequence.slot for sequence in scheduler.waiting]


def test_first_come_first_served() -> None:
    """Among equals the order is the one of their arrival."""
    assert _order(_sequence(1, 2.0), _sequence(2, 1.0), _sequence(3, 2.0)) == [2, 1, 3]


def test_priority_is_a_head_start() -> None:
    """HIGH goes before NORMAL before LOW when they arrive together."""
    low, normal, high = (
        _sequence(slot, priority=priority)
        for slot, priority in enumerate([Priority.LOW, Priority.NORMAL, Priority.HIGH])
    )
    assert _order(low, normal, high) == [2, 1, 0]


def test_low_priority_ages() -> None:
    """A LOW one that has waited longer than the head start goes before a fresh HIGH one."""
    head_start_s = HEAD_START_S[Priority.HIGH] - HEAD_START_S[Priority.LOW]
    old = _sequence(1, 0.0, Priority.LOW)
    assert _order(_sequence(2, head_start_s + 1, Priority.HIGH), old) == [1, 2]
    assert _order(_sequence(2, head_start_s - 1, Priority.HIGH), old) == [2, 1]


def test_the_batch_is_bounded() -> None:
    """No more than max_batch_size run; the next one is admitted when one is gone."""
    scheduler = Scheduler(2)
    sequences = [_sequence(slot, float(slot)) for slot in range(4)]
    for sequence in sequences:
        scheduler.submit(sequence)
    assert scheduler.admit() == sequences[:2]
    assert scheduler.admit() == []
    assert sequences[0].state is SequenceState.PREFILLING
    assert sequences[2].state is SequenceState.WAITING
    assert scheduler.remove([sequences[1]]) == [1]
    assert scheduler.admit() == [sequences[2]]
    assert (scheduler.num_running, len(scheduler.waiting), len(scheduler)) == (2, 1, 3)


def test_remove_tells_who_was_running() -> None:
    """Only the slots that were in the batch come back; waiting ones are just forgotten."""
    scheduler = Scheduler(1)
    running, waiting = _sequence(1), _sequence(2)
    scheduler.submit(running)
    scheduler.admit()
    scheduler.submit(waiting)
    assert 1 in scheduler
    assert 2 in scheduler
    assert scheduler.remove([running, waiting]) == [1]
    assert len(scheduler) == 0
    assert 1 not in scheduler
    assert 2 not in scheduler
