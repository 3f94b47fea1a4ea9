"""What the engine asks of a backend. mlx_backend implements it; tests bring a fake."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from mlxpool_server.domain import OutputPart, Pooling, SamplingParams, Vector
from mlxpool_server.errors import MlxpoolError


@dataclass(frozen=True, slots=True)
class TokenScores:
    """One token's log-probability, and (token id, log-probability) of the likeliest, best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step did, by slot."""

    # (slot, token id), each slot's in order. Most have one a step; drafts that were right, more.
    tokens: tuple[tuple[int, int], ...] = ()
    # (slot, how many of its tokens, the first ones, were drafts).
    drafted: tuple[tuple[int, int], ...] = ()
    # (slot, prompt tokens processed so far).
    prefilled: tuple[tuple[int, int], ...] = ()
    # (slot, how many of those were in the prompt cache).
    cached: tuple[tuple[int, int], ...] = ()
    # (slot, why it alone cannot go on): it wants to be removed.
    failed: tuple[tuple[int, MlxpoolError], ...] = ()
    # Of the new tokens of slots that asked.
    scores: Mapping[int, TokenScores] = field(default_factory=dict)


class Guide(Protocol):
    """Says which tokens may come next in one generation; its own, on one thread at a time."""

    def allowed(self) -> bytes:
        """One bit a token id, the lowest first; at least one is set.

        Raises: BadConstraintError when the constraint turns out too complex, here or in `advance`.
        """

    def advance(self, token_id: int) -> None:
        """Take the next token, one of those that were allowed."""


class BatchRunner(Protocol):
    """One model's running batch. Engine thread only. A slot is the caller's name for a row."""

    def add(
        self,
        slot: int,
        prompt: Sequence[int],
        sampling: SamplingParams,
        guide: Guide | None = None,
        top_logprobs: int | None = None,
        *,
        max_tokens: int = 0,
        may_be_forced: bool = False,
        adapter: LoadedAdapter | None = None,
    ) -> None:
        """Join the batch at the next step. `prompt` is not empty, its ids are in the vocabulary.

        `guide` None: any token may come. `top_logprobs`: give each token's scores, with so many
        alternatives. None: give none. `max_tokens`: no more are wanted, and no place behind them is
        worked on; 0: nobody knows. `may_be_forced`: `force` may come for it, after any token.
        `adapter`: one that was loaded for this model. None: the model as it is.
        """

    def remove(self, slots: Sequence[int]) -> None:
        """Free these slots before the next step, in whatever phase they are.

        No harm for a slot that is not in the batch.
        """

    def force(self, slot: int, token_ids: Sequence[int]) -> None:
        """Let the slot's next tokens be these, whatever the model would say.

        Counted from the last token that `step` returned. No harm for a slot that is not here.
        """

    def step(self) -> StepOutput:
        """Advance every slot: a chunk of prefill, or one token."""

    def settle(self) -> None:
        """Wait for what a step began and did not wait for."""

    def kv_bytes(self) -> int:
        """Bytes of KV cache the batch holds now."""

    def limit_prompt_cache(self, num_bytes: int) -> None:
        """Keep at most so much of what prompts and answers leave in the KV cache; 0 at first."""

    def prompt_cache_bytes(self) -> int:
        """Bytes of it now."""

    def close(self) -> None:
        """Drop the batch and everything it holds."""


@runtime_checkable
class LoadedAdapter(Protocol):
    """What changes a model for some of its rows; in memory, so that any thread may use it."""

    @property
    def resident_bytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class EmbeddingJob:
    """Texts of one request, as tokens: none is empty, their ids are in the vocabulary."""

    model: str
    texts: tuple[tuple[int, ...], ...]
    pooling: Pooling
    normalize: bool = True


class Embedder(Protocol):
    """One model's texts on their way to vectors. Engine thread only. A slot is a job's name."""

    def add(self, slot: int, job: EmbeddingJob) -> None:
        """Take its texts into the passes to come."""

    def remove(self, slot: int) -> None:
        """Forget what is left of it. No harm for a slot that is not here."""

    def step(self, *, is_alone: bool) -> Sequence[tuple[int, tuple[Vector, ...]]]:
        """One pass over some texts, to its end; return the jobs that it completed.

        `is_alone`: nothing else waits for the engine, so that a pass may be long.
        """

    def kv_bytes(self) -> int:
        """Bytes of KV cache that a long text holds now."""

    def close(self) -> None:
        """Drop all jobs and everything they hold."""


@runtime_checkable
class LoadedModel(Protocol):
    """Weights in memory, fully evaluated, so that any thread may use them."""

    @property
    def resident_bytes(self) -> int:
        """Measured size of the weights."""

    def new_runner(self) -> BatchRunner:
        """An empty batch on this model. Engine thread only."""

    def new_embedder(self) -> Embedder | None:
        """None: nothing is known of its hidden states. Engine thread only."""


class TextDecoder(Protocol):
    """Turns one sequence's tokens into text as they come."""

    def push(self, token_id: int) -> str:
        """Return the text this token completes: whole characters only, maybe none."""

    def finish(self) -> str:
        """Return what is still held back; incomplete characters become U+FFFD."""


class ChannelSorter(Protocol):
    """Tells one sequence's answer from its thoughts and its tool calls."""

    @property
    def is_reasoning(self) -> bool:
        """Whether what comes next is a thought."""

    def push(self, token_id: int, text: str) -> tuple[OutputPart, ...]:
        """Return what is certain by now. `text` is what the token completed."""

    def finish(self, text: str, *, is_cut: bool) -> tuple[OutputPart, ...]:
        """Return what was held back. `text` is the decoder's last; `is_cut`: more was to come."""
