"""Logits of the last tokens only: the same numbers as the whole pass, from less work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.utils import load_model

from mlxpool_server.mlx_backend.last_rows import LastRows
from mlxpool_server.mlx_backend.model_caches import new_caches
from tiny_models import ARCHITECTURES, RARE_ARCHITECTURES, VOCAB_SIZE, write_model

TOKENS = mx.array([[5, 6, 7, 8, 9, 10], [11, 12, 13, 0, 0, 0]])
COUNTS = [6, 3]
BATCHABLE = [name for name in ARCHITECTURES | RARE_ARCHITECTURES if name != "llama4"]


class Spied(nn.Module):
    """A head that notes the shapes of what it is asked."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self._shapes: list[tuple[int, ...]] = []

    def __call__(self, hidden: mx.array) -> mx.array:
        self._shapes.append(hidden.shape)
        logits: mx.array = self.head(hidden)
        return logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def read(folder: Path, architecture: str = "llama", **options: Any) -> nn.Module:
    return load_model(write_model(folder / "model", architecture, **options))[0]


def last_of(logits: mx.array) -> mx.array:
    return mx.stack([logits[row, count - 1] for row, count in enumerate(COUNTS)])


def whole_pass(model: nn.Module) -> mx.array:
    """Logits by the model's own forward pass, of which the last of each row are taken."""
    caches = new_caches(model, 2)
    for cache in caches:
        cache.prepare(lengths=COUNTS, right_padding=[0, 3])
    return last_of(model(TOKENS, cache=caches))


def picked_pass(rows: LastRows) -> mx.array:
    caches = new_caches(rows.model, 2)
    for cache in caches:
        cache.prepare(lengths=COUNTS, right_padding=[0, 3])
    return rows(TOKENS, caches, COUNTS)


def check(model: nn.Module) -> None:
    expected = np.asarray(whole_pass(model).astype(mx.float32))
    got = np.asarray(picked_pass(LastRows(model)).astype(mx.float32))
    assert got.shape == (2, VOCAB_SIZE)
    assert np.allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("architecture", BATCHABLE)
def test_logits_are_those_of_the_whole_pass(architecture: str, folder: Path) -> None:
    """For every architecture, whatever lies between head and caller."""
    check(read(folder, architecture))


@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "4-bit"])
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_every_kind_of_head(tied: bool, quantized: bool, folder: Path) -> None:
    """A head of its own or the embedding, stored in full or quantised."""
    check(read(folder, tie_word_embeddings=tied, quantized=quantized))


@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "4-bit"])
def test_the_head_works_on_one_row_only(quantized: bool, folder: Path) -> None:
    """The point of it: of a long prompt's hidden states just the last is multiplied."""
    model = read(folder, quantized=quantized)
    model.lm_head = spy = Spied(model.lm_head)
    picked_pass(LastRows(model))
    assert spy._shapes == [(2, 1, 64)]


@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "4-bit"])
def test_a_tied_head_works_on_one_row_only(
    quantized: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the embedding is the head; as an embedding it still sees every token."""
    shapes = []
    kind = nn.QuantizedEmbedding if quantized else nn.Embedding
    as_linear, embed = kind.as_linear, kind.__call__

    def spied_head(self: nn.Module, hidden: mx.array) -> Any:
        shapes.append(hidden.shape)
        return as_linear(self, hidden)

    def spied_embedding(self: nn.Module, tokens: mx.array) -> Any:
        shapes.append(tokens.shape)
        return embed(self, tokens)

    monkeypatch.setattr(kind, "as_linear", spied_head)
    monkeypatch.setattr(kind, "__call__", spied_embedding)
    picked_pass(LastRows(read(folder, tie_word_embeddings=True, quantized=quantized)))
    assert shapes == [(2, 6), (2, 1, 64)]


class Renamed(nn.Module):
    """A model whose head has a name of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.model = inner.model
        self.output = inner.lm_head

    @property
    def layers(self) -> Any:
        return self.model.layers

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        logits: mx.array = self.output(self.model(tokens, cache))
        return logits


def test_a_head_that_is_not_found_gives_the_same_logits(folder: Path) -> None:
    """It computes them all, and the last are taken."""
    model = Renamed(read(folder))
    spy = model.output = Spied(model.output)
    check(model)
    assert spy._shapes == [(2, 6, 64)] * 2


def test_one_token_a_row_is_left_alone(folder: Path) -> None:
    """A step of decoding has nothing to pick."""
    model = read(folder)
    rows = LastRows(model)
    logits = rows(mx.array([[5], [6]]), new_caches(model, 2), [1, 1])
    expected = model(mx.array([[5], [6]]), cache=new_caches(model, 2))[:, -1]
    assert np.allclose(np.asarray(logits), np.asarray(expected), atol=1e-5)


def test_the_model_itself_still_gives_all_logits(folder: Path) -> None:
    """Nothing is picked outside of a pass of these rows."""
    model = read(folder)
    picked_pass(LastRows(model))
    assert model(TOKENS).shape == (2, 6, VOCAB_SIZE)


def test_teaching_a_model_twice_is_harmless(folder: Path) -> None:
    """Both give the logits of the whole pass, one after the other and again."""
    model = read(folder)
    expected = np.asarray(whole_pass(model))
    first, second = LastRows(model), LastRows(model)
    for rows in (first, second, first):
        assert np.allclose(np.asarray(picked_pass(rows)), expected, atol=1e-4)


def test_weights_and_kind_of_the_head_stay(folder: Path) -> None:
    """What looks at the model afterwards finds what was there: names, classes, parameters."""
    model = read(folder, quantized=True)
    kinds = [type(module).__name__ for module in model.modules()]
    names = [name for name, _ in model.named_modules()]
    LastRows(model)
    assert [type(module).__name__ for module in model.modules()] == kinds
    assert [name for name, _ in model.named_modules()] == names
    assert isinstance(model.lm_head, nn.QuantizedLinear)


class Failing(nn.Module):
    """Fails while the pass is built."""

    def __call__(self, *_: Any, **__: Any) -> mx.array:
        raise RuntimeError


def test_a_failing_pass_leaves_nothing_behind(folder: Path) -> None:
    """The next one, of another shape, is not picked from with the old places."""
    model = read(folder)
    norm, model.model.norm = model.model.norm, Failing()
    rows = LastRows(model)
    with pytest.raises(RuntimeError):
        rows(TOKENS, new_caches(model, 2), COUNTS)
    hidden = mx.zeros((2, 6, 64))
    assert rows.pick(hidden) is hidden
    model.model.norm = norm
    assert model(TOKENS).shape == (2, 6, VOCAB_SIZE)
