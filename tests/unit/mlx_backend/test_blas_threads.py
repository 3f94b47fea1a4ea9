"""The number of threads that is fastest here and now."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mlxpool_server.mlx_backend.blas_threads import SETTLED_STEPS, TRIAL_STEPS, ThreadTuner
from mlxpool_server.mlx_backend.openblas import OpenBlas


class Machine:
    """Steps that cost what a table says, by the threads that are set."""

    def __init__(self, most: int, cost: Callable[[int], float]) -> None:
        self.threads = 0
        self.cost = cost
        self.tuner = ThreadTuner(most, self._set, num_cpus=most)

    def _set(self, threads: int) -> None:
        self.threads = threads

    def run(self, steps: int, kind: object = "decode", num_tokens: int = 0) -> list[int]:
        """The threads of each step."""
        seen = []
        for _ in range(steps):
            self.tuner.begin(kind)
            seen.append(self.threads)
            self.tuner.end(kind, self.cost(self.threads), num_tokens)
        return seen


def settled(machine: Machine, kind: object = "decode") -> int:
    """What it keeps to once it has tried everything."""
    machine.run(10 * TRIAL_STEPS, kind)
    return machine.run(1, kind)[0]


@pytest.mark.parametrize("best", [1, 2, 4, 8, 12])
def test_it_finds_the_fastest(best: int) -> None:
    """Among powers of two and the most."""
    assert settled(Machine(12, lambda threads: 1 + abs(threads - best))) == best


def test_all_are_used_first() -> None:
    """Until something else was measured."""
    assert Machine(6, lambda _: 1.0).run(1) == [6]


def test_a_small_gain_changes_nothing() -> None:
    """It may be noise."""
    assert settled(Machine(2, lambda threads: 1.0 if threads == 2 else 0.99)) == 2


def test_it_follows_a_neighbour_who_comes_and_goes() -> None:
    """What was best is tried again against what is next to it."""
    machine = Machine(2, lambda threads: 3.0 - threads)
    assert settled(machine) == 2
    machine.cost = float
    machine.run(SETTLED_STEPS + 6 * TRIAL_STEPS)
    assert machine.run(1) == [1]
    machine.cost = lambda threads: 3.0 - threads
    machine.run(SETTLED_STEPS + 6 * TRIAL_STEPS)
    assert machine.run(1) == [2]


def test_one_slow_step_is_no_measurement() -> None:
    """The median of a trial counts."""
    machine = Machine(2, lambda threads: 3.0 - threads)
    steps = 0

    def with_hiccups(threads: int) -> float:
        nonlocal steps
        steps += 1
        return 100.0 if steps % TRIAL_STEPS == 0 else 3.0 - threads

    machine.cost = with_hiccups
    assert settled(machine) == 2


def test_kinds_are_apart() -> None:
    """One row may want one thread where a prompt wants all."""
    machine = Machine(4, float)
    assert settled(machine, "one row") == 1
    machine.cost = lambda threads: 1.0 / threads
    assert settled(machine, "prefill") == 4
    assert machine.run(1, "one row") == [1]


def test_who_delivers_needs_a_processor() -> None:
    """Two threads that gain a third are not worth it when 64 tokens wait to be delivered."""
    machine = Machine(2, lambda threads: 0.009 if threads == 1 else 0.006)
    machine.run(10 * TRIAL_STEPS, num_tokens=64)
    assert machine.run(1) == [1]
    assert settled(Machine(2, lambda threads: 0.077 if threads == 1 else 0.066)) == 2


def test_trying_is_rare() -> None:
    """Fewer than one step in ten."""
    machine = Machine(2, float)
    settled(machine)
    seen = machine.run(4 * SETTLED_STEPS)
    assert sum(threads != 1 for threads in seen) < len(seen) / 10


@pytest.mark.parametrize(
    "blas", [None, OpenBlas(threads=8), OpenBlas(threads=1, set_threads=lambda _: None)]
)
def test_nothing_to_choose(blas: OpenBlas | None) -> None:
    """No OpenBLAS, a number that somebody asked for, or one processor."""
    assert ThreadTuner.of(blas) is None
