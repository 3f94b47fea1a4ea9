"""The reference of all settings, made from the fields themselves: one table for the docs."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

from mlxpool_server.settings.fields import Settings

# Repeated flags read better in the singular.
_SINGULAR = {"models": "model"}


@dataclass(frozen=True, slots=True)
class SettingRow:
    """One setting as the documentation shows it; `default` is as an operator would write it."""

    name: str
    flag: str
    variable: str
    type: str
    default: str
    description: str
    # A value that is accepted: the default, or one where there is none.
    example: str
    is_list: bool
    # A flag without a value means true.
    is_switch: bool


def flag_of(name: str) -> str:
    """Return the flag that sets this field."""
    return "--" + _SINGULAR.get(name, name).replace("_", "-")


def variable_of(name: str) -> str:
    """Return the environment variable that sets this field."""
    return "MLXPOOL_" + name.upper()


def describe_settings() -> tuple[SettingRow, ...]:
    """Return a row for every setting, in the order of their declaration."""
    rows = []
    for name, field in Settings.model_fields.items():
        default = _written(field.default)
        rows.append(
            SettingRow(
                name=name,
                flag=flag_of(name),
                variable=variable_of(name),
                type=field.title or "",
                default=default,
                description=field.description or "",
                example=default or str((field.examples or [""])[0]),
                is_list=isinstance(field.default, tuple),
                is_switch=isinstance(field.default, bool),
            )
        )
    return tuple(rows)


def render_settings_table() -> str:
    """Return the Markdown table of docs/configuration.md."""
    lines = [
        "| Setting | Flag | Environment | Value | Default | What it does |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| `{row.name}` | `{row.flag}` | `{row.variable}` | {row.type} "
        f"| {f'`{row.default}`' if row.default else 'unset'} | {row.description} |"
        for row in describe_settings()
    ]
    return "\n".join(lines) + "\n"


def _written(value: object) -> str:  # noqa: PLR0911 - one for each kind of value
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value)
    if isinstance(value, enum.Enum):
        return str(value.value)
    if value == math.inf:
        return "never"
    if isinstance(value, int) and value >= 2**20 and value % 2**20 == 0:
        return f"{value // 2**20}MiB"
    return str(value)
