"""How a channel to the server is set up; the same for both clients."""

from __future__ import annotations

import json

import grpc

DEFAULT_TARGET = "127.0.0.1:50051"

_MAX_RECEIVE_BYTES = 64 * 1024 * 1024
# The server answers pings more frequent than every 10 s with GOAWAY.
_KEEPALIVE_INTERVAL_MS = 30_000
_KEEPALIVE_TIMEOUT_MS = 10_000

# gRPC retries only what has not produced a message yet, so an answer never starts twice. With
# nothing listening the four attempts are over in about a second.
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [
                {"service": "mlxpool.v1.ModelService"},
                {"service": "mlxpool.v1.MemoryService"},
            ],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}


def open_channel(target: str, credentials: grpc.ChannelCredentials | None) -> grpc.Channel:
    options = channel_options(target)
    if credentials is None:
        return grpc.insecure_channel(target, options)
    return grpc.secure_channel(target, credentials, options)


def open_aio_channel(target: str, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
    options = channel_options(target)
    if credentials is None:
        return grpc.aio.insecure_channel(target, options)
    return grpc.aio.secure_channel(target, credentials, options)


def channel_options(target: str) -> list[tuple[str, str | int]]:
    """Return gRPC's channel arguments for `target`."""
    options: list[tuple[str, str | int]] = [
        ("grpc.max_receive_message_length", _MAX_RECEIVE_BYTES),
        ("grpc.keepalive_time_ms", _KEEPALIVE_INTERVAL_MS),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
        # A stream may be silent for long: its pings must not be counted against it.
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.enable_retries", 1),
        ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    ]
    if is_loopback(target):
        # gRPC would send even these through $http_proxy.
        options.append(("grpc.enable_http_proxy", 0))
    return options


def is_loopback(target: str) -> bool:
    """Tell whether `target` names this machine."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    host = target.removeprefix("dns:").lstrip("/").rsplit(":", 1)[0]
    return host in {"localhost", "[::1]"} or host.startswith("127.")
