"""What sampling knows of one row of a batch."""

from __future__ import annotations

from collections.abc import Sequence

from mlxpool_server.domain import SamplingParams

# Below this, dividing by the temperature overflows float32; the limit is greedy anyway.
GREEDY_BELOW = 1e-5

_MASK = (1 << 64) - 1
# So that the coin of xtc is not the number that draws.
COIN = 0xA0761D6478BD642F

# The smallest normal number of float32: a smaller weight is a 0 on some devices, so that xtc takes
# no such word for one of the top choices anywhere.
SMALLEST_WEIGHT = 2.0**-126


class SampledRow:
    """One row's parameters, what its penalties look at, and its place in the random sequence."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], vocab_size: int) -> None:
        self.params = params
        self.is_greedy = params.temperature < GREEDY_BELOW
        self.temperature = 1.0 if self.is_greedy else params.temperature
        # A top_k that keeps every token is no filter.
        self.top_k = params.top_k if 0 < params.top_k < vocab_size else 0
        self.has_penalties = (
            params.repetition_penalty != 1.0
            or params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0
        )
        self.is_filtered = not self.is_greedy and (
            params.top_p < 1.0
            or params.min_p > 0.0
            or params.xtc_probability > 0.0
            or self.top_k > 0
        )
        # Just the most likely token of the model's own logits.
        self.is_plain_greedy = self.is_greedy and not self.has_penalties and not params.logit_bias
        size = params.penalty_context_size if self.has_penalties else 0
        self.context_size = size
        self.context = list(prompt[-size:]) if size else []
        self.seed = (params.seed or 0) & _MASK
        # How many numbers were drawn.
        self.position = 0

    def next_draw(self) -> tuple[float, bool]:
        """The number in (0, 1) that picks the next token, and whether xtc strikes."""
        number = uniform(self.seed, self.position)
        coin = self.params.xtc_probability
        strikes = coin > 0.0 and uniform(self.seed ^ COIN, self.position) < coin
        self.position += 1
        return number, strikes

    def accept(self, token: int) -> None:
        """Take note of a token for the penalties."""
        if self.context_size:
            self.context.append(token)
            del self.context[: -self.context_size]


def uniform(seed: int, position: int) -> float:
    """A number in (0, 1), both ends excluded, with 24 bits: exact in float32."""
    return ((fold(seed, position) >> 41) + 0.5) / (1 << 23)


def fold(seed: int, position: int) -> int:
    """Mix seed and position into 64 bits (splitmix64: Steele, Lea, Flood 2014)."""
    mixed = (seed + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return mixed ^ (mixed >> 31)
