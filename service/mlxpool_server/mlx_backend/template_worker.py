"""The process that renders chat templates and reads tool calls.

A template is a program, and may mean harm; a call may make a regular expression take for ever.

It knows nothing of the server, can open no file, and is killed by its own alarm when a template
takes too long, whatever that is doing. Frames on its pipes: 8 bytes of length, then JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
from typing import Any, BinaryIO

from mlxpool_server.mlx_backend.call_parsers import CallParsers

LENGTH_BYTES = 8
# A longer prompt fits no model.
MAX_TEXT_CHARS = 64 * 1024 * 1024

# Between them they make jinja2 import all that it imports late.
_WARM_UPS = (
    "{{ messages | tojson | pprint }}{{ strftime_now('%d %b %Y') }}",
    "{% generation %}{% endgeneration %}{{ [1] | random }}{{ 'a' | wordwrap }}",
    "{{ raise_exception('refused') }}",
    "{{ unknown.field }}",
    "{{ ''.__class__ }}",
    "{% syntax",
)


def main() -> None:
    """Serve requests until standard input ends."""
    memory_bytes, limit_s = int(sys.argv[1]), float(sys.argv[2])
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    # Late: it takes a second, and only this process wants it.
    from transformers.utils.chat_template_utils import (  # noqa: PLC0415 - see above
        render_jinja_template,
    )

    def render(request: dict[str, Any]) -> str:
        rendered: Any = render_jinja_template(
            conversations=[request["messages"]],
            chat_template=request["template"],
            **request["variables"],
        )
        texts, _ = rendered
        return str(texts[0])

    # Whatever is imported late is imported now: afterwards no file can be opened.
    messages = [{"role": "user", "content": ""}]
    for template in _WARM_UPS:
        with contextlib.suppress(Exception):
            render({"messages": messages, "template": template, "variables": {}})
    calls = CallParsers()
    _give_up_rights(memory_bytes)
    _write(replies, {"ready": True})
    while (payload := _read(requests)) is not None:
        # The default action: the process ends, without asking Python.
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        reply = _reply(render, calls, payload)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _write(replies, reply)


def _reply(render: Any, calls: CallParsers, payload: bytes) -> dict[str, Any]:
    try:
        request = json.loads(payload)
        if "parser" in request:
            signal.setitimer(signal.ITIMER_REAL, float(request["limit_s"]))
            return {"calls": calls.read(request["parser"], request["text"], request["tools"])}
        text = render(request)
    except MemoryError:
        return {"error": "it takes too much memory"}
    except RecursionError:
        return {"error": "it calls itself without end"}
    except Exception as error:  # noqa: BLE001 - a template may raise anything
        return {"error": str(error)[:1000] or type(error).__name__}
    if len(text) > MAX_TEXT_CHARS:
        return {"error": f"its text has more than {MAX_TEXT_CHARS} characters"}
    return {"text": text}


def _give_up_rights(memory_bytes: int) -> None:
    """No more files, processes or writes, should a template ever get out of its sandbox.

    `memory_bytes` 0: the parent looks after it.
    """
    limits = {
        resource.RLIMIT_AS: memory_bytes or resource.RLIM_INFINITY,
        resource.RLIMIT_NOFILE: 0,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
    }
    for kind, limit in limits.items():
        # Some systems refuse some of them.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (limit, limit))


def _read(stream: BinaryIO) -> bytes | None:
    header = stream.read(LENGTH_BYTES)
    if len(header) < LENGTH_BYTES:
        return None
    return stream.read(int.from_bytes(header, "big"))


def _write(stream: BinaryIO, reply: dict[str, Any]) -> None:
    try:
        payload = json.dumps(reply).encode()
    except MemoryError:
        payload = b'{"error": "it takes too much memory"}'
    stream.write(len(payload).to_bytes(LENGTH_BYTES, "big") + payload)
    stream.flush()


if __name__ == "__main__":
    main()
