"""Printing a generation while it runs, and what there is to say at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlxpool_client.cli.exits import CommandError, ExitCode
from mlxpool_client.cli.json_lines import json_line
from mlxpool_client.cli.quantities import format_bytes
from mlxpool_client.enums import FinishReason, GenerationPhase
from mlxpool_client.events import Delta, Finished, Progress, Started

if TYPE_CHECKING:
    from mlxpool_client.cli.terminal import Terminal
    from mlxpool_client.streams import Generation


def print_answer(terminal: Terminal, generation: Generation) -> Finished:
    """Write text as it arrives, reasoning to stderr; return the last event."""
    last_text = ""
    with terminal.waiting() as waiting:
        for event in generation:
            match event:
                case Progress():
                    waiting.show(describe_progress(event))
                case Delta():
                    waiting.stop()
                    terminal.aside(event.reasoning)
                    terminal.write(event.text)
                    last_text = event.text or last_text
                case Started() | Finished():
                    pass
    if not last_text.endswith("\n"):
        terminal.line("")
    return generation.result()


def print_events(terminal: Terminal, generation: Generation) -> Finished:
    """Write one JSON object per event; return the last one."""
    for event in generation:
        terminal.line(json_line(event, event=type(event).__name__.lower()))
    return generation.result()


def describe_progress(progress: Progress) -> str:
    match progress.phase:
        case GenerationPhase.QUEUED:
            return f"queued at position {progress.queue_position}"
        case GenerationPhase.LOADING:
            load = progress.load
            if load is None or not load.total_bytes:
                return "loading the model"
            done, total = format_bytes(load.completed_bytes), format_bytes(load.total_bytes)
            return f"loading the model: {done} of {total}"
        case GenerationPhase.PREFILLING:
            return f"reading the prompt: {progress.prefilled_tokens} of {progress.prompt_tokens}"
        case GenerationPhase.DECODING | GenerationPhase.UNKNOWN:
            return "generating"


def describe_stats(finished: Finished) -> str:
    """Return TTFT, speed and token counts, by the server's clock."""
    usage, timings = finished.usage, finished.timings
    first_s, decode_s = timings.time_to_first_token_s, timings.decode_s
    facts = [
        "no token" if first_s is None else f"TTFT {first_s:.2f} s",
        f"{usage.completion_tokens} tokens",
        f"{timings.total_s:.2f} s in all",
        f"prompt {usage.prompt_tokens} tokens ({usage.cached_prompt_tokens} cached)",
        f"ended by {finished.finish_reason.name.lower()}",
    ]
    # The first token comes from the prompt's pass, not from a decode step.
    if decode_s > 0 and usage.completion_tokens > 1:
        facts.insert(2, f"{(usage.completion_tokens - 1) / decode_s:.1f} tokens/s")
    return ", ".join(facts)


def check_complete(finished: Finished) -> None:
    """Raises: CommandError when somebody else ended the generation."""
    if finished.finish_reason is FinishReason.CANCELLED:
        raise CommandError("the generation was cancelled by somebody else", ExitCode.TRY_AGAIN)
