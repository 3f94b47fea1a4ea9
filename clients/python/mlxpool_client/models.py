"""Models and their life in the pool, tokenizations, and the server itself.

Sizes are bytes, `_s` values seconds, `_time` values aware datetimes in UTC.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlxpool_client.enums import LoadPhase, ModelState

if TYPE_CHECKING:
    from datetime import datetime

    from mlxpool_client.enums import Capability


@dataclass(frozen=True, slots=True)
class ModelActivity:
    """What a model has done since its server started; the difference of two is a rate."""

    finished_generations: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    # Those of running generations included.
    completion_tokens: int = 0
    # Generations that had a first token, and how long all of them waited for it, together.
    first_tokens: int = 0
    time_to_first_token_s: float = 0.0
    loads: int = 0
    failed_loads: int = 0
    evictions: int = 0


@dataclass(frozen=True, slots=True)
class Model:
    """A model that the server has, loaded or not; `name` is what requests put in `model`."""

    name: str
    state: ModelState = ModelState.UNKNOWN
    revision: str = ""
    adapter: str = ""
    # Why the state is FAILED.
    error_message: str = ""
    capabilities: tuple[Capability, ...] = ()
    architecture: str = ""
    # Empty when not quantized.
    quantization: str = ""
    context_length: int = 0
    vocab_size: int = 0
    # Predicted, known before a load.
    estimated_bytes: int = 0
    resident_bytes: int = 0
    active_requests: int = 0
    queued_requests: int = 0
    pinned: bool = False
    load_time: datetime | None = None
    last_used_time: datetime | None = None
    # When it is unloaded if idle; None = never.
    expire_time: datetime | None = None
    aliases: tuple[str, ...] = ()
    available_adapters: tuple[str, ...] = ()
    activity: ModelActivity = ModelActivity()


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """Sent on every change of phase and at least every 10 s; `total_bytes` 0 = not known."""

    phase: LoadPhase = LoadPhase.UNKNOWN
    completed_bytes: int = 0
    total_bytes: int = 0


@dataclass(frozen=True, slots=True)
class LoadFinished:
    """The last event of a load: the model, and what the load did to others."""

    model: Model
    already_loaded: bool = False
    evicted_models: tuple[str, ...] = ()
    duration_s: float = 0.0


LoadEvent = LoadProgress | LoadFinished


@dataclass(frozen=True, slots=True)
class Unloaded:
    """`was_loaded` is False when there was nothing to unload, which is no error."""

    was_loaded: bool
    freed_bytes: int


@dataclass(frozen=True, slots=True)
class Tokenization:
    """`pieces` are the exact bytes of each token, if asked for: a token may split a character."""

    token_ids: tuple[int, ...]
    pieces: tuple[bytes, ...]
    # The prompt after the chat template.
    rendered_prompt: str


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """Versions and device, for support tickets and clients that adapt."""

    version: str
    mlx_version: str
    mlx_lm_version: str
    device_name: str
    device_architecture: str
    start_time: datetime | None
