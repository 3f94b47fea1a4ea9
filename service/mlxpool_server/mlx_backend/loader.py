"""Model folders to weights in memory, through mlx-lm. No remote code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import structlog
from mlx_lm.utils import load_model

from mlxpool_server.domain import (
    Footprint,
    HubSource,
    KvQuantization,
    Layout,
    LoadPhase,
    LoadProgress,
    ModelInfo,
    ModelSpec,
)
from mlxpool_server.errors import LoadFailedError, LoadSupersededError, MlxpoolError
from mlxpool_server.mlx_backend import row_attention
from mlxpool_server.mlx_backend.batch import MlxBatch
from mlxpool_server.mlx_backend.blas_threads import ThreadTuner
from mlxpool_server.mlx_backend.capabilities import capabilities_of
from mlxpool_server.mlx_backend.drafting.drafted_pass import can_rewind
from mlxpool_server.mlx_backend.flat_rows import flatten_rows
from mlxpool_server.mlx_backend.footprint import read_footprint
from mlxpool_server.mlx_backend.hub import (
    MODEL_FILES,
    TOKENIZER_FILES,
    cached_folder,
    download,
)
from mlxpool_server.mlx_backend.joined_products import join_products
from mlxpool_server.mlx_backend.kernel_folder import keep_kernels
from mlxpool_server.mlx_backend.last_rows import LastRows
from mlxpool_server.mlx_backend.layout import Choice, LayoutChooser, OneThread, form_of
from mlxpool_server.mlx_backend.memory import device_kind
from mlxpool_server.mlx_backend.model_caches import (
    batch_problem,
    check_kv_quantization,
    new_caches,
)
from mlxpool_server.mlx_backend.model_config import (
    check_quantization,
    class_names_of,
    describe_quantization,
    eos_token_ids,
    first_int,
    headers_of,
    one_line,
    quantization_of,
    read_config,
    vocab_size_of,
)
from mlxpool_server.mlx_backend.model_size import (
    TensorHeader,
    estimate_bytes,
    missing_weights,
    vocabulary_of,
)
from mlxpool_server.mlx_backend.openblas import OpenBlas
from mlxpool_server.mlx_backend.tokenizer import MlxTokenizer
from mlxpool_server.mlx_backend.tokenizer_files import read_tokenizer_files
from mlxpool_server.mlx_backend.warm_up import WARM_UP_TOKENS, warm_up, warm_up_bytes
from mlxpool_server.mlx_backend.weights import all_arrays, embedding_rows, evaluated
from mlxpool_server.watched_file import FileState, file_state

log = structlog.get_logger(__name__)

DTYPE_OF = {Layout.FLOAT32: mx.float32, Layout.BFLOAT16: mx.bfloat16, Layout.FLOAT16: mx.float16}
CONTEXT_KEYS = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length",
    "seq_length", "model_max_length",
)  # fmt: skip
WEIGHTS = ("model*.safetensors",)
# For a model whose files do not say, as recurrent ones: as good as no limit, and still a number.
UNKNOWN_CONTEXT_LENGTH = 1 << 20


class MlxModel:
    """A model whose arrays are all evaluated: any thread may use it."""

    def __init__(
        self,
        model: nn.Module,
        vocab_size: int,
        prefill_tokens: int,
        *,
        kv_quantization: KvQuantization | None = None,
        max_drafts: int = 0,
        blas: OpenBlas | None = None,
    ) -> None:
        # First, so that a head picks its rows before it flattens them.
        flatten_rows(model)
        self._model = LastRows(model)
        self._vocab_size = vocab_size
        self._prefill_tokens = prefill_tokens
        self._kv_quantization = kv_quantization
        self._blas = blas
        self._resident_bytes = sum(array.nbytes for array in all_arrays(model))
        self._batch_problem = batch_problem(model)
        can_draft = not self._batch_problem and can_rewind(new_caches(model, 1))
        self._max_drafts = max_drafts if can_draft else 0
        self._is_quantized = any(
            isinstance(module, nn.QuantizedLinear) for module in model.modules()
        )

    @property
    def batch_problem(self) -> str:
        """Why its rows cannot share a batch; empty when they can."""
        return self._batch_problem

    @property
    def max_drafts(self) -> int:
        """0 for a model whose caches cannot forget tokens: then nothing is guessed."""
        return self._max_drafts

    @property
    def resident_bytes(self) -> int:
        return self._resident_bytes

    def new_runner(self) -> MlxBatch:
        return MlxBatch(
            self._model,
            vocab_size=self._vocab_size,
            is_batchable=not self._batch_problem,
            prefill_tokens=self._prefill_tokens,
            kv_quantization=self._kv_quantization,
            max_drafts=self._max_drafts,
            threads=ThreadTuner.of(self._blas),
        )

    def warm_up(
        self, processors: AbstractContextManager[None], check_wanted: Callable[[], None]
    ) -> None:
        """Run it once, before it has users, and learn whether its rows can share a batch.

        `check_wanted` may raise between two steps. Raises: what a single row raises.
        """
        problem = warm_up(
            self._trial_batch,
            can_batch=not self._batch_problem,
            is_quantized=self._is_quantized,
            vocab_size=self._vocab_size,
            processors=processors,
            check_wanted=check_wanted,
        )
        self._batch_problem = self._batch_problem or problem

    def _trial_batch(self, *, is_batchable: bool) -> MlxBatch:
        # Without the tuner of threads, which is the engine thread's.
        return MlxBatch(
            self._model,
            vocab_size=self._vocab_size,
            is_batchable=is_batchable,
            prefill_tokens=WARM_UP_TOKENS,
            kv_quantization=self._kv_quantization,
        )


@dataclass(frozen=True, slots=True)
class _Look:
    """What a model's files say, and the layout that it gets."""

    info: ModelInfo
    choice: Choice

    @property
    def dtype(self) -> mx.Dtype | None:
        """None: as stored."""
        return DTYPE_OF.get(self.choice.layout)


class MlxLoader:
    """Every method blocks and may run on any thread but the event loop's."""

    def __init__(
        self,
        *,
        prefill_step_tokens: int,
        default_layout: Layout,
        processors: AbstractContextManager[None] | None = None,
        blas: OpenBlas | None = None,
        pool_limit_bytes: int | None = None,
        warm_up: bool = True,
    ) -> None:
        """`processors` is held for each portion of weights, where the engine's steps need them;
        `blas` is what a CPU's matrix products run on. `pool_limit_bytes` bounds the layouts that
        are chosen here; None: any fits. `warm_up`: run each model once before it is used.
        """
        keep_kernels()
        row_attention.install()
        self._blas = blas
        self._prefill_step_tokens = prefill_step_tokens
        self._default_layout = default_layout
        self._processors = processors or nullcontext()
        self._layouts = LayoutChooser(pool_limit_bytes, OneThread(self._processors, blas))
        self._warm_up = warm_up

    def fetch(self, spec: ModelSpec, report: Callable[[LoadProgress], None]) -> None:
        if isinstance(spec.source, HubSource):
            report(LoadProgress(LoadPhase.DOWNLOADING))
            download(spec.name, spec.source, MODEL_FILES, report)

    def inspect(self, spec: ModelSpec) -> ModelInfo | None:
        look = self._look(spec)
        return None if look is None else look.info

    def _look(self, spec: ModelSpec) -> _Look | None:
        folder = _local_folder(spec)
        if folder is None:
            return None
        config = read_config(spec.name, folder)
        if missing := missing_weights(folder):
            if isinstance(spec.source, HubSource):
                return None
            raise LoadFailedError(spec.name, f"its folder has no {missing}")
        quantization = quantization_of(config)
        headers = headers_of(spec.name, folder, config)
        if any(header.name.endswith(".scales") for header in headers):
            check_quantization(spec.name, quantization)
        choice = self._choose(spec, headers, quantization)
        footprint = _footprint(spec, config, DTYPE_OF.get(choice.layout))
        info = ModelInfo(
            architecture=str(config["model_type"]),
            quantization=describe_quantization(quantization),
            context_length=first_int(config, *CONTEXT_KEYS) or UNKNOWN_CONTEXT_LENGTH,
            vocab_size=vocab_size_of(config) or vocabulary_of(headers),
            estimated_bytes=estimate_bytes(headers, quantization, choice.layout),
            footprint=footprint,
            warm_up_bytes=warm_up_bytes(footprint) if self._warm_up else 0,
            revision=folder.name if isinstance(spec.source, HubSource) else "",
            capabilities=capabilities_of(folder),
            class_names=class_names_of(config),
        )
        return _Look(info, choice)

    def tokenizer_stamp(self, spec: ModelSpec) -> object:
        folder = _local_folder(spec, TOKENIZER_FILES)
        # A folder of the hub's is one of a revision.
        return None if folder is None else (folder, _stamps(folder, TOKENIZER_FILES))

    def load_tokenizer(self, spec: ModelSpec) -> MlxTokenizer:
        folder = _local_folder(spec, TOKENIZER_FILES)
        if folder is None and isinstance(spec.source, HubSource):
            folder = download(spec.name, spec.source, TOKENIZER_FILES)
        if folder is None:
            raise LoadFailedError(spec.name, "its folder does not exist")
        config = read_config(spec.name, folder)
        vocab_size = vocab_size_of(config)
        if not vocab_size and not missing_weights(folder):
            vocab_size = vocabulary_of(headers_of(spec.name, folder, config))
        try:
            return MlxTokenizer.read(folder, vocab_size, eos_token_ids(folder, config))
        except Exception as error:  # whatever transformers raises on a foreign folder
            problem = f"its tokenizer cannot be read: {one_line(error)}"
            raise LoadFailedError(spec.name, problem) from error

    def tokenizer_files(self, spec: ModelSpec) -> dict[str, bytes]:
        folder = _local_folder(spec, TOKENIZER_FILES)
        if folder is None:
            raise LoadFailedError(spec.name, "its files are not on this machine")
        return read_tokenizer_files(spec.name, folder)

    def load(
        self,
        spec: ModelSpec,
        report: Callable[[LoadProgress], None],
        is_cancelled: Callable[[], bool],
    ) -> MlxModel:
        folder = _local_folder(spec)
        stamps = None if folder is None else _stamps(folder, WEIGHTS)
        look = self._look(spec)
        if folder is None or look is None:
            raise LoadFailedError(spec.name, "its files are not on this machine")
        log.info("model.layout", model=spec.name, **look.choice.log_fields())
        total_bytes = look.info.estimated_bytes

        def check_wanted() -> None:
            if is_cancelled():
                raise LoadSupersededError(spec.name)

        with _as_load_failures(spec.name, ""):
            module, _ = load_model(folder, lazy=True)
            for done_bytes in evaluated(module, look.dtype, self._processors):
                report(LoadProgress(LoadPhase.LOADING, done_bytes, total_bytes))
                check_wanted()
            if _stamps(folder, WEIGHTS) != stamps:
                raise LoadFailedError(spec.name, "its files changed while they were read")
            model = self._served(spec, look.info, module)
        if self._warm_up:
            report(LoadProgress(LoadPhase.WARMING_UP, model.resident_bytes, total_bytes))
            with _as_load_failures(spec.name, "its first run failed: "):
                model.warm_up(self._processors, check_wanted)
        if model.batch_problem:
            log.warning("model.not_batchable", model=spec.name, reason=model.batch_problem)
        if spec.prompt_lookup_tokens and not model.max_drafts:
            log.warning("model.no_drafts", model=spec.name, reason="its caches cannot forget")
        return model

    def _served(self, spec: ModelSpec, info: ModelInfo, module: nn.Module) -> MlxModel:
        rows = embedding_rows(module)
        if rows and info.vocab_size > rows:
            # An id beyond its rows would end the process.
            problem = f"it claims {info.vocab_size} tokens, and has embeddings for {rows}"
            raise LoadFailedError(spec.name, problem)
        model = MlxModel(
            module,
            info.vocab_size,
            self._prefill_step_tokens,
            kv_quantization=spec.kv_quantization,
            max_drafts=spec.prompt_lookup_tokens,
            blas=self._blas,
        )
        if device_kind() == "cuda":
            join_products(module, self._processors)
        if spec.kv_quantization is not None:
            with _as_load_failures(spec.name, "its KV cache cannot be quantised: "):
                check_kv_quantization(module, spec.kv_quantization)
        return model

    def _choose(
        self, spec: ModelSpec, headers: list[TensorHeader], quantization: dict[str, Any]
    ) -> Choice:
        bytes_in = partial(estimate_bytes, headers, quantization)
        layout = self._default_layout if spec.layout is Layout.AUTO else spec.layout
        if layout is not Layout.AUTO:
            return Choice(layout, "set", bytes_in(Layout.STORED))
        return self._layouts.choose(form_of(headers, quantization), bytes_in)


@contextmanager
def _as_load_failures(name: str, prefix: str) -> Iterator[None]:
    """Whatever mlx-lm or a model's code raises on a foreign folder becomes a LoadFailedError."""
    try:
        yield
    except MlxpoolError:
        raise
    except Exception as error:
        raise LoadFailedError(name, prefix + one_line(error)) from error


def _footprint(spec: ModelSpec, config: dict[str, Any], dtype: mx.Dtype | None) -> Footprint:
    try:
        return read_footprint(
            config, dtype, fused=device_kind() != "cpu", kv_quantization=spec.kv_quantization
        )
    except Exception as error:  # noqa: BLE001 - a config that its own code refuses
        # The load will say so; a model that cannot be loaded generates nothing.
        log.debug("model.footprint_unknown", model=spec.name, error=one_line(error))
        return Footprint()


def _local_folder(spec: ModelSpec, patterns: tuple[str, ...] = MODEL_FILES) -> Path | None:
    """Where the files are, if they are here."""
    if isinstance(spec.source, Path):
        if not spec.source.is_dir():
            raise LoadFailedError(spec.name, "its folder does not exist")
        return spec.source
    return cached_folder(spec.source, patterns)


def _stamps(folder: Path, patterns: tuple[str, ...]) -> dict[str, FileState]:
    """Differ once a file was written to or replaced: old and new mixed are no model."""
    return {file.name: file_state(file) for pattern in patterns for file in folder.glob(pattern)}
