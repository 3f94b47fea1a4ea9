"""numpy's sampler and MLX's: the same tokens, and those that the distribution says."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mlxpool_server.domain import SamplingParams
from mlxpool_server.mlx_backend.sampling.row import SampledRow
from references.sampling import (
    Floats,
    ScriptedRow,
    is_clear,
    on_device,
    on_host,
    penalized,
    picked,
    word_probs,
)

Sampler = Callable[[Floats, Sequence[SampledRow]], list[int]]
BASE = SamplingParams(seed=1)
FIRST, LAST = 2**-24, 1 - 2**-24
NUMBERS = [FIRST, *((index + 0.5) / 64 for index in range(64)), LAST]

both = pytest.mark.parametrize("sampler", [on_host, on_device], ids=["host", "device"])
some = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])


def random_logits(seed: int, vocab_size: int, spread: float = 3.0, step: float = 0.0) -> Floats:
    """`step` above 0 makes many of them equal."""
    logits = np.random.default_rng(seed).normal(size=vocab_size) * spread
    return (np.round(logits / step) * step if step else logits).astype(np.float32)


@st.composite
def sampling(draw: st.DrawFn, vocab_size: int, *, with_penalties: bool) -> SamplingParams:
    """Any parameters; those that change nothing often enough."""

    def maybe(usual: float, low: float, high: float) -> float:
        return draw(st.just(usual) | st.floats(low, high))

    words = st.integers(0, vocab_size - 1)
    params = replace(
        BASE,
        temperature=maybe(1.0, 0.2, 3.0),
        top_p=maybe(1.0, 0.05, 0.97),
        min_p=maybe(0.0, 0.001, 0.5),
        top_k=draw(st.sampled_from([0, 1, 3, 20, vocab_size])),
        xtc_threshold=maybe(0.1, 0.0, 0.5),
        xtc_probability=draw(st.sampled_from([0.0, 0.5])),
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
    )
    if not with_penalties:
        return params
    return replace(
        params,
        repetition_penalty=maybe(1.0, 0.5, 2.0),
        presence_penalty=maybe(0.0, -2.0, 2.0),
        frequency_penalty=maybe(0.0, -2.0, 2.0),
        penalty_context_size=draw(st.sampled_from([1, 3, 64, 2**31 - 1])),
        logit_bias=draw(st.dictionaries(words, st.floats(-5, 5, width=32), max_size=4)),
    )


def expected_tokens(logits: Floats, rows: Sequence[ScriptedRow]) -> list[int | None]:
    """None where single precision may decide otherwise."""
    expected: list[int | None] = []
    for words, row in zip(logits, rows, strict=True):
        changed = penalized(words, row.params, row.context)
        if row.is_greedy:
            expected.append(int(changed.argmax()))
        elif is_clear(changed, row.params, strikes=row.strikes):
            probs = word_probs(changed, row.params, strikes=row.strikes)
            expected.append(picked(probs, row.number))
        else:
            expected.append(None)
    return expected


def disagreements(logits: Floats, rows: Sequence[ScriptedRow], sampler: Sampler) -> list[object]:
    got = sampler(logits, rows)
    expected = expected_tokens(logits, rows)
    return [
        (row.params, row.number, mine, theirs)
        for row, mine, theirs in zip(rows, got, expected, strict=True)
        if theirs is not None and mine != theirs
    ]


# ---------------------------------------------------------------- the distribution


@both
@some
@given(
    data=st.data(),
    seed=st.integers(0, 2**32 - 1),
    vocab_size=st.sampled_from([1, 2, 37, 256, 257, 600]),
)
def test_draws_are_the_references(
    sampler: Sampler, data: st.DataObject, seed: int, vocab_size: int
) -> None:
    """All numbers through every filter: kept set, temperature and order of the words are right."""
    params = data.draw(sampling(vocab_size, with_penalties=False))
    strikes = params.xtc_probability > 0 and data.draw(st.booleans())
    step = data.draw(st.sampled_from([0.0, 0.5, 100.0]))
    logits = random_logits(seed, vocab_size, step=step)
    assume(is_clear(logits, params, strikes=strikes))
    rows = [ScriptedRow(params, vocab_size, number, strikes=strikes) for number in NUMBERS]
    tokens = sampler(np.tile(logits, (len(rows), 1)), rows)
    probs = word_probs(logits, params, strikes=strikes)
    for number, token in zip(NUMBERS, tokens, strict=True):
        assert picked(probs, number) in (token, None)


@both
@some
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_penalties_and_bias_are_mlx_lms(sampler: Sampler, data: st.DataObject, seed: int) -> None:
    """Over random contexts, each row with parameters of its own, greedy ones among them."""
    rng = np.random.default_rng(seed)
    vocab_size, rows = 50, []
    for number in rng.uniform(0.01, 0.99, size=8):
        params = data.draw(sampling(vocab_size, with_penalties=True))
        if rng.uniform() < 0.3:
            params = replace(params, temperature=0.0)
        prompt = rng.integers(0, vocab_size, size=rng.integers(1, 30)).tolist()
        strikes = params.xtc_probability > 0
        rows.append(ScriptedRow(params, vocab_size, float(number), strikes=strikes, prompt=prompt))
    logits = rng.normal(size=(len(rows), vocab_size)).astype(np.float32) * 3
    assert disagreements(logits, rows, sampler) == []


@some
@given(data=st.data(), seed=st.integers(0, 2**32 - 1), vocab_size=st.integers(1, 300))
def test_both_give_the_same_tokens(data: st.DataObject, seed: int, vocab_size: int) -> None:
    """Step after step with the rows' own random numbers, penalties looking at what was drawn."""
    rng = np.random.default_rng(seed)
    params = [data.draw(sampling(vocab_size, with_penalties=True)) for _ in range(4)]
    prompt = rng.integers(0, vocab_size, size=5).tolist()
    mine = [SampledRow(each, prompt, vocab_size) for each in params]
    theirs = [SampledRow(each, prompt, vocab_size) for each in params]
    for _ in range(4):
        logits = rng.normal(size=(len(params), vocab_size)).astype(np.float32) * 3
        # The same numbers for both, and only what rounding cannot change is compared.
        scripted: list[ScriptedRow] = []
        for row in mine:
            number, strikes = row.next_draw()
            assert theirs[len(scripted)].next_draw() == (number, strikes)
            copy = ScriptedRow(row.params, vocab_size, number, strikes=strikes, prompt=row.context)
            scripted.append(copy)
        expected = expected_tokens(logits, scripted)
        first, second = on_host(logits, scripted), on_device(logits, scripted)
        for index, token in enumerate(expected):
            if token is not None:
                assert first[index] == second[index] == token
            mine[index].accept(first[index])
            theirs[index].accept(first[index])


@both
@pytest.mark.parametrize(
    "params",
    [
        BASE,
        replace(BASE, temperature=0.5),
        replace(BASE, temperature=2.0),
        replace(BASE, top_p=0.8),
        replace(BASE, top_k=3),
        replace(BASE, min_p=0.1, temperature=1.5),
    ],
    ids=["plain", "cold", "hot", "top_p", "top_k", "min_p"],
)
def test_frequencies_are_the_probabilities(sampler: Sampler, params: SamplingParams) -> None:
    """Chi-square over 4000 draws with the rows' own numbers; nothing outside the kept set."""
    logits = np.log(np.array([0.3, 0.05, 0.25, 0.15, 0.1, 0.15], dtype=np.float32))
    logits += np.float32(0.001) * np.arange(6, dtype=np.float32)
    rows = [SampledRow(replace(params, seed=seed), [], 6) for seed in range(4000)]
    tokens = sampler(np.tile(logits, (4000, 1)), rows)
    probs = word_probs(logits, params)
    counts = np.bincount(tokens, minlength=6)
    assert (counts[probs == 0] == 0).all()
    expected = 4000 * probs[probs > 0]
    # Five degrees of freedom at most: above 20.5 once in a thousand seeds, and these are fixed.
    assert ((counts[probs > 0] - expected) ** 2 / expected).sum() < 20.5


# ---------------------------------------------------------------- edges


@both
@pytest.mark.parametrize("vocab_size", [1, 2, 255, 256, 257, 511, 513, 1000])
def test_numbers_at_the_ends_pick_the_first_and_the_last(sampler: Sampler, vocab_size: int) -> None:
    """Of equal words, for any size of the vocabulary: none outside it, no wrap-around."""
    logits = np.zeros((3, vocab_size), dtype=np.float32)
    rows = [ScriptedRow(BASE, vocab_size, number) for number in (FIRST, 0.5, LAST)]
    assert sampler(logits, rows) == [0, (vocab_size - 1) // 2, vocab_size - 1]


@both
@pytest.mark.parametrize("word", [0, 1, 255, 256, 299])
def test_one_possible_word_is_always_picked(sampler: Sampler, word: int) -> None:
    """All others at -inf or far below, wherever it stands, for every number and filter."""
    for other in (-np.inf, -1e30, -200.0):
        logits = np.full(300, other, dtype=np.float32)
        logits[word] = 1.0
        for params in (
            BASE,
            replace(BASE, top_p=0.9, top_k=5, min_p=0.01),
            replace(BASE, top_p=LAST),
        ):
            rows = [ScriptedRow(params, 300, number) for number in NUMBERS]
            assert set(sampler(np.tile(logits, (len(rows), 1)), rows)) == {word}


@both
def test_words_at_minus_infinity_are_never_picked(sampler: Sampler) -> None:
    """A model that masks words, at the beginning, in the middle and at the end."""
    logits = random_logits(0, 600)
    masked = np.r_[0:3, 250:260, 500:600]
    logits[masked] = -np.inf
    for params in (
        BASE,
        replace(BASE, top_p=0.999),
        replace(BASE, top_k=599),
        replace(BASE, temperature=100.0),
    ):
        rows = [ScriptedRow(params, 600, number) for number in NUMBERS]
        tokens = sampler(np.tile(logits, (len(rows), 1)), rows)
        assert not set(tokens) & set(masked.tolist())


@both
@pytest.mark.parametrize("top_k", [1, 2, 7, 19])
def test_top_k_leaves_exactly_so_many_of_equal_words(sampler: Sampler, top_k: int) -> None:
    """The first ones, as without ties; mlx-lm leaves as many."""
    numbers = [(index + 0.5) / 200 for index in range(200)]
    rows = [ScriptedRow(replace(BASE, top_k=top_k), 20, number) for number in numbers]
    assert set(sampler(np.zeros((200, 20), dtype=np.float32), rows)) == set(range(top_k))


@both
def test_top_k_among_ties_below_the_top(sampler: Sampler) -> None:
    """Two of the four second best ones."""
    logits = np.array([0, 1, 3, 1, 1, 0, 1], dtype=np.float32)
    numbers = [(index + 0.5) / 200 for index in range(200)]
    rows = [ScriptedRow(replace(BASE, top_k=3), 7, number) for number in numbers]
    assert set(sampler(np.tile(logits, (200, 1)), rows)) == {2, 1, 3}


@both
@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.0},
        {"temperature": 1e-38},
        {"temperature": 1.1e-5},
        {"top_p": 1e-45},
        {"top_p": 1e-30},
        {"top_k": 1},
        {"min_p": 1.0},
    ],
    ids=str,
)
def test_extremes_are_greedy(sampler: Sampler, changes: dict[str, float]) -> None:
    """Every filter's limit leaves the likeliest word, though top_p times the mass underflows."""
    logits = random_logits(3, 100)
    params = replace(BASE, **changes)  # type: ignore[arg-type]
    rows = [ScriptedRow(params, 100, number) for number in NUMBERS]
    assert set(sampler(np.tile(logits, (len(rows), 1)), rows)) == {int(logits.argmax())}


@both
@settings(max_examples=50, deadline=None)
@given(top_p=st.floats(min_value=0, exclude_min=True, max_value=1, width=32))
def test_some_word_always_survives_top_p(sampler: Sampler, top_p: float) -> None:
    """The likeliest, for the smallest number as for the largest."""
    logits = np.array([-3, -2, 5, -1, -4], dtype=np.float32)
    rows = [ScriptedRow(replace(BASE, top_p=top_p), 5, number) for number in (0.3, 0.5)]
    assert sampler(np.tile(logits, (2, 1)), rows) == [2, 2]


@both
@pytest.mark.parametrize("top_k", [100, 101, 2**31 - 1])
def test_top_k_of_the_whole_vocabulary_changes_nothing(sampler: Sampler, top_k: int) -> None:
    """Nor does it raise, as in mlx-lm."""
    logits = np.tile(random_logits(4, 100), (20, 1))
    plain = [SampledRow(replace(BASE, seed=seed), [], 100) for seed in range(20)]
    wide = [SampledRow(replace(BASE, seed=seed, top_k=top_k), [], 100) for seed in range(20)]
    assert sampler(logits, wide) == sampler(logits, plain)


@both
@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.5])
def test_xtc_leaves_the_least_likely_of_the_top_choices(sampler: Sampler, threshold: float) -> None:
    """And everything below the threshold; without a strike nothing changes."""
    logits = random_logits(1, 100)
    params = replace(BASE, xtc_probability=0.5, xtc_threshold=threshold)
    struck = [ScriptedRow(params, 100, number, strikes=True) for number in NUMBERS]
    spared = [ScriptedRow(params, 100, number, strikes=False) for number in NUMBERS]
    plain = [ScriptedRow(BASE, 100, number) for number in NUMBERS]
    many = np.tile(logits, (len(NUMBERS), 1))
    assert sampler(many, spared) == sampler(many, plain)
    assert disagreements(many, struck, sampler) == []


@both
def test_logits_are_left_as_they_are(sampler: Sampler) -> None:
    """The model's own array is not written to."""
    logits = random_logits(5, 50)[None]
    before = logits.copy()
    params = replace(BASE, top_p=0.5, logit_bias={3: 9.0}, presence_penalty=1.0)
    sampler(logits, [SampledRow(params, [1, 2], 50)])
    assert (logits == before).all()


@both
def test_the_global_generator_is_left_alone(sampler: Sampler) -> None:
    """Neither read nor moved, with every filter on."""
    params = replace(BASE, top_p=0.9, min_p=0.01, top_k=50, xtc_probability=0.5)
    logits = random_logits(6, 100)[None]

    def draws() -> list[int]:
        row = SampledRow(params, [], 100)
        return [sampler(logits, [row])[0] for _ in range(10)]

    mx.random.seed(3)
    first = draws()
    state = [each.tolist() for each in mx.random.state]
    mx.random.seed(4)
    assert draws() == first
    mx.random.seed(3)
    assert [each.tolist() for each in mx.random.state] == state


@both
def test_new_parameter_values_are_not_slow(sampler: Sampler) -> None:
    """A value never seen before costs no compilation, which would stop every stream."""
    logits = random_logits(7, 100)[None]

    def draw(step: int) -> None:
        params = replace(
            BASE, top_p=0.5 + step / 100, min_p=step / 1000, xtc_probability=0.5, top_k=50 - step,
            xtc_threshold=step / 100, temperature=1 + step / 100, presence_penalty=step / 100,
        )  # fmt: skip
        sampler(logits, [SampledRow(params, [1, 2, 3], 100)])

    draw(0)
    started = time.perf_counter()
    for step in range(1, 21):
        draw(step)
    # Compiled, each of them takes half a second.
    assert time.perf_counter() - started < 2


@both
def test_what_xtc_leaves_is_drawn_however_unlikely(sampler: Sampler) -> None:
    """At a low temperature its weight is a 0 beside the likeliest one's, which is gone."""
    logits = np.array([[30.0, 25.0, 0.0]], dtype=np.float32)
    params = SamplingParams(temperature=0.2, xtc_probability=1.0, xtc_threshold=0.0)
    assert list(sampler(logits, [ScriptedRow(params, 3, strikes=True)])) == [2]


@both
def test_xtc_chooses_among_words_that_have_a_weight_everywhere(sampler: Sampler) -> None:
    """Below the smallest normal number some devices see a 0: such words are no choice."""
    logits = np.array([[0.0, -87.0, -87.5, -120.0]], dtype=np.float32)
    params = SamplingParams(xtc_probability=1.0, xtc_threshold=0.0)
    tokens = [sampler(logits, [ScriptedRow(params, 4, n, strikes=True)])[0] for n in (0.5, 0.99)]
    assert tokens == [1, 2]


@both
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_zeros_of_both_signs_are_equal(sampler: Sampler, temperature: float) -> None:
    """The first of them is the likeliest, as a bias of -0.0 leaves it."""
    logits = np.array([[-1.0, -0.0, 0.0, -3.0]], dtype=np.float32)
    params = SamplingParams(temperature=temperature, top_k=1, logit_bias={0: -1.0}, seed=1)
    assert sampler(logits, [SampledRow(params, [], 4)]) == [1]


@both
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("params", [BASE, replace(BASE, temperature=0.0, logit_bias={0: 1.0})])
def test_the_first_logit_that_is_no_number_is_taken(
    sampler: Sampler, params: SamplingParams, sign: float
) -> None:
    """As argmax does; whatever its sign, nothing has a probability beside it."""
    logits = random_logits(8, 100)[None]
    logits[0, [7, 50]] = np.copysign(np.float32(np.nan), sign)
    assert sampler(logits, [SampledRow(params, [], 100)]) == [7]
