"""TLS and mutual TLS, from files that may change while the server runs."""

from __future__ import annotations

import ssl
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import grpc
import structlog

from mlxpool_server.errors import SettingsError
from mlxpool_server.regular_file import opened_regular
from mlxpool_server.watched_file import state_of

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files. `client_ca`: whose certificates clients need; None: they need none."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    @property
    def all(self) -> tuple[Path, ...]:
        given = (self.certificate, self.key, self.client_ca)
        return tuple(file for file in given if file is not None)


@dataclass(frozen=True, slots=True)
class _Pair:
    """The same files, as gRPC and as Python's own ssl take them."""

    configuration: grpc.ServerCertificateConfiguration
    context: ssl.SSLContext


class Certificates:
    """The pair that new connections get. gRPC's own threads ask for it before each handshake."""

    def __init__(self, files: TlsFiles) -> None:
        """Raises: SettingsError when the files are no pair that can be served."""
        self._files = files
        self._lock = threading.Lock()
        # Before they are read: what changes meanwhile is read again.
        self._state = state_of(files.all)
        # The one in use.
        self._pair = _read(files)

    def credentials(self) -> grpc.ServerCredentials:
        """For one port of gRPC's: a port asks what changed since it asked before."""
        told = pair = self._pair

        def changed() -> grpc.ServerCertificateConfiguration | None:
            """The new pair, or None to go on with the one in use."""
            nonlocal told
            with self._lock:
                self._look()
                if told is self._pair:
                    return None
                told = self._pair
                return told.configuration

        return grpc.dynamic_ssl_server_credentials(
            pair.configuration,
            changed,  # type: ignore[arg-type]  # None is allowed, and means no change
            require_client_authentication=self._files.client_ca is not None,
        )

    def context(self) -> ssl.SSLContext:
        """For a server of asyncio; each of its handshakes gets the pair of that moment."""
        context = self._pair.context
        context.sni_callback = self._choose
        return context

    def _choose(self, connection: ssl.SSLObject, _name: str | None, _: ssl.SSLContext) -> None:
        """OpenSSL asks whether or not the client named a server."""
        with self._lock:
            self._look()
            connection.context = self._pair.context

    def _look(self) -> None:
        state = state_of(self._files.all)
        if state == self._state:
            return
        # A broken pair is reported once, and read again when a file changes again.
        self._state = state
        try:
            self._pair = _read(self._files)
        except SettingsError as error:
            log.error("tls.not_reloaded", problem=str(error))  # noqa: TRY400 - the text says it all
        else:
            log.info("tls.reloaded", certificate=str(self._files.certificate))


def _read(files: TlsFiles) -> _Pair:
    """Raises: SettingsError. gRPC itself would take any bytes, and fail every handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # A resumed session would not be held against a new tls_client_ca.
    context.options |= ssl.OP_NO_TICKET
    context.num_tickets = 0
    certificate, key = _bytes("tls_certificate", files.certificate), _bytes("tls_key", files.key)
    try:
        context.load_cert_chain(files.certificate, files.key, password=_no_password)
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"tls_certificate {files.certificate} and tls_key {files.key} are no pair of PEM "
            f"files: {_reason(error)}"
        ) from None
    authorities = None
    if files.client_ca is not None:
        authorities = _bytes("tls_client_ca", files.client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(cadata=authorities.decode("ascii", "ignore"))
        except (OSError, ValueError) as error:
            raise SettingsError(
                f"tls_client_ca {files.client_ca} holds no PEM certificates: {_reason(error)}"
            ) from None
    if (_bytes("tls_certificate", files.certificate), _bytes("tls_key", files.key)) != (
        certificate,
        key,
    ):
        raise SettingsError(f"{files.certificate} or {files.key} changed while it was read")
    configuration = grpc.ssl_server_certificate_configuration([(key, certificate)], authorities)
    return _Pair(configuration, context)


def _bytes(setting: str, file: Path) -> bytes:
    try:
        with opened_regular(file) as opened:
            return opened.read()
    except OSError as error:
        raise SettingsError(f"{setting} {file}: {error.strerror or 'cannot be read'}") from None
    except ValueError as error:
        raise SettingsError(f"{setting} {file} {error}") from None


def _no_password() -> NoReturn:
    """Left alone, OpenSSL asks for it on the terminal."""
    raise ValueError("the key has a password; write it without one")


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.lower().replace("_", " ")
    return str(error)
