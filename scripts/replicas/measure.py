"""Measures what scripts/bench-gateway says: two workers with the demo model behind the gateway."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mlxpool_server.mlx_backend.demo_model import ensure_demo_model
from replicas.asking import Asked, ask
from replicas.fleet import Fleet, Worker, running_fleet

MODEL = "demo"
# About a thousand tokens: three a word and digit.
SHARED = " ".join(f"word{number}" for number in range(290))
NUM_STREAMS = 4
STREAM_TOKENS = 60
NUM_LATER = 10
WAIT_S = 60.0


def main() -> int:
    arguments = _arguments()
    folder = ensure_demo_model(lambda line: print(line, file=sys.stderr))
    logs = Path(tempfile.mkdtemp(prefix="mlxpool-gateway-"))
    print(f"logs: {logs}", file=sys.stderr)
    for name in arguments.parts:
        with running_fleet(MODEL, folder, logs / name, gateway_flags=arguments.flag) as fleet:
            # Both are warm, whoever gets which.
            for number in range(4):
                ask(fleet, f"{number} warms up", max_tokens=2)
            print(json.dumps({"part": name} | _PARTS[name](fleet)), flush=True)
    return 0


def prefix(fleet: Fleet) -> dict[str, object]:
    """Time to first token of prompts that begin with the same thousand tokens."""
    asked = [ask(fleet, f"{SHARED} Question {number}?", max_tokens=4) for number in range(3)]
    return {
        "prompt_tokens": asked[0].prompt_tokens,
        "cached_tokens": [each.cached_tokens for each in asked],
        "ttft_s": [_rounded(each.first_s) for each in asked],
        "times_sooner": _rounded((asked[0].first_s or 0.0) / (asked[2].first_s or 1.0)),
    }


def killed_before(fleet: Fleet) -> dict[str, object]:
    """A worker dies; then requests come, which the gateway would have sent to it."""
    ask(fleet, "Tell me of the sea", max_tokens=8)
    _busiest_by_log(fleet).process.kill()
    later = _later(fleet)
    return later | {"healthy_in_the_end": len(fleet.gateway.healthy())}


def killed_during(fleet: Fleet) -> dict[str, object]:
    """A worker dies while it streams."""
    killed_at: list[float] = []

    def kill() -> None:
        _busiest(fleet).process.kill()
        killed_at.append(time.perf_counter())

    asked = _streams(fleet, kill)
    broken = [each for each in asked if each.problem]
    return {
        "streams": len(asked),
        "broken": len(broken),
        "told_after_s": sorted(_rounded(each.ended_at - killed_at[0]) for each in broken),
        "said": sorted({each.problem for each in broken}),
        "whole": sum(each.finish_reason == "length" for each in asked),
    } | _later(fleet)


def killed_during_unary(fleet: Fleet) -> dict[str, object]:
    """A worker dies while it works on answers that are sent in one piece."""

    def kill() -> None:
        _busiest(fleet).process.kill()

    asked = _streams(fleet, kill, stream=False)
    return {
        "answers": len(asked),
        "whole": sum(each.finish_reason == "length" for each in asked),
        "said": sorted({each.problem for each in asked if each.problem}),
    }


def drained(fleet: Fleet) -> dict[str, object]:
    """A worker gets SIGTERM while it streams."""
    stopped: list[tuple[Worker, float]] = []

    def stop() -> None:
        worker = _busiest(fleet)
        worker.process.send_signal(signal.SIGTERM)
        stopped.append((worker, time.perf_counter()))

    with ThreadPoolExecutor(1) as one:
        running = one.submit(_streams, fleet, stop)
        _wait_until(lambda: bool(stopped))
        later = _later(fleet)
        asked = running.result()
    worker, stopped_at = stopped[0]
    exit_code = worker.process.wait(WAIT_S)
    return {
        "streams": len(asked),
        "whole": sum(each.finish_reason == "length" for each in asked),
        "exit_code": exit_code,
        "gone_after_s": _rounded(time.perf_counter() - stopped_at),
    } | later


_ALL = (prefix, killed_before, killed_during, killed_during_unary, drained)
_PARTS: dict[str, Callable[[Fleet], dict[str, object]]] = {part.__name__: part for part in _ALL}


def _streams(fleet: Fleet, act: Callable[[], None], *, stream: bool = True) -> list[Asked]:
    """Several answers at once; `act` when they are under way."""
    done = threading.Event()

    def look(num_chunks: int) -> None:
        if num_chunks == STREAM_TOKENS // 4 and not done.is_set():
            done.set()
            act()

    def one(number: int) -> Asked:
        return ask(
            fleet, f"Tell a story, number {number}", max_tokens=STREAM_TOKENS, look=look,
            stream=stream,
        )  # fmt: skip

    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        running = [pool.submit(one, number) for number in range(NUM_STREAMS)]
        if not stream:
            _wait_until(lambda: max(_loads(fleet).values()) == NUM_STREAMS)
            time.sleep(1.0)
            act()
        return [each.result() for each in running]


def _later(fleet: Fleet) -> dict[str, object]:
    """Requests one after the other, after what has happened."""
    asked = [ask(fleet, f"{number} colours", max_tokens=4) for number in range(NUM_LATER)]
    return {
        "later": len(asked),
        "later_refused": sum(bool(each.problem) for each in asked),
        "later_longest_s": _rounded(max(each.total_s for each in asked)),
        "later_usual_s": _rounded(sorted(each.total_s for each in asked)[NUM_LATER // 2]),
    }


def _loads(fleet: Fleet) -> dict[str, int]:
    """Requests of each worker, by address, as the gateway counts them."""
    workers = fleet.gateway.get("/workers")["workers"]
    return {each["url"].removeprefix("grpc://"): int(each["load"]) for each in workers}


def _busiest(fleet: Fleet) -> Worker:
    loads = _loads(fleet)
    return max(fleet.workers, key=lambda worker: loads.get(worker.address, 0))


def _busiest_by_log(fleet: Fleet) -> Worker:
    return max(fleet.workers, key=lambda worker: len(worker.events("rpc.finished")))


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the gateway does not get there")
        time.sleep(0.02)


def _rounded(seconds: float | None) -> float:
    return round(seconds or 0.0, 2)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench-gateway", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*_PARTS, []], help="by default all")
    parser.add_argument("--flag", action="append", default=[], help="for the gateway")
    arguments = parser.parse_args()
    arguments.parts = arguments.parts or list(_PARTS)
    return arguments


if __name__ == "__main__":
    sys.exit(main())
