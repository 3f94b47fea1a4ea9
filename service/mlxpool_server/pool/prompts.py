"""Prompts to token ids, the same way for Generate, Tokenize and CountTokens."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from mlxpool_server.domain import (
    ChatPrompt,
    ModelSpec,
    Prompt,
    RenderedPrompt,
    TextPrompt,
    Tokenization,
    TokenPrompt,
)
from mlxpool_server.errors import CapabilityMissingError, InvalidFieldError
from mlxpool_server.pool.backend import ModelLoader, Tokenizer
from mlxpool_server.pool.tokenizers import Tokenizers


class PromptReader:
    """Event loop only; templates and tokenizers run on worker threads. Loads no weights."""

    def __init__(self, loader: ModelLoader) -> None:
        self._tokenizers = Tokenizers(loader)

    async def tokenizer(self, spec: ModelSpec) -> Tokenizer:
        """Raises: LoadFailedError."""
        return await self._tokenizers.get(spec)

    async def read(self, spec: ModelSpec, prompt: Prompt) -> RenderedPrompt:
        """Raises: InvalidFieldError, CapabilityMissingError, LoadFailedError."""
        tokenizer = await self._tokenizers.get(spec)
        return await asyncio.to_thread(_read, spec.name, tokenizer, prompt)

    async def tokenize(
        self, spec: ModelSpec, prompt: Prompt, *, include_pieces: bool
    ) -> Tokenization:
        """Raises: as `read`."""
        tokenizer = await self._tokenizers.get(spec)
        rendered = await self.read(spec, prompt)
        pieces: tuple[bytes, ...] = ()
        if include_pieces:
            pieces = await asyncio.to_thread(
                lambda: tuple(map(tokenizer.piece, rendered.token_ids))
            )
        return Tokenization(rendered.token_ids, pieces, rendered.text)


def check_token_ids(field: str, token_ids: Iterable[int], tokenizer: Tokenizer) -> None:
    """Raises: InvalidFieldError on the first id outside the vocabulary."""
    for token_id in token_ids:
        if not 0 <= token_id < tokenizer.vocab_size:
            raise InvalidFieldError(
                field, f"token id {token_id} is outside 0 to {tokenizer.vocab_size - 1}"
            )


def _read(model: str, tokenizer: Tokenizer, prompt: Prompt) -> RenderedPrompt:
    match prompt:
        case TextPrompt(text):
            rendered = RenderedPrompt(tokenizer.encode(text, add_special_tokens=True), text)
        case ChatPrompt(messages):
            if not tokenizer.has_chat_template:
                raise CapabilityMissingError(model, "chat template", "send prompt.text instead")
            text = tokenizer.render_chat(messages)
            # The template writes the special tokens itself.
            rendered = RenderedPrompt(tokenizer.encode(text, add_special_tokens=False), text)
        case TokenPrompt(token_ids):
            check_token_ids("prompt.tokens.ids", token_ids, tokenizer)
            rendered = RenderedPrompt(token_ids, "")
    if not rendered.token_ids:
        raise InvalidFieldError("prompt", "has no tokens")
    return rendered
