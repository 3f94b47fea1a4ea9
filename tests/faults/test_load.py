"""The load and fault scenarios of scripts/reliability in small: nothing is lost, nothing stays."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.server_process import ServerProcess
from soak import ghz, http2
from soak.attack import ATTACKS, INVALID, Attack, Attacker
from soak.clients import Connections, Crowd
from soak.scenarios import Scale, stopping
from soak.tally import Tally
from soak.vanish import Vanishing
from soak.vitals import Vitals, Watch
from tiny_models import write_model

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's"),
    pytest.mark.timeout(180),
]

SETTLE_S = 30.0
WINDOW_S = 0.5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "a", max_position_embeddings=2048)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One for all: what a test leaves behind, the next one sees."""
    log = tmp_path_factory.mktemp("server") / "log.jsonl"
    flags = ("--model", f"a={model}", "--metrics-listen", "127.0.0.1:0")
    with ServerProcess(log, *flags) as process:
        yield process
    # Whatever clients do is no reason to warn the operator.
    assert {event["level"] for event in process.events()} == {"info"}


@pytest.fixture(scope="module")
def watch(server: ServerProcess) -> Watch:
    address = server.address
    url = f"http://{server.wait_for('metrics.listening')['address']}/metrics"
    return Watch(server.process.pid, address, url)


@pytest.fixture(scope="module")
def start(server: ServerProcess, watch: Watch) -> Vitals:
    """After the first streams: the model is loaded, and the libraries' threads are there."""
    asyncio.run(live("good", 4, server))
    return watch.rest(SETTLE_S)


async def live(kind: str, streams: int, server: ServerProcess) -> Tally:
    """Half a second of it, and until the last stream has ended."""
    connections = Connections(Crowd(kind, streams, server.address, max_tokens=16))
    await connections.open()
    tally = await connections.run(0.0, WINDOW_S)
    await connections.close()
    assert tally.lost == 0
    assert tally.finished + tally.failed.total() == tally.admitted > 0
    return tally


async def assert_back(watch: Watch, start: Vitals) -> None:
    """Memory apart, which takes more than these few streams to tell."""
    # On a thread: this loop still has sockets to close.
    vitals, _ = await asyncio.to_thread(
        watch.settle, SETTLE_S, lambda vitals: vitals.is_back_to(start)
    )
    assert vitals.is_back_to(start), (start, vitals)


async def test_many_streams(server: ServerProcess, watch: Watch, start: Vitals) -> None:
    """More at once than fit into the batch: each finishes."""
    tally = await live("good", 64, server)
    assert tally.finished == tally.calls
    await assert_back(watch, start)


async def test_clients_that_cancel(server: ServerProcess, watch: Watch, start: Vitals) -> None:
    """At any time, beside others that are served to the end."""
    good, bad = await asyncio.gather(live("good", 8, server), live("cancelling", 8, server))
    assert good.finished == good.calls
    assert bad.failed.keys() | bad.refused.keys() == {"CANCELLED"}
    await assert_back(watch, start)


async def test_clients_that_stop_reading(
    server: ServerProcess, watch: Watch, start: Vitals
) -> None:
    """Whether they go away then or read the rest, which is all there."""
    good, bad = await asyncio.gather(live("good", 8, server), live("stalling", 6, server))
    assert good.finished == good.calls
    assert bad.finished > 0
    assert bad.failed.keys() == {"CANCELLED"}
    await assert_back(watch, start)


async def test_clients_that_vanish(server: ServerProcess, watch: Watch, start: Vitals) -> None:
    """Processes killed in the middle of their streams, one of them stopped for a while before."""
    crowd = Vanishing(Crowd("vanishing", 10, server.address))
    await crowd.open()
    good, bad = await asyncio.gather(live("good", 8, server), crowd.run(0.0, WINDOW_S))
    await crowd.close()
    assert good.finished == good.calls
    assert bad.calls >= 10
    await assert_back(watch, start)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
async def test_malformed_http2(
    server: ServerProcess, watch: Watch, start: Vitals, attack: Attack
) -> None:
    """Others are served beside it, and nothing of it stays."""
    attacker = Attacker(server.address, random.Random(attack.__name__))  # noqa: S311 - no secret
    good, _ = await asyncio.gather(live("good", 4, server), attacker.attack(attack))
    attacker.close()
    assert good.finished == good.calls
    await assert_back(watch, start)


async def test_frames_that_break_rules(server: ServerProcess, watch: Watch, start: Vitals) -> None:
    """Each of them: the server goes on."""
    attacker = Attacker(server.address, random.Random("each"))  # noqa: S311 - no secret

    async def send(frame: bytes) -> None:
        await attacker.attack(lambda attacker: attacker.send(http2.hello(), frame))

    await asyncio.gather(*map(send, INVALID))
    assert (await live("good", 4, server)).finished > 0
    await assert_back(watch, start)


async def test_short_calls(server: ServerProcess, watch: Watch, start: Vitals) -> None:
    """Each ends, and is counted once."""
    before = watch.read().ended_calls
    connections = Connections(Crowd("short", 10, server.address))
    await connections.open()
    tally = await connections.run_calls(200)
    await connections.close()
    assert tally.finished == tally.calls >= 200
    await assert_back(watch, start)
    assert watch.read().ended_calls - before == tally.calls


async def test_short_calls_by_ghz(server: ServerProcess, watch: Watch, start: Vitals) -> None:
    """By a client that is not ours, from the schema that reflection gives."""
    tool = ghz.find()
    if tool is None:
        pytest.skip("no ghz: scripts/install-ghz")
    tally = await asyncio.to_thread(ghz.run, tool, server.address, 200, 10)
    assert tally.finished == tally.calls == 200
    await assert_back(watch, start)


def test_sigterm_under_load(model: Path, tmp_path: Path) -> None:
    """Streams finish or are told UNAVAILABLE, and the exit code is 0, within the grace time."""
    scale = Scale(stop_streams=9, stop_after_s=0.5, stop_grace_s=1.0)
    outcome = stopping(model, tmp_path, scale)
    assert not outcome.broken, outcome.broken
    assert outcome.good.failed.total() > 0
