"""Models that exist nowhere: a test says how large they are and how their load goes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fakes.model import FakeModel
from fakes.tokenizer import FakeTokenizer
from mlxpool_server.domain import (
    Capability,
    EmbeddingInfo,
    Footprint,
    LoadPhase,
    LoadProgress,
    ModelInfo,
    ModelSpec,
    Pooling,
)
from mlxpool_server.errors import LoadFailedError, LoadSupersededError


@dataclass
class FakeFiles:
    """One model's files. `may_load` cleared: its load waits, at half its bytes, until it is set."""

    estimated_bytes: int = 100
    warm_up_bytes: int = 0
    context_length: int = 1000
    footprint: Footprint = field(default_factory=Footprint)
    embedding: EmbeddingInfo | None = field(
        default_factory=lambda: EmbeddingInfo(2, Pooling.MEAN, pass_tokens=100)
    )
    can_generate: bool = True
    model: FakeModel = field(default_factory=FakeModel)
    tokenizer: FakeTokenizer = field(default_factory=FakeTokenizer)
    # False: a hub model, until it is fetched.
    is_fetched: bool = True
    inspect_error: str = ""
    tokenizer_error: str = ""
    # A load error raised in the middle; an Exception that is no domain error is raised as it is.
    load_error: Exception | None = None
    # False: a load that is past the point where it looks whether it is wanted.
    is_cancellable: bool = True
    may_load: threading.Event = field(default_factory=threading.Event)
    is_loading: threading.Event = field(default_factory=threading.Event)
    may_read_tokenizer: threading.Event = field(default_factory=threading.Event)
    tokenizer_files: dict[str, bytes] = field(default_factory=lambda: {"tokenizer.json": b"{}"})
    # Another one: the tokenizer's files were replaced.
    stamp: int = 0
    num_stamps: int = 0
    num_inspections: int = 0
    num_loads: int = 0
    num_tokenizer_reads: int = 0
    # The draft model of each load; empty: none.
    drafts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.may_load.set()
        self.may_read_tokenizer.set()

    @property
    def capabilities(self) -> frozenset[Capability]:
        can = {
            Capability.CHAT: True,
            Capability.TOOLS: self.tokenizer.has_tools,
            Capability.REASONING: self.tokenizer.has_reasoning,
            Capability.EMBEDDINGS: self.embedding is not None,
        }
        return frozenset(capability for capability, has in can.items() if has)

    @classmethod
    def of_size(cls, num_bytes: int, *, is_stepped: bool = False) -> FakeFiles:
        """A model whose estimate is right."""
        model = FakeModel(resident_bytes=num_bytes, is_stepped=is_stepped)
        return cls(estimated_bytes=num_bytes, model=model)


@dataclass(frozen=True)
class FakeAdapter:
    """`name` is both names, its model's and its own."""

    name: str
    resident_bytes: int


class FakeLoader:
    def __init__(self, files: Mapping[str, FakeFiles]) -> None:
        self._files = files

    def fetch(self, spec: ModelSpec, report: Callable[[LoadProgress], None]) -> None:
        files = self._files[spec.name]
        if not files.is_fetched:
            report(LoadProgress(LoadPhase.DOWNLOADING))
            files.is_fetched = True

    def inspect(self, spec: ModelSpec) -> ModelInfo | None:
        files = self._files[spec.name]
        files.num_inspections += 1
        if not files.is_fetched:
            return None
        if files.inspect_error:
            raise LoadFailedError(spec.name, files.inspect_error)
        return ModelInfo(
            architecture="fake",
            quantization="",
            context_length=files.context_length,
            vocab_size=files.tokenizer.vocab_size,
            estimated_bytes=files.estimated_bytes + self._draft_bytes(spec),
            footprint=files.footprint,
            warm_up_bytes=files.warm_up_bytes,
            revision="r1",
            capabilities=files.capabilities,
            class_names=("FakeForCausalLM",),
            embedding=files.embedding,
            can_generate=files.can_generate,
        )

    def _draft_bytes(self, spec: ModelSpec) -> int:
        return 0 if spec.draft is None else self._files[spec.draft.name].estimated_bytes

    def tokenizer_stamp(self, spec: ModelSpec) -> object:
        self._files[spec.name].num_stamps += 1
        return self._files[spec.name].stamp

    def load_tokenizer(self, spec: ModelSpec) -> FakeTokenizer:
        files = self._files[spec.name]
        files.num_tokenizer_reads += 1
        if not files.may_read_tokenizer.wait(timeout=30):
            raise TimeoutError("the test never let the tokenizer be read")
        if files.tokenizer_error:
            raise LoadFailedError(spec.name, files.tokenizer_error)
        return files.tokenizer

    def tokenizer_files(self, spec: ModelSpec) -> dict[str, bytes]:
        return self._files[spec.name].tokenizer_files

    def load(
        self,
        spec: ModelSpec,
        report: Callable[[LoadProgress], None],
        is_cancelled: Callable[[], bool],
    ) -> FakeModel | FakeAdapter:
        files = self._files[spec.name]
        files.num_loads += 1
        files.drafts.append(spec.draft_model)
        report(LoadProgress(LoadPhase.LOADING, files.estimated_bytes // 2, files.estimated_bytes))
        files.is_loading.set()
        # As a real load looks up between two portions of weights.
        while not files.may_load.wait(0.005):
            if is_cancelled() and files.is_cancellable:
                raise LoadSupersededError(spec.name)
        if files.load_error is not None:
            raise files.load_error
        return FakeAdapter(spec.name, files.model.resident_bytes) if spec.adapter else files.model
