"""`mlxpool embed`: texts as vectors."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from mlxpool_client.cli.arguments import add_json_option, add_model_option, pick_model
from mlxpool_client.cli.json_lines import json_line
from mlxpool_client.enums import Pooling

if TYPE_CHECKING:
    import argparse

    from mlxpool_client.cli.terminal import Terminal
    from mlxpool_client.client import Client

_POOLINGS = {
    pooling.name.lower().replace("_", "-"): pooling
    for pooling in Pooling
    if pooling is not Pooling.UNKNOWN
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "texts", metavar="TEXT", nargs="+", help="the texts; a single - reads one a line from stdin"
    )
    add_model_option(parser)
    parser.add_argument("--pooling", choices=_POOLINGS, help="default: the model's own")
    parser.add_argument(
        "--no-normalize", action="store_true", help="leave the vectors as long as they are"
    )
    add_json_option(parser, "a JSON object")


def run(client: Client, terminal: Terminal, arguments: argparse.Namespace) -> None:
    """Print a vector a line, as JSON."""
    texts: list[str] = arguments.texts
    if texts == ["-"]:
        texts = terminal.read_all().splitlines()
    model = arguments.model or pick_model(client, None).name
    embedded = client.embed(
        model,
        texts,
        pooling=_POOLINGS.get(arguments.pooling),
        normalize=False if arguments.no_normalize else None,
    )
    if arguments.json:
        terminal.line(json_line(embedded))
        return
    for vector in embedded.vectors:
        terminal.line(json.dumps(vector))
    size = len(embedded.vectors[0]) if embedded.vectors else 0
    terminal.note(f"{len(texts)} texts, {embedded.prompt_tokens} tokens, {size} numbers each")
