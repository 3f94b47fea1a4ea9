"""`mlxpool chat`: a conversation."""

from __future__ import annotations

import contextlib
import importlib
from typing import TYPE_CHECKING

from mlxpool_client.cli import answer
from mlxpool_client.cli.arguments import (
    add_generation_options,
    add_model_option,
    generation_options,
    pick_model,
)
from mlxpool_client.cli.exits import CommandError, ExitCode, describe
from mlxpool_client.enums import Capability, Role
from mlxpool_client.errors import MlxpoolError
from mlxpool_client.messages import ChatMessage

if TYPE_CHECKING:
    import argparse

    from mlxpool_client.cli.terminal import Terminal
    from mlxpool_client.client import Client
    from mlxpool_client.requests import GenerateOptions

HELP = "/reset forgets the conversation, /system TEXT instructs the model, /exit or Ctrl-D leaves"


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model_option(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system message before all others")
    parser.add_argument("--stats", action="store_true", help="print TTFT and tokens/s to stderr")
    add_generation_options(parser)


def run(client: Client, terminal: Terminal, arguments: argparse.Namespace) -> None:
    model = pick_model(client, arguments.model)
    if Capability.CHAT not in model.capabilities:
        raise CommandError(
            f"{model.name} is no chat model; use: mlxpool generate --raw", ExitCode.FORBIDDEN_NOW
        )
    if terminal.is_interactive:
        # Importing it gives input() line editing and history, where Python has it.
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")
        terminal.line(f"{model.name}: {HELP}")
    chat = Chat(client, terminal, model.name, generation_options(arguments), arguments.stats)
    chat.system = arguments.system or ""
    chat.run()


class Chat:
    """The turns so far. A turn that failed or was cancelled leaves no trace in them."""

    def __init__(
        self,
        client: Client,
        terminal: Terminal,
        model: str,
        options: GenerateOptions,
        wants_stats: bool,
    ) -> None:
        self.system = ""
        self._client = client
        self._terminal = terminal
        self._model = model
        self._options = options
        self._wants_stats = wants_stats
        self._turns: list[ChatMessage] = []

    def run(self) -> None:
        """Ask and answer until the input ends."""
        while True:
            try:
                line = self._terminal.ask("> ").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                if not self._terminal.is_interactive:
                    raise
                self._terminal.line("\n(Ctrl-D leaves)")
                continue
            if line == "/exit":
                return
            if line:
                self._take(line)

    def _take(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        match command:
            case "/reset":
                self._turns.clear()
            case "/system":
                self.system = rest.strip()
            case _ if command.startswith("/") and "/" not in command[1:]:
                self._terminal.note(f"no command {command}; {HELP}")
            case _:
                self._answer(line)

    def _answer(self, line: str) -> None:
        turn = ChatMessage(Role.USER, line)
        system = [ChatMessage(Role.SYSTEM, self.system)] if self.system else []
        messages = [*system, *self._turns, turn]
        options: GenerateOptions = {**self._options, "messages": messages}
        try:
            with self._client.generate(self._model, **options) as generation:
                finished = answer.print_answer(self._terminal, generation)
        except KeyboardInterrupt:
            self._terminal.line("")
            self._terminal.note("cancelled")
            return
        except MlxpoolError as error:
            # Nobody is there to ask again: let the exit code tell.
            if not self._terminal.is_interactive:
                raise
            self._terminal.note(describe(error, self._client.target))
            return
        if self._wants_stats:
            self._terminal.note(answer.describe_stats(finished))
        self._turns += [turn, finished.message]
