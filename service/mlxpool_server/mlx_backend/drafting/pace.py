"""Whether guesses are worth it: measured, since a wider pass costs more where rows are many."""

from __future__ import annotations

from dataclasses import dataclass

# How much of what is known a new measurement replaces.
WEIGHT = 0.2
# Passes of each kind before they are compared.
MIN_PASSES = 8
# Steps without guesses before they are tried again.
PAUSE_STEPS = 256


@dataclass(slots=True)
class _Cost:
    """Seconds a token."""

    seconds: float = 0.0
    num_passes: int = 0

    def learn(self, seconds: float) -> None:
        self.num_passes += 1
        weight = max(WEIGHT, 1 / self.num_passes)
        self.seconds += weight * (seconds - self.seconds)


class DraftPace:
    """One model's. Batches of up to 1, 2, 4, 8 … rows are told apart."""

    def __init__(self) -> None:
        self._costs: dict[tuple[int, bool], _Cost] = {}
        self._pauses: dict[int, int] = {}

    def is_worth(self, num_rows: int) -> bool:
        """Asked once a step."""
        kind = (num_rows - 1).bit_length()
        left = self._pauses.get(kind, 0)
        if left:
            self._pauses[kind] = left - 1
            if left == 1:
                # Its rows are others by now.
                self._costs.pop((kind, True), None)
        return left == 0

    def learn(
        self, num_rows: int, num_tokens: int, duration_s: float, *, has_guesses: bool
    ) -> None:
        """Tell what a pass took, from its launch to its tokens."""
        kind = (num_rows - 1).bit_length()
        cost = self._costs.setdefault((kind, has_guesses), _Cost())
        cost.learn(duration_s / max(1, num_tokens))
        plain, drafted = (self._costs.get((kind, each)) for each in (False, True))
        if plain is None or drafted is None:
            return
        if min(plain.num_passes, drafted.num_passes) < MIN_PASSES:
            return
        if drafted.seconds > plain.seconds:
            self._pauses[kind] = PAUSE_STEPS
