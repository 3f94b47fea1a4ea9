"""Who may make which call, and how often."""

from __future__ import annotations

from pathlib import Path

import pytest
from grpc_channelz.v1 import channelz_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from smg_grpc_proto import mlx_engine_pb2

from mlxpool.v1 import memory_service_pb2, model_service_pb2
from mlxpool_server.errors import (
    ApiKeyInvalidError,
    ApiKeyMissingError,
    RateLimitedError,
    RoleMissingError,
    TooManyStreamsError,
)
from mlxpool_server.rpc.access import roles
from mlxpool_server.rpc.access.gate import Gate, Metadata
from mlxpool_server.rpc.access.keys import KeyRing, hash_of
from mlxpool_server.rpc.access.roles import Role, roles_for
from mlxpool_server.rpc.interceptors.wrap import OWN_PREFIXES

GENERATE = "/mlxpool.v1.ModelService/Generate"
HEALTH = "/grpc.health.v1.Health/Check"
ADMIN, INFERENCE, OBSERVER = Role.ADMIN, Role.INFERENCE, Role.OBSERVER
FILES = (
    model_service_pb2, memory_service_pb2, mlx_engine_pb2, health_pb2, reflection_pb2,
    channelz_pb2,
)  # fmt: skip
METHODS = {
    f"/{service.full_name}/{method.name}"
    for file in FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def bearer(key: str) -> Metadata:
    return (("user-agent", "test"), ("authorization", f"Bearer {key}"))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A key of each role, named after it: `admin-key` and so on."""
    path = tmp_path / "keys.toml"
    path.write_text(
        "".join(
            f'[[keys]]\nname = "{role.value}"\nsha256 = "{hash_of(f"{role.value}-key")}"\n'
            f'roles = ["{role.value}"]\n'
            for role in Role
        )
    )
    return path


@pytest.fixture
def gate(file: Path, clock: Clock) -> Gate:
    return Gate(KeyRing(file), clock=clock)


def limited(file: Path, clock: Clock, limits: str) -> Gate:
    """One key, `k`, with these limits."""
    file.write_text(
        f'[[keys]]\nname = "k"\nsha256 = "{hash_of("k")}"\nroles = ["inference"]\n{limits}'
    )
    return Gate(KeyRing(file), clock=clock)


# ---------------------------------------------------------------- roles


def test_every_method_is_in_the_table() -> None:
    """A new RPC is given its roles together with its name."""
    named = {method for method in METHODS if method.startswith(OWN_PREFIXES)}
    assert set(roles._METHODS) == named
    services = {method[: method.rfind("/") + 1] for method in METHODS - named}
    assert set(roles._SERVICES) == services


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (GENERATE, {INFERENCE}),
        ("/mlxpool.v1.ModelService/CancelGeneration", {INFERENCE, ADMIN}),
        ("/mlxpool.v1.ModelService/ListModels", {INFERENCE, OBSERVER, ADMIN}),
        ("/mlxpool.v1.ModelService/LoadModel", {ADMIN}),
        ("/mlxpool.v1.ModelService/UnloadModel", {ADMIN}),
        ("/mlxpool.v1.MemoryService/WatchMemoryUsage", {OBSERVER, ADMIN}),
        ("/mlxpool.v1.MemoryService/SetMemoryLimits", {ADMIN}),
        ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", {OBSERVER, ADMIN}),
        ("/grpc.channelz.v1.Channelz/GetServers", {OBSERVER, ADMIN}),
        (HEALTH, {INFERENCE, OBSERVER, ADMIN}),
        ("/somebody.Else/Call", {ADMIN}),
        ("nonsense", {ADMIN}),
    ],
)
def test_roles(method: str, expected: set[Role]) -> None:
    """As docs/security.md says; what nobody thought of is for admins."""
    assert roles_for(method) == expected


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_key_may_do_what_its_role_may(gate: Gate, method: str, role: Role) -> None:
    """And nothing else; the error names the roles that would do. Health is open to all."""
    metadata = bearer(f"{role.value}-key")
    if role in roles_for(method) or "Health" in method:
        gate.admit(method, metadata)
        return
    with pytest.raises(RoleMissingError) as caught:
        gate.admit(method, metadata)
    assert caught.value.key_name == role.value
    assert set(caught.value.roles) == {each.value for each in roles_for(method)}


def test_the_documented_table_is_the_roles() -> None:
    """docs/security.md has a row for each RPC of ours, with its roles."""
    text = (Path(__file__).parents[3] / "docs" / "security.md").read_text()
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| `")]
    documented = {
        name.strip(" `"): {
            role
            for role, cell in zip((INFERENCE, OBSERVER, ADMIN), cells, strict=True)
            if cell.strip()
        }
        for names, *cells in rows
        if len(cells) == 3
        for name in names.split(",")
    }
    for method in METHODS:
        if method.startswith("/mlxpool."):
            assert documented.pop(method.rpartition("/")[2]) == roles_for(method)
    assert documented == {}


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize("metadata", [(), (("user-agent", "x"),), (("x-api-key", "admin-key"),)])
def test_without_a_key(gate: Gate, metadata: Metadata) -> None:
    """UNAUTHENTICATED, and the way to send one."""
    with pytest.raises(ApiKeyMissingError, match="authorization: Bearer"):
        gate.admit(GENERATE, metadata)


@pytest.mark.parametrize(
    "value",
    ["", "Bearer", "Bearer ", "inference-key", "Basic inference-key", "Bearer wrong", "Bearer\0k"],
)
def test_with_a_wrong_one(gate: Gate, value: str) -> None:
    """What was sent is not in the error."""
    with pytest.raises(ApiKeyInvalidError) as caught:
        gate.admit(GENERATE, (("authorization", value),))
    assert "wrong" not in str(caught.value)
    assert "inference" not in str(caught.value)


def test_two_keys_are_none(gate: Gate) -> None:
    """A proxy that adds its own must not lend it to its callers."""
    with pytest.raises(ApiKeyInvalidError):
        gate.admit(GENERATE, (*bearer("wrong"), *bearer("inference-key")))


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_scheme_has_no_case(gate: Gate, scheme: str) -> None:
    """As RFC 7235 says."""
    assert gate.admit(GENERATE, (("authorization", f"{scheme} inference-key"),)).name == "inference"


def test_health_is_open_unless_told(file: Path) -> None:
    """Probes have no keys; a setting closes it."""
    assert Gate(KeyRing(file)).admit(HEALTH, ()).name is None
    closed = Gate(KeyRing(file), health_needs_key=True)
    with pytest.raises(ApiKeyMissingError):
        closed.admit(HEALTH, ())
    assert closed.admit(HEALTH, bearer("observer-key")).name == "observer"


@pytest.mark.parametrize("method", sorted(METHODS))
def test_without_a_file_everything_is_allowed(method: str) -> None:
    """As on a developer's own machine."""
    assert Gate(None).admit(method, ()).name is None


# ---------------------------------------------------------------- limits


def test_requests_a_minute(file: Path, clock: Clock) -> None:
    """A minute's worth at once, then as they come back, one by one."""
    gate = limited(file, clock, "requests_per_minute = 3")
    for _ in range(3):
        gate.admit(GENERATE, bearer("k"))
    with pytest.raises(RateLimitedError) as caught:
        gate.admit(GENERATE, bearer("k"))
    assert caught.value.retry_after_s == pytest.approx(20)
    clock.now += 15
    with pytest.raises(RateLimitedError) as caught:
        gate.admit(GENERATE, bearer("k"))
    assert caught.value.retry_after_s == pytest.approx(5)
    clock.now += 5
    gate.admit(GENERATE, bearer("k"))
    with pytest.raises(RateLimitedError):
        gate.admit(GENERATE, bearer("k"))


def test_an_idle_key_saves_one_minute(file: Path, clock: Clock) -> None:
    """Not an hour's worth of requests at once."""
    gate = limited(file, clock, "requests_per_minute = 2")
    gate.admit(GENERATE, bearer("k"))
    clock.now += 3600
    gate.admit(GENERATE, bearer("k"))
    gate.admit(GENERATE, bearer("k"))
    with pytest.raises(RateLimitedError):
        gate.admit(GENERATE, bearer("k"))


def test_a_refused_role_costs_no_request(file: Path, clock: Clock) -> None:
    """The bucket counts what was let through."""
    gate = limited(file, clock, "requests_per_minute = 1")
    for _ in range(5):
        with pytest.raises(RoleMissingError):
            gate.admit("/mlxpool.v1.ModelService/LoadModel", bearer("k"))
    gate.admit(GENERATE, bearer("k"))


def test_streams_at_once(file: Path, clock: Clock) -> None:
    """One more is refused; one that ended, by an error too, makes room."""
    gate = limited(file, clock, "max_streams = 2")
    first, second, third = (gate.admit(GENERATE, bearer("k")) for _ in range(3))
    with first.stream(), second.stream():
        with pytest.raises(TooManyStreamsError) as caught, third.stream():
            pass
        assert caught.value.max_streams == 2
    with pytest.raises(ZeroDivisionError), first.stream():
        _ = 1 / 0
    with first.stream(), second.stream():
        pass


def test_a_reload_changes_the_limits_and_keeps_the_count(file: Path, clock: Clock) -> None:
    """What a key has used stays used."""
    gate = limited(file, clock, "max_streams = 1")
    with gate.admit(GENERATE, bearer("k")).stream():
        file.write_text(file.read_text().replace("max_streams = 1", "max_streams = 2\n"))
        with (
            gate.admit(GENERATE, bearer("k")).stream(),
            pytest.raises(TooManyStreamsError),
            gate.admit(GENERATE, bearer("k")).stream(),
        ):
            pass


def test_no_limits_unless_given(file: Path, clock: Clock) -> None:
    """A key without them has none."""
    gate = limited(file, clock, "")
    for _ in range(1000):
        gate.admit(GENERATE, bearer("k"))
