"""Which settings a running server takes over."""

from __future__ import annotations

from mlxpool_server.settings import Settings, changed_settings, merged_settings
from mlxpool_server.settings.reloading import RELOADABLE


def test_every_reloadable_setting_is_one() -> None:
    """A renamed setting does not stay behind in the list."""
    assert set(Settings.model_fields) >= RELOADABLE


def test_changes_are_found_by_name() -> None:
    """Written or not: what counts is the value."""
    old, new = Settings(), Settings(max_batch_size=32, drain_grace_s=1.0)
    assert changed_settings(old, new) == {"drain_grace_s"}


def test_what_needs_a_restart_stays() -> None:
    """The rest is the new one's."""
    old, new = Settings(max_batch_size=4), Settings(max_batch_size=8, max_prompt_tokens=5)
    merged = merged_settings(old, new)
    assert (merged.max_batch_size, merged.max_prompt_tokens) == (4, 5)
