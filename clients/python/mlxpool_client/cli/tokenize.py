"""`mlxpool tokenize`: the tokens of a text."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from mlxpool_client.cli.arguments import add_json_option, add_model_option, pick_model
from mlxpool_client.cli.json_lines import json_line

if TYPE_CHECKING:
    import argparse

    from mlxpool_client.cli.terminal import Terminal
    from mlxpool_client.client import Client


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", metavar="TEXT", help="the text; - reads it from stdin")
    add_model_option(parser)
    add_json_option(parser, "a JSON object")


def run(client: Client, terminal: Terminal, arguments: argparse.Namespace) -> None:
    text = terminal.read_all() if arguments.text == "-" else arguments.text
    model = arguments.model or pick_model(client, None).name
    tokens = client.tokenize(model, text, include_pieces=True)
    if arguments.json:
        terminal.line(json_line(tokens))
        return
    for token_id, piece in zip(tokens.token_ids, tokens.pieces, strict=False):
        # A piece may be a part of a character, a newline or worse: quote it.
        quoted = json.dumps(piece.decode("utf-8", errors="backslashreplace"), ensure_ascii=False)
        terminal.line(f"{token_id:>8}  {quoted}")
    terminal.note(f"{len(tokens.token_ids)} tokens")
