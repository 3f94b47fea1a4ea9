"""The sync client's generations, over a real connection."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import grpc
import pytest

from mlxpool.v1 import model_service_pb2 as pb
from mlxpool_client import (
    Client,
    DeadlineError,
    Delta,
    Finished,
    FinishReason,
    GenerationCancelledError,
    GenerationFailedError,
    GenerationPhase,
    IncompleteStreamError,
    Progress,
    QueueFullError,
    Started,
    TokenUsage,
    UnavailableError,
)

if TYPE_CHECKING:
    from tests.unit.client.conftest import FakeServer

WAIT_S = 10


def test_events_arrive_in_order(client: Client) -> None:
    """A generation is Started, Progress, Deltas and one Finished, in the server's order."""
    events = list(client.generate("demo", "hi"))
    assert [type(event) for event in events] == [Started, Progress, Delta, Delta, Finished]
    assert events[0] == Started(generation_id="g1", model="demo", seed=42)
    assert events[1] == Progress(GenerationPhase.PREFILLING, prefilled_tokens=4, prompt_tokens=5)
    assert events[2] == Delta(text="Hello", completion_tokens=1)


def test_result_carries_the_whole_output(client: Client) -> None:
    """result() reads to the end and returns text, usage, timings and why it ended."""
    generation = client.generate("demo", "hi")
    result = generation.result()
    assert generation.generation_id == "g1"
    assert result.text == "Hello you"
    assert result.finish_reason is FinishReason.STOP
    assert result.stop_token_id == 2
    assert result.usage == TokenUsage(5, 3, 3)
    assert result.timings.time_to_first_token_s == 0.25
    assert result.timings.load_s == 0.0
    assert generation.result() is result


def test_generate_text_asks_for_no_deltas(client: Client, server: FakeServer) -> None:
    """generate_text() returns the whole text and saves the server the deltas."""
    assert client.generate_text("demo", "hi") == "Hello you"
    (request,) = server.models.requests
    assert request.output.final_only


@pytest.mark.parametrize("leave", ["close", "with", "drop"])
def test_leaving_cancels_the_call(client: Client, server: FakeServer, leave: str) -> None:
    """The server sees the cancel when the stream is closed, its block left, or it is dropped."""
    server.models.hold = True
    server.models.generation = server.models.generation[:3]
    generation = client.generate("demo", "hi")
    assert isinstance(next(generation), Started)
    if leave == "close":
        generation.close()
    elif leave == "with":
        with generation:
            pass
    else:
        del generation
    assert server.models.generation_ended.wait(WAIT_S)


def test_closing_from_another_thread_wakes_the_reader(client: Client, server: FakeServer) -> None:
    """A reader that waits gets GenerationCancelledError when another thread closes its stream."""
    server.models.hold = True
    server.models.generation = server.models.generation[:1]
    generation = client.generate("demo", "hi")
    next(generation)
    closer = threading.Thread(target=generation.close)
    closer.start()
    with pytest.raises(GenerationCancelledError):
        next(generation)
    closer.join()


def test_a_closed_stream_never_looks_complete(client: Client, server: FakeServer) -> None:
    """text() of a stream that was closed half-way raises instead of returning half a text."""
    server.models.hold = True
    generation = client.generate("demo", "hi")
    next(generation)
    generation.close()
    with pytest.raises(GenerationCancelledError):
        generation.text()


def test_closing_after_the_end_changes_nothing(client: Client) -> None:
    """A finished generation keeps its result when its block is left."""
    with client.generate("demo", "hi") as generation:
        generation.result()
    assert generation.text() == "Hello you"


def test_unknown_events_are_skipped(client: Client, server: FakeServer) -> None:
    """An event of a newer server, whose oneof looks unset, is ignored."""
    server.models.generation.insert(1, pb.GenerateResponse())
    assert len(list(client.generate("demo", "hi"))) == 5


def test_unknown_enum_values_are_kept_as_unknown(client: Client, server: FakeServer) -> None:
    """A finish reason that this client is too old for is UNKNOWN, not an error."""
    server.models.generation[-1].finished.finish_reason = 99  # type: ignore[assignment] # newer
    assert client.generate("demo", "hi").result().finish_reason is FinishReason.UNKNOWN


def test_a_stream_without_finished_failed(client: Client, server: FakeServer) -> None:
    """A stream that ends with OK but without Finished raises, every time it is asked."""
    server.models.generation.pop()
    generation = client.generate("demo", "hi")
    with pytest.raises(IncompleteStreamError):
        list(generation)
    with pytest.raises(EOFError):
        generation.text()


def test_failures_after_the_first_message_are_raised(client: Client, server: FakeServer) -> None:
    """Deltas that arrived are delivered before the error, and the error stays."""
    server.models.generation = server.models.generation[:3]
    server.models.final_failure = server.failure(grpc.StatusCode.INTERNAL, "GENERATION_FAILED")
    generation = client.generate("demo", "hi")
    assert [type(next(generation)) for _ in range(3)] == [Started, Progress, Delta]
    for _ in range(2):
        with pytest.raises(GenerationFailedError, match="it failed"):
            next(generation)


def test_unavailable_is_retried_before_the_first_message(
    client: Client, server: FakeServer
) -> None:
    """A call that was refused before it said anything is sent again by itself."""
    server.models.failures = [server.failure(grpc.StatusCode.UNAVAILABLE, "QUEUE_FULL")] * 2
    assert client.generate("demo", "hi").text() == "Hello you"
    assert len(server.models.requests) == 3


def test_unavailable_is_not_retried_for_ever(client: Client, server: FakeServer) -> None:
    """After four attempts the refusal is raised with its reason."""
    server.models.failures = [server.failure(grpc.StatusCode.UNAVAILABLE, "QUEUE_FULL")] * 9
    with pytest.raises(QueueFullError):
        client.generate("demo", "hi").result()
    assert len(server.models.requests) == 4


def test_unavailable_is_not_retried_after_the_first_message(
    client: Client, server: FakeServer
) -> None:
    """Once the stream has started, a lost server is an error: no text may come twice."""
    server.models.generation = server.models.generation[:1]
    server.models.final_failure = server.failure(grpc.StatusCode.UNAVAILABLE)
    with pytest.raises(UnavailableError):
        list(client.generate("demo", "hi"))
    assert len(server.models.requests) == 1


def test_the_deadline_is_a_timeout_error(client: Client, server: FakeServer) -> None:
    """A generation that outlives timeout_s raises DeadlineError, which is a TimeoutError."""
    server.models.hold = True
    server.models.generation = server.models.generation[:1]
    with pytest.raises(DeadlineError) as caught:
        client.generate("demo", "hi", timeout_s=0.2).result()
    assert isinstance(caught.value, TimeoutError)
    assert server.models.generation_ended.wait(WAIT_S)
