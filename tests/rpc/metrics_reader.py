"""Scrapes a running server over HTTP, as Prometheus does."""

from __future__ import annotations

import asyncio
import ssl
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from rpc.harness import PATIENCE_S, Server


@dataclass(frozen=True)
class Scrape:
    content_type: str
    samples: tuple[Any, ...]

    def __call__(self, name: str, **labels: str) -> float:
        """The one sample of this name with at least these labels."""
        (value,) = (each.value for each in self.find(name, **labels))
        return float(value)

    def find(self, name: str, **labels: str) -> list[Any]:
        return [
            each
            for each in self.samples
            if each.name == name and labels.items() <= each.labels.items()
        ]


def metrics_address(server: Server) -> str:
    (line,) = (each for each in server.logs.entries if each["event"] == "metrics.listening")
    return str(line["address"])


async def scrape(server: Server) -> Scrape:
    content_type, text = await fetch(f"http://{metrics_address(server)}/metrics")
    return Scrape(content_type, tuple(_samples(text)))


async def fetch(url: str, *, tls: ssl.SSLContext | None = None, **headers: str) -> tuple[str, str]:
    """Content type and body."""

    def get() -> tuple[str, str]:
        request = urllib.request.Request(url, headers=headers)  # noqa: S310 - our own server
        with urllib.request.urlopen(  # noqa: S310 - see above
            request, timeout=PATIENCE_S, context=tls
        ) as response:
            return response.headers["content-type"], response.read().decode()

    return await asyncio.to_thread(get)


def _samples(text: str) -> Iterable[Any]:
    for family in text_string_to_metric_families(text):
        assert family.documentation, family.name
        yield from family.samples
