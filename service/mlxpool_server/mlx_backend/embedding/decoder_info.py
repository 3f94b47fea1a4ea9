"""How a model that generates embeds texts, by its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlxpool_server.domain import EmbeddingInfo, Pooling
from mlxpool_server.mlx_backend.embedding.pipeline import read_pipeline
from mlxpool_server.mlx_backend.model_config import first_int

# What models call the width of their hidden states.
SIZE_KEYS = ("hidden_size", "n_embd", "d_model", "model_dim", "dim")


def decoder_info(folder: Path, config: dict[str, Any], pass_tokens: int) -> EmbeddingInfo | None:
    """By its last token, unless it says otherwise. None: how large they are is not known."""
    size = first_int(config, *SIZE_KEYS)
    if not size:
        return None
    pipeline = read_pipeline(folder, Pooling.LAST_TOKEN)
    return EmbeddingInfo(size, pipeline.pooling, pass_tokens, pipeline.max_tokens, pipeline.problem)
