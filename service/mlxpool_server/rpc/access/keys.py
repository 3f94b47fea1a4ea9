"""API keys: hashes in a TOML file, read again when it changes."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from mlxpool_server.errors import ApiKeyInvalidError, SettingsError
from mlxpool_server.regular_file import opened_regular
from mlxpool_server.rpc.access.roles import Role
from mlxpool_server.watched_file import state_of

log = structlog.get_logger(__name__)

# Makes a key that got into a repository easy to find.
KEY_PREFIX = "mlxpool_"
KEY_BYTES = 32
# Longer ones are not hashed: metadata may be large.
MAX_KEY_CHARS = 512
MAX_FILE_BYTES = 4 * 1024 * 1024

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FIELDS = ("name", "sha256", "roles", "max_streams", "requests_per_minute")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One entry of the file. None: no such limit."""

    name: str
    sha256: str
    roles: frozenset[Role]
    max_streams: int | None = None
    requests_per_minute: int | None = None


def new_key() -> str:
    """A fresh key: 256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)


def hash_of(key: str) -> str:
    """SHA-256, and no slow or salted hash: nobody guesses 256 random bits, however fast."""
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()


class KeyRing:
    """The keys of one file. Event loop only."""

    def __init__(self, file: Path) -> None:
        """Raises: SettingsError."""
        self._file = file
        self._state = state_of([file])
        self._keys = read_keys(file)

    def find(self, key: str) -> ApiKey:
        """Raises: ApiKeyInvalidError. How long it takes says nothing about the keys."""
        self._reload()
        digest = hash_of(key[:MAX_KEY_CHARS])
        found = None
        for entry in self._keys:
            if hmac.compare_digest(entry.sha256, digest):
                found = entry
        if found is None or len(key) > MAX_KEY_CHARS:
            raise ApiKeyInvalidError
        return found

    def _reload(self) -> None:
        """A file that cannot be read changes nothing, and is reported once."""
        state = state_of([self._file])
        if state == self._state:
            return
        self._state = state
        try:
            self._keys = read_keys(self._file)
        except SettingsError as error:
            log.error("api_keys.not_reloaded", problem=str(error))  # noqa: TRY400 - the text says it all
        else:
            log.info("api_keys.reloaded", keys=len(self._keys))


def read_keys(file: Path) -> tuple[ApiKey, ...]:
    """Raises: SettingsError, whose text names the entry and the remedy, never a hash."""
    where = f"api_keys_file {file}"
    try:
        raw = _read(file)
    except OSError as error:
        raise SettingsError(f"{where}: {error.strerror or 'cannot be read'}") from None
    except ValueError as error:
        raise SettingsError(f"{where}: {error}") from None
    try:
        table = tomllib.loads(raw.decode())
    except (ValueError, RecursionError):
        # Not the parser's own words: they may quote a line.
        raise SettingsError(f"{where}: not TOML") from None
    entries = table.pop("keys", [])
    if table or not isinstance(entries, list):
        raise SettingsError(f"{where}: holds [[keys]] tables and nothing else")
    keys: list[ApiKey] = []
    for number, entry in enumerate(entries, start=1):
        try:
            keys.append(_key(entry))
        except ValueError as error:
            raise SettingsError(f"{where}: [[keys]] number {number}: {error}") from None
    for what, values in (("name", [k.name for k in keys]), ("sha256", [k.sha256 for k in keys])):
        if len(set(values)) != len(values):
            raise SettingsError(f"{where}: two keys have the same {what}")
    return tuple(keys)


def _read(file: Path) -> bytes:
    """Raises: OSError; ValueError for a file that may not be used."""
    with opened_regular(file) as opened:
        if os.fstat(opened.fileno()).st_mode & stat.S_IWOTH:
            raise ValueError("everyone on this machine may write to it; chmod o-w")
        raw = opened.read(MAX_FILE_BYTES + 1)
    if len(raw) > MAX_FILE_BYTES:
        raise ValueError(f"larger than {MAX_FILE_BYTES} bytes")
    return raw


def check_entry(entry: Mapping[str, object]) -> None:
    """Raises: SettingsError when the file could not hold this entry."""
    try:
        _key(entry)
    except ValueError as error:
        raise SettingsError(f"the key {error}") from None


def _key(entry: object) -> ApiKey:
    if not isinstance(entry, Mapping):
        raise ValueError("is no table")  # noqa: TRY004 - a wrong value like the others
    for field in entry:
        if field not in _FIELDS:
            raise ValueError(f"has an unknown field; there are {', '.join(_FIELDS)}")
    name, sha256 = entry.get("name"), entry.get("sha256")
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise ValueError("needs a name of up to 64 letters, digits and ._@-")
    if not isinstance(sha256, str) or _SHA256.fullmatch(sha256) is None:
        raise ValueError("needs the key's sha256 in 64 lower-case hex digits; see mlxpool new-key")
    return ApiKey(
        name,
        sha256,
        _roles(entry.get("roles")),
        _limit(entry, "max_streams"),
        _limit(entry, "requests_per_minute"),
    )


def _roles(value: object) -> frozenset[Role]:
    known = {role.value: role for role in Role}
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ValueError(f"needs roles, a list of {', '.join(known)}")
    if any(role not in known for role in value):
        raise ValueError(f"has an unknown role; there are {', '.join(known)}")
    return frozenset(known[role] for role in value)


def _limit(entry: Mapping[str, object], field: str) -> int | None:
    value = entry.get(field)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{field} has to be a whole number from 1; leave it out for no limit")
    return value
