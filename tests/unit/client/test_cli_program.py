"""The command as a whole: exit codes, error lines, broken pipes, and handing over to the server."""

from __future__ import annotations

import io
import runpy
import sys
from typing import TYPE_CHECKING

import grpc
import pytest

from mlxpool_client.cli import main

if TYPE_CHECKING:
    from tests.unit.client.conftest import FakeServer, Shell

CODE = grpc.StatusCode


def test_nobody_listening_names_the_remedy(
    nobody: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is one line with the remedy; the target may come from the environment."""
    monkeypatch.setenv("MLXPOOL_TARGET", nobody)
    assert main(["models"]) == 69
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        f"mlxpool: nothing answers at {nobody}; start a server with: mlxpool serve\n"
    )


@pytest.mark.parametrize(
    ("code", "reason", "exit_code", "line"),
    [
        (CODE.INVALID_ARGUMENT, "INVALID_FIELD", 65, "why"),
        (CODE.NOT_FOUND, "MODEL_NOT_FOUND", 66, "why; list the models with: mlxpool models"),
        (CODE.INTERNAL, "LOAD_FAILED", 70, "why; the server's log says why"),
        (
            CODE.RESOURCE_EXHAUSTED,
            "POOL_MEMORY_LIMIT",
            71,
            "why; see what holds the memory with: mlxpool memory",
        ),
        (CODE.DEADLINE_EXCEEDED, "", 75, "why; give it longer with --timeout"),
        (CODE.ABORTED, "LOAD_SUPERSEDED", 75, "why"),
        (CODE.UNIMPLEMENTED, "NOT_IMPLEMENTED", 76, "why"),
        (CODE.UNAUTHENTICATED, "", 77, "why"),
        (CODE.FAILED_PRECONDITION, "MODEL_IN_USE", 78, "why"),
    ],
)
def test_failures_have_exit_codes(
    shell: Shell,
    server: FakeServer,
    *,
    code: grpc.StatusCode,
    reason: str,
    exit_code: int,
    line: str,
) -> None:
    """Each kind of failure has its code and one line, with a remedy where there is one."""
    server.models.failures = [server.failure(code, reason, "why")]
    outcome = shell("models")
    assert (outcome.code, outcome.out, outcome.err) == (exit_code, "", f"mlxpool: {line}\n")


def test_a_lost_connection_is_not_an_absent_server(shell: Shell, server: FakeServer) -> None:
    """A server that went away in the middle is said to be lost, not missing."""
    del server.models.generation[2:]
    server.models.final_failure = server.failure(CODE.UNAVAILABLE, message="Socket closed")
    outcome = shell("generate", "hi")
    assert outcome.code == 69
    assert outcome.err == f"mlxpool: lost the connection to {server.target}: Socket closed\n"


def test_error_lines_are_harmless(shell: Shell, server: FakeServer) -> None:
    """A message with newlines and control characters stays one harmless line."""
    server.models.failures = [server.failure(CODE.ABORTED, message="a\nb\x1b[2J")]
    assert shell("models").err == "mlxpool: a b␛[2J\n"


def test_the_timeout_bounds_a_call(shell: Shell, server: FakeServer) -> None:
    """--timeout is understood after the command too, and ends a generation that hangs."""
    server.models.hold = True
    del server.models.generation[1:]
    outcome = shell("generate", "hi", "--timeout", "0.3")
    assert outcome.code == 75
    assert "give it longer with --timeout" in outcome.err


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["load"], ["memory", "--set-pool-limit", "x"]])
def test_wrong_usage_is_one_line(shell: Shell, argv: list[str]) -> None:
    """A mistake on the command line is one line that names the help."""
    outcome = shell(*argv)
    assert outcome.code == 64
    assert outcome.err.startswith("mlxpool: ")
    assert outcome.err.endswith("--help\n")
    assert outcome.err.count("\n") == 1


def test_help_documents_the_exit_codes(shell: Shell) -> None:
    """--help lists the commands and the exit codes, and is a success."""
    outcome = shell("--help")
    assert outcome.code == 0
    assert "generate" in outcome.out
    assert "69   nothing answers at the target" in outcome.out


def test_version(shell: Shell) -> None:
    """--version is a success, installed or not."""
    outcome = shell("--version")
    assert outcome.code == 0
    assert outcome.out.startswith("mlxpool ")


class Broken(io.StringIO):
    """The write end of a pipe whose reader has gone."""

    def __init__(self, *, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal = is_terminal

    def write(self, text: str) -> int:
        raise BrokenPipeError

    def isatty(self) -> bool:
        return self.is_terminal


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_broken_pipe_is_silent(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, *, is_terminal: bool
) -> None:
    """When the reader of the output goes, the command goes without a word, in rich's hands too."""
    monkeypatch.setattr("sys.stdout", Broken(is_terminal=is_terminal))
    outcome = shell("models")
    assert (outcome.code, outcome.err) == (141, "")


def test_a_bug_is_a_line_too(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """What should not have happened is named in one line, not in a traceback."""
    monkeypatch.setattr("mlxpool_client.client.Client.list_models", lambda _: 1 / 0)
    outcome = shell("models")
    assert outcome.code == 70
    assert outcome.err == (
        "mlxpool: this should not have happened: ZeroDivisionError: division by zero\n"
    )


def test_serve_hands_everything_to_the_server(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every argument after serve is the server's, --help too; its exit code is the command's."""
    seen: list[object] = []

    def fake_run_module(name: str, **options: object) -> None:
        seen.extend([name, options, sys.argv])
        raise SystemExit(78)

    monkeypatch.setattr(sys, "argv", ["mlxpool"])
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    monkeypatch.setattr(runpy, "run_module", fake_run_module)
    assert shell("serve", "--help", "--target", "x", "y", "--", "-z").code == 78
    assert seen == [
        "mlxpool_server",
        {"run_name": "__main__", "alter_sys": True},
        ["mlxpool serve", "--help", "--target", "x", "y", "--", "-z"],
    ]


@pytest.mark.parametrize("missing", ["mlxpool_server", "structlog", "mlx"])
def test_serve_without_a_server_names_the_remedy(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    """A light installation says what to install."""
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == missing else object()
    )
    outcome = shell("serve")
    assert outcome.code == 78
    assert outcome.err == (
        "mlxpool: the server is not installed; install it with: pip install 'mlxpool[server]'\n"
    )
