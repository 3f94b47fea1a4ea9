"""`mlxpool chat`: turns, commands, and what ends what."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc

from mlxpool.v1 import model_service_pb2 as pb

if TYPE_CHECKING:
    import pytest
    from tests.unit.client.conftest import FakeServer, Shell


def conversations(server: FakeServer) -> list[list[tuple[str, str]]]:
    """Return what each generation was asked with: (role, text) pairs."""
    return [
        [
            (pb.Role.Name(message.role).removeprefix("ROLE_").lower(), message.content[0].text)
            for message in request.prompt.chat.messages
        ]
        for request in server.models.requests
        if isinstance(request, pb.GenerateRequest)
    ]


def test_each_turn_carries_the_ones_before(shell: Shell, server: FakeServer) -> None:
    """The second question is sent with the first one and its answer; the input's end is an exit."""
    shell.type("one\n\ntwo\n")
    outcome = shell("chat")
    assert (outcome.code, outcome.out, outcome.err) == (0, "Hello you\n" * 2, "")
    assert conversations(server) == [
        [("user", "one")],
        [("user", "one"), ("assistant", "Hello you"), ("user", "two")],
    ]


def test_reset_forgets_and_system_instructs(shell: Shell, server: FakeServer) -> None:
    """/reset drops the turns but not the system message, which /system replaces."""
    shell.type("one\n/reset\n/system be brief\ntwo\n/exit\nthree\n")
    assert shell("chat", "--system", "be long").code == 0
    assert conversations(server) == [
        [("system", "be long"), ("user", "one")],
        [("system", "be brief"), ("user", "two")],
    ]


def test_unknown_commands_are_not_sent(shell: Shell, server: FakeServer) -> None:
    """A mistyped command is explained; a path is a question."""
    shell.type("/rest\n/etc/hosts is what?\n")
    outcome = shell("chat")
    assert "no command /rest; /reset forgets" in outcome.err
    assert conversations(server) == [[("user", "/etc/hosts is what?")]]


def test_interrupting_an_answer_keeps_the_session(shell: Shell, server: FakeServer) -> None:
    """Ctrl-C cancels the answer; its turn leaves no trace in the next one."""
    shell.type("one\ntwo\n")
    outcome = shell.interrupted("chat")
    assert (outcome.code, outcome.err) == (0, "mlxpool: cancelled\n")
    assert outcome.out == "Hello\nHello you\n"
    assert conversations(server) == [[("user", "one")], [("user", "two")]]


def test_a_failed_turn_keeps_the_session_on_a_terminal(
    shell: Shell, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody is there to ask again: the error is a line, and the next turn works."""
    lines = iter(["one", "two"])

    def fake_input(prompt: str) -> str:
        for line in lines:
            if line == "one":
                bad = server.failure(grpc.StatusCode.INVALID_ARGUMENT, "PROMPT_TOO_LONG", "long")
                server.models.failures = [bad]
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", fake_input)
    outcome = shell.on_a_terminal("chat", "--stats")
    assert outcome.code == 0
    assert "mlxpool: long\n" in outcome.err
    assert "TTFT 0.25 s" in outcome.err
    assert conversations(server) == [[("user", "one")], [("user", "two")]]


def test_a_failed_turn_ends_a_script(shell: Shell, server: FakeServer) -> None:
    """In a pipe nobody is there to ask again: the exit code tells."""
    shell.type("one\ntwo\n")
    server.models.final_failure = server.failure(grpc.StatusCode.ABORTED, "MODEL_UNLOADED", "gone")
    outcome = shell("chat")
    assert (outcome.code, outcome.err) == (75, "mlxpool: gone\n")
    assert len(conversations(server)) == 1


def test_interrupting_the_prompt_does_not_leave(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C at the prompt says how to leave; Ctrl-D does."""
    ways = iter([KeyboardInterrupt, EOFError])

    def fake_input(prompt: str) -> str:
        raise next(ways)

    monkeypatch.setattr("builtins.input", fake_input)
    outcome = shell.on_a_terminal("chat")
    assert outcome.code == 0
    assert outcome.out.startswith("demo: /reset forgets")
    assert "(Ctrl-D leaves)" in outcome.out


def test_a_base_model_cannot_chat(shell: Shell, server: FakeServer) -> None:
    """The remedy is named before anything is asked."""
    del server.models.models[0].capabilities[:]
    outcome = shell("chat")
    assert outcome.code == 78
    assert outcome.err == "mlxpool: demo is no chat model; use: mlxpool generate --raw\n"
