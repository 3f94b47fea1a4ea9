"""Which role may make which call."""

from __future__ import annotations

import enum


class Role(enum.Enum):
    # Generates and tokenises.
    INFERENCE = "inference"
    # Reads: models, memory, metrics, reflection, channelz.
    OBSERVER = "observer"
    # Reads, loads and unloads, changes the memory's limits.
    ADMIN = "admin"


ANY = frozenset(Role)
_USERS = frozenset({Role.INFERENCE})
_READERS = frozenset({Role.OBSERVER, Role.ADMIN})
_ADMINS = frozenset({Role.ADMIN})

_MODELS, _MEMORY = "/mlxpool.v1.ModelService/", "/mlxpool.v1.MemoryService/"
_GATEWAY = "/mlx.grpc.engine.MlxEngine/"
HEALTH = "/grpc.health.v1.Health/"
# No RPC: the path that scrapers ask for.
METRICS = "/metrics"

_METHODS: dict[str, frozenset[Role]] = {
    f"{_MODELS}Generate": _USERS,
    f"{_MODELS}CancelGeneration": _USERS | _ADMINS,
    f"{_MODELS}Tokenize": _USERS,
    f"{_MODELS}CountTokens": _USERS,
    f"{_MODELS}Embed": _USERS,
    f"{_MODELS}ListModels": ANY,
    f"{_MODELS}GetModel": ANY,
    f"{_MODELS}GetServerInfo": ANY,
    f"{_MODELS}LoadModel": _ADMINS,
    f"{_MODELS}UnloadModel": _ADMINS,
    f"{_MEMORY}GetMemoryUsage": _READERS,
    f"{_MEMORY}WatchMemoryUsage": _READERS,
    f"{_MEMORY}SetMemoryLimits": _ADMINS,
    f"{_MEMORY}ClearCache": _ADMINS,
    f"{_MEMORY}ResetPeakMemory": _ADMINS,
    f"{_GATEWAY}Generate": _USERS,
    f"{_GATEWAY}Abort": _USERS,
    f"{_GATEWAY}GetTokenizer": _USERS,
    f"{_GATEWAY}GetModelInfo": ANY,
    f"{_GATEWAY}GetServerInfo": ANY,
    f"{_GATEWAY}HealthCheck": ANY,
}
_SERVICES: dict[str, frozenset[Role]] = {
    HEALTH: ANY,
    "/grpc.reflection.v1alpha.ServerReflection/": _READERS,
    "/grpc.channelz.v1.Channelz/": _READERS,
}


def roles_for(method: str) -> frozenset[Role]:
    """One of these is enough; a call that nobody has thought of needs an admin."""
    service = method[: method.rfind("/") + 1]
    if method == METRICS:
        return _READERS
    return _METHODS.get(method) or _SERVICES.get(service, _ADMINS)
