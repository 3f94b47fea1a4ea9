"""What a server process holds: memory, descriptors, threads, tasks, streams, caches."""

from __future__ import annotations

import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import grpc
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from benchmark.meter import ProcessMeter
from mlxpool.v1 import memory_service_pb2 as memory_pb
from mlxpool.v1 import memory_service_pb2_grpc as memory_grpc

_TIMEOUT_S = 30.0
_POLL_S = 0.25
_REST_S = 1.0
_SAMPLE_S = 0.2
_CACHES = [memory_pb.CACHE_KIND_BUFFERS, memory_pb.CACHE_KIND_PROMPTS]
# What a quiet server has none of, by its own metrics.
_EMPTY = {
    "running": "mlxpool_running_sequences",
    "queued": "mlxpool_queued_requests",
    "open_generations": "mlxpool_open_generations",
    "kv_bytes": "mlxpool_kv_cache_bytes",
    "kv_reserved_bytes": "mlxpool_kv_reserved_bytes",
}


@dataclass(frozen=True, slots=True)
class Vitals:
    rss_bytes: int
    fds: int
    threads: int
    # Child processes: the template renderer.
    children: int
    tasks: int
    # Leases are what runs and what is queued together.
    running: int
    queued: int
    open_generations: int
    kv_bytes: int
    kv_reserved_bytes: int
    # By channelz, for the record: it never counts a call with headers that are no HPACK as ended,
    # though nothing of it stays.
    open_calls: int
    # Generate calls that have, by the server's account.
    ended_calls: int

    @property
    def is_quiet(self) -> bool:
        """Nobody is served, and nothing is kept for anybody."""
        return not any(getattr(self, name) for name in _EMPTY)

    def is_back_to(self, start: Vitals) -> bool:
        """Memory apart."""
        return self.is_quiet and self.fds <= start.fds and self.tasks <= start.tasks

    def facts(self) -> dict[str, int]:
        return asdict(self)


class Watch:
    """Over one server process, from outside of it."""

    def __init__(self, pid: int, address: str, metrics_url: str) -> None:
        self._folder = Path("/proc") / str(pid)
        self._meter = ProcessMeter(pid)
        self._pid = pid
        self._address = address
        self._metrics_url = metrics_url

    def read(self) -> Vitals:
        open_calls = self._with_channel(_open_calls)
        metrics = self._scrape()
        return Vitals(
            rss_bytes=self.rss_bytes(),
            fds=len(list((self._folder / "fd").iterdir())),
            threads=len(list((self._folder / "task").iterdir())),
            children=self._num_children(),
            tasks=int(metrics["mlxpool_asyncio_tasks"]),
            open_calls=open_calls,
            ended_calls=int(metrics.get("mlxpool_requests_total", 0)),
            **{name: int(metrics[metric]) for name, metric in _EMPTY.items()},
        )

    def settle(
        self, deadline_s: float, is_settled: Callable[[Vitals], bool] = lambda v: v.is_quiet
    ) -> tuple[Vitals, float]:
        """Poll until it is, or the deadline; return the last vitals, with the caches emptied
        before, and how long it took.
        """
        begin_s = time.monotonic()
        while True:
            self._with_channel(_clear_caches)
            vitals = self.read()
            waited_s = time.monotonic() - begin_s
            if is_settled(vitals) or waited_s > deadline_s:
                return vitals, waited_s
            time.sleep(_POLL_S)

    def rest(self, deadline_s: float) -> Vitals:
        """Wait until it is quiet, and the same a second later."""
        end_s = time.monotonic() + deadline_s
        vitals, _ = self.settle(deadline_s)
        while True:
            time.sleep(_REST_S)
            earlier = vitals
            vitals, _ = self.settle(max(0.0, end_s - time.monotonic()))
            same = (vitals.fds, vitals.tasks) == (earlier.fds, earlier.tasks)
            if same or time.monotonic() > end_s:
                return vitals

    def rss_bytes(self) -> int:
        return self._meter.rss_bytes()

    def _num_children(self) -> int:
        children = 0
        for task in (self._folder / "task").iterdir():
            with suppress(OSError):
                children += len((task / "children").read_text().split())
        return children

    def _with_channel(self, ask: Callable[[grpc.Channel], Any]) -> Any:
        """A connection that is gone before descriptors are counted."""
        with grpc.insecure_channel(
            self._address, options=[("grpc.use_local_subchannel_pool", 1)]
        ) as channel:
            return ask(channel)

    def _scrape(self) -> dict[str, float]:
        """Sums over the labels."""
        url = self._metrics_url
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:  # noqa: S310 - ours
            text = response.read().decode()
        sums: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
        return sums


class MemoryPeak:
    """The most memory seen between `with` and its end, by a thread of its own."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.peak_bytes = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(_TIMEOUT_S)

    def _sample(self) -> None:
        while not self._done.wait(_SAMPLE_S):
            self.peak_bytes = max(self.peak_bytes, self._watch.rss_bytes())


def _open_calls(channel: grpc.Channel) -> int:
    request = channelz_pb2.GetServersRequest()
    servers = channelz_pb2_grpc.ChannelzStub(channel).GetServers(request, timeout=_TIMEOUT_S).server
    counted = [each.data for each in servers]
    # Without the call that asks.
    return int(
        sum(data.calls_started - data.calls_succeeded - data.calls_failed for data in counted) - 1
    )


def _clear_caches(channel: grpc.Channel) -> None:
    request = memory_pb.ClearCacheRequest(kinds=_CACHES)
    memory_grpc.MemoryServiceStub(channel).ClearCache(request, timeout=_TIMEOUT_S)
