"""Models that generate, as embedders: by their hidden states, in passes and in parts."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from fakes.running_engine import PATIENCE_S, running_engine
from mlxpool_server.domain import (
    Capability,
    EmbeddingInfo,
    Layout,
    ModelSpec,
    Pooling,
    SamplingParams,
)
from mlxpool_server.engine.backend import EmbeddingJob
from mlxpool_server.mlx_backend.embedding.bodies import DecoderBody
from mlxpool_server.mlx_backend.embedding.embedder import MlxEmbedder
from mlxpool_server.mlx_backend.last_rows import LastRows
from mlxpool_server.mlx_backend.loader import MlxLoader, MlxModel
from mlxpool_server.mlx_backend.prefill_pace import MIN_TOKENS
from tiny_models import ARCHITECTURES, RARE_ARCHITECTURES, VOCAB_SIZE, write_model, write_pipeline

# The last is longer than a pass, and than a window of 16.
TEXTS = (
    (5, 6, 7),
    tuple(place * 7 % VOCAB_SIZE for place in range(45)),
    (9,),
    tuple(place * 5 % VOCAB_SIZE for place in range(300)),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def module_of(folder: Path, architecture: str) -> Any:
    return load_model(write_model(folder / architecture, architecture))[0]


def inner_body(module: Any, text: tuple[int, ...]) -> np.ndarray:
    """What the layers without the head, as mlx-lm's models name them, make of one text."""
    inner = getattr(module, "language_model", module)
    body = getattr(inner, "model", None) or inner.backbone
    hidden = body(mx.array([text]), cache=make_prompt_cache(module))
    return np.array(hidden[0].astype(mx.float32))


def run(embedder: MlxEmbedder, *texts: tuple[int, ...], **options: Any) -> list[np.ndarray]:
    pooling = options.pop("pooling", Pooling.LAST_TOKEN)
    embedder.add(1, EmbeddingJob("tiny", texts, pooling, **options))
    for _ in range(200):
        if done := embedder.step(is_alone=True):
            ((_, vectors),) = done
            return [np.array(vector) for vector in vectors]
    raise AssertionError("no end")


@pytest.mark.parametrize("architecture", ARCHITECTURES | RARE_ARCHITECTURES)
def test_vectors_are_the_bodys(architecture: str, models: Path) -> None:
    """In shared passes, and in parts through a cache, they are the inner body's last states."""
    module = module_of(models, architecture)
    expected = [inner_body(module, text) for text in TEXTS]
    # Passes of at most MIN_TOKENS: the longest text takes three.
    embedder = MlxEmbedder(DecoderBody(LastRows(module)), MIN_TOKENS)
    for pooling, pick in (
        (Pooling.LAST_TOKEN, lambda hidden: hidden[-1]),
        (Pooling.CLS, lambda hidden: hidden[0]),
        (Pooling.MEAN, lambda hidden: hidden.mean(0)),
    ):
        found = run(embedder, *TEXTS, pooling=pooling, normalize=False)
        for text, vector, hidden in zip(TEXTS, found, expected, strict=True):
            assert np.allclose(vector, pick(hidden), atol=1e-3), (pooling, len(text))


def test_the_head_is_not_computed(models: Path) -> None:
    """Hidden states cost no product with the vocabulary."""
    rows = LastRows(module_of(models, "llama"))
    tokens = mx.zeros((4, 500), dtype=mx.int32)
    hidden = rows.hidden(tokens)
    assert hidden is not None
    mx.eval(hidden)
    del hidden
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(rows.hidden(tokens))
    without = mx.get_peak_memory() - before
    mx.reset_peak_memory()
    mx.eval(rows.model(tokens))
    assert mx.get_peak_memory() - before > without + tokens.size * VOCAB_SIZE


def test_parts_and_passes_take_turns(models: Path) -> None:
    """A long text keeps a short one waiting for no more than a part of it."""
    embedder = MlxEmbedder(DecoderBody(LastRows(module_of(models, "llama"))), MIN_TOKENS)
    embedder.add(1, EmbeddingJob("tiny", (TEXTS[3], TEXTS[3]), Pooling.LAST_TOKEN))
    assert embedder.step(is_alone=True) == []
    assert embedder.kv_bytes() > 0
    embedder.add(2, EmbeddingJob("tiny", (TEXTS[0],), Pooling.LAST_TOKEN))
    ((slot, _),) = embedder.step(is_alone=True)
    assert slot == 2
    slots = [slot for _ in range(20) for slot, _ in embedder.step(is_alone=True)]
    assert slots == [1]
    assert embedder.kv_bytes() == 0


def test_a_job_that_leaves(models: Path) -> None:
    """Also in the middle of a text: its cache goes at once, and the others are answered."""
    embedder = MlxEmbedder(DecoderBody(LastRows(module_of(models, "llama"))), MIN_TOKENS)
    embedder.add(1, EmbeddingJob("tiny", (TEXTS[3],), Pooling.LAST_TOKEN))
    embedder.step(is_alone=True)
    embedder.remove(1)
    assert embedder.kv_bytes() == 0
    expected = run(embedder, TEXTS[0])
    embedder.add(3, EmbeddingJob("tiny", (TEXTS[1],), Pooling.LAST_TOKEN))
    embedder.remove(3)
    embedder.remove(3)
    assert np.allclose(run(embedder, TEXTS[0]), expected)


def test_what_its_files_say(tmp_path: Path) -> None:
    """It embeds by its last token, unless a pipeline says otherwise, and generates as before."""
    loader = MlxLoader(prefill_step_tokens=16, default_layout=Layout.FLOAT32)
    folder = write_model(tmp_path / "llama")
    info = loader.inspect(ModelSpec("tiny", folder))
    assert info is not None
    assert info.embedding == EmbeddingInfo(64, Pooling.LAST_TOKEN, 16)
    assert info.can_generate
    assert Capability.EMBEDDINGS in info.capabilities
    write_pipeline(folder, "cls_token", max_seq_length=20)
    info = loader.inspect(ModelSpec("tiny", folder))
    assert info is not None
    assert info.embedding == EmbeddingInfo(64, Pooling.CLS, 16, 20)
    # That of an answer is its own.
    assert info.context_length == 512


def test_an_unknown_head(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose hidden states are not found, or whose code wants a cache, does not embed."""
    model = MlxModel(module_of(models, "llama"), VOCAB_SIZE, 16)
    assert model.new_embedder() is not None
    monkeypatch.setattr(LastRows, "hidden", lambda *_: None)
    assert model.new_embedder() is None

    def fail(*_: object) -> None:
        raise TypeError("no cache")

    monkeypatch.setattr(LastRows, "hidden", fail)
    assert model.new_embedder() is None


class Spelled:
    """A decoder that gives each token its number."""

    def push(self, token_id: int) -> str:
        return f"{token_id} "

    def finish(self) -> str:
        return ""


async def test_beside_a_stream(model: MlxModel) -> None:
    """A real model's stream and its embeddings in turn: both are what they are alone."""
    job = EmbeddingJob("m", (TEXTS[3], TEXTS[0]), Pooling.MEAN)
    asked = {"max_tokens": 60, "eos_token_ids": frozenset(), "sampling": SamplingParams(seed=1)}
    async with running_engine() as running, asyncio.timeout(PATIENCE_S):
        await running.engine.attach("m", model)
        alone = await running.submit("abc", decoder=Spelled(), **asked).finished()
        expected = await running.engine.embed(job)
        stream = running.submit("abc", decoder=Spelled(), **asked)
        await stream.delta()
        found = await running.engine.embed(job)
        assert (await stream.finished()).text == alone.text
    for vector, other in zip(found, expected, strict=True):
        assert np.allclose(vector, other, atol=1e-5)
