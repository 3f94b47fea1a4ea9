"""`mlxpool memory`: who holds what, and the limits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mlxpool_client.cli.arguments import add_json_option
from mlxpool_client.cli.exits import CommandError
from mlxpool_client.cli.json_lines import json_line
from mlxpool_client.cli.quantities import byte_size, duration_s, format_bytes
from mlxpool_client.cli.terminal import printable
from mlxpool_client.enums import CacheKind

if TYPE_CHECKING:
    import argparse

    from mlxpool_client.cli.terminal import Terminal
    from mlxpool_client.client import Client
    from mlxpool_client.memory import MemoryLimits, MemoryUsage, ModelMemory

HEADERS = ("MODEL", "WEIGHTS", "KV CACHES", "PROMPT CACHE")
_LIMITS = {
    "pool": "what the pool may hold: models are evicted or refused",
    "memory": "MLX's guideline for all memory",
    "cache": "MLX's buffer cache; 0 disables it",
    "wired": "MLX's wired memory",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--watch", action="store_true", help="go on until interrupted")
    parser.add_argument(
        "--interval", type=duration_s, metavar="SECONDS", help="between samples; default: 1"
    )
    change = parser.add_argument_group("changes")
    for name, text in _LIMITS.items():
        change.add_argument(f"--set-{name}-limit", type=byte_size, metavar="BYTES", help=text)
    change.add_argument(
        "--clear",
        action="append",
        choices=("buffers", "prompts"),
        help="free MLX's unused buffers, or the kept prompts; repeatable",
    )
    change.add_argument("--reset-peak", action="store_true", help="start a new peak")
    add_json_option(parser, "a JSON object per sample or change")


def run(client: Client, terminal: Terminal, arguments: argparse.Namespace) -> None:
    has_changed = _change(client, terminal, arguments)
    if arguments.watch:
        if has_changed:
            raise CommandError("--watch goes with no change; leave one of them out")
        _watch(client, terminal, arguments)
    elif not has_changed:
        usage = client.memory_usage()
        if arguments.json:
            terminal.line(json_line(usage))
        else:
            _show(terminal, usage)


def _change(client: Client, terminal: Terminal, arguments: argparse.Namespace) -> bool:
    limits = [getattr(arguments, f"set_{name}_limit") for name in _LIMITS]
    wants_limits = any(limit is not None for limit in limits)
    wants_change = wants_limits or bool(arguments.clear) or arguments.reset_peak
    if not wants_change or arguments.watch:
        return bool(wants_change)
    if wants_limits:
        pool, memory, cache, wired = limits
        change = client.set_memory_limits(
            pool_bytes=pool, memory_bytes=memory, cache_bytes=cache, wired_bytes=wired
        )
        evicted = "".join(f"; evicted {name}" for name in change.evicted_models)
        text = f"limits: {describe_limits(change.current)}{evicted}"
        terminal.line(json_line(change) if arguments.json else text)
    if arguments.clear:
        freed = client.clear_cache(*(CacheKind[kind.upper()] for kind in arguments.clear))
        text = f"{format_bytes(freed)} freed"
        terminal.line(json_line({"freed_bytes": freed}) if arguments.json else text)
    if arguments.reset_peak:
        peak = client.reset_peak_memory()
        text = f"the peak was {format_bytes(peak)}"
        terminal.line(json_line({"previous_peak_bytes": peak}) if arguments.json else text)
    return True


def describe_limits(limits: MemoryLimits) -> str:
    named = {
        "pool": limits.pool_bytes,
        "memory": limits.memory_bytes,
        "cache": limits.cache_bytes,
        "wired": limits.wired_bytes,
    }
    known = [f"{name} {format_bytes(size)}" for name, size in named.items() if size is not None]
    return ", ".join(known) or "none"


def describe_usage(usage: MemoryUsage) -> str:
    facts = {
        "active": usage.active_bytes,
        "peak": usage.peak_bytes,
        "cache": usage.cache_bytes,
        "device": usage.device_bytes,
    }
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in facts.items())


def _show(terminal: Terminal, usage: MemoryUsage) -> None:
    terminal.line(describe_usage(usage))
    terminal.line(f"limits: {describe_limits(usage.limits)}")
    if usage.models:
        terminal.table(HEADERS, [_row(part) for part in usage.models])


def _row(part: ModelMemory) -> tuple[str, ...]:
    sizes = (part.resident_bytes, part.active_kv_bytes, part.prompt_cache_bytes)
    return (part.model, *(format_bytes(size) for size in sizes))


def _watch(client: Client, terminal: Terminal, arguments: argparse.Namespace) -> None:
    with client.watch_memory_usage(arguments.interval) as samples:
        if arguments.json:
            for usage in samples:
                terminal.line(json_line(usage))
        elif terminal.is_live:
            with Live(console=terminal.console) as live:
                for usage in samples:
                    live.update(_picture(usage), refresh=True)
        else:
            for usage in samples:
                models = (f"{part.model} {format_bytes(_total(part))}" for part in usage.models)
                terminal.line(", ".join([describe_usage(usage), *models]))


def _picture(usage: MemoryUsage) -> Group:
    """A bar per model, against the pool's limit or else the device."""
    whole = usage.limits.pool_bytes or usage.device_bytes or usage.active_bytes or 1
    bars = Table(box=None, pad_edge=False, show_header=False)
    bars.add_column(overflow="fold")
    bars.add_column(width=40)
    bars.add_column(justify="right")
    for part in usage.models:
        held = _total(part)
        bar = ProgressBar(total=whole, completed=min(held, whole))
        bars.add_row(Text(printable(part.model)), bar, Text(format_bytes(held)))
    limits = Text(f"limits: {describe_limits(usage.limits)}")
    return Group(Text(describe_usage(usage)), limits, bars)


def _total(part: ModelMemory) -> int:
    return part.resident_bytes + part.active_kv_bytes + part.prompt_cache_bytes
