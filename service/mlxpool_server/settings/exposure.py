"""Which addresses other machines can reach, and what has to be set before they may."""

from __future__ import annotations

import ipaddress

from mlxpool_server.errors import SettingsError
from mlxpool_server.settings.fields import Settings


def check_exposure(settings: Settings) -> None:
    """Raises: SettingsError for half of a TLS set-up, and for plaintext where others can reach it.

    These rules are about several settings at once, so no single one's reader has them.
    """
    has_certificate, has_key = settings.tls_certificate is not None, settings.tls_key is not None
    if has_certificate != has_key:
        given, missing = ("tls_certificate", "tls_key")[:: 1 if has_certificate else -1]
        raise SettingsError(f"{given} is set without {missing}; set both or neither")
    if settings.tls_client_ca is not None and not has_certificate:
        raise SettingsError(
            "tls_client_ca is set without tls_certificate; mutual TLS needs both, and tls_key"
        )
    if settings.health_needs_key and settings.api_keys_file is None:
        raise SettingsError("health_needs_key is set without api_keys_file; there are no keys")
    if has_certificate or settings.allow_plaintext:
        return
    for setting, address in reachable_addresses(settings):
        raise SettingsError(
            f"{setting} {address}: other machines can reach it, and it would be plaintext; set "
            "tls_certificate and tls_key, or allow_plaintext (--allow-plaintext) where the network "
            "itself is trusted"
        )


def reachable_addresses(settings: Settings) -> tuple[tuple[str, str], ...]:
    """Setting and address of each that is neither loopback nor a unix socket."""
    all_addresses = [("listen", address) for address in settings.listen]
    all_addresses += [("gateway", port.listen) for port in settings.gateway]
    if settings.metrics_listen is not None:
        all_addresses.append(("metrics_listen", settings.metrics_listen))
    return tuple(each for each in all_addresses if not _is_local(each[1]))


def _is_local(address: str) -> bool:
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0]
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        # Any other name is whatever a resolver says.
        return host == "localhost"
