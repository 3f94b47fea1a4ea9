"""`mlxpool generate`: one prompt, one answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlxpool_client.cli import answer
from mlxpool_client.cli.arguments import (
    add_generation_options,
    add_json_option,
    add_model_option,
    generation_options,
    pick_model,
)
from mlxpool_client.cli.exits import CommandError
from mlxpool_client.enums import Capability, Priority, Role
from mlxpool_client.messages import ChatMessage
from mlxpool_client.requests import GenerateOptions

if TYPE_CHECKING:
    import argparse

    from mlxpool_client.cli.terminal import Terminal
    from mlxpool_client.client import Client
    from mlxpool_client.models import Model


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help="the prompt; - reads it from stdin")
    add_model_option(parser)
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--chat", action="store_true", help="send a chat message; the default if the model can"
    )
    how.add_argument("--raw", action="store_true", help="send the text without a chat template")
    parser.add_argument("--system", metavar="TEXT", help="a system message before the prompt")
    priorities = [priority.name.lower() for priority in Priority if priority.value]
    parser.add_argument("--priority", choices=priorities)
    add_json_option(parser, "one JSON object per event")
    parser.add_argument("--stats", action="store_true", help="print TTFT and tokens/s to stderr")
    add_generation_options(parser)


def run(client: Client, terminal: Terminal, arguments: argparse.Namespace) -> None:
    if arguments.raw and arguments.system is not None:
        raise CommandError("--system needs a chat message; leave --raw out")
    prompt = terminal.read_all() if arguments.prompt == "-" else arguments.prompt
    model = pick_model(client, arguments.model)
    options = generation_options(arguments)
    if arguments.priority is not None:
        options["priority"] = Priority[arguments.priority.upper()]
    options |= _input(model, prompt, arguments)
    text = prompt if "messages" not in options else None
    with client.generate(model.name, text, **options) as generation:
        show = answer.print_events if arguments.json else answer.print_answer
        finished = show(terminal, generation)
    if arguments.stats:
        terminal.note(answer.describe_stats(finished))
    answer.check_complete(finished)


def _input(model: Model, prompt: str, arguments: argparse.Namespace) -> GenerateOptions:
    can_chat = Capability.CHAT in model.capabilities
    wants_chat = arguments.chat or arguments.system is not None
    if arguments.raw or not (can_chat or wants_chat):
        return GenerateOptions()
    messages = [ChatMessage(Role.USER, prompt)]
    if arguments.system is not None:
        messages.insert(0, ChatMessage(Role.SYSTEM, arguments.system))
    return GenerateOptions(messages=messages)
