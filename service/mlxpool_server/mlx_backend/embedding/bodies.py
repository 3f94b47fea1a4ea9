"""A model without its head: tokens to hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from mlxpool_server.mlx_backend.last_rows import LastRows


class Body(Protocol):
    """Engine thread only, once it is in use."""

    @property
    def can_cut(self) -> bool:
        """Whether a text can be worked on a part at a time, through caches."""

    @property
    def may_pad(self) -> bool: ...

    @property
    def pad_id(self) -> int: ...

    def hidden(
        self, tokens: mx.array, lengths: Sequence[int], caches: list[Any] | None = None
    ) -> mx.array:
        """Of (rows, tokens) the hidden states, (rows, tokens, size); lazy.

        Rows are padded on the right from their `lengths` on; what they have there has no meaning.
        """

    def new_caches(self) -> list[Any]:
        """For one text that is cut."""


class DecoderBody:
    """A model that generates: a token sees those before it, so that padding behind is unseen."""

    can_cut = True
    may_pad = True
    pad_id = 0

    def __init__(self, model: LastRows) -> None:
        self._model = model

    @property
    def is_known(self) -> bool:
        """Whether its hidden states are found; nothing is computed for it."""
        return self._model.hidden(mx.zeros((1, 1), dtype=mx.int32)) is not None

    def hidden(
        self, tokens: mx.array, lengths: Sequence[int], caches: list[Any] | None = None
    ) -> mx.array:
        del lengths
        hidden = self._model.hidden(tokens, caches)
        if hidden is None:
            raise RuntimeError("the model's head was not found")
        return hidden

    def new_caches(self) -> list[Any]:
        caches: list[Any] = make_prompt_cache(self._model.model)
        return caches


class EncoderBody:
    """A model that only embeds: a token sees all others, so that a text goes in whole."""

    can_cut = False

    def __init__(self, module: nn.Module, *, pad_id: int, may_pad: bool, dtype: mx.Dtype) -> None:
        """`dtype`: of its activations."""
        self._module = module
        self._dtype = dtype
        self.pad_id = pad_id
        self.may_pad = may_pad

    def hidden(
        self, tokens: mx.array, lengths: Sequence[int], caches: list[Any] | None = None
    ) -> mx.array:
        del caches
        is_own = mx.arange(tokens.shape[1])[None] < mx.array(list(lengths))[:, None]
        output: Any = self._module(tokens, attention_mask=is_own.astype(self._dtype))
        found = output if isinstance(output, dict) else vars(output)
        hidden: mx.array = found["last_hidden_state"]
        return hidden

    def new_caches(self) -> list[Any]:
        return []
