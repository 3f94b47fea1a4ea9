"""Settings: read once (TOML file < environment < flags), frozen, passed down."""

from mlxpool_server.settings.exposure import check_exposure, reachable_addresses
from mlxpool_server.settings.fields import Settings
from mlxpool_server.settings.reference import SettingRow, describe_settings, render_settings_table
from mlxpool_server.settings.reloading import changed_settings, merged_settings
from mlxpool_server.settings.sources import CONFIG_VARIABLE, load_settings

__all__ = [
    "CONFIG_VARIABLE",
    "SettingRow",
    "Settings",
    "changed_settings",
    "check_exposure",
    "describe_settings",
    "load_settings",
    "merged_settings",
    "reachable_addresses",
    "render_settings_table",
]
