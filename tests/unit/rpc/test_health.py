"""Health: what it says, and that no watcher can hold it up."""

from __future__ import annotations

import asyncio
from typing import Any

from grpc_health.v1 import health_pb2

from mlxpool_server.rpc.health import SERVICES, Health

RESPONSE = health_pb2.HealthCheckResponse
NO_CONTEXT: Any = None


def request(service: str = "") -> Any:
    return health_pb2.HealthCheckRequest(service=service)


async def test_it_does_not_serve_before_it_starts() -> None:
    """A probe that comes early is told so."""
    assert (await Health().Check(request(), NO_CONTEXT)).status == RESPONSE.NOT_SERVING


async def test_list_names_all_services() -> None:
    """With the status of each."""
    health = Health()
    health.set_serving(is_serving=True)
    statuses = (await health.List(health_pb2.HealthListRequest(), NO_CONTEXT)).statuses
    assert {name: each.status for name, each in statuses.items()} == dict.fromkeys(
        SERVICES, RESPONSE.SERVING
    )


async def test_a_watcher_sees_changes_and_nothing_twice() -> None:
    """An unchanged status that is set again is no change."""
    health = Health()
    watcher = health.Watch(request(), NO_CONTEXT)
    assert (await anext(watcher)).status == RESPONSE.NOT_SERVING
    following = asyncio.ensure_future(anext(watcher))
    await asyncio.sleep(0)
    health.set_serving(is_serving=False)
    health.set_serving(is_serving=True)
    assert (await following).status == RESPONSE.SERVING
    await watcher.aclose()


async def test_a_watcher_that_does_not_read_holds_nothing_up() -> None:
    """Its message may be in flight for ever: the status changes, and others learn of it."""
    health = Health()
    stuck = health.Watch(request(), NO_CONTEXT)
    await anext(stuck)
    health.set_serving(is_serving=True)
    health.set_serving(is_serving=False)
    health.set_serving(is_serving=True)
    assert (await health.Check(request(), NO_CONTEXT)).status == RESPONSE.SERVING
    # When it reads on it gets the latest.
    assert (await anext(stuck)).status == RESPONSE.SERVING
    await stuck.aclose()


async def test_an_unknown_service_is_watched() -> None:
    """As the protocol says; only Check answers NOT_FOUND."""
    watcher = Health().Watch(request("nobody"), NO_CONTEXT)
    assert (await anext(watcher)).status == RESPONSE.SERVICE_UNKNOWN
    await watcher.aclose()
