"""The channel's options."""

from __future__ import annotations

import pytest

from mlxpool_client.channel import channel_options, is_loopback


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("127.0.0.1:50051", True),
        ("localhost:1", True),
        ("dns:///localhost:1", True),
        ("[::1]:50051", True),
        ("unix:/tmp/mlxpool.sock", True),
        ("10.0.0.1:50051", False),
        ("gpu-box:50051", False),
    ],
)
def test_only_remote_targets_go_through_a_proxy(target: str, *, expected: bool) -> None:
    """A proxy from the environment is not asked for this machine."""
    assert is_loopback(target) is expected
    assert (("grpc.enable_http_proxy", 0) in channel_options(target)) is expected


def test_pings_are_slower_than_the_server_permits() -> None:
    """The server answers pings more frequent than every 10 s with GOAWAY."""
    assert int(dict(channel_options("h:1"))["grpc.keepalive_time_ms"]) >= 20_000
