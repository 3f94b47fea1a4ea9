"""Model folders to weights in memory, through mlx-lm. No remote code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
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
    Layout,
    LoadPhase,
    LoadProgress,
    ModelInfo,
    ModelSpec,
)
from mlxpool_server.errors import LoadFailedError, LoadSupersededError, MlxpoolError
from mlxpool_server.mlx_backend import row_attention
from mlxpool_server.mlx_backend.adapters.adapter import Adapter, check_layers, load_adapter
from mlxpool_server.mlx_backend.adapters.files import (
    AdapterFileError,
    AdapterFiles,
    read_adapter_files,
)
from mlxpool_server.mlx_backend.capabilities import capabilities_of
from mlxpool_server.mlx_backend.embedding.decoder_info import decoder_info
from mlxpool_server.mlx_backend.embedding.encoder_model import (
    EncoderModel,
    encoder_model,
    encoder_warm_up_bytes,
)
from mlxpool_server.mlx_backend.embedding.encoders import (
    capabilities_for,
    check_encoder,
    describe_encoder,
    encoder_of,
    kept_headers,
    model_classes,
)
from mlxpool_server.mlx_backend.footprint import read_footprint
from mlxpool_server.mlx_backend.hub import (
    MODEL_FILES,
    TOKENIZER_FILES,
    cached_folder,
    download,
)
from mlxpool_server.mlx_backend.joined_products import join_products
from mlxpool_server.mlx_backend.kernel_folder import keep_kernels
from mlxpool_server.mlx_backend.layout import Choice, LayoutChooser, OneThread, form_of
from mlxpool_server.mlx_backend.loaded_model import Draft, MlxModel, can_forget
from mlxpool_server.mlx_backend.memory import device_kind
from mlxpool_server.mlx_backend.model_caches import (
    check_kv_quantization,
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
from mlxpool_server.mlx_backend.warm_up import warm_up_bytes
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


@dataclass(frozen=True, slots=True)
class _Look:
    """What a model's files say, and the layout that it gets."""

    folder: Path
    # As the weights were when it began.
    stamps: dict[str, FileState]
    info: ModelInfo
    choice: Choice
    config: dict[str, Any]

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
        if look is None:
            return None
        if spec.adapter_folder is not None:
            files = _adapter_files(spec.name, spec.adapter_folder)
            return replace(
                look.info, estimated_bytes=files.nbytes, footprint=Footprint(), warm_up_bytes=0
            )
        if spec.draft is None:
            return look.info
        draft = self._look(spec.draft)
        return None if draft is None else _together(look.info, draft.info)

    def _look(self, spec: ModelSpec) -> _Look | None:
        folder = _local_folder(spec)
        if folder is None:
            return None
        stamps = _stamps(folder, WEIGHTS)
        config = read_config(spec.name, folder)
        if missing := missing_weights(folder):
            if isinstance(spec.source, HubSource):
                return None
            raise LoadFailedError(spec.name, f"its folder has no {missing}")
        quantization = quantization_of(config)
        headers = headers_of(spec.name, folder, config)
        encoder = encoder_of(config)
        if encoder is not None:
            check_encoder(spec.name, encoder, config)
            headers = kept_headers(headers)
        if any(header.name.endswith(".scales") for header in headers):
            check_quantization(spec.name, quantization)
        choice = self._choose(spec, headers, quantization)
        info = ModelInfo(
            architecture=str(config["model_type"]),
            quantization=describe_quantization(quantization),
            context_length=first_int(config, *CONTEXT_KEYS) or UNKNOWN_CONTEXT_LENGTH,
            vocab_size=vocab_size_of(config) or vocabulary_of(headers),
            estimated_bytes=estimate_bytes(headers, quantization, choice.layout),
            revision=folder.name if isinstance(spec.source, HubSource) else "",
            class_names=class_names_of(config),
        )
        dtype = DTYPE_OF.get(choice.layout)
        if encoder is not None:
            info = describe_encoder(info, encoder, folder, config, dtype)
            needed_bytes = encoder_warm_up_bytes(info.footprint)
        else:
            embedding = decoder_info(folder, config, self._prefill_step_tokens)
            info = replace(
                info,
                footprint=_footprint(spec, config, dtype),
                capabilities=capabilities_of(folder) | capabilities_for(embedding),
                embedding=embedding,
            )
            needed_bytes = warm_up_bytes(info.footprint)
        info = replace(info, warm_up_bytes=needed_bytes if self._warm_up else 0)
        return _Look(folder, stamps, info, choice, config)

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
    ) -> MlxModel | EncoderModel | Adapter:
        if spec.adapter_folder is not None:
            return self._load_adapter(spec, spec.adapter_folder)
        return self._load_model(spec, report, is_cancelled)

    def _load_model(
        self,
        spec: ModelSpec,
        report: Callable[[LoadProgress], None],
        is_cancelled: Callable[[], bool],
    ) -> MlxModel | EncoderModel:
        looks = [self._look(each) for each in (spec, spec.draft) if each is not None]
        here = [look for look in looks if look is not None]
        if len(here) < len(looks):
            raise LoadFailedError(spec.name, "its files are not on this machine")
        total_bytes = sum(look.info.estimated_bytes for look in here)
        if spec.draft is not None:
            self._check_tokenizers(spec, spec.draft)

        def check_wanted() -> None:
            if is_cancelled():
                raise LoadSupersededError(spec.name)

        def report_bytes(before: int, done_bytes: int) -> None:
            report(LoadProgress(LoadPhase.LOADING, before + done_bytes, total_bytes))
            check_wanted()

        with _as_load_failures(spec.name, ""):
            modules: list[nn.Module] = []
            for look in here:
                before = sum(array.nbytes for each in modules for array in all_arrays(each))
                modules.append(self._read(spec, look, partial(report_bytes, before)))
            model = self._model_of(spec, here, modules)
        if self._warm_up:
            report(LoadProgress(LoadPhase.WARMING_UP, model.resident_bytes, total_bytes))
            with _as_load_failures(spec.name, "its first run failed: "):
                model.warm_up(self._processors, check_wanted)
        if model.batch_problem:
            log.warning("model.not_batchable", model=spec.name, reason=model.batch_problem)
        if spec.prompt_lookup_tokens and isinstance(model, MlxModel) and not model.max_drafts:
            log.warning("model.no_drafts", model=spec.name, reason="its caches cannot forget")
        return model

    def _load_adapter(self, spec: ModelSpec, folder: Path) -> Adapter:
        model_folder = _local_folder(spec)
        if model_folder is None:
            raise LoadFailedError(spec.name, "its model's files are not on this machine")
        files = _adapter_files(spec.name, folder)
        with _as_load_failures(spec.name, ""):
            # Lazy: only the sizes of its layers are wanted.
            check_layers(files, load_model(model_folder, lazy=True)[0])
            return load_adapter(files, self._processors)

    def _read(self, spec: ModelSpec, look: _Look, report: Callable[[int], None]) -> nn.Module:
        """Weights in memory. `report` gets how many bytes are, and may raise."""
        log.info("model.layout", model=spec.name, **look.choice.log_fields())
        module = _read_module(look.folder, look.config)
        for done_bytes in evaluated(module, look.dtype, self._processors):
            report(done_bytes)
        if _stamps(look.folder, WEIGHTS) != look.stamps:
            raise LoadFailedError(spec.name, "its files changed while they were read")
        rows = embedding_rows(module)
        if rows and look.info.vocab_size > rows:
            # An id beyond its rows would end the process.
            problem = f"it claims {look.info.vocab_size} tokens, and has embeddings for {rows}"
            raise LoadFailedError(spec.name, problem)
        return module

    def _check_tokenizers(self, spec: ModelSpec, draft: ModelSpec) -> None:
        """A guess is a token id: it has to mean the same to both."""
        if self.load_tokenizer(spec).vocabulary != self.load_tokenizer(draft).vocabulary:
            raise LoadFailedError(
                spec.name, f"its draft model {draft.name!r} has another tokenizer"
            )

    def _served(
        self, spec: ModelSpec, infos: list[ModelInfo], modules: list[nn.Module]
    ) -> MlxModel:
        """The second ones, if any, are its draft model's."""
        draft = None
        if len(modules) > 1:
            if not all(map(can_forget, modules)):
                problem = "a draft model needs caches that can forget, and so does the model itself"
                raise LoadFailedError(spec.name, problem)
            draft = Draft(modules[1], infos[1].vocab_size)
        module = modules[0]
        model = MlxModel(
            module,
            infos[0].vocab_size,
            self._prefill_step_tokens,
            draft=draft,
            kv_quantization=spec.kv_quantization,
            max_drafts=spec.prompt_lookup_tokens if draft is None else spec.num_draft_tokens,
            blas=self._blas,
        )
        if device_kind() == "cuda":
            for each in modules:
                join_products(each, self._processors)
        if spec.adapters:
            model.accept_adapters()
        if spec.kv_quantization is not None:
            with _as_load_failures(spec.name, "its KV cache cannot be quantised: "):
                check_kv_quantization(module, spec.kv_quantization)
        return model

    def _model_of(
        self, spec: ModelSpec, looks: list[_Look], modules: list[nn.Module]
    ) -> MlxModel | EncoderModel:
        config = looks[0].config
        if (encoder := encoder_of(config)) is not None:
            return encoder_model(modules[0], encoder, config, self._blas)
        return self._served(spec, [look.info for look in looks], modules)

    def _choose(
        self, spec: ModelSpec, headers: list[TensorHeader], quantization: dict[str, Any]
    ) -> Choice:
        bytes_in = partial(estimate_bytes, headers, quantization)
        layout = self._default_layout if spec.layout is Layout.AUTO else spec.layout
        if layout is not Layout.AUTO:
            return Choice(layout, "set", bytes_in(Layout.STORED))
        return self._layouts.choose(form_of(headers, quantization), bytes_in)


def _together(main: ModelInfo, draft: ModelInfo) -> ModelInfo:
    """The first one's, with what both take."""
    return replace(
        main,
        estimated_bytes=main.estimated_bytes + draft.estimated_bytes,
        footprint=main.footprint.plus(draft.footprint),
        warm_up_bytes=main.warm_up_bytes + draft.warm_up_bytes,
        context_length=min(main.context_length, draft.context_length),
    )


def _adapter_files(name: str, folder: Path) -> AdapterFiles:
    try:
        return read_adapter_files(folder)
    except AdapterFileError as error:
        raise LoadFailedError(name, f"its adapter {error}") from error


def _read_module(folder: Path, config: dict[str, Any]) -> nn.Module:
    """The layers, their weights still lazy."""
    if encoder_of(config) is not None:
        module, _ = load_model(folder, lazy=True, get_model_classes=model_classes)
    else:
        module, _ = load_model(folder, lazy=True)
    return module


@contextmanager
def _as_load_failures(name: str, prefix: str) -> Iterator[None]:
    """Whatever mlx-lm or a model's code raises on a foreign folder becomes a LoadFailedError."""
    try:
        yield
    except MlxpoolError:
        raise
    except AdapterFileError as error:
        raise LoadFailedError(name, f"its adapter {error}") from error
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
