"""`mlxpool serve` and `mlxpool new-key`: hand everything to the server, where it is installed."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from collections.abc import Sequence

from mlxpool_client.cli.exits import CommandError, ExitCode

COMMANDS = {"serve": "start a server", "new-key": "make an API key for a server"}
# A light installation may carry the server's files without what they need.
_NEEDED = ("mlxpool_server", "structlog", "mlx")


def run(command: str, arguments: Sequence[str]) -> None:
    """Run the server in this process, with the arguments after the command.

    Raises: CommandError when it is not installed; SystemExit with the server's own exit code.
    """
    if any(importlib.util.find_spec(name) is None for name in _NEEDED):
        raise CommandError(
            "the server is not installed; install it with: pip install 'mlxpool[server]'",
            ExitCode.FORBIDDEN_NOW,
        )
    given = arguments if command == "serve" else (command, *arguments)
    sys.argv = [f"mlxpool {command}", *given]
    # By name only: client and server meet at the contract, not in an import.
    runpy.run_module("mlxpool_server", run_name="__main__", alter_sys=True)
