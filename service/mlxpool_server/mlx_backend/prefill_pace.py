"""How many prompt tokens one pass works on, so that running streams never stall for long."""

from __future__ import annotations

# Without running streams a pass may take this long: then others may be admitted or cancelled.
IDLE_PASS_S = 0.5
# With them, as long as so many of their steps, and at least this long.
STALL_STEPS = 3
MIN_STALL_S = 0.05
# On a GPU a pass over one short prompt costs as much as one over several: prompts that come within
# so many times its duration go into the next one together.
GATHER_PASSES = 4
# Below this a CPU's matrix products are far from their full speed, and a GPU is idle.
MIN_TOKENS = 128
# How much of what is known about the speed a new measurement replaces.
WEIGHT = 0.5


class PrefillPace:
    """Learns from the passes and steps of one model."""

    def __init__(self, max_tokens: int) -> None:
        """`max_tokens`: what a pass may never exceed, all rows and their padding together."""
        self._max_tokens = max_tokens
        self._tokens_per_s: float | None = None
        self._decode_step_s = 0.0
        self._pass_s = 0.0

    @property
    def gather_s(self) -> float:
        """How long after a pass prompts wait for others, while rows decode."""
        return min(MIN_STALL_S, GATHER_PASSES * self._pass_s)

    def target_s(self, *, is_decoding: bool) -> float:
        """How long a pass may take."""
        if not is_decoding:
            return IDLE_PASS_S
        return max(MIN_STALL_S, STALL_STEPS * self._decode_step_s)

    def num_tokens(self, *, is_decoding: bool) -> int:
        if self._tokens_per_s is None:
            return min(self._max_tokens, MIN_TOKENS)
        fitting = int(self._tokens_per_s * self.target_s(is_decoding=is_decoding))
        return min(self._max_tokens, max(MIN_TOKENS, fitting))

    def learn_pass(self, num_tokens: int, duration_s: float) -> None:
        # What a pass costs whatever its size, a step costs too.
        own_s = max(duration_s - self._decode_step_s, duration_s / 4, 1e-6)
        self._pass_s = own_s
        measured = num_tokens / own_s
        known = self._tokens_per_s
        # A first pass may have waited for kernels to be compiled: what is faster is believed.
        if known is None or measured > known:
            self._tokens_per_s = measured
        else:
            self._tokens_per_s = known + WEIGHT * (measured - known)

    def learn_step(self, duration_s: float) -> None:
        self._decode_step_s += WEIGHT * (duration_s - self._decode_step_s)
