"""Shares of the engine's time between busy models."""

from __future__ import annotations

from mlxpool_server.engine.turns import Turns


def run(turns: Turns, step_s: dict[str, float], num_steps: int) -> dict[str, float]:
    """How much time each model had after so many steps of the lengths given."""
    spent = dict.fromkeys(step_s, 0.0)
    for _ in range(num_steps):
        name = turns.next(list(step_s))
        assert name is not None
        turns.spend(name, step_s[name])
        spent[name] += step_s[name]
    return spent


def started(*names: str) -> Turns:
    turns = Turns()
    for name in names:
        turns.add(name)
    return turns


def test_shares_are_of_time_not_of_steps() -> None:
    """A model whose steps take ten times as long gets as much time, not ten times as much."""
    spent = run(started("slow", "fast"), {"slow": 1.0, "fast": 0.1}, 220)
    assert 0.9 <= spent["slow"] / spent["fast"] <= 1.2


def test_a_long_step_is_made_up_for() -> None:
    """After one chunk of a long prefill the others decode until they have had as much."""
    turns = started("long", "short")
    turns.spend("long", 1.0)
    assert all(run(turns, {"long": 1.0, "short": 0.1}, 9)[name] == 0 for name in ("long",))


def test_idling_saves_nothing_up() -> None:
    """A model that comes back does not shut the others out for as long as it was away."""
    turns = started("steady", "back")
    run(turns, {"steady": 1.0}, 100)
    spent = run(turns, {"steady": 1.0, "back": 1.0}, 10)
    assert spent == {"steady": 5.0, "back": 5.0}


def test_nobody_busy() -> None:
    """With nothing to do it is nobody's turn."""
    assert started("m").next([]) is None
