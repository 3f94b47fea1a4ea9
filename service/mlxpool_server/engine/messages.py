"""What the event loop tells the engine thread."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from mlxpool_server.domain import FinishReason, Vector
from mlxpool_server.engine.backend import EmbeddingJob, LoadedModel
from mlxpool_server.engine.sequence import SequenceRequest
from mlxpool_server.errors import MlxpoolError


@dataclass(frozen=True, slots=True)
class Attach:
    name: str
    model: LoadedModel
    # Settled on the event loop.
    done: asyncio.Future[None]


@dataclass(frozen=True, slots=True)
class Detach:
    name: str
    error: MlxpoolError
    done: asyncio.Future[None]


@dataclass(frozen=True, slots=True)
class LimitPromptCache:
    name: str
    num_bytes: int
    done: asyncio.Future[None]


@dataclass(frozen=True, slots=True)
class Submit:
    slot: int
    request: SequenceRequest


@dataclass(frozen=True, slots=True)
class Abort:
    slot: int
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class Embed:
    slot: int
    job: EmbeddingJob
    done: asyncio.Future[tuple[Vector, ...]]


@dataclass(frozen=True, slots=True)
class AbortEmbed:
    slot: int
    model: str


@dataclass(frozen=True, slots=True)
class Stop:
    error: MlxpoolError


Message = Attach | Detach | LimitPromptCache | Submit | Abort | Embed | AbortEmbed | Stop
