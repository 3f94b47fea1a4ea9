"""How many threads a matrix product gets, found out while serving.

OpenBLAS's threads wait busily for each other. Where the event loop, a client or a neighbour needs
one of their cores, two threads are slower than one; where nobody does, faster. That changes with
the size of the batch and from minute to minute, so it is measured, not set.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

from mlxpool_server.mlx_backend.cpu_quota import usable_cpus
from mlxpool_server.mlx_backend.openblas import OpenBlas

# Steps with one number of threads before it is judged.
TRIAL_STEPS = 8
# Steps with the best one before its neighbours are tried again.
SETTLED_STEPS = 256
# A neighbour has to be faster by so much: less is noise.
GAIN = 1.05
# What a token costs the processors outside of the engine: the event loop, a client beside it.
TOKEN_S = 0.2e-3


@dataclass(slots=True)
class _Kind:
    """What is known of one kind of work."""

    # What is tried, one after the other; the first is what was best so far.
    trials: list[int]
    best: int
    costs: dict[int, float] = field(default_factory=dict)
    measured: list[float] = field(default_factory=list)
    steps_left: int = 0

    @property
    def current(self) -> int:
        return self.trials[0] if self.trials else self.best


class ThreadTuner:
    """Engine thread only. A kind of work is any name for steps that cost alike."""

    def __init__(self, most: int, set_threads: Callable[[int], None], num_cpus: int) -> None:
        self._num_cpus = num_cpus
        self._choices = sorted({1, most, *(1 << bits for bits in range(1, most.bit_length()))})
        self._choices = [threads for threads in self._choices if threads <= most]
        self._set_threads = set_threads
        self._kinds: dict[object, _Kind] = {}
        self._threads: int | None = None
        self._is_changed = False

    @classmethod
    def of(cls, blas: OpenBlas | None) -> ThreadTuner | None:
        """None where there is nothing to choose."""
        if blas is None or blas.set_threads is None or blas.threads == 1:
            return None
        return cls(blas.threads, blas.set_threads, usable_cpus())

    def begin(self, kind: object) -> None:
        """Set the threads for the next step."""
        state = self._kinds.get(kind)
        if state is None:
            most_first = self._choices[::-1]
            state = self._kinds[kind] = _Kind(most_first, self._choices[-1])
        self._is_changed = state.current != self._threads
        self._threads = state.current
        # Each time: another model's steps may have come between.
        self._set_threads(state.current)

    def end(self, kind: object, duration_s: float, num_tokens: int = 0) -> None:
        """Tell what the step took, and how many tokens others now have to deliver."""
        state = self._kinds[kind]
        # The step before, with other threads, may have been running into it.
        if self._is_changed:
            return
        if not state.trials:
            self._wait_for_trials(state)
            return
        # Threads that compute keep the processors from those who deliver.
        busy_s = state.current * duration_s + num_tokens * TOKEN_S
        state.measured.append(max(duration_s, busy_s / self._num_cpus))
        if len(state.measured) == TRIAL_STEPS:
            state.costs[state.trials.pop(0)] = statistics.median(state.measured)
            state.measured.clear()
            if not state.trials:
                self._settle(state)

    def _settle(self, state: _Kind) -> None:
        fastest = min(state.costs, key=lambda threads: state.costs[threads])
        known = state.costs.get(state.best)
        if known is None or known > state.costs[fastest] * GAIN:
            state.best = fastest
        state.costs.clear()
        state.steps_left = SETTLED_STEPS

    def _wait_for_trials(self, state: _Kind) -> None:
        state.steps_left -= 1
        if state.steps_left <= 0:
            place = self._choices.index(state.best)
            neighbours = self._choices[max(0, place - 1) : place + 2]
            state.trials = [state.best, *(each for each in neighbours if each != state.best)]
