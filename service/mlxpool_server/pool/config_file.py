"""A model folder's config.json, which may come from anybody."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mlxpool_server.regular_file import opened_regular

# With a setting for each layer they have 1 MB.
MAX_CONFIG_BYTES = 32 * 1024 * 1024

# It names a module of mlx-lm's, and is shown in logs and terminals.
_MODEL_TYPE = re.compile(r"[A-Za-z0-9_.-]{1,100}")


class ConfigFileError(ValueError):
    """What is wrong with the file, without its name."""


def read_config_file(file: Path) -> dict[str, Any]:
    """Return the object in it, whose `model_type` is one.

    Raises: ConfigFileError; FileNotFoundError and other kinds of OSError.
    """
    try:
        with opened_regular(file) as opened:
            raw = opened.read(MAX_CONFIG_BYTES + 1)
    except ValueError as error:
        raise ConfigFileError(str(error)) from None
    if len(raw) > MAX_CONFIG_BYTES:
        raise ConfigFileError(f"has more than {MAX_CONFIG_BYTES} bytes")
    try:
        config = json.loads(raw)
    except (ValueError, RecursionError):
        raise ConfigFileError("is not JSON; fetch the model again") from None
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(model_type, str) or not model_type:
        raise ConfigFileError("has no model_type; mlx-lm serves only models whose config names one")
    if _MODEL_TYPE.fullmatch(model_type) is None:
        raise ConfigFileError("has a model_type that is no name")
    return config
