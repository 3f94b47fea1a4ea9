"""Where settings come from: a TOML file, then `MLXPOOL_*`, then flags; the last one wins."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from mlxpool_server.domain import GatewayPort, ModelSpec
from mlxpool_server.errors import SettingsError
from mlxpool_server.settings.fields import Settings
from mlxpool_server.settings.gateway_table import GatewayTable, parse_gateway_flag
from mlxpool_server.settings.model_table import ModelTable, anchored_path, parse_model_flag
from mlxpool_server.settings.reference import describe_settings, flag_of, variable_of

_PREFIX = "MLXPOOL_"
CONFIG_VARIABLE = f"{_PREFIX}CONFIG"
# Kubernetes and Docker put these into every container beside a service whose name starts so.
_SERVICE_LINK = re.compile(
    r"MLXPOOL_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)"
)
# Names with our prefix that are no settings: the file itself, and what the cache folder, the
# client and the scripts read.
_OTHERS = (
    "CONFIG", "CACHE_DIR", "EXTRA",
    "TARGET", "API_KEY", "TLS", "CA", "CLIENT_CERT", "CLIENT_KEY",
)  # fmt: skip
_OTHER_VARIABLES = frozenset(f"{_PREFIX}{name}" for name in _OTHERS)
_LISTS = frozenset({"listen", "models", "gateway"})
_PATHS = frozenset(
    {
        "models_dir", "blas_library",
        "tls_certificate", "tls_key", "tls_client_ca", "api_keys_file",
    }
)  # fmt: skip
_MAX_ECHOED_CHARS = 80


@dataclass(frozen=True, slots=True)
class _Given:
    """A value, where it came from, and the folder that its relative paths start from."""

    value: object
    origin: str
    folder: Path


def load_settings(
    config_file: Path | None, flags: Mapping[str, object], environ: Mapping[str, str]
) -> Settings:
    """Read the settings: the file's, overridden by `MLXPOOL_*`, overridden by the flags.

    `flags` are by field name, None where a flag was not given. A list is taken as a whole from
    its last source. Raises: SettingsError: one line with the setting, its source and the remedy.
    """
    given: dict[str, _Given] = {}
    if config_file is not None:
        given |= _from_file(config_file)
    given |= _from_environment(environ)
    given |= _from_flags(flags)
    values = {name: _prepared(name, setting) for name, setting in given.items()}
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise _invalid(error, given) from None


# ---------------------------------------------------------------- the three sources


def _from_file(file: Path) -> dict[str, _Given]:
    remedy = "name a TOML file with --config or MLXPOOL_CONFIG"
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"config file {file}: {error.strerror}; {remedy}") from None
    except (ValueError, RecursionError) as error:
        # ValueError: TOMLDecodeError, and what it lets through: wrong UTF-8, endless integers.
        problem = " ".join(str(error).split())
        raise SettingsError(f"config file {file}: not TOML: {problem}; {remedy}") from None
    for name in table:
        if name not in Settings.model_fields:
            hint = _did_you_mean(name, Settings.model_fields)
            raise SettingsError(f"{_key(name)} (file {file}): no such setting; {hint}")
    return {name: _Given(value, f"file {file}", file.parent) for name, value in table.items()}


def _from_environment(environ: Mapping[str, str]) -> dict[str, _Given]:
    variables = {variable_of(name): name for name in Settings.model_fields}
    given = {}
    for variable, text in sorted(environ.items()):
        name = variables.get(variable)
        # An empty variable is an unset one: compose files and shells cannot always leave it out.
        if name is not None and text:
            origin = f"environment variable {variable}"
            given[name] = _Given(text, origin, Path.cwd())
        elif name is None and _is_misspelt(variable):
            hint = _did_you_mean(variable, [*variables, *_OTHER_VARIABLES])
            raise SettingsError(f"{variable} (environment): no such setting; {hint}")
    return given


def _from_flags(flags: Mapping[str, object]) -> dict[str, _Given]:
    given = {}
    for name, value in flags.items():
        if name not in Settings.model_fields:
            hint = _did_you_mean(name, Settings.model_fields)
            raise SettingsError(f"{name} (flag): no such setting; {hint}")
        if value is not None:
            given[name] = _Given(value, f"flag {flag_of(name)}", Path.cwd())
    return given


def _is_misspelt(variable: str) -> bool:
    return (
        variable.startswith(_PREFIX)
        and variable not in _OTHER_VARIABLES
        and _SERVICE_LINK.fullmatch(variable) is None
    )


# ---------------------------------------------------------------- lists, paths and models


def _prepared(name: str, given: _Given) -> object:
    """Return the value for Settings: lists, absolute paths, ModelSpecs. Raises: SettingsError."""
    value = given.value
    if name in _LISTS and isinstance(value, str):
        value = [item.strip() for item in value.split(",") if item.strip()]
    try:
        if name in _PATHS and isinstance(value, str):
            return anchored_path(value, given.folder)
        if name == "listen" and isinstance(value, list):
            return tuple(_anchored_address(address, given) for address in value)
    except ValueError as error:
        raise SettingsError(f"{name} ({given.origin}): {error}") from None
    if name in _TABLES and isinstance(value, list | tuple):
        table = _TABLES[name]
        return tuple(_entry(table, each, number, given) for number, each in enumerate(value, 1))
    return value


def _anchored_address(address: object, given: _Given) -> object:
    """Make a file's relative socket path start from the file's folder, like its other paths."""
    if not isinstance(address, str) or not given.origin.startswith("file "):
        return address
    scheme, _, path = address.partition(":")
    if scheme != "unix" or not path or path.startswith("//"):
        return address
    return f"unix:{anchored_path(path, given.folder)}"


@dataclass(frozen=True, slots=True)
class _Table:
    """A setting whose entries are tables in the file and one word each elsewhere."""

    name: str
    value: type
    table: type[ModelTable | GatewayTable]
    from_flag: Callable[[str, Path], object]


_TABLES = {
    "models": _Table("models", ModelSpec, ModelTable, parse_model_flag),
    "gateway": _Table(
        "gateway", GatewayPort, GatewayTable, lambda text, _: parse_gateway_flag(text)
    ),
}


def _entry(table: _Table, entry: object, number: int, given: _Given) -> object:
    if isinstance(entry, table.value):
        return entry
    if isinstance(entry, str):
        where = f"{table.name} {_echo(entry)} ({given.origin})"
    else:
        where = f"[[{table.name}]] number {number} ({given.origin})"
    try:
        if isinstance(entry, str):
            return table.from_flag(entry, given.folder)
        return table.table.model_validate(entry).domain_value(given.folder)
    except ValidationError as error:
        raise SettingsError(f"{where}: {_table_problem(table, error)}") from None
    except ValueError as error:
        raise SettingsError(f"{where}: {error}") from None


# ---------------------------------------------------------------- what went wrong


def _invalid(error: ValidationError, given: Mapping[str, _Given]) -> SettingsError:
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0])
    text = f"{name} = {_echo(first['input'])} ({given[name].origin}): {_sentence(first)}"
    if first["type"] == "value_error":
        # Raised by a parser of ours, whose text has the remedy already.
        return SettingsError(text)
    row = next(row for row in describe_settings() if row.name == name)
    return SettingsError(f"{text}; write a value such as {row.example}")


def _table_problem(table: _Table, error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"has no {key}; add {key}"
    if first["type"] != "extra_forbidden":
        return f"{key or 'the table'} = {_echo(first['input'])}: {_sentence(first)}"
    if key in Settings.model_fields:
        return f"{key} is a setting of the server; move it above the first [[{table.name}]]"
    return f"{_key(key)}: no such key; {_did_you_mean(key, table.table.model_fields)}"


def _sentence(detail: ErrorDetails) -> str:
    message = detail["msg"].removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _key(name: str) -> str:
    return name if name.isidentifier() else _echo(name)


def _echo(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_ECHOED_CHARS else f"{text[:_MAX_ECHOED_CHARS]}…"


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"did you mean {close[0]}?" if close else "docs/configuration.md lists them all"
