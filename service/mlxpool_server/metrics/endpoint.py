"""GET /metrics over HTTP or HTTPS, on a port of its own."""

from __future__ import annotations

import asyncio
import math
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from http import HTTPStatus

import structlog
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from mlxpool_server.errors import (
    AddressUnavailableError,
    MlxpoolError,
    RateLimitedError,
    RoleMissingError,
)
from mlxpool_server.metrics.sample import Sample
from mlxpool_server.metrics.sample_collector import SampleCollector

log = structlog.get_logger(__name__)

# A scraper that takes longer to ask, or to read, is cut off.
PATIENCE_S = 10.0
MAX_HEAD_BYTES = 16 * 1024
# More at once are turned away: scrapers are few.
MAX_CONNECTIONS = 16

_TEXT = "text/plain; charset=utf-8"
_HELLO = b"mlxpool's metrics are at /metrics\n"

Headers = Sequence[tuple[str, str]]


class MetricsEndpoint:
    """Event loop; only the text is made on a thread, out of frozen values."""

    def __init__(
        self,
        registry: CollectorRegistry,
        sample: Callable[[], Sample],
        admit: Callable[[Headers], object],
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`admit` raises for headers without a key that would do; `tls` None: plaintext."""
        self._registry = registry
        self._sample = sample
        self._admit = admit
        self._tls = tls
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self, address: str) -> str:
        """Listen on HOST:PORT; return it with the port that the kernel picked.

        Raises: AddressUnavailableError.
        """
        host, _, port = address.rpartition(":")
        try:
            self._server = await asyncio.start_server(
                self._connected,
                host.strip("[]"),
                int(port),
                limit=MAX_HEAD_BYTES,
                ssl=self._tls,
                ssl_handshake_timeout=None if self._tls is None else PATIENCE_S,
            )
        except OSError as error:
            raise AddressUnavailableError(address) from error
        return f"{host}:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        if self._server is None:
            return
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None or len(self._connections) >= MAX_CONNECTIONS:
            writer.close()
            return
        self._connections.add(task)
        # Drained is then what the kernel has taken, all of it.
        writer.transport.set_write_buffer_limits(0)
        is_read = False
        try:
            async with asyncio.timeout(PATIENCE_S):
                writer.write(await self._answer(await reader.readuntil(b"\r\n\r\n")))
                await writer.drain()
                is_read = True
        except (OSError, TimeoutError, EOFError, asyncio.LimitOverrunError):
            # It went away, never asked, or stopped reading.
            pass
        except Exception:  # the edge: a scrape that fails must not end in silence
            log.exception("metrics.failed")
        finally:
            self._connections.discard(task)
            if is_read:
                writer.close()
            else:
                # Closing would wait, with what is left, until it is read.
                writer.transport.abort()

    async def _answer(self, head: bytes) -> bytes:
        request, *lines = head.decode("latin-1").split("\r\n")
        method, _, target = request.partition(" ")
        path = target.partition(" ")[0].partition("?")[0]
        pairs = (line.partition(":") for line in lines)
        headers = [(name.strip().lower(), value.strip()) for name, _, value in pairs]
        try:
            self._admit(headers)
        except MlxpoolError as error:
            return _refusal(error, method)
        if method not in ("GET", "HEAD"):
            return _response(HTTPStatus.METHOD_NOT_ALLOWED, _TEXT, b"", method)
        if path == "/":
            return _response(HTTPStatus.OK, _TEXT, _HELLO, method)
        if path != "/metrics":
            return _response(HTTPStatus.NOT_FOUND, _TEXT, _HELLO, method)
        return await self._metrics(dict(headers), method)

    async def _metrics(self, headers: Mapping[str, str], method: str) -> bytes:
        encode, content_type = choose_encoder(headers.get("accept", ""))
        # Taken here, on the event loop, which owns what it is made of.
        everything = _Scrape(self._registry, self._sample())
        return _response(
            HTTPStatus.OK, content_type, await asyncio.to_thread(encode, everything), method
        )


class _Scrape(Collector):
    """What one scrape sees."""

    def __init__(self, registry: CollectorRegistry, sample: Sample) -> None:
        self._parts = (registry, SampleCollector(sample))

    def collect(self) -> Iterator[Metric]:
        for part in self._parts:
            yield from part.collect()


def _refusal(error: MlxpoolError, method: str) -> bytes:
    """What was sent as a key is neither repeated nor logged."""
    match error:
        case RoleMissingError():
            status, extra = HTTPStatus.FORBIDDEN, ""
        case RateLimitedError(retry_after_s=wait_s):
            status, extra = HTTPStatus.TOO_MANY_REQUESTS, f"Retry-After: {math.ceil(wait_s)}\r\n"
        case _:
            status, extra = HTTPStatus.UNAUTHORIZED, "WWW-Authenticate: Bearer\r\n"
    log.info("metrics.refused", status=status.value, key=getattr(error, "key_name", None))
    return _response(status, _TEXT, f"{error}\n".encode(), method, extra)


def _response(
    status: HTTPStatus, content_type: str, body: bytes, method: str, extra: str = ""
) -> bytes:
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\n"
        f"Content-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\n"
        f"{extra}Connection: close\r\n\r\n"
    )
    return head.encode() + (b"" if method == "HEAD" else body)
