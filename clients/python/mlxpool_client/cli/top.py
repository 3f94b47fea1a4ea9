"""`mlxpool top`: who runs, how fast, and in how much memory, frame by frame."""

from __future__ import annotations

import argparse
import itertools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Group
from rich.live import Live
from rich.text import Text

from mlxpool_client.cli.arguments import add_json_option
from mlxpool_client.cli.json_lines import json_line
from mlxpool_client.cli.quantities import duration_s, format_bytes
from mlxpool_client.cli.terminal import rich_table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlxpool_client.cli.terminal import Terminal
    from mlxpool_client.client import Client
    from mlxpool_client.memory import MemoryUsage, ModelMemory
    from mlxpool_client.models import Model

HEADERS = ("MODEL", "STATE", "STREAMS", "QUEUED", "TOKENS/S", "FIRST TOKEN", "WEIGHTS", "KV CACHES")
DEFAULT_INTERVAL_S = 1.0


@dataclass(frozen=True, slots=True)
class Row:
    """One model since the frame before; None where nothing can be said."""

    model: str
    state: str
    streams: int
    queued: int
    tokens_per_s: float | None
    # The mean of those whose first token came since the frame before.
    first_token_s: float | None
    weights_bytes: int
    kv_bytes: int
    prompt_cache_bytes: int


@dataclass(frozen=True, slots=True)
class Frame:
    models: tuple[Row, ...]
    streams: int
    queued: int
    tokens_per_s: float | None
    used_bytes: int
    limit_bytes: int | None
    active_bytes: int


@dataclass(frozen=True, slots=True)
class Sample:
    """What the server said at one moment of ours."""

    at: float
    models: tuple[Model, ...]
    memory: MemoryUsage


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--interval",
        type=duration_s,
        metavar="SECONDS",
        default=DEFAULT_INTERVAL_S,
        help="between two frames; default: 1",
    )
    parser.add_argument(
        "--once", action="store_true", help="print one frame, after one interval, and end"
    )
    parser.add_argument("--frames", type=_count, metavar="N", help="end after so many frames")
    add_json_option(parser, "a JSON object per frame")


def run(client: Client, terminal: Terminal, arguments: argparse.Namespace) -> None:
    num_frames = 1 if arguments.once else arguments.frames
    frames = itertools.islice(_frames(client, arguments.interval), num_frames)
    if arguments.json:
        for frame in frames:
            terminal.line(json_line(frame))
    elif terminal.is_live and not arguments.once:
        with Live(console=terminal.console, screen=True, auto_refresh=False) as live:
            for frame in frames:
                live.update(_picture(frame), refresh=True)
    else:
        for frame in frames:
            terminal.line(describe(frame))
            terminal.table(HEADERS, [_cells(row) for row in frame.models])


def frame_of(before: Sample, after: Sample) -> Frame:
    """What went on between two samples."""
    elapsed_s = after.at - before.at
    earlier = {model.name: model for model in before.models}
    held = {part.model: part for part in after.memory.models}
    rows = tuple(
        _row(earlier.get(model.name), model, held.get(model.name), elapsed_s)
        for model in after.models
    )
    rates = [row.tokens_per_s for row in rows if row.tokens_per_s is not None]
    return Frame(
        models=rows,
        streams=sum(row.streams for row in rows),
        queued=sum(row.queued for row in rows),
        tokens_per_s=sum(rates) if rates else None,
        used_bytes=sum(row.weights_bytes + row.kv_bytes + row.prompt_cache_bytes for row in rows),
        limit_bytes=after.memory.limits.pool_bytes,
        active_bytes=after.memory.active_bytes,
    )


def describe(frame: Frame) -> str:
    """The line above the table."""
    limit = f" of {format_bytes(frame.limit_bytes)}" if frame.limit_bytes is not None else ""
    return (
        f"{frame.streams} streams, {frame.queued} queued, {_number(frame.tokens_per_s)} tokens/s; "
        f"pool {format_bytes(frame.used_bytes)}{limit}, MLX {format_bytes(frame.active_bytes)}"
    )


def _frames(client: Client, interval_s: float) -> Iterator[Frame]:
    before = _sample(client)
    while True:
        time.sleep(interval_s)
        after = _sample(client)
        yield frame_of(before, after)
        before = after


def _sample(client: Client) -> Sample:
    models = tuple(client.list_models())
    return Sample(time.monotonic(), models, client.memory_usage())


def _row(before: Model | None, after: Model, held: ModelMemory | None, elapsed_s: float) -> Row:
    tokens_per_s = first_token_s = None
    # Fewer tokens than before: the server was started anew.
    if before is not None and elapsed_s > 0:
        num_tokens = after.activity.completion_tokens - before.activity.completion_tokens
        num_first = after.activity.first_tokens - before.activity.first_tokens
        waited_s = after.activity.time_to_first_token_s - before.activity.time_to_first_token_s
        if num_tokens >= 0:
            tokens_per_s = num_tokens / elapsed_s
        if num_first > 0:
            first_token_s = waited_s / num_first
    return Row(
        model=after.name,
        state=after.state.name.lower(),
        streams=after.active_requests,
        queued=after.queued_requests,
        tokens_per_s=tokens_per_s,
        first_token_s=first_token_s,
        weights_bytes=0 if held is None else held.resident_bytes,
        kv_bytes=0 if held is None else held.active_kv_bytes,
        prompt_cache_bytes=0 if held is None else held.prompt_cache_bytes,
    )


def _picture(frame: Frame) -> Group:
    table = rich_table(HEADERS, [_cells(row) for row in frame.models])
    return Group(Text(describe(frame), style="bold"), Text(), table)


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.model,
        row.state,
        str(row.streams),
        str(row.queued),
        _number(row.tokens_per_s),
        "-" if row.first_token_s is None else f"{row.first_token_s:.2f} s",
        format_bytes(row.weights_bytes),
        format_bytes(row.kv_bytes + row.prompt_cache_bytes),
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of frames")
    return int(text)
