"""`mlxpool generate`: what is sent, what is printed, and where."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import grpc
import pytest

from mlxpool.v1 import model_service_pb2 as pb

if TYPE_CHECKING:
    from tests.unit.client.conftest import FakeServer, Shell


def generate_request(server: FakeServer) -> pb.GenerateRequest:
    request = server.models.requests[-1]
    assert isinstance(request, pb.GenerateRequest)
    return request


def test_text_goes_to_stdout_and_nothing_else(shell: Shell) -> None:
    """Standard output is the answer alone, with one newline at its end."""
    outcome = shell("generate", "hi")
    assert (outcome.code, outcome.out, outcome.err) == (0, "Hello you\n", "")


def test_a_chat_model_gets_a_chat_message(shell: Shell, server: FakeServer) -> None:
    """The only model is the default; one that can chat gets the prompt as a user's message."""
    shell("generate", "hi", "--system", "be brief")
    request = generate_request(server)
    assert request.model == "demo"
    roles = [message.role for message in request.prompt.chat.messages]
    assert roles == [pb.ROLE_SYSTEM, pb.ROLE_USER]


def test_a_base_model_gets_the_text(shell: Shell, server: FakeServer) -> None:
    """A model that cannot chat gets the prompt as it is."""
    del server.models.models[0].capabilities[:]
    shell("generate", "Once upon")
    assert generate_request(server).prompt.text == "Once upon"


def test_raw_and_chat_override_the_default(shell: Shell, server: FakeServer) -> None:
    """--raw sends text to a chat model, --chat messages to any other."""
    shell("generate", "hi", "--raw")
    assert generate_request(server).prompt.text == "hi"
    del server.models.models[0].capabilities[:]
    shell("generate", "hi", "--chat")
    assert generate_request(server).prompt.WhichOneof("input") == "chat"


def test_a_dash_reads_stdin(shell: Shell, server: FakeServer) -> None:
    """The prompt - is all of standard input."""
    shell.type("line 1\nline 2\n")
    shell("generate", "-", "--raw")
    assert generate_request(server).prompt.text == "line 1\nline 2\n"


def test_flags_become_the_request(shell: Shell, server: FakeServer) -> None:
    """Sampling and stop flags are sent; what is not given is not."""
    flags = "--temperature 0 --top-k 5 --max-tokens 9 --stop a --stop b --keep-alive never"
    shell("generate", "hi", *flags.split(), "--priority", "low")
    request = generate_request(server)
    assert request.sampling.HasField("temperature")
    assert request.sampling.top_k == 5
    assert not request.sampling.HasField("top_p")
    assert (request.stop.max_tokens, list(request.stop.sequences)) == (9, ["a", "b"])
    assert request.keep_alive.seconds == 315_576_000_000
    assert request.priority == pb.PRIORITY_LOW


def test_json_prints_an_object_per_event(shell: Shell) -> None:
    """--json prints each event as one line, with its kind."""
    lines = [json.loads(line) for line in shell("generate", "hi", "--json").out.splitlines()]
    kinds = [line["event"] for line in lines]
    assert kinds == ["started", "progress", "delta", "delta", "finished"]
    assert lines[2]["text"] == "Hello"
    assert lines[4]["finish_reason"] == "stop"
    assert lines[4]["message"]["content"] == "Hello you"


def test_stats_go_to_stderr(shell: Shell) -> None:
    """--stats is one line on standard error: two tokens in 0.5 s after the first are 4 a second."""
    outcome = shell("generate", "hi", "--stats")
    assert outcome.out == "Hello you\n"
    assert outcome.err.startswith("mlxpool: TTFT 0.25 s, 3 tokens, 4.0 tokens/s, 0.75 s in all")
    assert "prompt 5 tokens (3 cached), ended by stop" in outcome.err


def test_reasoning_goes_to_stderr(shell: Shell, server: FakeServer) -> None:
    """What the model thinks is not part of its answer."""
    thought = pb.GenerateResponse(delta=pb.GenerationDelta(reasoning="hm"))
    server.models.generation.insert(2, thought)
    outcome = shell("generate", "hi")
    assert (outcome.out, outcome.err) == ("Hello you\n", "hm")


def evil(server: FakeServer) -> None:
    text = "a\x1b[2Jb\r\x07\x9b1m\x7f\tc\nd [bold]e[/bold]"
    server.models.generation[2:4] = [pb.GenerateResponse(delta=pb.GenerationDelta(text=text))]


def test_a_model_cannot_drive_the_terminal(shell: Shell, server: FakeServer) -> None:
    """On a terminal control characters are shown, not obeyed; newline, tab and markup stay."""
    evil(server)
    outcome = shell.on_a_terminal("generate", "hi")
    assert outcome.out == "a␛[2Jb␍␇\ufffd1m␡\tc\nd [bold]e[/bold]\n"


def test_a_pipe_gets_the_exact_text(shell: Shell, server: FakeServer) -> None:
    """What goes into a file or a program is what the model wrote."""
    evil(server)
    outcome = shell("generate", "hi")
    assert outcome.out == "a\x1b[2Jb\r\x07\x9b1m\x7f\tc\nd [bold]e[/bold]\n"


def test_the_wait_is_shown_on_a_terminal_only(shell: Shell) -> None:
    """Until the first text a terminal says what is going on, on standard error."""
    outcome = shell.on_a_terminal("generate", "hi")
    assert "reading the prompt: 4 of 5" in outcome.err
    assert outcome.out == "Hello you\n"


def test_several_models_need_a_name(shell: Shell, server: FakeServer) -> None:
    """With more than one model the error lists them."""
    server.models.models.append(pb.Model(name="other"))
    outcome = shell("generate", "hi")
    assert outcome.code == 64
    assert outcome.err == (
        "mlxpool: the server has more than one model; name one with -m: demo, other\n"
    )


def test_a_broken_stream_keeps_the_text_and_fails(shell: Shell, server: FakeServer) -> None:
    """Text that arrived is printed; the failure is one line and an exit code."""
    del server.models.generation[3:]
    server.models.final_failure = server.failure(
        grpc.StatusCode.INTERNAL, "GENERATION_FAILED", "the engine\nfailed"
    )
    outcome = shell("generate", "hi")
    assert (outcome.code, outcome.out) == (70, "Hello")
    assert outcome.err == "mlxpool: the engine failed; the server's log says why\n"


def test_a_stream_without_finished_fails(shell: Shell, server: FakeServer) -> None:
    """An answer that was cut off is never a success."""
    server.models.generation.pop()
    outcome = shell("generate", "hi")
    assert outcome.code == 70
    assert "without its Finished event" in outcome.err


def test_a_generation_that_somebody_cancelled_fails(shell: Shell, server: FakeServer) -> None:
    """A part of an answer is printed, but the exit code tells."""
    server.models.generation[-1].finished.finish_reason = pb.FINISH_REASON_CANCELLED
    outcome = shell("generate", "hi")
    assert (outcome.code, outcome.out) == (75, "Hello you\n")
    assert outcome.err == "mlxpool: the generation was cancelled by somebody else\n"


def test_interrupting_cancels_the_generation(shell: Shell, server: FakeServer) -> None:
    """Ctrl-C ends with code 130 and without a traceback, and the server sees the cancel."""
    server.models.hold = True
    del server.models.generation[3:]
    outcome = shell.interrupted("generate", "hi")
    assert (outcome.code, outcome.out, outcome.err) == (130, "Hello", "")
    assert server.models.generation_ended.wait(10)


@pytest.mark.parametrize(
    "flags", [["--raw", "--system", "x"], ["--top-k", "99999999999"], ["--max-duration", "-1"]]
)
def test_wrong_flags_are_usage_errors(shell: Shell, flags: list[str]) -> None:
    """What cannot be sent is said in one line, with the exit code for wrong usage."""
    outcome = shell("generate", "hi", *flags)
    assert outcome.code == 64
    assert outcome.err.startswith("mlxpool: ")
    assert outcome.err.count("\n") == 1
