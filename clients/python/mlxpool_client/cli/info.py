"""`mlxpool info`: the server's versions and device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlxpool_client.cli.arguments import add_json_option
from mlxpool_client.cli.json_lines import json_line

if TYPE_CHECKING:
    import argparse

    from mlxpool_client.cli.terminal import Terminal
    from mlxpool_client.client import Client


def add_options(parser: argparse.ArgumentParser) -> None:
    add_json_option(parser, "a JSON object")


def run(client: Client, terminal: Terminal, arguments: argparse.Namespace) -> None:
    info = client.server_info()
    if arguments.json:
        terminal.line(json_line(info))
        return
    facts = {
        "target": client.target,
        "mlxpool": info.version,
        "mlx": info.mlx_version,
        "mlx-lm": info.mlx_lm_version,
        "device": " ".join(part for part in (info.device_name, info.device_architecture) if part),
        "started": "" if info.start_time is None else info.start_time.isoformat(sep=" "),
    }
    for name, value in facts.items():
        terminal.line(f"{name:<9}{value or '-'}")
