"""What numpy's sampler does in a way of its own: sums by class and by group."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxpool_server.domain import SamplingParams
from mlxpool_server.mlx_backend.sampling import host
from mlxpool_server.mlx_backend.sampling.host import largest, pick, top_p_floor
from mlxpool_server.mlx_backend.sampling.row import SampledRow
from references.sampling import picked


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([1, 2, 100, 1000, 5000]),
    spread=st.sampled_from([0.0, 0.001, 1.0, 10.0, 60.0]),
    top_p=st.floats(0.0, 1.0, exclude_min=True, exclude_max=True),
)
def test_the_floor_of_top_p_is_that_of_a_whole_sort(
    seed: int, size: int, spread: float, top_p: float
) -> None:
    """The smallest of the largest weights that together have so much of the mass."""
    logits = np.random.default_rng(seed).normal(size=size) * spread
    weights = np.exp(logits - logits.max()).astype(np.float32)
    ordered = np.sort(weights)[::-1].astype(np.float64)
    reached = np.cumsum(ordered)
    floor = top_p_floor(weights, top_p)
    assert floor in weights
    kept = int((weights >= floor).sum())
    above = reached[kept - 1] - ordered[:kept][ordered[:kept] == floor].sum()
    target = top_p * reached[-1]
    # What is above it does not reach the mass, and with it the mass is reached.
    assert above < target * (1 + 1e-9)
    assert reached[kept - 1] >= target * (1 - 1e-9)


@pytest.mark.parametrize("size", [1, 255, 256, 257, 512, 1000])
def test_picking_agrees_with_a_plain_running_sum(size: int) -> None:
    """On both sides of every border of a group."""
    rng = np.random.default_rng(size)
    weights = rng.random(size).astype(np.float32)
    weights[rng.random(size) < 0.3] = 0.0
    weights[0] = 0.5
    probs = weights.astype(np.float64) / weights.astype(np.float64).sum()
    for number in rng.random(300):
        assert picked(probs, number) in (pick(weights, number), None)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0.001, 1.0), last=st.booleans())
def test_a_word_without_weight_is_never_picked(seed: int, share: float, last: bool) -> None:
    """Also where a number falls exactly on the end of a group, and for sums that round up."""
    rng = np.random.default_rng(seed)
    weights = (rng.random(1000) ** 8).astype(np.float32)
    weights[rng.random(1000) > share] = 0.0
    if last:
        weights[700:] = 0.0
    weights[rng.integers(0, 700)] = 1e-6
    total = weights.astype(np.float64).sum()
    ends = np.cumsum(np.add.reduceat(weights, np.arange(0, 1000, 256)), dtype=np.float64) / total
    for number in [2**-24, 1 - 2**-24, *(min(end, 1 - 2**-24) for end in ends), *rng.random(20)]:
        if number > 0:
            assert weights[pick(weights, float(number))] > 0


# ---------------------------------------------------------------- the largest few


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), size=st.integers(64, 2000), count=st.integers(1, 40),
    num_different=st.integers(1, 1000),
)  # fmt: skip
def test_the_largest_are_those_of_a_stable_sort(
    seed: int, size: int, count: int, num_different: int
) -> None:
    """In order, and of equal ones the first; or nobody looked, where groups would be small."""
    rng = np.random.default_rng(seed)
    # As a bias rules words out.
    known = np.append(rng.normal(size=num_different), -np.inf).astype(np.float32)
    values = rng.choice(known, size)
    places = largest(values, count)
    if places is None:
        assert size < 32 * count
    else:
        assert places.tolist() == sorted(np.argsort(-values, kind="stable")[:count].tolist())


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(400, 3000),
    spread=st.sampled_from([0.1, 1.0, 10.0]),
    top_k=st.integers(1, 12),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
)
def test_looking_at_the_largest_only_changes_no_token(
    *, seed: int, size: int, spread: float, top_k: int, **filters: float
) -> None:
    """The same as with all words' weights, filtered one after the other."""
    logits = (np.random.default_rng(seed).normal(size=(1, size)) * spread).astype(np.float32)
    params = SamplingParams(top_k=top_k, seed=seed, **filters)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "largest", lambda *_: None)
        expected = host.sample(logits, [SampledRow(params, [1], size)])
    assert host.sample(logits, [SampledRow(params, [1], size)]) == expected


# ---------------------------------------------------------------- rows without probabilities


@pytest.mark.parametrize(
    "filters",
    [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 5, "top_p": 0.9, "min_p": 0.1}],
    ids=str,
)
@pytest.mark.parametrize("strikes", [0.0, 1.0])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_without_probabilities_are_taken_greedily(
    value: float, strikes: float, filters: dict[str, float]
) -> None:
    """One such row would otherwise end every stream of its batch, or warn with each token."""
    params = replace(SamplingParams(seed=1, xtc_probability=strikes), **filters)  # type: ignore[arg-type]
    one = np.full(1000, -np.inf if value < 0 else 0.0, dtype=np.float32)
    one[7] = value
    whole = np.full(1000, value, dtype=np.float32)
    rows = [SampledRow(params, [1], 1000) for _ in range(2)]
    assert host.sample(np.stack([one, whole]), rows) == [0 if value < 0 else 7, 0]
