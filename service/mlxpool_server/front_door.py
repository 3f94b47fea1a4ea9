"""Who gets in, from the settings: certificates, API keys, and a warning when nothing guards it."""

from __future__ import annotations

import structlog

from mlxpool_server.rpc.access.gate import Gate
from mlxpool_server.rpc.access.keys import KeyRing
from mlxpool_server.rpc.tls import Certificates, TlsFiles
from mlxpool_server.settings import Settings, reachable_addresses

log = structlog.get_logger(__name__)


def certificates_for(settings: Settings) -> Certificates | None:
    """None: plaintext. Raises: SettingsError."""
    if settings.tls_certificate is None or settings.tls_key is None:
        return None
    files = TlsFiles(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)
    return Certificates(files)


def gate_for(settings: Settings) -> Gate:
    """Raises: SettingsError."""
    keys = None if settings.api_keys_file is None else KeyRing(settings.api_keys_file)
    return Gate(keys, health_needs_key=settings.health_needs_key)


def warn_of_exposure(settings: Settings) -> None:
    """What an operator has allowed, and should not have to find out from somebody else."""
    addresses = tuple(address for _, address in reachable_addresses(settings))
    if not addresses:
        return
    if settings.tls_certificate is None:
        log.warning("server.plaintext", addresses=addresses)
    if settings.api_keys_file is None and settings.tls_client_ca is None:
        problem = "no api_keys_file and no tls_client_ca: whoever reaches it may do everything"
        log.warning("server.open", addresses=addresses, problem=problem)
