"""Prompts to token ids, the same way for Generate, Tokenize and CountTokens."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
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
    RETRY_AFTER_S,
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


@dataclass(frozen=True, slots=True)
class _Threads:
    """One model's. Whoever has a place in `free` finds a thread of the executor idle."""

    executor: ThreadPoolExecutor
    free: asyncio.Semaphore


def _release(free: asyncio.Semaphore) -> Callable[[object], None]:
    loop = asyncio.get_running_loop()

    def release(_: object) -> None:
        # A closed loop has nobody left who waits.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(free.release)

    return release


class PromptReader:
    """Event loop only; each model's template and tokenizer run on threads of its own.

    Loads no weights.
    """

    def __init__(
        self,
        loader: ModelLoader,
        load_number: Callable[[str], int | None] = lambda _: None,
        limit_s: float = LIMIT_S,
    ) -> None:
        """`load_number`: as Tokenizers takes it; `limit_s` for each prompt, with its wait."""
        self._tokenizers = Tokenizers(loader, load_number)
        self._limit_s = limit_s
        self._threads: dict[str, _Threads] = {}
        # Calls that nobody waits for any more.
        self._left: list[Future[Any]] = []

    @property
    def is_idle(self) -> bool:
        """False: a thread is busy, for nobody, and would keep the process from its end."""
        return all(call.done() for call in self._left)

    def close(self) -> None:
        """Wait for nobody: a template may still take its time."""
        for threads in self._threads.values():
            threads.executor.shutdown(wait=False, cancel_futures=True)

    def forget(self, name: str) -> None:
        """Read the model's tokenizer anew when it is needed next."""
        self._tokenizers.forget(name)
        # Those that are stuck in the old one are not the new one's.
        if (threads := self._threads.pop(name, None)) is not None:
            threads.executor.shutdown(wait=False)

    async def tokenizer(self, spec: ModelSpec) -> Tokenizer:
        """Raises: LoadFailedError."""
        return await self._tokenizers.get(spec)

    async def read(
        self,
        spec: ModelSpec,
        prompt: Prompt,
        max_tokens: int | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> RenderedPrompt:
        """`max_tokens`: a text that must have more is not even tokenised.

        `tokenizer`: the model's, from a caller who has it: its files are not looked at again.

        Raises: InvalidFieldError, PromptTooLongError, CapabilityMissingError, LoadFailedError,
        QueueTimeoutError.
        """
        if tokenizer is None:
            tokenizer = await self._tokenizers.get(spec)
        return await self._on_thread(spec, partial(_read, spec.name, tokenizer, prompt, max_tokens))

    async def tokenize(
        self, spec: ModelSpec, prompt: Prompt, *, include_pieces: bool
    ) -> Tokenization:
        """Raises: as `read`."""
        tokenizer = await self._tokenizers.get(spec)
        rendered = await self.read(spec, prompt, tokenizer=tokenizer)
        pieces: tuple[bytes, ...] = ()
        if include_pieces:
            pieces = await self._on_thread(
                spec, lambda: tuple(map(tokenizer.piece, rendered.token_ids))
            )
        return Tokenization(rendered.token_ids, pieces, rendered.text)

    async def _on_thread(self, spec: ModelSpec, call: Callable[[], T]) -> T:
        threads = self._threads.get(spec.name)
        if threads is None:
            executor = ThreadPoolExecutor(MAX_THREADS, f"prompts {spec.name}")
            threads = _Threads(executor, asyncio.Semaphore(MAX_THREADS))
            self._threads[spec.name] = threads
        running: Future[T] | None = None
        try:
            async with asyncio.timeout(self._limit_s) as timeout:
                # An executor's own queue would keep the prompts of those who gave up.
                await threads.free.acquire()
                running = threads.executor.submit(call)
                running.add_done_callback(_release(threads.free))
                return await asyncio.wrap_future(running)
        except TimeoutError:
            if not timeout.expired():
                raise
            if running is None:
                raise QueueTimeoutError(self._limit_s, RETRY_AFTER_S) from None
            problem = f"takes longer than {self._limit_s:g} s to render and tokenise"
            raise InvalidFieldError("prompt", problem) from None
        finally:
            if running is not None and not running.done():
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
