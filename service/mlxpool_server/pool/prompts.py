"""Prompts to token ids, the same way for Generate, Tokenize and CountTokens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from mlxpool_server.domain import (
    ChatPrompt,
    ModelSpec,
    Prompt,
    RenderedPrompt,
    TextPrompt,
    Tokenization,
    TokenPrompt,
)
from mlxpool_server.errors import (
    CapabilityMissingError,
    InvalidFieldError,
    PromptTooLongError,
    QueueTimeoutError,
)
from mlxpool_server.pool.backend import ModelLoader, Tokenizer
from mlxpool_server.pool.tokenizers import Tokenizers

T = TypeVar("T")

# A slow template or tokenizer keeps its thread; only prompts for its own model wait behind it.
MAX_THREADS = 2
# A long prompt takes seconds; a tokenizer that somebody made slow takes for ever.
LIMIT_S = 30.0
RETRY_AFTER_S = 1.0


class PromptReader:
    """Event loop only; each model's template and tokenizer run on threads of its own.

    Loads no weights.
    """

    def __init__(
        self,
        loader: ModelLoader,
        is_loaded: Callable[[str], bool] = lambda _: False,
        limit_s: float = LIMIT_S,
    ) -> None:
        """`is_loaded`: as Tokenizers takes it; `limit_s` for each prompt, with its wait."""
        self._tokenizers = Tokenizers(loader, is_loaded)
        self._limit_s = limit_s
        self._threads: dict[str, ThreadPoolExecutor] = {}
        # Calls that nobody waits for any more.
        self._left: list[Future[Any]] = []

    @property
    def is_idle(self) -> bool:
        """False: a thread is busy, for nobody, and would keep the process from its end."""
        return all(call.done() for call in self._left)

    def close(self) -> None:
        """Wait for nobody: a template may still take its time."""
        for threads in self._threads.values():
            threads.shutdown(wait=False, cancel_futures=True)

    def forget(self, name: str) -> None:
        """Read the model's tokenizer anew when it is needed next."""
        self._tokenizers.forget(name)
        # Those that are stuck in the old one are not the new one's.
        if (threads := self._threads.pop(name, None)) is not None:
            threads.shutdown(wait=False)

    async def tokenizer(self, spec: ModelSpec) -> Tokenizer:
        """Raises: LoadFailedError."""
        return await self._tokenizers.get(spec)

    async def read(
        self, spec: ModelSpec, prompt: Prompt, max_tokens: int | None = None
    ) -> RenderedPrompt:
        """`max_tokens`: a text that must have more is not even tokenised.

        Raises: InvalidFieldError, PromptTooLongError, CapabilityMissingError, LoadFailedError,
        QueueTimeoutError.
        """
        tokenizer = await self._tokenizers.get(spec)
        return await self._on_thread(spec, partial(_read, spec.name, tokenizer, prompt, max_tokens))

    async def tokenize(
        self, spec: ModelSpec, prompt: Prompt, *, include_pieces: bool
    ) -> Tokenization:
        """Raises: as `read`."""
        tokenizer = await self._tokenizers.get(spec)
        rendered = await self.read(spec, prompt)
        pieces: tuple[bytes, ...] = ()
        if include_pieces:
            pieces = await self._on_thread(
                spec, lambda: tuple(map(tokenizer.piece, rendered.token_ids))
            )
        return Tokenization(rendered.token_ids, pieces, rendered.text)

    async def _on_thread(self, spec: ModelSpec, call: Callable[[], T]) -> T:
        threads = self._threads.get(spec.name)
        if threads is None:
            name = f"prompts {spec.name}"
            threads = self._threads[spec.name] = ThreadPoolExecutor(MAX_THREADS, name)
        running = threads.submit(call)
        try:
            async with asyncio.timeout(self._limit_s) as timeout:
                return await asyncio.wrap_future(running)
        except TimeoutError:
            if not timeout.expired():
                raise
            if running.cancel():
                raise QueueTimeoutError(self._limit_s, RETRY_AFTER_S) from None
            problem = f"takes longer than {self._limit_s:g} s to render and tokenise"
            raise InvalidFieldError("prompt", problem) from None
        finally:
            if not running.done():
                self._left = [each for each in (*self._left, running) if not each.done()]


def check_token_ids(field: str, token_ids: Iterable[int], vocab_size: int) -> None:
    """Raises: InvalidFieldError on the first id outside the vocabulary."""
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidFieldError(field, f"token id {token_id} is outside 0 to {vocab_size - 1}")


def _read(
    model: str, tokenizer: Tokenizer, prompt: Prompt, max_tokens: int | None
) -> RenderedPrompt:
    match prompt:
        case TextPrompt(text):
            _check_length(tokenizer, text, max_tokens)
            rendered = RenderedPrompt(tokenizer.encode(text, add_special_tokens=True), text)
        case ChatPrompt(messages):
            if not tokenizer.has_chat_template:
                raise CapabilityMissingError(model, "chat template", "send prompt.text instead")
            text = tokenizer.render_chat(messages)
            _check_length(tokenizer, text, max_tokens)
            # The template writes the special tokens itself.
            rendered = RenderedPrompt(tokenizer.encode(text, add_special_tokens=False), text)
        case TokenPrompt(token_ids):
            check_token_ids("prompt.tokens.ids", token_ids, tokenizer.vocab_size)
            rendered = RenderedPrompt(token_ids, "")
    if not rendered.token_ids:
        raise InvalidFieldError("prompt", "has no tokens")
    return rendered


def _check_length(tokenizer: Tokenizer, text: str, max_tokens: int | None) -> None:
    """Raises: PromptTooLongError."""
    fewest = -(-len(text) // max(1, tokenizer.max_token_chars))
    if max_tokens is not None and fewest > max_tokens:
        what = "the most that the model's context and this server allow"
        raise PromptTooLongError(fewest, max_tokens, what, is_lower_bound=True)
