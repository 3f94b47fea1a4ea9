"""Model folders to weights in memory, through mlx-lm. No remote code."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import structlog
from mlx_lm.utils import dequantize_model, load_model
from safetensors import SafetensorError

from mlxpool_server.domain import (
    Capability,
    Footprint,
    HubSource,
    Layout,
    LoadPhase,
    LoadProgress,
    ModelInfo,
    ModelSpec,
)
from mlxpool_server.errors import LoadFailedError, LoadSupersededError, MlxpoolError
from mlxpool_server.mlx_backend.batch import MlxBatch
from mlxpool_server.mlx_backend.footprint import read_footprint
from mlxpool_server.mlx_backend.hub import (
    MODEL_FILES,
    TOKENIZER_FILES,
    cached_folder,
    download,
)
from mlxpool_server.mlx_backend.memory import device_kind
from mlxpool_server.mlx_backend.model_size import (
    TensorHeader,
    estimate_bytes,
    missing_weights,
    read_headers,
    vocabulary_of,
)
from mlxpool_server.mlx_backend.tokenizer import MlxTokenizer

log = structlog.get_logger(__name__)

DTYPE_OF = {Layout.FLOAT32: mx.float32, Layout.BFLOAT16: mx.bfloat16, Layout.FLOAT16: mx.float16}
# Weights are evaluated in portions, so that progress shows and a cancelled load stops soon.
PORTION_BYTES = 64 * 1024 * 1024
CONTEXT_KEYS = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length",
    "seq_length", "model_max_length",
)  # fmt: skip
# For a model whose files do not say, as recurrent ones: as good as no limit, and still a number.
UNKNOWN_CONTEXT_LENGTH = 1 << 20
INT32_MAX = 2**31 - 1


class MlxModel:
    """A model whose arrays are all evaluated: any thread may use it."""

    def __init__(self, model: nn.Module, vocab_size: int, batch_options: dict[str, int]) -> None:
        self._model = model
        self._vocab_size = vocab_size
        self._batch_options = batch_options
        self._resident_bytes = sum(array.nbytes for array in _arrays(model))

    @property
    def resident_bytes(self) -> int:
        return self._resident_bytes

    def new_runner(self) -> MlxBatch:
        return MlxBatch(self._model, vocab_size=self._vocab_size, **self._batch_options)


class MlxLoader:
    """Every method blocks and may run on any thread but the event loop's."""

    def __init__(
        self,
        *,
        max_batch_size: int,
        prefill_rows: int,
        prefill_step_tokens: int,
        default_layout: Layout,
    ) -> None:
        self._batch_options = {
            "max_batch_size": max_batch_size,
            "prefill_rows": prefill_rows,
            "prefill_step_tokens": prefill_step_tokens,
        }
        self._default_layout = default_layout

    def fetch(self, spec: ModelSpec, report: Callable[[LoadProgress], None]) -> None:
        if isinstance(spec.source, HubSource):
            report(LoadProgress(LoadPhase.DOWNLOADING))
            download(spec.name, spec.source, MODEL_FILES, report)

    def inspect(self, spec: ModelSpec) -> ModelInfo | None:
        folder = _local_folder(spec)
        if folder is None:
            return None
        config = _read_config(spec.name, folder)
        if missing := missing_weights(folder):
            if isinstance(spec.source, HubSource):
                return None
            raise LoadFailedError(spec.name, f"its folder has no {missing}")
        quantization = _dict(config, "quantization") or _dict(config, "quantization_config")
        headers = _kept(_headers(spec.name, folder), config)
        has_template = _has_chat_template(folder)
        return ModelInfo(
            architecture=str(config["model_type"]),
            quantization=_describe(quantization),
            context_length=_first_int(config, *CONTEXT_KEYS) or UNKNOWN_CONTEXT_LENGTH,
            vocab_size=_first_int(config, "vocab_size") or vocabulary_of(headers),
            estimated_bytes=estimate_bytes(headers, quantization, self._layout(spec)),
            footprint=self._footprint(spec, config),
            revision=folder.name if isinstance(spec.source, HubSource) else "",
            capabilities=frozenset({Capability.CHAT}) if has_template else frozenset(),
        )

    def load_tokenizer(self, spec: ModelSpec) -> MlxTokenizer:
        folder = _local_folder(spec, TOKENIZER_FILES)
        if folder is None and isinstance(spec.source, HubSource):
            folder = download(spec.name, spec.source, TOKENIZER_FILES)
        if folder is None:
            raise LoadFailedError(spec.name, "its folder does not exist")
        config = _read_config(spec.name, folder)
        vocab_size = _first_int(config, "vocab_size")
        if not vocab_size and not missing_weights(folder):
            vocab_size = vocabulary_of(_headers(spec.name, folder))
        try:
            return MlxTokenizer.read(folder, vocab_size, _eos_token_ids(folder, config))
        except Exception as error:  # whatever transformers raises on a foreign folder
            problem = f"its tokenizer cannot be read: {_one_line(error)}"
            raise LoadFailedError(spec.name, problem) from error

    def load(
        self,
        spec: ModelSpec,
        report: Callable[[LoadProgress], None],
        is_cancelled: Callable[[], bool],
    ) -> MlxModel:
        folder = _local_folder(spec)
        info = self.inspect(spec)
        if folder is None or info is None:
            raise LoadFailedError(spec.name, "its files are not on this machine")
        try:
            model, _ = load_model(folder, lazy=True)
            layout = self._layout(spec)
            if layout is not Layout.STORED:
                model = dequantize_model(model)
                model.set_dtype(DTYPE_OF[layout])
            for done_bytes in _evaluate(model):
                report(LoadProgress(LoadPhase.LOADING, done_bytes, info.estimated_bytes))
                if is_cancelled():
                    raise LoadSupersededError(spec.name)
        except MlxpoolError:
            raise
        except Exception as error:  # whatever mlx-lm raises on a foreign folder
            raise LoadFailedError(spec.name, _one_line(error)) from error
        return MlxModel(model, info.vocab_size, self._batch_options)

    def _footprint(self, spec: ModelSpec, config: dict[str, Any]) -> Footprint:
        dtype = DTYPE_OF.get(self._layout(spec))
        try:
            return read_footprint(config, dtype, fused=device_kind() != "cpu")
        except Exception as error:  # noqa: BLE001 - a config that its own code refuses
            # The load will say so; a model that cannot be loaded generates nothing.
            log.debug("model.footprint_unknown", model=spec.name, error=_one_line(error))
            return Footprint()

    def _layout(self, spec: ModelSpec) -> Layout:
        layout = self._default_layout if spec.layout is Layout.AUTO else spec.layout
        if layout is not Layout.AUTO:
            return layout
        # The CPU has no fast quantised or 16-bit kernels.
        return Layout.FLOAT32 if device_kind() == "cpu" else Layout.STORED


def _evaluate(model: nn.Module) -> Iterator[int]:
    """Evaluate every array, a portion at a time; yield the bytes done so far."""
    done = pending_bytes = 0
    pending: list[mx.array] = []
    for array in _arrays(model):
        pending.append(array)
        pending_bytes += array.nbytes
        if pending_bytes >= PORTION_BYTES:
            mx.eval(pending)
            done += pending_bytes
            pending, pending_bytes = [], 0
            yield done
    if pending:
        mx.eval(pending)
        yield done + pending_bytes


def _arrays(model: nn.Module) -> list[mx.array]:
    """All arrays of a model, those too that parameters() skips (RoPE frequencies, for one)."""
    found: dict[int, mx.array] = {}

    def visit(value: object) -> None:
        if isinstance(value, mx.array):
            found[id(value)] = value
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)

    for module in model.modules():
        visit(dict(module))
        visit(vars(module))
    return list(found.values())


def _local_folder(spec: ModelSpec, patterns: tuple[str, ...] = MODEL_FILES) -> Path | None:
    """Where the files are, if they are here."""
    if isinstance(spec.source, Path):
        if not spec.source.is_dir():
            raise LoadFailedError(spec.name, "its folder does not exist")
        return spec.source
    return cached_folder(spec.source, patterns)


def _read_config(name: str, folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LoadFailedError(name, "its folder has no config.json") from error
    except (OSError, ValueError, RecursionError) as error:
        problem = f"its config.json cannot be read: {_one_line(error)}"
        raise LoadFailedError(name, problem) from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise LoadFailedError(name, "its config.json has no model_type")
    if config.get("model_file") is not None:
        raise LoadFailedError(name, "it brings its own code (model_file), which is never run")
    return config


def _headers(name: str, folder: Path) -> list[TensorHeader]:
    try:
        return read_headers(folder)
    except (SafetensorError, OSError, ValueError) as error:
        raise LoadFailedError(name, f"its weights cannot be read: {_one_line(error)}") from error


def _kept(headers: list[TensorHeader], config: dict[str, Any]) -> list[TensorHeader]:
    """Without an output layer that the config says is the embedding: mlx-lm drops it."""
    if config.get("tie_word_embeddings") is not True:
        return headers
    return [header for header in headers if not header.name.startswith("lm_head.")]


def _eos_token_ids(folder: Path, config: dict[str, Any]) -> object:
    """generation_config.json's, which is the more careful one, or config.json's."""
    try:
        text = (folder / "generation_config.json").read_text(encoding="utf-8")
        generation = json.loads(text)
        return generation["eos_token_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return config.get("eos_token_id")


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").exists() or (folder / "chat_template.json").exists():
        return True
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        return bool(config.get("chat_template") or config.get("chat_template_type"))
    except (OSError, ValueError, AttributeError):
        return False


def _dict(config: dict[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key)
    return value if isinstance(value, dict) else {}


def _first_int(config: dict[str, Any], *keys: str) -> int:
    """The first of these keys, here or in `text_config`, that is a positive number; else 0."""
    for source in (config, _dict(config, "text_config")):
        for key in keys:
            value = source.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return min(value, INT32_MAX)
    return 0


def _describe(quantization: dict[str, Any]) -> str:
    if "bits" not in quantization:
        return ""
    return f"{quantization['bits']}-bit, group {quantization.get('group_size')}"


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:500] or type(error).__name__
