"""The contract's enums. The numbers are the wire's; a value this client is too old to know is
UNKNOWN, never an error.
"""

from __future__ import annotations

import enum
from typing import Self


class OpenEnum(enum.Enum):
    """An enum that a newer server may extend: every number it does not have is UNKNOWN."""

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        return cls(0) if isinstance(value, int) and value != 0 else None


class ModelState(OpenEnum):
    UNKNOWN = 0
    UNLOADED = 1
    LOADING = 2
    READY = 3
    UNLOADING = 4
    FAILED = 5


class Capability(OpenEnum):
    UNKNOWN = 0
    CHAT = 1
    TOOLS = 2
    REASONING = 3
    CONSTRAINTS = 4
    EMBEDDINGS = 5
    IMAGES = 6


class LoadPhase(OpenEnum):
    UNKNOWN = 0
    QUEUED = 1
    DOWNLOADING = 2
    EVICTING = 3
    LOADING = 4
    WARMING_UP = 5


class Role(OpenEnum):
    UNKNOWN = 0
    SYSTEM = 1
    USER = 2
    ASSISTANT = 3
    TOOL = 4
    DEVELOPER = 5


class ToolMode(OpenEnum):
    UNKNOWN = 0
    AUTO = 1
    NONE = 2
    REQUIRED = 3


class Priority(OpenEnum):
    UNKNOWN = 0
    LOW = 1
    NORMAL = 2
    HIGH = 3


class Pooling(OpenEnum):
    UNKNOWN = 0
    MEAN = 1
    LAST_TOKEN = 2
    CLS = 3


class GenerationPhase(OpenEnum):
    UNKNOWN = 0
    QUEUED = 1
    LOADING = 2
    PREFILLING = 3
    DECODING = 4


class FinishReason(OpenEnum):
    UNKNOWN = 0
    STOP = 1
    STOP_SEQUENCE = 2
    MAX_TOKENS = 3
    CONTEXT_LENGTH = 4
    TOOL_CALLS = 5
    TIME_LIMIT = 6
    CANCELLED = 7


class CacheKind(OpenEnum):
    UNKNOWN = 0
    # MLX's free buffers.
    BUFFERS = 1
    # Reusable KV prefixes.
    PROMPTS = 2
