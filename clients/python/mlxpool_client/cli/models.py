"""`mlxpool models`, `mlxpool load` and `mlxpool unload`."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn

from mlxpool_client.cli.arguments import add_json_option
from mlxpool_client.cli.json_lines import json_line
from mlxpool_client.cli.quantities import format_bytes, format_seconds, keep_alive_s
from mlxpool_client.cli.terminal import printable
from mlxpool_client.models import LoadFinished, LoadProgress, Model

if TYPE_CHECKING:
    from mlxpool_client.cli.terminal import Terminal
    from mlxpool_client.client import Client
    from mlxpool_client.streams import Loading

HEADERS = ("NAME", "STATE", "MEMORY", "CONTEXT", "ACTIVE", "QUEUED", "IDLE", "EXPIRES", "PINNED")


def add_list_options(parser: argparse.ArgumentParser) -> None:
    add_json_option(parser, "one JSON object per model")


def run_list(client: Client, terminal: Terminal, arguments: argparse.Namespace) -> None:
    models = client.list_models()
    if arguments.json:
        for model in models:
            terminal.line(json_line(model))
        return
    now = datetime.now(tz=UTC)
    terminal.table(HEADERS, [model_row(model, now) for model in models])
    for model in models:
        if model.error_message:
            terminal.note(f"{model.name}: {model.error_message}")


def model_row(model: Model, now: datetime) -> tuple[str, ...]:
    """Return the table's cells; a model that is not loaded shows its estimate as ~size."""
    memory = "-"
    if model.resident_bytes:
        memory = format_bytes(model.resident_bytes)
    elif model.estimated_bytes:
        memory = f"~{format_bytes(model.estimated_bytes)}"
    is_idle = model.last_used_time is not None and not model.active_requests
    return (
        model.name,
        model.state.name.lower(),
        memory,
        str(model.context_length or "-"),
        str(model.active_requests),
        str(model.queued_requests),
        _between(model.last_used_time, now) if is_idle else "-",
        f"in {_between(now, model.expire_time)}" if model.expire_time else "never",
        "yes" if model.pinned else "no",
    )


def add_load_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME")
    parser.add_argument(
        "--pinned",
        action=argparse.BooleanOptionalAction,
        help="never evict or expire it; default: leave it as it is",
    )
    parser.add_argument(
        "--keep-alive",
        type=keep_alive_s,
        metavar="SECONDS",
        help="unload it after this long without use; 0 = at once, or never",
    )
    parser.add_argument(
        "--no-evict", action="store_true", help="fail rather than evict other models"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what the load would do, and change nothing"
    )
    add_json_option(parser, "one JSON object per event")


def run_load(client: Client, terminal: Terminal, arguments: argparse.Namespace) -> None:
    with client.load_model(
        arguments.name,
        pinned=arguments.pinned,
        keep_alive_s=arguments.keep_alive,
        disallow_eviction=arguments.no_evict,
        validate_only=arguments.dry_run,
    ) as loading:
        if arguments.json:
            for event in loading:
                kind = "finished" if isinstance(event, LoadFinished) else "progress"
                terminal.line(json_line(event, event=kind))
            return
        watch = _watch_live if terminal.error_console.is_terminal else _watch_plain
        watch(terminal, loading, arguments.name)
        terminal.line(describe_load(loading.result(), is_dry_run=arguments.dry_run))


def describe_load(finished: LoadFinished, *, is_dry_run: bool) -> str:
    model = finished.model
    evicted = ", ".join(finished.evicted_models)
    if is_dry_run:
        fits = f"{model.name} would fit in {format_bytes(model.estimated_bytes)}"
        return f"{fits}, evicting {evicted}" if evicted else fits
    if finished.already_loaded:
        return f"{model.name} was loaded already"
    size, time = format_bytes(model.resident_bytes), f"{finished.duration_s:.1f} s"
    loaded = f"{model.name} is loaded: {size} in {time}"
    return f"{loaded}; evicted {evicted}" if evicted else loaded


def add_unload_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME")
    parser.add_argument(
        "--force", action="store_true", help="cancel its generations instead of waiting for them"
    )
    add_json_option(parser, "a JSON object")


def run_unload(client: Client, terminal: Terminal, arguments: argparse.Namespace) -> None:
    unloaded = client.unload_model(arguments.name, force=arguments.force)
    if arguments.json:
        terminal.line(json_line(unloaded))
    elif unloaded.was_loaded:
        terminal.line(f"{arguments.name} is unloaded: {format_bytes(unloaded.freed_bytes)} freed")
    else:
        terminal.line(f"{arguments.name} was not loaded")


def _watch_live(terminal: Terminal, loading: Loading, name: str) -> None:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
    )
    with Progress(*columns, console=terminal.error_console, transient=True) as bar:
        name = printable(name)
        task: TaskID = bar.add_task(f"{name}: waiting", total=None)
        for event in loading:
            if isinstance(event, LoadProgress):
                bar.update(
                    task,
                    description=f"{name}: {_phase(event)}",
                    completed=event.completed_bytes,
                    total=event.total_bytes or None,
                )


def _watch_plain(terminal: Terminal, loading: Loading, name: str) -> None:
    shown = ""
    for event in loading:
        if isinstance(event, LoadProgress) and _phase(event) != shown:
            shown = _phase(event)
            terminal.note(f"{name}: {shown}")


def _phase(progress: LoadProgress) -> str:
    return progress.phase.name.lower().replace("_", " ")


def _between(start: datetime | None, end: datetime | None) -> str:
    # The two clocks may differ by a little: never show less than nothing.
    if start is None or end is None:
        return "-"
    return format_seconds(max(0.0, (end - start).total_seconds()))
