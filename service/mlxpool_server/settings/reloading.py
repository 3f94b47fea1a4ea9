"""Which settings a running server can take over (SIGHUP), and which need a new one."""

from __future__ import annotations

from mlxpool_server.settings.fields import Settings

RELOADABLE = frozenset(
    {
        "models", "models_dir",
        "pool_memory_limit_bytes", "pool_memory_share", "mlx_cache_limit_bytes",
        "default_keep_alive_s",
        "max_queued_requests", "max_queue_wait_s", "default_max_tokens", "max_prompt_tokens",
        "max_stop_sequences", "max_stop_sequence_chars", "max_deltas_per_s",
        "drain_grace_s", "engine_stuck_s", "engine_exit_s",
    }
)  # fmt: skip


def changed_settings(old: Settings, new: Settings) -> frozenset[str]:
    """The names of those that differ."""
    names = Settings.model_fields
    return frozenset(name for name in names if getattr(old, name) != getattr(new, name))


def merged_settings(old: Settings, new: Settings) -> Settings:
    """`new`, but what cannot change without a restart as in `old`."""
    fixed = {name: getattr(old, name) for name in Settings.model_fields if name not in RELOADABLE}
    return new.model_copy(update=fixed)
