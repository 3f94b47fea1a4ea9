"""Chat templates rendered, and tool calls read, in other processes, with limits that hold."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from mlxpool_server.domain import ToolCall
from mlxpool_server.mlx_backend.process_memory import resident_bytes
from mlxpool_server.mlx_backend.template_worker import LENGTH_BYTES

LIMIT_S = 5.0
# A call takes some microseconds to read, but for those that make a regular expression suffer.
CALL_LIMIT_S = 1.0
MEMORY_BYTES = 1 << 30
# The worker's own alarm comes first; this is for one that does not heed it.
GRACE_S = 1.0
# How often a render that takes its time has its memory looked at.
LOOK_S = 0.02
# macOS takes no limit of the address space.
LIMITS_ADDRESS_SPACE = sys.platform != "darwin"
# It imports transformers, from a cold disk perhaps.
START_LIMIT_S = 120.0
# As many as there are threads that render.
MAX_IDLE = 4
MAX_REPLY_BYTES = 1 << 30

_WORKER = "mlxpool_server.mlx_backend.template_worker"
# What Python and strftime need; no tokens, no settings.
_KEPT_VARIABLES = ("LANG", "LC_ALL", "PATH", "SYSTEMROOT", "TZ", "VIRTUAL_ENV")


class TemplateError(Exception):
    """The template refused, failed or took too much; the text may be shown to callers."""


class CallError(Exception):
    """The text is no tool call, or takes too much to read."""


class _WorkerLostError(Exception):
    """It died or did not answer in time."""


class TemplateRenderer:
    """Thread-safe. Each render has a process to itself; between renders they are kept."""

    def __init__(
        self,
        limit_s: float = LIMIT_S,
        memory_bytes: int = MEMORY_BYTES,
        *,
        limits_address_space: bool = LIMITS_ADDRESS_SPACE,
    ) -> None:
        """A process may hold `memory_bytes`, by its own limit where the system has one, and looked
        at from here wherever it has not.
        """
        self._limit_s = limit_s
        self._memory_bytes = memory_bytes
        self._limits_address_space = limits_address_space
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []

    def warm_up(self) -> None:
        """Start a process, so that the first render need not wait for all of its start."""
        with self._lock:
            if not self._idle:
                self._idle.append(self._new_worker())

    def render(
        self, template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
    ) -> str:
        """Return what the template makes of the messages. Raises: TemplateError."""
        request = {"template": template, "messages": messages, "variables": variables}
        reply = self._ask(request, self._limit_s, TemplateError)
        if "text" not in reply:
            raise TemplateError(str(reply.get("error", "it failed")))
        return str(reply["text"])

    def read_calls(
        self, parser: str, text: str, tools: Sequence[Mapping[str, Any]] | None
    ) -> tuple[ToolCall, ...]:
        """Return the calls in the text, by this parser of mlx-lm's. Raises: CallError."""
        limit_s = min(CALL_LIMIT_S, self._limit_s)
        request = {"parser": parser, "text": text, "tools": tools, "limit_s": limit_s}
        reply = self._ask(request, limit_s, CallError)
        if "calls" not in reply:
            raise CallError(str(reply.get("error", "it failed")))
        return tuple(ToolCall(*map(str, call)) for call in reply["calls"])

    def _ask(
        self, request: Mapping[str, Any], limit_s: float, error_type: type[Exception]
    ) -> dict[str, Any]:
        worker = self._take()
        try:
            reply = worker.ask(json.dumps(request, default=str).encode(), limit_s + GRACE_S)
        except BaseException as error:
            worker.kill()
            if isinstance(error, _WorkerLostError):
                raise error_type(
                    f"it takes longer than {limit_s:g} s, or too much memory"
                ) from None
            raise
        self._put_back(worker)
        return reply

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.kill()

    def _take(self) -> _Worker:
        with self._lock:
            while self._idle:
                if (worker := self._idle.pop()).is_alive:
                    return worker
                worker.kill()
        return self._new_worker()

    def _new_worker(self) -> _Worker:
        return _Worker(
            self._memory_bytes, self._limit_s, limits_address_space=self._limits_address_space
        )

    def _put_back(self, worker: _Worker) -> None:
        with self._lock:
            if len(self._idle) < MAX_IDLE:
                self._idle.append(worker)
                return
        worker.kill()


@cache
def shared_renderer() -> TemplateRenderer:
    """The one of this process: models share its workers."""
    renderer = TemplateRenderer()
    atexit.register(renderer.close)
    return renderer


class _Worker:
    """One process. Used by one thread at a time."""

    def __init__(self, memory_bytes: int, limit_s: float, *, limits_address_space: bool) -> None:
        self._memory_bytes = memory_bytes
        own_limit = memory_bytes if limits_address_space else 0
        kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        own = {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "PYTHONDONTWRITEBYTECODE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "HF_HUB_OFFLINE": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", _WORKER, str(own_limit), str(limit_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=kept | own,
            bufsize=0,
            # Ctrl-C is for the server, which still renders while it drains.
            start_new_session=True,
        )
        self._is_ready = False

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: bytes, limit_s: float) -> dict[str, Any]:
        """Raises: _WorkerLostError."""
        if not self._is_ready:
            self._read_frame(time.monotonic() + START_LIMIT_S)
            self._is_ready = True
        deadline = time.monotonic() + limit_s
        self._write(len(request).to_bytes(LENGTH_BYTES, "big") + request)
        try:
            reply = json.loads(self._read_frame(deadline))
        except ValueError:
            raise _WorkerLostError from None
        return reply if isinstance(reply, dict) else {}

    def kill(self) -> None:
        """It holds nothing that would have to be ended nicely."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._process.wait()

    def _write(self, frame: bytes) -> None:
        """It reads the whole request before it looks at it."""
        pipe, left = self._process.stdin, memoryview(frame)
        try:
            while pipe is not None and left:
                left = left[pipe.write(left) :]
        except OSError:
            raise _WorkerLostError from None

    def _read_frame(self, deadline: float) -> bytes:
        length = int.from_bytes(self._read(LENGTH_BYTES, deadline), "big")
        if length > MAX_REPLY_BYTES:
            raise _WorkerLostError
        return self._read(length, deadline)

    def _read(self, num_bytes: int, deadline: float) -> bytes:
        pipe = self._process.stdout
        chunks = bytearray()
        while pipe is not None and len(chunks) < num_bytes:
            remaining_s = deadline - time.monotonic()
            # poll, not select: a busy server has more than 1024 descriptors.
            poll = select.poll()
            poll.register(pipe, select.POLLIN)
            if remaining_s <= 0:
                raise _WorkerLostError
            if not poll.poll(min(remaining_s, LOOK_S) * 1000):
                if resident_bytes(self._process.pid) > self._memory_bytes:
                    raise _WorkerLostError
                continue
            chunk = pipe.read(min(num_bytes - len(chunks), 1 << 20))
            if not chunk:
                raise _WorkerLostError
            chunks += chunk
        return bytes(chunks)
