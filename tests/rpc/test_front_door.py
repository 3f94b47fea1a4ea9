"""What the server says at its start about who can reach it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from fakes.certificates import Authority
from mlxpool_server.errors import SettingsError
from mlxpool_server.front_door import certificates_for, gate_for, warn_of_exposure
from mlxpool_server.settings import Settings


def warnings_of(**settings: Any) -> list[str]:
    with capture_logs() as logs:
        warn_of_exposure(Settings(**settings))
    return [line["event"] for line in logs if line["log_level"] == "warning"]


FILE = Path("x")
TLS: dict[str, Any] = {"tls_certificate": FILE, "tls_key": FILE}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, []),
        ({"listen": ("0.0.0.0:1",)}, ["server.plaintext", "server.open"]),
        ({"listen": ("0.0.0.0:1",)} | TLS, ["server.open"]),
        ({"listen": ("0.0.0.0:1",), "api_keys_file": FILE}, ["server.plaintext"]),
        ({"listen": ("0.0.0.0:1",), "tls_client_ca": FILE} | TLS, []),
        ({"listen": ("0.0.0.0:1",), "api_keys_file": FILE} | TLS, []),
    ],
)
def test_warnings(settings: dict[str, Any], expected: list[str]) -> None:
    """One for plaintext, one for no guard at all, and only where others can reach it."""
    assert warnings_of(**settings) == expected


def test_from_settings(tmp_path: Path) -> None:
    """Neither TLS nor keys unless they are set; files that cannot be used stop the start."""
    assert certificates_for(Settings()) is None
    assert gate_for(Settings()).admit("/any/Method", ()).name is None
    certificate, key = Authority().issue().write(tmp_path)
    assert certificates_for(Settings(tls_certificate=certificate, tls_key=key)) is not None
    with pytest.raises(SettingsError, match="no pair"):
        certificates_for(Settings(tls_certificate=key, tls_key=key))
    with pytest.raises(SettingsError, match="No such file"):
        gate_for(Settings(api_keys_file=tmp_path / "none"))
