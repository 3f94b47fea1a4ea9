"""Whether guesses are worth it: measured, since a wider pass costs more where rows are many."""

from __future__ import annotations

from dataclasses import dataclass

# How much of what is known a new measurement replaces.
WEIGHT = 0.2
# Passes of each kind before they are compared.
MIN_PASSES = 8
# Steps without guesses before they are tried again.
PAUSE_STEPS = 256
# So often in a row nobody had a guess: then steps run ahead of each other again, for longer each
# time.
MAX_MISSES = 4
REST_STEPS = (8, 16, 32, 64)


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
        self._num_misses = 0
        self._num_rests = 0
        self._rest_steps = 0

    def is_worth(self, num_rows: int) -> bool:
        """Asked once a step."""
        if self._rest_steps:
            self._rest_steps -= 1
            return False
        kind = (num_rows - 1).bit_length()
        left = self._pauses.get(kind, 0)
        if left:
            self._pauses[kind] = left - 1
            if left == 1:
                # Its rows are others by now.
                self._costs.pop((kind, True), None)
        return left == 0

    def looked(self, *, found: bool) -> None:
        """Tell whether anybody had a guess: waiting for tokens to look at them costs, too."""
        if found:
            self._num_misses = self._num_rests = 0
            return
        self._num_misses += 1
        if self._num_misses == MAX_MISSES:
            self._num_misses = 0
            self._rest_steps = REST_STEPS[min(self._num_rests, len(REST_STEPS) - 1)]
            self._num_rests += 1

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
