"""Log-probabilities of the rows that asked for them: the model's own, whatever sampling adds."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import mlx.core as mx
import numpy as np

from mlxpool_server.engine.backend import TokenScores
from mlxpool_server.mlx_backend.host_arrays import as_numpy
from mlxpool_server.mlx_backend.row import Row
from mlxpool_server.mlx_backend.sampling.host import Floats, largest

# JSON has no infinity: what has no probability, or none that is a number, has this.
LOWEST_LOGPROB = -9999.0
_MOST = float(np.finfo(np.float32).max)
# A GPU looks for the largest words in the groups that have the largest maxima.
_GROUP = 64


class Scoring:
    """One step's, as part of its graph. Log-softmax in float32.

    On a CPU numpy does it, ten times as fast; a GPU hands out a few numbers a row.
    """

    def __init__(self, rows: Sequence[Row], logits: mx.array, tokens: mx.array | None) -> None:
        """`logits` has (rows, vocabulary); `tokens`, shape (rows,), those that a GPU chose."""
        self._rows = rows
        self._count = min(max(row.top_logprobs or 0 for row in rows), logits.shape[-1])
        logits = logits.astype(mx.float32)
        self._logits = logits
        self._tokens = tokens
        if tokens is None:
            self.arrays = [logits]
            return
        self._shifted, log_totals = _shifted(logits)
        chosen = mx.take_along_axis(self._shifted, tokens[:, None], axis=-1)
        self.arrays = [tokens, chosen[:, 0], log_totals]
        if self._count:
            self.arrays.extend(_largest(self._shifted, self._count))

    @classmethod
    def of(cls, rows: Sequence[Row], logits: mx.array, tokens: mx.array | None) -> Scoring | None:
        """`tokens` None: on a CPU. None when no row asked; otherwise nothing is evaluated yet."""
        places = [place for place, row in enumerate(rows) if row.top_logprobs is not None]
        if not places:
            return None
        if len(places) < len(rows):
            rows = [rows[place] for place in places]
            index = mx.array(places, dtype=mx.uint32)
            logits = logits[index]
            tokens = None if tokens is None else tokens[index]
        return cls(rows, logits, tokens)

    def tell(self, here: Collection[Row]) -> None:
        """Give each row that is still here the scores of the token it accepted."""
        if self._tokens is None:
            logits = as_numpy(self._logits)
            for place, row in enumerate(self._rows):
                if row in here:
                    row.scores = host_scores(logits[place], row.token, row.top_logprobs or 0)
            return
        tokens, chosen, log_totals, *top = [as_numpy(array).tolist() for array in self.arrays]
        for place, row in enumerate(self._rows):
            if row not in here:
                continue
            own = chosen[place]
            if row.token != tokens[place]:
                # It was given, not chosen: then no step ran ahead that this would wait for.
                own = as_numpy(self._shifted[place, row.token]).item()
            words = zip(top[0][place], top[1][place], strict=True) if top else ()
            row.scores = _scores(own, words, log_totals[place], row.top_logprobs or 0)


def told_scores(rows: Iterable[Row]) -> dict[int, TokenScores]:
    """By slot, what these rows have to tell; each is told once."""
    told: dict[int, TokenScores] = {}
    for row in rows:
        if row.scores is not None:
            told[row.slot], row.scores = row.scores, None
    return told


def host_scores(logits: Floats, token: int, count: int) -> TokenScores:
    """Of one row; `logits` has shape (vocabulary,), and may have any values."""
    if not np.isfinite(logits).all():
        logits = np.nan_to_num(logits, nan=-np.inf, posinf=_MOST, neginf=-np.inf)
    count = min(count, logits.size)
    with np.errstate(divide="ignore", over="ignore"):
        shifted = logits - max(float(logits.max()), -_MOST)
        log_total = float(np.log(np.exp(shifted).sum(dtype=np.float64)))
    places = largest(shifted, count) if count else np.zeros(0, dtype=np.intp)
    if places is None:
        places = np.arange(shifted.size)
    places = places[np.argsort(-shifted[places], kind="stable")][:count]
    words = zip(places.tolist(), shifted[places].tolist(), strict=True)
    return _scores(float(shifted[token]), words, log_total, count)


def _scores(
    own: float, words: Iterable[tuple[int, float]], log_total: float, count: int
) -> TokenScores:
    top = tuple((token, _logprob(value, log_total)) for token, value in words)
    return TokenScores(_logprob(own, log_total), top[:count])


def _logprob(value: float, log_total: float) -> float:
    # In this order: what is not a number is not above it.
    return max(LOWEST_LOGPROB, value - log_total)


def _shifted(logits: mx.array) -> tuple[mx.array, mx.array]:
    """Logits over the largest one, and the logarithm of their exponentials' sum: (rows,)."""
    logits = mx.minimum(mx.where(mx.isnan(logits), -mx.inf, logits), _MOST)
    shifted = logits - mx.maximum(mx.max(logits, axis=-1, keepdims=True), -_MOST)
    return shifted, mx.log(mx.sum(mx.exp(shifted), axis=-1))


def _largest(values: mx.array, count: int) -> tuple[mx.array, mx.array]:
    """The words of the `count` largest values of each row, in order, and the values.

    Sorting a whole vocabulary is slow: a row's largest are in the groups with the largest maxima.
    """
    num_rows, size = values.shape
    missing = -size % _GROUP
    padded = mx.pad(values, [(0, 0), (0, missing)], constant_values=mx.array(-mx.inf))
    grouped = padded.reshape(num_rows, -1, _GROUP)
    # Groups in their own order, so that of equal words the first comes first.
    best = mx.sort(mx.argsort(-mx.max(grouped, axis=-1), axis=-1)[:, :count], axis=-1)
    found = mx.take_along_axis(grouped, best[:, :, None], axis=1).reshape(num_rows, -1)
    words = (best[:, :, None] * _GROUP + mx.arange(_GROUP)).reshape(num_rows, -1)
    order = mx.argsort(-found, axis=-1)[:, :count]
    # Among words of no probability one may be none: its id has to be in the vocabulary.
    told = mx.minimum(mx.take_along_axis(words, order, axis=-1), size - 1)
    return told, mx.take_along_axis(found, order, axis=-1)
