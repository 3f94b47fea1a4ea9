"""What has to be set before other machines can reach the server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlxpool_server.domain import GatewayPort
from mlxpool_server.errors import SettingsError
from mlxpool_server.settings import Settings, check_exposure, reachable_addresses

FILE = Path("/etc/mlxpool/tls.pem")
TLS: dict[str, Any] = {"tls_certificate": FILE, "tls_key": FILE}
LOCAL = ("127.0.0.1:1", "127.9.9.9:1", "localhost:1", "[::1]:1", "unix:/run/mlxpool.sock")
REACHABLE = ("0.0.0.0:1", "[::]:1", "192.168.0.7:1", "[fe80::1]:1", "gpu-box:1", "localhost.lan:1")


@pytest.mark.parametrize("address", LOCAL)
def test_plaintext_is_fine_on_this_machine(address: str) -> None:
    """Loopback addresses and unix sockets need nothing."""
    settings = Settings(listen=(address,))
    check_exposure(settings)
    assert reachable_addresses(settings) == ()


@pytest.mark.parametrize("address", REACHABLE)
def test_plaintext_where_others_can_reach_it(address: str) -> None:
    """The start is refused with the address and both remedies."""
    with pytest.raises(SettingsError) as caught:
        check_exposure(Settings(listen=("127.0.0.1:0", address)))
    message = str(caught.value)
    assert message.startswith(f"listen {address}: ")
    assert "tls_certificate" in message
    assert "--allow-plaintext" in message


def test_a_plaintext_gateway_port_where_others_can_reach_it() -> None:
    """Is refused like plaintext calls, and allowed by the same settings."""
    ports = (GatewayPort("m", "0.0.0.0:1"),)
    with pytest.raises(SettingsError, match=r"^gateway 0\.0\.0\.0:1: "):
        check_exposure(Settings(gateway=ports))
    check_exposure(Settings(gateway=ports, allow_plaintext=True))
    check_exposure(Settings(gateway=ports, **TLS))


@pytest.mark.parametrize("address", ["0.0.0.0:1", "gpu-box:1"])
def test_plaintext_metrics_where_others_can_reach_them(address: str) -> None:
    """Are refused like plaintext calls, and allowed by the same settings."""
    with pytest.raises(SettingsError, match=f"^metrics_listen {address}: .*allow_plaintext"):
        check_exposure(Settings(metrics_listen=address))
    for how in (TLS, {"allow_plaintext": True}):
        settings = Settings(metrics_listen=address, **how)
        check_exposure(settings)
        assert reachable_addresses(settings) == (("metrics_listen", address),)
    check_exposure(Settings(metrics_listen="127.0.0.1:1"))


@pytest.mark.parametrize("address", REACHABLE)
@pytest.mark.parametrize("how", [TLS, {"allow_plaintext": True}], ids=["tls", "flag"])
def test_tls_or_the_flag_opens_it(address: str, how: dict[str, Any]) -> None:
    """Either is enough."""
    settings = Settings(listen=(address,), **how)
    check_exposure(settings)
    assert reachable_addresses(settings) == (("listen", address),)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"tls_certificate": FILE}, "tls_certificate is set without tls_key"),
        ({"tls_key": FILE}, "tls_key is set without tls_certificate"),
        ({"tls_client_ca": FILE}, "tls_client_ca is set without tls_certificate"),
        ({"health_needs_key": True}, "health_needs_key is set without api_keys_file"),
    ],
)
def test_half_a_set_up(fields: dict[str, Any], problem: str) -> None:
    """What only works together is only taken together."""
    with pytest.raises(SettingsError, match=problem):
        check_exposure(Settings(**fields))
