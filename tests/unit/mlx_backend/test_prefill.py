"""Prompts of several lengths in one cache: what each leaves there is what it leaves alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

from mlxpool_server.domain import SamplingParams
from mlxpool_server.mlx_backend.last_rows import LastRows
from mlxpool_server.mlx_backend.model_caches import new_caches
from mlxpool_server.mlx_backend.prefill import Prefill
from mlxpool_server.mlx_backend.row import Row
from mlxpool_server.mlx_backend.sampling.row import SampledRow
from tiny_models import ARCHITECTURES, RARE_ARCHITECTURES, VOCAB_SIZE, write_model

BATCHABLE = [name for name in ARCHITECTURES | RARE_ARCHITECTURES if name != "llama4"]
# What is fed after the prompt, to see what the caches hold.
NEXT = 7
Logits = np.ndarray[Any, Any]


def make_row(slot: int, num_tokens: int) -> Row:
    prompt = tuple((slot * 31 + index * 7) % 250 for index in range(num_tokens))
    return Row(slot, prompt, SampledRow(SamplingParams(), prompt, VOCAB_SIZE))


@pytest.fixture(scope="module", params=BATCHABLE)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LastRows:
    folder = write_model(tmp_path_factory.mktemp("models") / request.param, request.param)
    return LastRows(load_model(folder)[0])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LastRows:
    return LastRows(load_model(write_model(tmp_path_factory.mktemp("models") / "llama"))[0])


@pytest.fixture(scope="module")
def mamba(tmp_path_factory: pytest.TempPathFactory) -> LastRows:
    folder = write_model(tmp_path_factory.mktemp("models") / "mamba", "mamba")
    return LastRows(load_model(folder)[0])


def new_prefill(model: LastRows, rows: Sequence[Row]) -> Prefill:
    return Prefill(rows, new_caches(model.model, len(rows)))


def next_logits(model: LastRows, rows: Sequence[Row], caches: list[Any]) -> mx.array:
    return model(mx.full((len(rows), 1), NEXT, dtype=mx.int32), caches, [1] * len(rows))


def finish(
    model: LastRows, prefill: Prefill, num_tokens: int = 16
) -> dict[int, tuple[Logits, Logits]]:
    """By slot: logits at the prompt's end, and one token later."""
    told = {}
    while prefill.rows:
        rows, logits, caches = prefill.step(model, num_tokens)
        if not rows:
            continue
        later = next_logits(model, rows, caches)
        for index, row in enumerate(rows):
            told[row.slot] = np.asarray(logits[index]), np.asarray(later[index])
    return told


def check(model: LastRows, told: dict[int, tuple[Logits, Logits]], rows: Sequence[Row]) -> None:
    """The same as each prompt in one piece and alone."""
    assert told.keys() == {row.slot for row in rows}
    for row in rows:
        ((first, later),) = finish(
            model, new_prefill(model, [make_row(row.slot, len(row.prompt))]), 1000
        ).values()
        assert np.allclose(told[row.slot][0], first, atol=1e-4)
        assert np.allclose(told[row.slot][1], later, atol=1e-4)


@pytest.mark.parametrize("lengths", [(10, 40), (40, 10), (3, 3, 3), (16, 32, 1), (17, 33, 50, 2)])
def test_uneven_prompts_in_chunks(model: LastRows, lengths: tuple[int, ...]) -> None:
    """16 tokens at a time; the short ones leave the group as soon as they are complete."""
    rows = [make_row(slot, length) for slot, length in enumerate(lengths)]
    check(model, finish(model, new_prefill(model, rows)), rows)


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_row_leaves_in_the_middle(model: LastRows, gone: int) -> None:
    """The others go on as if it had never been there."""
    rows = [make_row(slot, length) for slot, length in enumerate((40, 25, 50))]
    prefill = new_prefill(model, rows)
    prefill.step(model, 16)
    prefill.remove(frozenset({gone, 99}))
    rest = [row for row in rows if row.slot != gone]
    assert prefill.rows == rest
    check(model, finish(model, prefill), rest)


def test_chunks_may_change_their_size(model: LastRows) -> None:
    """As the pace learns what fits."""
    rows = [make_row(slot, length) for slot, length in enumerate((60, 29))]
    prefill = new_prefill(model, rows)
    told: dict[int, tuple[Logits, Logits]] = {}
    for num_tokens in (1, 20, 3, 7):
        done, logits, caches = prefill.step(model, num_tokens)
        if done:
            later = next_logits(model, done, caches)
            for index, row in enumerate(done):
                told[row.slot] = np.asarray(logits[index]), np.asarray(later[index])
    told |= finish(model, prefill, 100)
    assert not prefill.rows
    check(model, told, rows)


def test_recurrent_layers_are_never_padded(mamba: LastRows) -> None:
    """mlx-lm's Mamba takes padding for tokens: a pass is as long as the shortest prompt."""
    rows = [make_row(0, 10), make_row(1, 40)]
    prefill = new_prefill(mamba, rows)
    assert prefill.num_left == 10
    prefill.step(mamba, 16)
    assert [row.num_done for row in rows] == [10, 10]
    assert prefill.num_left == 30


def test_progress_is_each_rows_own(llama: LastRows) -> None:
    """And what is left is that of the longest."""
    rows = [make_row(0, 10), make_row(1, 40)]
    prefill = new_prefill(llama, rows)
    assert prefill.num_left == 40
    done, _, _ = prefill.step(llama, 16)
    assert done == [rows[0]]
    assert [row.num_done for row in rows] == [10, 16]
    assert prefill.rows == [rows[1]]
    assert prefill.num_left == 24


def test_rows_that_leave_take_their_memory_along(llama: LastRows) -> None:
    """By completing, by being removed, and the last one all of it."""
    prefill = new_prefill(llama, [make_row(0, 10), make_row(1, 40), make_row(2, 40)])
    prefill.step(llama, 5)
    three = prefill.nbytes
    prefill.step(llama, 5)
    assert prefill.nbytes * 3 == three * 2
    prefill.remove(frozenset({1}))
    assert prefill.nbytes * 3 == three
    prefill.remove(frozenset({2}))
    assert prefill.nbytes == prefill.num_left == 0
    assert not prefill.rows
