"""What a generation says while it runs: Started, then any Progress and Delta, then Finished."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlxpool_client.enums import FinishReason, GenerationPhase

if TYPE_CHECKING:
    from mlxpool_client.messages import ChatMessage
    from mlxpool_client.models import LoadProgress


@dataclass(frozen=True, slots=True)
class Started:
    """The request was accepted. `seed` is the one in effect: send it to repeat the run."""

    generation_id: str
    # The resolved model, after aliases.
    model: str
    revision: str = ""
    adapter: str = ""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """Sent on every change of phase, and at least every 10 s while no delta flows."""

    phase: GenerationPhase = GenerationPhase.UNKNOWN
    queue_position: int = 0
    load: LoadProgress | None = None
    prefilled_tokens: int = 0
    prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A fragment of a tool call: append `arguments_json` by `index`.

    `id` and `name` come in the first fragment of their index only.
    """

    index: int
    id: str
    name: str
    arguments_json: str


@dataclass(frozen=True, slots=True)
class TokenCandidate:
    """A token and its log-probability; `text` is lossy, `raw_bytes` exact."""

    token_id: int
    text: str
    raw_bytes: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    chosen: TokenCandidate
    top: tuple[TokenCandidate, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """New output, whole characters only, in at most one of text, reasoning and tool_call."""

    text: str = ""
    reasoning: str = ""
    tool_call: ToolCallDelta | None = None
    # All tokens generated so far, not only this delta's.
    completion_tokens: int = 0
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """`prompt_tokens` includes the cached ones, `completion_tokens` the reasoning."""

    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    accepted_draft_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time went, by the server's clock."""

    queue_s: float = 0.0
    load_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    # None: no token was generated.
    time_to_first_token_s: float | None = None
    total_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event: why it ended, and the whole output (the deltas folded)."""

    finish_reason: FinishReason
    message: ChatMessage
    # The match, with FinishReason.STOP_SEQUENCE.
    stop_sequence: str = ""
    stop_token_id: int | None = None
    usage: TokenUsage = TokenUsage()
    timings: Timings = Timings()
    # With final_only and include_token_ids.
    token_ids: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        """The whole text, without reasoning and tool calls."""
        return self.message.content


GenerationEvent = Started | Progress | Delta | Finished
