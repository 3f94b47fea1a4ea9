"""What one RPC's log line says. The servicer adds facts as they become known."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field

from mlxpool_server.domain import (
    GenerationDelta,
    GenerationEvent,
    GenerationFinished,
    GenerationProgress,
    GenerationStarted,
)

# Names come from requests, which may be as long as a message.
MAX_TEXT_CHARS = 256


@dataclass(slots=True)
class Call:
    """What is known of a call by now."""

    facts: dict[str, object] = field(default_factory=dict)
    finished: GenerationFinished | None = None


_call: ContextVar[Call | None] = ContextVar("call", default=None)


def begin() -> Call:
    """Open this call's facts, for the interceptor that logs them at the end."""
    call = Call()
    _call.set(call)
    return call


def add(**facts: object) -> None:
    """What is None is not worth a field."""
    call = _call.get()
    if call is not None:
        known = {name: _clipped(value) for name, value in facts.items() if value is not None}
        call.facts.update(known)


def add_event(event: GenerationEvent) -> None:
    """Note what a generation's log line needs, also if it breaks off; never prompt or text."""
    match event:
        case GenerationStarted(generation_id, model):
            add(generation_id=generation_id, model=model)
        case GenerationProgress(prompt_tokens=prompt_tokens):
            if prompt_tokens:
                add(prompt_tokens=prompt_tokens)
        case GenerationDelta(completion_tokens=completion_tokens):
            add(completion_tokens=completion_tokens)
        case GenerationFinished(usage=usage, timings=timings):
            call = _call.get()
            if call is not None:
                call.finished = event
            first = timings.time_to_first_token_s
            add(
                finish_reason=event.finish_reason.value,
                prompt_tokens=usage.prompt_tokens,
                completion_tokens=usage.completion_tokens,
                ttft_s=None if first is None else round(first, 4),
                queue_s=round(timings.queue_s, 4),
                load_s=round(timings.load_s, 4),
            )


def _clipped(value: object) -> object:
    if isinstance(value, str) and len(value) > MAX_TEXT_CHARS:
        return value[:MAX_TEXT_CHARS] + "…"
    return value
