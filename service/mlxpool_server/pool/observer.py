"""What the pool tells whoever keeps statistics. metrics/ implements it; the pool knows no more."""

from __future__ import annotations

from typing import Protocol

from mlxpool_server.domain import GenerationFinished


class PoolObserver(Protocol):
    """Called on the event loop, at the moment itself: quick, and never raising."""

    def first_token(self, model: str, seconds: float) -> None:
        """The first token of a generation, so long after its request came."""

    def inter_token(self, model: str, seconds: float) -> None:
        """The time per token since the last text of a generation that streams."""

    def generation_finished(self, model: str, finished: GenerationFinished) -> None: ...

    def tool_call(self, model: str, num_calls: int) -> None:
        """A model wrote so many calls at once; 0: what it wrote could not be read."""

    def constrained(self, model: str, kind: str) -> None:
        """A generation was admitted whose output is constrained."""

    def adapted(self, model: str, adapter: str) -> None:
        """A generation was admitted that wants an adapter."""

    def embedded(self, model: str, num_inputs: int, num_tokens: int) -> None:
        """An Embed was answered."""

    def load_finished(self, model: str, seconds: float) -> None:
        """A load that succeeded, so long after it was asked for."""


class Unobserved:
    """Nobody keeps statistics."""

    def first_token(self, model: str, seconds: float) -> None: ...

    def inter_token(self, model: str, seconds: float) -> None: ...

    def generation_finished(self, model: str, finished: GenerationFinished) -> None: ...

    def tool_call(self, model: str, num_calls: int) -> None: ...

    def constrained(self, model: str, kind: str) -> None: ...

    def adapted(self, model: str, adapter: str) -> None: ...

    def embedded(self, model: str, num_inputs: int, num_tokens: int) -> None: ...

    def load_finished(self, model: str, seconds: float) -> None: ...
