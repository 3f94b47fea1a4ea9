"""Settings: read once (TOML file < environment < flags), frozen, passed down."""

from mlxpool_server.settings.fields import Settings
from mlxpool_server.settings.reference import SettingRow, describe_settings, render_settings_table
from mlxpool_server.settings.sources import CONFIG_VARIABLE, load_settings

__all__ = [
    "CONFIG_VARIABLE",
    "SettingRow",
    "Settings",
    "describe_settings",
    "load_settings",
    "render_settings_table",
]
