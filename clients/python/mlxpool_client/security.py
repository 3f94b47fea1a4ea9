"""How a client proves who it is, and checks who the server is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc

from mlxpool_client.channel import is_loopback

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files for TLS.

    ca: the authorities to trust; None = the system's. certificate, key: the client's own, for
    mutual TLS; both or neither.
    """

    ca: str | Path | None = None
    certificate: str | Path | None = None
    key: str | Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the files. Raises: OSError; ValueError for half a pair."""
        if (self.certificate is None) != (self.key is None):
            raise ValueError("a client certificate needs its key, and a key its certificate")
        return grpc.ssl_channel_credentials(
            root_certificates=_read(self.ca),
            private_key=_read(self.key),
            certificate_chain=_read(self.certificate),
        )


def channel_credentials(
    tls: Tls | bool | None, credentials: grpc.ChannelCredentials | None
) -> grpc.ChannelCredentials | None:
    """Return what to open the channel with; None = plaintext. Raises: as Tls.credentials()."""
    if credentials is not None:
        if tls is not None:
            raise ValueError("give either tls or credentials, not both")
        return credentials
    if tls is True:
        tls = Tls()
    return tls.credentials() if isinstance(tls, Tls) else None


def key_metadata(api_key: str | None) -> Metadata:
    """Return the metadata that every call carries. Raises: ValueError for what is no key."""
    if api_key is None:
        return ()
    # A line feed, left by an editor, would make the metadata illegal.
    if not api_key or not api_key.isascii() or not api_key.isprintable() or " " in api_key:
        raise ValueError("the API key is empty, or has characters that no key has")
    return (("authorization", f"Bearer {api_key}"),)


def check_key_is_safe(target: str, tls: Tls | bool | None, *, is_secure: bool) -> None:
    """Raises: ValueError where a key would go to another machine in plaintext, unasked."""
    if is_secure or tls is False or is_loopback(target):
        return
    raise ValueError(
        f"the API key would travel to {target} in plaintext; use TLS (tls=True, --tls), or say "
        "that the network itself is trusted (tls=False, --no-tls)"
    )


def _read(file: str | Path | None) -> bytes | None:
    return None if file is None else Path(file).read_bytes()
