"""Measures what scripts/bench-load-gap says, on the demo model under two names."""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlxpool_client import Client, Delta
from mlxpool_server.mlx_backend.demo_model import ensure_demo_model

START_TIMEOUT_S = 60.0
MAX_TOKENS = 120


@contextmanager
def running_server() -> Iterator[str]:
    """A server with the demo model as `a` and as `b`; yields its address."""
    folder = ensure_demo_model(print)
    command = [sys.executable, "-m", "mlxpool_server", "--listen", "127.0.0.1:0"]
    command += ["--log-format", "json", "--model", f"a={folder}", "--model", f"b={folder}"]
    with tempfile.TemporaryDirectory() as place:
        log = Path(place) / "server.log"
        with log.open("w") as stderr:
            server = subprocess.Popen(command, stderr=stderr)
        try:
            yield address_in(log)
        finally:
            server.terminate()
            server.wait(START_TIMEOUT_S)


def address_in(log: Path) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        for line in log.read_text().splitlines():
            event = json.loads(line)
            if event["event"] == "server.listening":
                return str(event["addresses"][0])
        time.sleep(0.05)
    raise TimeoutError(log.read_text())


def gaps(client: Client, loading: threading.Event | None = None) -> list[float]:
    """Seconds between the deltas of one generation on `a`; `loading` is set after some of them."""
    times = []
    for event in client.generate(
        "a", "Once upon a time", temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True
    ):
        if isinstance(event, Delta):
            times.append(time.perf_counter())
            if loading is not None and len(times) == MAX_TOKENS // 8:
                loading.set()
    return [after - before for before, after in itertools.pairwise(times)]


def gaps_beside_a_load(client: Client) -> list[float]:
    client.unload_model("b")
    may_load = threading.Event()

    def load() -> None:
        if may_load.wait(START_TIMEOUT_S):
            client.load_model("b").result()

    thread = threading.Thread(target=load)
    thread.start()
    found = gaps(client, may_load)
    thread.join(START_TIMEOUT_S)
    return found


def main() -> int:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    ratios = []
    with running_server() as address, Client(address, timeout_s=300) as client:
        client.load_model("a").result()
        gaps(client)
        for number in range(1, rounds + 1):
            alone, beside = gaps(client), gaps_beside_a_load(client)
            usual = statistics.median(alone)
            ratios.append(max(beside) / usual)
            print(
                f"round {number}: usual gap {usual * 1e3:.0f} ms, longest alone "
                f"{max(alone) * 1e3:.0f} ms, longest beside a load {max(beside) * 1e3:.0f} ms: "
                f"{ratios[-1]:.1f} times the usual"
            )
    print(f"median {statistics.median(ratios):.1f}, worst {max(ratios):.1f} times the usual gap")
    return 0


if __name__ == "__main__":
    sys.exit(main())
