"""The commands about models, memory, tokens and the server."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from mlxpool.v1 import memory_service_pb2 as memory_pb
from mlxpool.v1 import model_service_pb2 as pb
from mlxpool_client import Model, ModelState
from mlxpool_client.cli.models import HEADERS, model_row

if TYPE_CHECKING:
    from tests.unit.client.conftest import FakeServer, Shell


def test_models_is_a_plain_table_in_a_pipe(shell: Shell, server: FakeServer) -> None:
    """Columns are aligned, and there is no colour and no box."""
    server.models.models.append(pb.Model(name="a-longer-name", state=pb.MODEL_STATE_UNLOADED))
    header, demo, other = shell("models").out.splitlines()
    assert " ".join(header.split()) == " ".join(HEADERS)
    assert " ".join(demo.split()) == "demo ready 1.0 GiB 2048 1 2 - never yes"
    assert other.index("unloaded") == header.index("STATE") == demo.index("ready")


def test_models_on_a_terminal_shows_names_literally(shell: Shell, server: FakeServer) -> None:
    """Neither rich markup nor control characters in a name are obeyed."""
    server.models.models[0].name = "[red]x[/red]\x1b[2J"
    outcome = shell.on_a_terminal("models")
    assert "[red]x[/red]␛[2J" in outcome.out


def test_a_failed_model_says_why(shell: Shell, server: FakeServer) -> None:
    """The reason is a line on standard error, under the table."""
    server.models.models = [
        pb.Model(name="bad", state=pb.MODEL_STATE_FAILED, error_message="no weights")
    ]
    outcome = shell("models")
    assert "failed" in outcome.out
    assert outcome.err == "mlxpool: bad: no weights\n"


def test_models_as_json(shell: Shell) -> None:
    """--json prints one object per model."""
    (line,) = shell("models", "--json").out.splitlines()
    model = json.loads(line)
    assert (model["name"], model["state"], model["capabilities"]) == ("demo", "ready", ["chat"])
    assert datetime.fromisoformat(model["last_used_time"]).tzinfo is not None


def test_an_idle_model_shows_since_when_and_until_when() -> None:
    """Idle time and expiry are durations from now; an estimate is marked as one."""
    now = datetime.now(tz=UTC)
    model = Model(
        "m",
        ModelState.UNLOADED,
        estimated_bytes=3 << 29,
        last_used_time=now - timedelta(minutes=5),
        expire_time=now + timedelta(hours=2, minutes=10),
    )
    row = model_row(model, now)
    assert row[2] == "~1.5 GiB"
    assert row[6:8] == ("5 min", "in 2 h 10 min")


def test_a_clock_ahead_of_ours_shows_no_negative_time() -> None:
    """The server's clock may be a little ahead."""
    now = datetime.now(tz=UTC)
    assert model_row(Model("m", last_used_time=now + timedelta(seconds=9)), now)[6] == "0 s"


def test_load_prints_its_result(shell: Shell, server: FakeServer) -> None:
    """The result is on stdout, the phases on stderr; the flags are sent."""
    outcome = shell("load", "demo", "--no-pinned", "--keep-alive", "never", "--no-evict")
    assert (outcome.code, outcome.out) == (0, "demo is loaded: 1.0 GiB in 0.0 s; evicted old\n")
    assert outcome.err == "mlxpool: demo: loading\n"
    (request,) = server.models.requests
    assert isinstance(request, pb.LoadModelRequest)
    assert request.HasField("pinned")
    assert not request.pinned
    assert request.keep_alive.seconds == 315_576_000_000
    assert request.disallow_eviction


def test_load_shows_a_bar_on_a_terminal(shell: Shell) -> None:
    """On a terminal the load is drawn on standard error, with markup in a name left alone."""
    outcome = shell.on_a_terminal("load", "[red]demo")
    assert "[red]demo: loading" in outcome.err
    assert outcome.out.startswith("demo is loaded")


def test_a_dry_run_says_what_would_happen(shell: Shell, server: FakeServer) -> None:
    """--dry-run is validate_only."""
    outcome = shell("load", "demo", "--dry-run")
    assert outcome.out == "demo would fit in 1.5 GiB, evicting old\n"
    (request,) = server.models.requests
    assert isinstance(request, pb.LoadModelRequest)
    assert request.validate_only


def test_load_as_json(shell: Shell) -> None:
    """--json prints one object per event."""
    lines = [json.loads(line) for line in shell("load", "demo", "--json").out.splitlines()]
    assert [line["event"] for line in lines] == ["progress", "finished"]
    assert lines[0]["phase"] == "loading"
    assert lines[1]["model"]["name"] == "demo"


def test_a_second_load_says_so(shell: Shell, server: FakeServer) -> None:
    """A model that was loaded already is no error."""
    server.models.load[-1].finished.already_loaded = True
    assert shell("load", "demo").out == "demo was loaded already\n"


def test_unload(shell: Shell, server: FakeServer) -> None:
    """What was freed is printed; --force is sent."""
    assert shell("unload", "demo", "--force").out == "demo is unloaded: 1.0 GiB freed\n"
    assert server.models.requests == [pb.UnloadModelRequest(model="demo", force=True)]
    assert json.loads(shell("unload", "demo", "--json").out)["was_loaded"] is True


def test_memory(shell: Shell) -> None:
    """One sample: MLX's counters, the limits, and who holds what."""
    lines = shell("memory").out.splitlines()
    assert lines[0] == "active 1.0 GiB, peak 2.0 GiB, cache 1.0 MiB, device 16.0 GiB"
    assert lines[1] == "limits: pool 4.0 GiB, cache 0 B"
    assert lines[3].split() == ["demo", "1.0", "GiB", "1.0", "MiB", "0", "B"]


def test_memory_as_json(shell: Shell) -> None:
    """--json has bytes as numbers, and null for a limit that the device does not have."""
    usage = json.loads(shell("memory", "--json").out)
    assert usage["limits"]["pool_bytes"] == 4 << 30
    assert usage["limits"]["wired_bytes"] is None


def test_watching_memory(shell: Shell, server: FakeServer) -> None:
    """In a pipe a watch prints a line per sample, with --json an object per sample."""
    plain = shell("memory", "--watch", "--interval", "0.5").out.splitlines()
    assert len(plain) == 2
    assert plain[0].endswith("demo 1.0 GiB")
    assert len(shell("memory", "--watch", "--json").out.splitlines()) == 2
    request = server.memory.requests[0]
    assert isinstance(request, memory_pb.WatchMemoryUsageRequest)
    assert request.interval.nanos == 500_000_000


def test_watching_memory_on_a_terminal_draws_bars(shell: Shell, server: FakeServer) -> None:
    """On a terminal each model has a bar; its name is literal."""
    server.memory.usage.models[0].model = "[red]x"
    outcome = shell.on_a_terminal("memory", "--watch")
    assert outcome.code == 0
    assert "[red]x" in outcome.out
    assert "━" in outcome.out


def test_changing_memory(shell: Shell, server: FakeServer) -> None:
    """Limits, caches and the peak are changed in one run; sizes may have units."""
    flags = "--set-pool-limit 8GiB --set-cache-limit 0 --clear buffers --clear prompts --reset-peak"
    outcome = shell("memory", *flags.split())
    assert outcome.out.splitlines() == [
        "limits: pool 8.0 GiB, cache 0 B; evicted old",
        "1.0 MiB freed",
        "the peak was 2.0 GiB",
    ]
    limits, clear, _ = server.memory.requests
    assert isinstance(limits, memory_pb.SetMemoryLimitsRequest)
    assert limits.limits == memory_pb.MemoryLimits(pool_bytes=8 << 30, cache_bytes=0)
    assert isinstance(clear, memory_pb.ClearCacheRequest)
    assert len(clear.kinds) == 2


def test_changing_memory_as_json(shell: Shell) -> None:
    """--json prints an object per change."""
    outcome = shell("memory", "--clear", "buffers", "--reset-peak", "--json")
    freed, peak = (json.loads(line) for line in outcome.out.splitlines())
    assert (freed, peak) == ({"freed_bytes": 1 << 20}, {"previous_peak_bytes": 2 << 30})


def test_a_watch_changes_nothing(shell: Shell, server: FakeServer) -> None:
    """--watch with a change is refused before anything is changed."""
    assert shell("memory", "--watch", "--reset-peak").code == 64
    assert server.memory.requests == []


def test_tokenize(shell: Shell) -> None:
    """Ids and quoted pieces on stdout: a part of a character is shown as its bytes."""
    outcome = shell("tokenize", "Hi")
    assert outcome.out.splitlines() == ['       7  "Hi"', '       8  "\\\\xe2\\\\x82"']
    assert outcome.err == "mlxpool: 2 tokens\n"


def test_tokenize_as_json(shell: Shell, server: FakeServer) -> None:
    """--json has ids and pieces; - reads stdin; -m saves asking for the only model."""
    shell.type("from stdin")
    tokens = json.loads(shell("tokenize", "-", "-m", "demo", "--json").out)
    assert (tokens["token_ids"], tokens["pieces"][0]) == ([7, 8], "Hi")
    (request,) = server.models.requests
    assert isinstance(request, pb.TokenizeRequest)
    assert request.prompt.text == "from stdin"


def test_embed(shell: Shell, server: FakeServer) -> None:
    """A vector a line on stdout, the counts on stderr."""
    outcome = shell("embed", "Hi", "you", "--pooling", "last-token", "--no-normalize")
    assert outcome.out.splitlines() == ["[0.5, -2.0]"] * 2
    assert outcome.err == "mlxpool: 2 texts, 5 tokens, 2 numbers each\n"
    request = server.models.requests[-1]
    assert request.pooling == pb.POOLING_LAST_TOKEN
    assert request.HasField("normalize")


def test_embed_as_json(shell: Shell, server: FakeServer) -> None:
    """--json has vectors and tokens; - reads a text a line from stdin."""
    shell.type("one\ntwo\n")
    embedded = json.loads(shell("embed", "-", "-m", "demo", "--json").out)
    assert embedded == {"vectors": [[0.5, -2.0], [0.5, -2.0]], "prompt_tokens": 5}
    (request,) = server.models.requests
    assert [each.text for each in request.inputs] == ["one", "two"]
    assert not request.HasField("normalize")


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_info(shell: Shell, flags: list[str]) -> None:
    """Versions and device, as lines or as an object."""
    outcome = shell("info", *flags)
    assert "0.32.4" in outcome.out
    assert ('"device_name": "cpu"' if flags else "device   cpu") in outcome.out
