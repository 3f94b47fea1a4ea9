"""Encoders from their files to vectors, against float64 and against themselves."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxpool_server.domain import Capability, EmbeddingInfo, Layout, ModelSpec, Pooling
from mlxpool_server.engine.backend import EmbeddingJob, LoadedModel
from mlxpool_server.errors import LoadFailedError
from mlxpool_server.mlx_backend.embedding.encoder_model import NoBatch
from mlxpool_server.mlx_backend.embedding.encoders import PASS_TOKENS
from mlxpool_server.mlx_backend.loader import MlxLoader
from references.encoders import Reference
from tiny_models import ENCODERS, write_encoder, write_pipeline
from tiny_models.encoders import ENCODER_VOCAB

# Some share a pass, so that all but the longest of it are padded: by more than ModernBERT's local
# window. Another is longer than that.
TEXTS = (
    (2, 5, 3), tuple(4 + place % 14 for place in range(40)), (2, 9, 9, 10, 3), (2,),
    tuple(4 + place % 11 for place in range(32)),
)  # fmt: skip


def load(folder: Path, layout: Layout = Layout.FLOAT32) -> LoadedModel:
    loader = MlxLoader(prefill_step_tokens=16, default_layout=layout)
    return loader.load(ModelSpec("tiny", folder), lambda _: None, lambda: False)


def inspect(folder: Path) -> Any:
    loader = MlxLoader(prefill_step_tokens=16, default_layout=Layout.FLOAT32)
    return loader.inspect(ModelSpec("tiny", folder))


def vectors(
    model: LoadedModel, *texts: tuple[int, ...], pooling: Pooling = Pooling.MEAN, **options: Any
) -> list[np.ndarray]:
    """Of one job, however many passes it takes."""
    embedder = model.new_embedder()
    assert embedder is not None
    embedder.add(7, EmbeddingJob("tiny", texts, pooling, **options))
    for _ in range(100):
        if done := embedder.step(is_alone=True):
            ((slot, found),) = done
            assert slot == 7
            return [np.array(vector, dtype=np.float64) for vector in found]
    raise AssertionError("no end")


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))


@pytest.mark.parametrize("kind", ENCODERS)
def test_vectors_are_the_papers(kind: str, tmp_path: Path) -> None:
    """Padded and in one pass, they are what float64 gives each text alone."""
    folder = write_encoder(tmp_path / kind, kind)
    reference = Reference(folder)
    model = load(folder)
    for pooling, row in ((Pooling.CLS, 0), (Pooling.LAST_TOKEN, -1), (Pooling.MEAN, None)):
        found = vectors(model, *TEXTS, pooling=pooling, normalize=False)
        for text, vector in zip(TEXTS, found, strict=True):
            hidden = reference.hidden(text)
            expected = hidden.mean(0) if row is None else hidden[row]
            assert np.allclose(vector, expected, atol=2e-5), (pooling, len(text))


def test_vectors_have_length_one(tmp_path: Path) -> None:
    """Unless the request wants them as they are."""
    model = load(write_encoder(tmp_path / "bert"))
    (plain,) = vectors(model, TEXTS[0], normalize=False)
    (unit,) = vectors(model, TEXTS[0])
    assert np.linalg.norm(plain) != pytest.approx(1, abs=1e-3)
    assert np.allclose(unit, plain / np.linalg.norm(plain), atol=1e-6)


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_sixteen_bits(kind: str, dtype: mx.Dtype, tmp_path: Path) -> None:
    """Padding makes nothing infinite, and 16 bits are close to 32."""
    folder = write_encoder(tmp_path / kind, kind, dtype=dtype)
    layout = Layout.FLOAT16 if dtype == mx.float16 else Layout.BFLOAT16
    exact = vectors(load(folder), *TEXTS)
    for vector, expected in zip(vectors(load(folder, layout), *TEXTS), exact, strict=True):
        assert cosine(vector, expected) > 0.999


def test_quantized(tmp_path: Path) -> None:
    """In 8 bits, as mlx-embeddings converts them: as stored and dequantised they agree."""
    folder = write_encoder(tmp_path / "bert", quantized=True)
    assert inspect(folder).quantization == "8-bit, group 32"
    stored = vectors(load(folder, Layout.STORED), *TEXTS)
    for vector, expected in zip(stored, vectors(load(folder), *TEXTS), strict=True):
        assert cosine(vector, expected) > 0.9999


def old_name(name: str) -> str:
    for new, old in ((".weight", ".gamma"), (".bias", ".beta")):
        if "LayerNorm" in name and name.endswith(new):
            name = name.removesuffix(new) + old
    return f"bert.{name}"


@pytest.mark.parametrize(
    "rename",
    [old_name, lambda name: "" if name.startswith("pooler.") else name],
    ids=["a language model's, by TensorFlow's names", "without a pooler"],
)
def test_other_checkpoints(rename: Any, tmp_path: Path) -> None:
    """The same weights under the names of other checkpoints give the same vectors."""
    expected = vectors(load(write_encoder(tmp_path / "usual")), *TEXTS)
    model = load(write_encoder(tmp_path / "other", rename=rename))
    assert np.allclose(vectors(model, *TEXTS), expected, atol=1e-6)


def test_what_its_files_say(tmp_path: Path) -> None:
    """It embeds, generates nothing, and its estimate is what it takes: no pooler, no heads."""
    folder = write_encoder(tmp_path / "bert")
    info = inspect(folder)
    assert info.embedding == EmbeddingInfo(32, Pooling.MEAN, PASS_TOKENS)
    assert info.capabilities == {Capability.EMBEDDINGS}
    assert not info.can_generate
    assert (info.architecture, info.context_length) == ("bert", 140)
    assert info.vocab_size == len(ENCODER_VOCAB)
    model = load(folder)
    assert info.estimated_bytes == model.resident_bytes
    assert isinstance(model.new_runner(), NoBatch)


def test_context_length(tmp_path: Path) -> None:
    """RoBERTa's first positions are no text's; sentence-transformers' limit is the model's."""
    assert inspect(write_encoder(tmp_path / "r", "roberta")).context_length == 138
    folder = write_encoder(tmp_path / "bert")
    write_pipeline(folder, max_seq_length=50)
    assert inspect(folder).context_length == 50


def test_a_pipeline_that_is_not_run(tmp_path: Path) -> None:
    """Its vectors would be others than its makers': it says so and has no EMBEDDINGS."""
    folder = write_encoder(tmp_path / "bert")
    write_pipeline(folder, "mean_tokens", "Dense")
    info = inspect(folder)
    assert "Dense" in info.embedding.problem
    assert info.capabilities == frozenset()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("bert", {"hidden_act": "relu"}),
        ("bert", {"position_embedding_type": "relative_key"}),
        ("bert", {"is_decoder": True}),
        ("modernbert", {"rope_parameters": {"full_attention": {"rope_theta": 5}}}),
    ],
)
def test_unknown_settings(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """What mlx-embeddings would leave out of account is refused by its name."""
    folder = write_encoder(tmp_path / kind, kind)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes), encoding="utf-8")
    with pytest.raises(LoadFailedError, match=next(iter(changes))):
        inspect(folder)


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its absence is said with the remedy, before anything is loaded."""
    folder = write_encoder(tmp_path / "bert")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(LoadFailedError, match=r"pip install 'mlxpool\[embed\]'"):
        inspect(folder)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    """A checkpoint that lacks a layer fails to load, with its name."""
    folder = write_encoder(
        tmp_path / "bert", rename=lambda name: "" if name.startswith("encoder.layer.2") else name
    )
    with pytest.raises(LoadFailedError, match="layer"):
        load(folder)


def test_token_ids_beyond_the_embedding(tmp_path: Path) -> None:
    """A config that claims more tokens than there are embeddings for is refused."""
    folder = write_encoder(tmp_path / "bert")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 1000}), "utf-8")
    with pytest.raises(LoadFailedError):
        load(folder)


def test_the_tokenizer_neither_cuts_nor_pads(tmp_path: Path) -> None:
    """Whatever its file says: who sends a text that is too long is told so."""
    folder = write_encoder(tmp_path / "bert")
    loader = MlxLoader(prefill_step_tokens=16, default_layout=Layout.FLOAT32)
    tokenizer = loader.load_tokenizer(ModelSpec("tiny", folder))
    assert tokenizer.encode("A a b", add_special_tokens=True) == (2, 4, 4, 5, 3)
    assert len(tokenizer.encode("a " * 20, add_special_tokens=True)) == 22


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "modernbert"])
def test_passes_take_what_is_reserved(kind: str, tmp_path: Path) -> None:
    """The footprint is above what a pass takes, and of its kind."""
    folder = write_encoder(
        tmp_path / kind, kind, hidden_size=128, intermediate_size=512, num_attention_heads=8,
        max_position_embeddings=300,
    )  # fmt: skip
    reserved = inspect(folder).footprint.embedding_bytes(256, 4 * 256)
    model = load(folder)
    texts = [tuple(4 + place % 14 for place in range(256))] * 4
    vectors(model, *texts)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    vectors(model, *texts)
    taken = mx.get_peak_memory() - before
    assert reserved / 20 < taken <= reserved
