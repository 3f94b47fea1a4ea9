"""Encoders in float64, by their papers and the code that published them: no MLX."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

Array = NDArray[np.float64]
_erf = np.vectorize(math.erf)


class Reference:
    """One text at a time, without padding."""

    def __init__(self, folder: Path) -> None:
        self._config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        stored = load_file(folder / "model.safetensors")
        self._weights = {name: array.astype(np.float64) for name, array in stored.items()}

    def hidden(self, tokens: Sequence[int]) -> Array:
        """The last hidden states, (tokens, size)."""
        if self._config["model_type"] == "modernbert":
            return self._modern_bert(list(tokens))
        return self._bert(list(tokens))

    # ------------------------------------------------------------ BERT and RoBERTa

    def _bert(self, tokens: list[int]) -> Array:
        """Devlin et al. 2018; RoBERTa's positions begin behind its padding token's."""
        is_roberta = self._config["model_type"] != "bert"
        first = self._config["pad_token_id"] + 1 if is_roberta else 0
        part = "embeddings."
        hidden = (
            self._weights[f"{part}word_embeddings.weight"][tokens]
            + self._weights[f"{part}position_embeddings.weight"][first : first + len(tokens)]
            + self._weights[f"{part}token_type_embeddings.weight"][0]
        )
        hidden = self._norm(hidden, f"{part}LayerNorm")
        for layer in range(self._config["num_hidden_layers"]):
            part = f"encoder.layer.{layer}."
            names = ("query", "key", "value")
            projected = [self._linear(hidden, f"{part}attention.self.{name}") for name in names]
            attended = self._attend(*map(self._heads, projected))
            output = self._linear(attended, f"{part}attention.output.dense")
            hidden = self._norm(hidden + output, f"{part}attention.output.LayerNorm")
            inner = _gelu(self._linear(hidden, f"{part}intermediate.dense"))
            output = self._linear(inner, f"{part}output.dense")
            hidden = self._norm(hidden + output, f"{part}output.LayerNorm")
        return hidden

    # ------------------------------------------------------------ ModernBERT

    def _modern_bert(self, tokens: list[int]) -> Array:
        """Warner et al. 2024: rotary positions, local layers between global ones, gated GELU."""
        config = self._config
        hidden = self._weights["embeddings.tok_embeddings.weight"][tokens]
        hidden = self._norm(hidden, "embeddings.norm")
        for layer in range(config["num_hidden_layers"]):
            part = f"layers.{layer}."
            is_global = layer % config["global_attn_every_n_layers"] == 0
            base = config["global_rope_theta" if is_global else "local_rope_theta"]
            window = None if is_global else config["local_attention"] // 2
            # The embeddings are normalised already.
            normed = hidden if layer == 0 else self._norm(hidden, f"{part}attn_norm")
            query, key, value = map(
                self._heads, np.split(self._linear(normed, f"{part}attn.Wqkv"), 3, axis=-1)
            )
            attended = self._attend(_rotated(query, base), _rotated(key, base), value, window)
            hidden = hidden + self._linear(attended, f"{part}attn.Wo")
            normed = self._norm(hidden, f"{part}mlp_norm")
            inner, gate = np.split(self._linear(normed, f"{part}mlp.Wi"), 2, axis=-1)
            hidden = hidden + self._linear(_gelu(inner) * gate, f"{part}mlp.Wo")
        return self._norm(hidden, "final_norm")

    # ------------------------------------------------------------ parts

    def _linear(self, values: Array, name: str) -> Array:
        return values @ self._weights[f"{name}.weight"].T + self._weights.get(f"{name}.bias", 0.0)

    def _norm(self, values: Array, name: str) -> Array:
        epsilon = self._config.get("layer_norm_eps") or self._config["norm_eps"]
        centred = values - values.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
        return scaled * self._weights[f"{name}.weight"] + self._weights.get(f"{name}.bias", 0.0)

    def _heads(self, values: Array) -> Array:
        num_heads = self._config["num_attention_heads"]
        return values.reshape(len(values), num_heads, -1).transpose(1, 0, 2)

    def _attend(self, query: Array, key: Array, value: Array, window: int | None = None) -> Array:
        scores = query @ key.transpose(0, 2, 1) / math.sqrt(query.shape[-1])
        if window is not None:
            places = np.arange(scores.shape[-1])
            is_far = np.abs(places[:, None] - places) > window
            scores = np.where(is_far, -np.inf, scores)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        attended: Array = (weights @ value).transpose(1, 0, 2).reshape(query.shape[1], -1)
        return attended


def _gelu(values: Array) -> Array:
    scaled: Array = 0.5 * values * (1 + _erf(values / math.sqrt(2)))
    return scaled


def _rotated(heads: Array, base: float) -> Array:
    half = heads.shape[-1] // 2
    angles = np.arange(heads.shape[1])[:, None] / base ** (np.arange(half) / half)
    first, second = heads[..., :half], heads[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
