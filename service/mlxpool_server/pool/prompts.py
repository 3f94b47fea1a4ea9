"""Prompts to token ids, the same way for Generate, Tokenize and CountTokens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

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

T = TypeVar("T")


# A slow template keeps its thread until its time is up; only other prompts wait behind it.
MAX_THREADS = 4


class PromptReader:
    """Event loop only; templates and tokenizers run on threads of their own. Loads no weights."""

    def __init__(self, loader: ModelLoader) -> None:
        self._tokenizers = Tokenizers(loader)
        self._threads = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="prompts")

    def close(self) -> None:
        """Wait for nobody: a template may still take its time."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def forget(self, name: str) -> None:
        """Read the model's tokenizer anew when it is needed next."""
        self._tokenizers.forget(name)

    async def tokenizer(self, spec: ModelSpec) -> Tokenizer:
        """Raises: LoadFailedError."""
        return await self._tokenizers.get(spec)

    async def read(self, spec: ModelSpec, prompt: Prompt) -> RenderedPrompt:
        """Raises: InvalidFieldError, CapabilityMissingError, LoadFailedError."""
        tokenizer = await self._tokenizers.get(spec)
        return await self._on_thread(partial(_read, spec.name, tokenizer, prompt))

    async def tokenize(
        self, spec: ModelSpec, prompt: Prompt, *, include_pieces: bool
    ) -> Tokenization:
        """Raises: as `read`."""
        tokenizer = await self._tokenizers.get(spec)
        rendered = await self.read(spec, prompt)
        pieces: tuple[bytes, ...] = ()
        if include_pieces:
            pieces = await self._on_thread(lambda: tuple(map(tokenizer.piece, rendered.token_ids)))
        return Tokenization(rendered.token_ids, pieces, rendered.text)

    async def _on_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)


def check_token_ids(field: str, token_ids: Iterable[int], vocab_size: int) -> None:
    """Raises: InvalidFieldError on the first id outside the vocabulary."""
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidFieldError(field, f"token id {token_id} is outside 0 to {vocab_size - 1}")


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
            check_token_ids("prompt.tokens.ids", token_ids, tokenizer.vocab_size)
            rendered = RenderedPrompt(token_ids, "")
    if not rendered.token_ids:
        raise InvalidFieldError("prompt", "has no tokens")
    return rendered
