"""The command's front door: which commands there are, and how each way to fail ends."""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlxpool_client.channel import DEFAULT_TARGET
from mlxpool_client.cli import chat, embed, generate, info, memory, models, serve, tokenize, top
from mlxpool_client.cli.arguments import Parser, connection_options, open_client
from mlxpool_client.cli.exits import EPILOG, CommandError, ExitCode, describe, exit_code
from mlxpool_client.cli.terminal import Terminal
from mlxpool_client.client import Client
from mlxpool_client.errors import MlxpoolError


@dataclass(frozen=True, slots=True)
class Command:
    name: str
    help: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[Client, Terminal, argparse.Namespace], None]


COMMANDS = (
    Command("generate", "answer one prompt", generate.add_options, generate.run),
    Command("chat", "have a conversation", chat.add_options, chat.run),
    Command("models", "list the models", models.add_list_options, models.run_list),
    Command("load", "load a model", models.add_load_options, models.run_load),
    Command("unload", "unload a model", models.add_unload_options, models.run_unload),
    Command("memory", "show or change the memory's use", memory.add_options, memory.run),
    Command("top", "watch the models at work", top.add_options, top.run),
    Command("tokenize", "show the tokens of a text", tokenize.add_options, tokenize.run),
    Command("embed", "turn texts into vectors", embed.add_options, embed.run),
    Command("info", "show the server's versions and device", info.add_options, info.run),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; failures are one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Not every locale has the characters that a model writes.
            stream.reconfigure(errors="backslashreplace")
    terminal = Terminal(sys.stdin, sys.stdout, sys.stderr)
    try:
        _run(terminal, _parser().parse_args(argv))
        sys.stdout.flush()
    except SystemExit as end:
        # From argparse, after --help or an error, and from the server that `serve` ran.
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        terminal.abandon_output()
        return ExitCode.BROKEN_PIPE
    except CommandError as error:
        terminal.note(str(error))
        return error.code
    except Exception as error:  # noqa: BLE001 - the edge: a user gets a line, never a traceback
        terminal.note(f"this should not have happened: {type(error).__name__}: {error}")
        return ExitCode.SERVER_FAILED
    return ExitCode.OK


def _run(terminal: Terminal, arguments: argparse.Namespace) -> None:
    if arguments.command in serve.COMMANDS:
        serve.run(arguments.command, arguments.arguments)
        return
    command: Command = arguments.command
    try:
        with open_client(arguments, os.environ) as client:
            command.run(client, terminal, arguments)
    except MlxpoolError as error:
        raise CommandError(describe(error, arguments.target), exit_code(error)) from error
    except ValueError as error:
        # A number that the wire cannot carry, for example.
        raise CommandError(str(error)) from error


def _parser() -> Parser:
    target = os.environ.get("MLXPOOL_TARGET") or DEFAULT_TARGET
    parser = Parser(
        prog="mlxpool",
        description="Talk to an mlxpool server, or start one.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[connection_options(target, None)],
    )
    parser.add_argument("--version", action="version", version=f"mlxpool {_version()}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        options = commands.add_parser(
            command.name,
            help=command.help,
            description=f"{command.help.capitalize()}.",
            parents=[connection_options(argparse.SUPPRESS, argparse.SUPPRESS)],
        )
        command.add_options(options)
        options.set_defaults(command=command)
    for name, text in serve.COMMANDS.items():
        # No prefix character: even --help is the server's.
        server = commands.add_parser(name, help=text, add_help=False, prefix_chars="\0")
        server.add_argument("arguments", nargs=argparse.REMAINDER)
        server.set_defaults(command=name)
    return parser


def _version() -> str:
    try:
        return importlib.metadata.version("mlxpool")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
