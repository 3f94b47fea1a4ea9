"""Prompts to token ids, the same way for Generate, Embed, Tokenize and CountTokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeVar

from mlxpool_server.domain import (
    ChatPrompt,
    GenerationRequest,
    ModelSpec,
    Prompt,
    RenderedPrompt,
    TextPrompt,
    Tokenization,
    TokenPrompt,
    ToolCall,
)
from mlxpool_server.engine.backend import Guide
from mlxpool_server.errors import (
    BadConstraintError,
    CapabilityMissingError,
    InvalidFieldError,
    MalformedCallError,
    MlxpoolError,
    PromptTooLongError,
    QueueTimeoutError,
    of_input,
)
from mlxpool_server.pool.backend import ModelLoader, Tokenizer
from mlxpool_server.pool.chat_abilities import check_chat
from mlxpool_server.pool.model_threads import ModelThreads, TooSlowError
from mlxpool_server.pool.tokenizers import Tokenizers

T = TypeVar("T")

# A long prompt takes seconds; a tokenizer that somebody made slow takes for ever.
LIMIT_S = 30.0
# Of several inputs, so many are read before it is another request's turn.
INPUTS_AT_ONCE = 32


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
        self._threads = ModelThreads(limit_s)
        self._tokenizers = Tokenizers(loader, load_number)
        # Their own: a grammar that takes long keeps no prompt waiting.
        self._compilers = ModelThreads(limit_s)

    @property
    def is_idle(self) -> bool:
        """False: a thread is busy, for nobody, and would keep the process from its end."""
        return self._threads.is_idle and self._compilers.is_idle and self._tokenizers.is_idle

    def close(self) -> None:
        """Wait for nobody: a template may still take its time."""
        self._threads.close()
        self._compilers.close()
        self._tokenizers.close()

    def forget(self, name: str) -> None:
        """Read the model's tokenizer anew when it is needed next."""
        self._tokenizers.forget(name)
        self._threads.forget(name)
        self._compilers.forget(name)

    async def tokenizer(self, spec: ModelSpec) -> Tokenizer:
        """Raises: LoadFailedError."""
        return await self._tokenizers.get(spec)

    async def tokenizer_archive(self, spec: ModelSpec) -> bytes:
        """Return the tokenizer's files as a ZIP. Raises: LoadFailedError, QueueTimeoutError."""
        return await self._tokenizers.archive(spec)

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

    async def read_inputs(
        self,
        spec: ModelSpec,
        prompts: Sequence[Prompt],
        max_tokens: int | None,
        tokenizer: Tokenizer,
    ) -> list[tuple[int, ...]]:
        """The token ids of each.

        Raises: as `read`; what is wrong with one of them names its index.
        """
        read: list[tuple[int, ...]] = []
        for start in range(0, len(prompts), INPUTS_AT_ONCE):
            part = prompts[start : start + INPUTS_AT_ONCE]
            call = partial(_read_inputs, spec.name, tokenizer, part, max_tokens, start)
            read += await self._on_thread(spec, call, f"inputs[{start}]")
        return read

    async def read_calls(
        self, spec: ModelSpec, tokenizer: Tokenizer, text: str, chat: ChatPrompt
    ) -> tuple[ToolCall, ...]:
        """Raises: MalformedCallError."""
        try:
            return await self._threads.run(spec.name, partial(tokenizer.read_calls, text, chat))
        except (TooSlowError, QueueTimeoutError):
            # Slow prompts keep the threads: the caller still gets the text.
            raise MalformedCallError("there was no time to read it") from None

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

    async def guide(
        self, spec: ModelSpec, tokenizer: Tokenizer, request: GenerationRequest, rendered: str
    ) -> Guide | None:
        """None: any output will do. `rendered` is the prompt's text.

        Raises: BadConstraintError, CapabilityMissingError, LoadFailedError, QueueTimeoutError.
        """
        constraint, prompt = request.constraint, request.prompt
        chat = prompt if isinstance(prompt, ChatPrompt) else None
        if constraint is None and (chat is None or not chat.must_call):
            return None
        if constraint is not None and not tokenizer.has_constraints:
            raise CapabilityMissingError(
                spec.name, "vocabulary that grammars can read", "leave constraint unset"
            )
        compiled = partial(tokenizer.compile, constraint, chat, rendered)
        try:
            return await self._compilers.run(spec.name, compiled)
        except TooSlowError:
            field = "prompt.chat.tools" if constraint is None else constraint.field
            problem = f"takes longer than {self._compilers.limit_s:g} s to compile"
            raise BadConstraintError(field, problem) from None

    async def _on_thread(self, spec: ModelSpec, call: Callable[[], T], field: str = "prompt") -> T:
        try:
            return await self._threads.run(spec.name, call)
        except TooSlowError:
            problem = f"takes longer than {self._threads.limit_s:g} s to render and tokenise"
            raise InvalidFieldError(field, problem) from None


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
        case ChatPrompt():
            check_chat(model, tokenizer, prompt)
            text = tokenizer.render_chat(prompt)
            _check_length(tokenizer, text, max_tokens)
            # The template writes the special tokens itself.
            rendered = RenderedPrompt(tokenizer.encode(text, add_special_tokens=False), text)
        case TokenPrompt(token_ids):
            check_token_ids("prompt.tokens.ids", token_ids, tokenizer.vocab_size)
            rendered = RenderedPrompt(token_ids, "")
    if not rendered.token_ids:
        raise InvalidFieldError("prompt", "has no tokens")
    return rendered


def _read_inputs(
    model: str,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    max_tokens: int | None,
    first: int,
) -> list[tuple[int, ...]]:
    """`first` is the index of the first of them."""
    read = []
    for index, prompt in enumerate(prompts, start=first):
        try:
            read.append(_read(model, tokenizer, prompt, max_tokens).token_ids)
        except MlxpoolError as error:
            raise of_input(error, index) from error
    return read


def _check_length(tokenizer: Tokenizer, text: str, max_tokens: int | None) -> None:
    """Raises: PromptTooLongError."""
    most_chars = tokenizer.max_token_chars
    if max_tokens is None or most_chars is None:
        return
    fewest = -(-len(text) // max(1, most_chars))
    if fewest > max_tokens:
        what = "the most that the model's context and this server allow"
        raise PromptTooLongError(fewest, max_tokens, what, is_lower_bound=True)
