"""Who runs next on one model: a bounded batch, and a queue ordered by priority and age."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from mlxpool_server.domain import Priority
from mlxpool_server.engine.sequence import Sequence

# A priority is a head start in the queue, so that low ones age instead of starving.
HEAD_START_S = {Priority.HIGH: 30.0, Priority.NORMAL: 0.0, Priority.LOW: -30.0}


class Scheduler:
    """Waiting and running sequences of one model. Engine thread only."""

    def __init__(self, max_batch_size: int) -> None:
        self._max_batch_size = max_batch_size
        self._waiting: list[Sequence] = []
        self._running: dict[int, Sequence] = {}

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._running.values()
        yield from self._waiting

    def __contains__(self, slot: int) -> bool:
        return slot in self._running or any(waiting.slot == slot for waiting in self._waiting)

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """The queue, next one first."""
        return tuple(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def submit(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)
        self._waiting.sort(key=_turn)

    def admit(self) -> list[Sequence]:
        """Move as many waiting sequences into the batch as it has room for; return them."""
        room = self._max_batch_size - len(self._running)
        admitted, self._waiting = self._waiting[:room], self._waiting[room:]
        for sequence in admitted:
            sequence.start()
            self._running[sequence.slot] = sequence
        return admitted

    def running(self, slot: int) -> Sequence | None:
        return self._running.get(slot)

    def remove(self, sequences: Iterable[Sequence]) -> list[int]:
        """Forget these; return the slots that were running."""
        gone = {sequence.slot for sequence in sequences}
        self._waiting = [waiting for waiting in self._waiting if waiting.slot not in gone]
        return [slot for slot in gone if self._running.pop(slot, None) is not None]


def _turn(sequence: Sequence) -> float:
    return sequence.request.submitted_at - HEAD_START_S[sequence.request.priority]
