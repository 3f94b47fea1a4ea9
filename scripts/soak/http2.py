"""Just enough of HTTP/2 to break its rules (RFC 9113 names the frames)."""

from __future__ import annotations

import struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY = range(8)
WINDOW_UPDATE, CONTINUATION = 8, 9
END_STREAM, ACK, END_HEADERS, PADDED = 0x1, 0x1, 0x4, 0x8

CANCEL = struct.pack(">I", 8)
GENERATE = "/mlxpool.v1.ModelService/Generate"
_LONGEST_SHORT = 0x7E


def frame(
    kind: int, payload: bytes = b"", *, flags: int = 0, stream: int = 0, length: int | None = None
) -> bytes:
    """`length`: what the header claims, if it is a lie."""
    claimed = len(payload) if length is None else length
    return struct.pack(">I", claimed)[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def settings(*pairs: tuple[int, int]) -> bytes:
    return frame(SETTINGS, b"".join(struct.pack(">HI", *pair) for pair in pairs))


def hello() -> bytes:
    """What every proper connection begins with."""
    return PREFACE + settings()


def header(name: str, value: str) -> bytes:
    """A literal that enters no table (RFC 7541, 6.2.2); names and values up to 126 bytes."""
    parts = name.encode(), value.encode()
    if max(map(len, parts)) > _LONGEST_SHORT:
        raise ValueError(name)
    return b"\x00" + b"".join(bytes([len(part)]) + part for part in parts)


def call(stream: int, path: str = GENERATE, *more: bytes, flags: int = END_HEADERS) -> bytes:
    """The headers of a gRPC call, its message to come."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    block = b"".join(header(*field) for field in fields.items()) + b"".join(more)
    return frame(HEADERS, block, flags=flags, stream=stream)


def message(stream: int, body: bytes, *, claimed: int | None = None, compressed: int = 0) -> bytes:
    """GRPC's length-prefixed message in a DATA frame that ends the request."""
    prefix = struct.pack(">BI", compressed, len(body) if claimed is None else claimed)
    return frame(DATA, prefix + body, flags=END_STREAM, stream=stream)
