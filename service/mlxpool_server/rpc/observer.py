"""What a call was, for whoever keeps statistics or traces. metrics/ and tracing/ implement it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mlxpool_server.domain import GenerationFinished

# The methods that generate, as EndedCall names them.
GENERATE = frozenset({"mlxpool.v1.ModelService/Generate", "mlx.grpc.engine.MlxEngine/Generate"})


@dataclass(frozen=True, slots=True)
class EndedCall:
    """A call of one of our own methods. Nothing of its prompt or its text but the token counts."""

    # "mlxpool.v1.ModelService/Generate".
    method: str
    # gRPC's name of the status: "OK", "UNAVAILABLE".
    status: str
    # POSIX seconds.
    start_time: float
    duration_s: float
    # Our reason for a status that is not OK; empty where there is none.
    reason: str = ""
    # What the log line says: `model` is the caller's own word until the model was found.
    facts: Mapping[str, object] = field(default_factory=dict)
    # The caller's trace context, and nothing else of its metadata.
    metadata: Sequence[tuple[str, str | bytes]] = ()
    finished: GenerationFinished | None = None


class CallObserver(Protocol):
    def call_ended(self, call: EndedCall) -> None:
        """Event loop; quick, and never raising."""
