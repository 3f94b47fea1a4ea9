"""Sampling in numpy: for a CPU, where MLX has no vectorised exp and no fast sort.

A softmax over 49,152 words takes MLX 755 us a row and numpy 45 us on the same core.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mlxpool_server.mlx_backend.sampling.row import SMALLEST_WEIGHT, SampledRow

Floats = NDArray[np.float32]
Places = NDArray[np.intp]

# Words whose probabilities are added up before one is looked for among them.
_GROUP = 256
# So that rounding cannot leave out a word that belongs in.
_LESS = 0.999
# For the largest few: so many groups for each of them, and at least so many words in a group.
_GROUPS_PER_WORD = 4
_SMALLEST_GROUP = 8
# Top-p takes the words that matter out where they are less than this share of all.
_FEW = 0.25
# Up to so many it sorts at once, without adding up classes first.
_SORTED = 4096


def sample(logits: Floats, rows: Sequence[SampledRow]) -> list[int]:
    """One token a row; `logits` has shape (rows, vocabulary)."""
    return [_sample_row(logits[index], row) for index, row in enumerate(rows)]


def _sample_row(logits: Floats, row: SampledRow) -> int:
    logits = _adjusted(logits, row)
    if row.is_greedy:
        return int(logits.argmax())
    number, xtc_strikes = row.next_draw()
    largest_logit = logits.max()
    if not np.isfinite(largest_logit):
        # Nothing has a probability: a model that overflowed, or all words ruled out.
        return int(logits.argmax())
    logits = logits - largest_logit
    if row.top_k and not xtc_strikes and (places := largest(logits, row.top_k)) is not None:
        return _sample_among(places, logits, row, number)
    if not row.is_filtered:
        return pick(_heated(logits, row), number)
    weights = np.exp(logits)
    kept = _kept(weights, row, xtc_strikes=xtc_strikes)
    if xtc_strikes:
        # It may have taken the likeliest: what is left has to have a weight that is no 0.
        logits = np.where(kept, logits, np.float32(-np.inf))
        logits = logits - logits.max()
    if row.temperature != 1.0 or xtc_strikes:
        weights = _heated(logits, row)
    # As np.where, which branches for each word and takes fifteen times as long.
    weights *= kept
    return pick(weights, number)


def _heated(logits: Floats, row: SampledRow) -> Floats:
    """The weights to draw by."""
    weights: Floats = np.exp(logits / np.float32(row.temperature))
    return weights


def _sample_among(places: Places, logits: Floats, row: SampledRow, number: float) -> int:
    """Of the words in `places`, the likeliest, in order; others only count for top_p's mass."""
    params = row.params
    own = logits[places]
    weights = np.exp(own)
    floor = np.float32(params.min_p)
    if params.top_p < 1.0:
        target = params.top_p * float(np.exp(logits).sum(dtype=np.float64))
        floor = max(floor, _border(weights, 0.0, target))
    reached = np.cumsum(np.where(weights >= floor, _heated(own, row), 0.0), dtype=np.float64)
    return int(places[min(int(np.searchsorted(reached, number * reached[-1])), places.size - 1)])


def largest(values: Floats, count: int) -> Places | None:
    """Where the `count` largest values are, in order, of equal ones the first.

    The `count`-th largest maximum of as many groups, or more, is no larger than the value that is
    looked for: what reaches it is little more than `count`. None where groups would be too small
    to be worth it.
    """
    width = values.size // (_GROUPS_PER_WORD * count)
    if width < _SMALLEST_GROUP:
        return None
    maxima = np.maximum.reduceat(values, np.arange(0, values.size, width))
    bound = np.partition(maxima, maxima.size - count)[maxima.size - count]
    places: Places = np.flatnonzero(values >= bound)
    found = values[places]
    last = np.partition(found, found.size - count)[found.size - count]
    kept = found > last
    kept[np.flatnonzero(found == last)[: count - int(kept.sum())]] = True
    chosen: Places = places[kept]
    return chosen


def _adjusted(logits: Floats, row: SampledRow) -> Floats:
    """With bias and penalties; the model's own logits stay as they are."""
    params = row.params
    if not params.logit_bias and not row.context:
        return logits
    logits = logits.copy()
    if params.logit_bias:
        logits[list(params.logit_bias)] += np.array(
            list(params.logit_bias.values()), dtype=np.float32
        )
    if row.context:
        words, counts = np.unique(row.context, return_counts=True)
        own = logits[words]
        penalty = np.float32(params.repetition_penalty)
        own = np.where(own < 0, own * penalty, own / penalty)
        own -= np.float32(params.presence_penalty)
        own -= np.float32(params.frequency_penalty) * counts.astype(np.float32)
        logits[words] = own
    return logits


def _kept(weights: Floats, row: SampledRow, *, xtc_strikes: bool) -> NDArray[np.bool_]:
    """Which words the filters leave; `weights` are probabilities over the likeliest one's."""
    params = row.params
    floor = np.float32(params.min_p)
    if params.top_p < 1.0:
        floor = max(floor, top_p_floor(weights, params.top_p))
    kept = weights >= floor
    if xtc_strikes:
        limit = np.float32(params.xtc_threshold) * weights[kept].sum()
        limit = max(limit, np.float32(SMALLEST_WEIGHT))
        choices = weights[kept & (weights > limit)]
        if choices.size:
            kept &= weights <= choices.min()
    if row.top_k:
        _keep_largest(kept, weights, row.top_k)
    return kept


def _keep_largest(kept: NDArray[np.bool_], weights: Floats, count: int) -> None:
    """Of the kept words leave the `count` likeliest; of equal ones the first."""
    left = weights[kept]
    if left.size <= count:
        return
    last = np.partition(left, left.size - count)[left.size - count]
    tied = np.flatnonzero(kept & (weights == last))
    kept &= weights >= last
    kept[tied[count - int((left > last).sum()) :]] = False


def top_p_floor(weights: Floats, top_p: float) -> np.float32:
    """The smallest weight among the largest ones that together have `top_p` of the mass.

    Exact without sorting everything: positive floats order as their bits do, so the weights are
    added up by their upper 16 bits, and only the words of one such class are sorted.
    """
    total = float(weights.sum(dtype=np.float64))
    target = top_p * total
    # All that are below it have less than the mass that may go: of a real model, nearly all are.
    is_heavy = weights >= (1.0 - top_p) * total / weights.size * _LESS
    if np.count_nonzero(is_heavy) < _FEW * weights.size:
        weights = weights[np.flatnonzero(is_heavy)]
    if weights.size <= _SORTED:
        return _border(weights, 0.0, target)
    classes = weights.view(np.uint32) >> 16
    masses = np.bincount(classes, weights=weights)
    mass_down_to = np.cumsum(masses[::-1])
    place = int(np.searchsorted(mass_down_to, target))
    if place == masses.size:
        # Rounding: all of them are a little less than the target.
        return np.float32(weights.min())
    above = float(mass_down_to[place - 1]) if place else 0.0
    return _border(weights[classes == masses.size - 1 - place], above, target)


def _border(weights: Floats, above: float, target: float) -> np.float32:
    """The weight that, with all larger ones and what is `above` them, reaches the target."""
    ordered = np.sort(weights)[::-1]
    last = int(np.searchsorted(above + np.cumsum(ordered, dtype=np.float64), target))
    return np.float32(ordered[min(last, ordered.size - 1)])


def pick(weights: Floats, number: float) -> int:
    """The word at which the running sum of the weights reaches `number` of their total."""
    starts = np.arange(0, weights.size, _GROUP)
    reached = np.cumsum(np.add.reduceat(weights, starts), dtype=np.float64)
    target = number * reached[-1]
    group = min(int(np.searchsorted(reached, target)), starts.size - 1)
    members = weights[starts[group] : starts[group] + _GROUP]
    missing = target - (reached[group - 1] if group else 0.0)
    inside = np.cumsum(members, dtype=np.float64)
    word = int(np.searchsorted(inside, missing))
    if word >= members.size:
        # Rounding: the group's sum in single precision was a little more than its members'.
        word = int(np.flatnonzero(members)[-1])
    return int(starts[group]) + word
