"""`mlxpool top`: rates between two samples, and its frames in a pipe and on a terminal."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from mlxpool.v1 import model_service_pb2 as pb
from mlxpool_client import MemoryLimits, MemoryUsage, Model, ModelActivity, ModelMemory, ModelState
from mlxpool_client.cli.top import HEADERS, Sample, frame_of

if TYPE_CHECKING:
    from tests.unit.client.conftest import FakeServer, Shell

FLAGS = ("top", "--interval", "0")


def sample(at: float, *models: Model) -> Sample:
    parts = tuple(ModelMemory(model.name, "", 100, 10, 20) for model in models)
    memory = MemoryUsage(None, 120, 0, 0, MemoryLimits(pool_bytes=1000), 0, 0, parts)
    return Sample(at, models, memory)


def model(name: str = "m", **activity: float) -> Model:
    counts = ModelActivity(**activity)  # type: ignore[arg-type]  # counts are ints
    return Model(name, ModelState.READY, active_requests=2, queued_requests=1, activity=counts)


def test_rates_are_between_two_samples() -> None:
    """Tokens a second, and the mean first token of those that came meanwhile."""
    before = model(completion_tokens=100, first_tokens=3, time_to_first_token_s=9.0)
    after = model(completion_tokens=150, first_tokens=5, time_to_first_token_s=9.5)
    frame = frame_of(sample(10.0, before), sample(12.0, after))
    (row,) = frame.models
    assert (row.tokens_per_s, row.first_token_s) == (25.0, 0.25)
    assert (frame.streams, frame.queued, frame.tokens_per_s) == (2, 1, 25.0)
    assert (frame.used_bytes, frame.limit_bytes) == (130, 1000)


def test_a_model_that_is_new_has_no_rate() -> None:
    """There is nothing to compare it with."""
    frame = frame_of(sample(0.0), sample(1.0, model(completion_tokens=5)))
    assert frame.models[0].tokens_per_s is None
    assert frame.tokens_per_s is None


def test_a_restarted_server_has_no_negative_rate() -> None:
    """Its counts begin at zero again."""
    frame = frame_of(sample(0.0, model(completion_tokens=50)), sample(1.0, model()))
    assert frame.models[0].tokens_per_s is None


def test_one_frame_in_a_pipe(shell: Shell) -> None:
    """A line for the whole and a plain table, then it ends."""
    outcome = shell(*FLAGS, "--once")
    assert outcome.code == 0
    whole, header, row = outcome.out.splitlines()
    assert whole.startswith("1 streams, 2 queued, 0.0 tokens/s; pool 1.0 GiB of 4.0 GiB")
    assert header.split("  ")[0] == HEADERS[0]
    assert row.split()[:2] == ["demo", "ready"]


def test_as_many_frames_as_asked_for(shell: Shell) -> None:
    """--frames ends it; --json prints one object a frame."""
    lines = shell(*FLAGS, "--frames", "3", "--json").out.splitlines()
    assert len(lines) == 3
    (row,) = json.loads(lines[0])["models"]
    assert (row["model"], row["streams"], row["weights_bytes"]) == ("demo", 1, 1 << 30)


def test_on_a_terminal_it_is_drawn(shell: Shell, server: FakeServer) -> None:
    """On a screen of its own, which is left at the end; a name cannot steer the terminal."""
    server.models.models = [pb.Model(name="[red]x\x1b[2J", state=pb.MODEL_STATE_READY)]
    out = shell.on_a_terminal(*FLAGS, "--frames", "2").out
    assert "[red]x␛[2J" in out
    assert out.count("\x1b[?1049h") == out.count("\x1b[?1049l") == 1


@pytest.mark.parametrize("flags", [("--interval", "x"), ("--frames", "-1"), ("--frames", "0")])
def test_wrong_flags_are_refused(shell: Shell, flags: tuple[str, str]) -> None:
    """With the usage's exit code, before anything is asked."""
    assert shell("top", *flags).code == 64
