"""How much one key has used of its limits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mlxpool_server.errors import RateLimitedError, TooManyStreamsError
from mlxpool_server.rpc.access.keys import ApiKey

# Nobody knows when a stream ends.
STREAM_RETRY_S = 1.0
MINUTE_S = 60.0
# What floating point leaves of a request is no reason to refuse it.
ROUNDING = 1e-9


class Quota:
    """One key's use, by its name: a reload of the file neither refills nor forgets it."""

    def __init__(self, now: float) -> None:
        self._num_streams = 0
        # Of a bucket that holds one minute's requests: how full it is, and since when.
        self._share = 1.0
        self._updated_at = now

    def take_request(self, key: ApiKey, now: float) -> None:
        """Raises: RateLimitedError with the time until the next request is allowed."""
        limit = key.requests_per_minute
        if limit is None:
            return
        self._share = min(1.0, self._share + (now - self._updated_at) / MINUTE_S)
        self._updated_at = now
        missing = 1 / limit - self._share
        if missing > ROUNDING:
            raise RateLimitedError(key.name, limit, missing * MINUTE_S)
        self._share -= 1 / limit

    @contextmanager
    def stream(self, key: ApiKey) -> Iterator[None]:
        """Hold one of the key's streams. Raises: TooManyStreamsError."""
        if key.max_streams is not None and self._num_streams >= key.max_streams:
            raise TooManyStreamsError(key.name, key.max_streams, STREAM_RETRY_S)
        self._num_streams += 1
        try:
            yield
        finally:
            self._num_streams -= 1
