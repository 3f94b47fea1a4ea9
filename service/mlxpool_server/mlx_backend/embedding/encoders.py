"""Models of the BERT family, which only embed: mlx-embeddings' code for them, and its limits."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxpool_server.domain import Capability, EmbeddingInfo, Footprint, ModelInfo, Pooling
from mlxpool_server.errors import LoadFailedError
from mlxpool_server.mlx_backend.embedding.pipeline import read_pipeline
from mlxpool_server.mlx_backend.model_config import first_int
from mlxpool_server.mlx_backend.model_size import TensorHeader

_PACKAGE = "mlx_embeddings"
# The most tokens of one pass, padding included: enough to keep a GPU busy.
PASS_TOKENS = 4096
# Activations of each width that are alive at the peak of a layer, and arrays of attention scores,
# measured with margin.
_HIDDEN_COPIES = 8
_INTERMEDIATE_COPIES = 4
_SCORE_COPIES = 4
# The masks of ModernBERT's two kinds of layers, and what they are made of: float32.
_MASK_BYTES = 4 * 6
# Of its configuration, what mlx-embeddings' code takes for granted.
_PLAIN_BERT: Mapping[str, object] = {
    "hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False,
}  # fmt: skip
# Left out: the heads that a checkpoint may bring, and the pooler, which no pooling here reads.
_HEADS = ("cls.", "lm_head.", "classifier.", "pooler.", "head.", "decoder.")
_PREFIXES = ("bert.", "roberta.", "model.")
# As TensorFlow called them.
_OLD_NAMES = {".gamma": ".weight", ".beta": ".bias"}


@dataclass(frozen=True, slots=True)
class Encoder:
    """One kind. `module` of mlx-embeddings computes `settings` as they are here, or unset."""

    module: str
    settings: Mapping[str, object]
    # Positions begin behind that of the padding token.
    has_padding_position: bool = False
    is_modern: bool = False


_BERT = Encoder("bert", _PLAIN_BERT)
_ROBERTA = Encoder("xlm_roberta", _PLAIN_BERT, has_padding_position=True)
_MODERN_BERT = Encoder(
    "modernbert", {"hidden_activation": "gelu", "rope_parameters": None}, is_modern=True
)
_ENCODERS = {
    "bert": _BERT, "roberta": _ROBERTA, "xlm-roberta": _ROBERTA, "modernbert": _MODERN_BERT,
}  # fmt: skip


def encoder_of(config: Mapping[str, Any]) -> Encoder | None:
    """None: a model that generates."""
    return _ENCODERS.get(str(config.get("model_type")))


def check_encoder(name: str, encoder: Encoder, config: Mapping[str, Any]) -> None:
    """Raises: LoadFailedError for what would be computed wrongly, or not at all."""
    if importlib.util.find_spec(_PACKAGE) is None:
        raise LoadFailedError(name, "it needs mlx-embeddings: pip install 'mlxpool[embed]'")
    for key, value in encoder.settings.items():
        if config.get(key, value) not in (value, None):
            shown = f"{config[key]!r:.50}"
            raise LoadFailedError(name, f"its config.json has {key} = {shown}, which is not known")


def context_length(encoder: Encoder, config: dict[str, Any]) -> int:
    """0: it does not say."""
    positions = first_int(config, "max_position_embeddings")
    if not encoder.has_padding_position:
        return positions
    return max(0, positions - pad_id(encoder, config) - 1)


def pad_id(encoder: Encoder, config: dict[str, Any]) -> int:
    found = config.get("pad_token_id")
    is_id = type(found) is int and 0 <= found < first_int(config, "vocab_size")
    default = 1 if encoder.has_padding_position else 0
    return found if is_id and found is not None else default


def kept_headers(headers: list[TensorHeader]) -> list[TensorHeader]:
    """Those of weights that stay in memory."""
    return [header for header in headers if _name_of(header.name)]


def encoder_footprint(
    encoder: Encoder, config: dict[str, Any], dtype: mx.Dtype | None
) -> Footprint:
    """What passes take, by config.json. `dtype` None: the one the weights are stored in."""
    if dtype is None:
        dtype = getattr(mx, str(config.get("torch_dtype", "float32")), mx.float32)
    hidden = first_int(config, "hidden_size")
    intermediate = first_int(config, "intermediate_size")
    values = _HIDDEN_COPIES * hidden + _INTERMEDIATE_COPIES * intermediate
    scores = _SCORE_COPIES * first_int(config, "num_attention_heads") * mx.float32.size
    return Footprint(
        activation_bytes_per_token=dtype.size * values,
        score_bytes=scores + (_MASK_BYTES if encoder.is_modern else 0),
    )


def encoder_info(folder: Path, config: dict[str, Any]) -> EmbeddingInfo:
    """By the mean of its tokens, unless it says otherwise."""
    pipeline = read_pipeline(folder, Pooling.MEAN)
    size = first_int(config, "hidden_size")
    return EmbeddingInfo(size, pipeline.pooling, PASS_TOKENS, pipeline.max_tokens, pipeline.problem)


def describe_encoder(
    info: ModelInfo, encoder: Encoder, folder: Path, config: dict[str, Any], dtype: mx.Dtype | None
) -> ModelInfo:
    """Return it with what is an encoder's own. `dtype` None: the one the weights are stored in."""
    embedding = encoder_info(folder, config)
    tokens = context_length(encoder, config) or info.context_length
    return replace(
        info,
        context_length=min(tokens, embedding.max_tokens or tokens),
        footprint=encoder_footprint(encoder, config, dtype),
        capabilities=capabilities_for(embedding),
        embedding=embedding,
        can_generate=False,
    )


def capabilities_for(embedding: EmbeddingInfo | None) -> frozenset[Capability]:
    can_embed = embedding is not None and not embedding.problem
    return frozenset({Capability.EMBEDDINGS} if can_embed else ())


def model_classes(config: dict[str, Any]) -> tuple[type[nn.Module], type[Any]]:
    """For mlx-lm's load_model: the layers alone, without heads. Imports mlx-embeddings."""
    encoder = _ENCODERS[str(config["model_type"])]
    arch = importlib.import_module(f"{_PACKAGE}.models.{encoder.module}")
    base: Any = arch.ModernBertModel if encoder.is_modern else arch.Model

    class EncoderModel(base):  # type: ignore[misc]  # as untyped as its package
        def __init__(self, args: Any) -> None:
            super().__init__(args)
            if "pooler" in self:
                self.pooler = nn.Identity()
            for module in self.modules():
                if isinstance(module, nn.GELU):
                    # ModernBERT's is the exact one; mlx-embeddings approximates it by tanh.
                    module._approx = "none"  # noqa: SLF001 - what its constructor sets

        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            return {kept: array for name, array in weights.items() if (kept := _name_of(name))}

    return EncoderModel, arch.ModelArgs


def _name_of(name: str) -> str:
    """As the layers call a checkpoint's weight; empty for one that is left out."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    if name.startswith(_HEADS) or "position_ids" in name:
        return ""
    for old, new in _OLD_NAMES.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name
