"""The `mlxpool` command."""

from mlxpool_client.cli.program import main

__all__ = ["main"]
