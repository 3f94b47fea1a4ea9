"""Model folders and hub repositories to weights in memory, through mlx-lm. No remote code."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from mlx_lm.utils import dequantize_model, load_model
from safetensors import SafetensorError

from mlxpool_server.domain import (
    Capability,
    HubSource,
    Layout,
    LoadPhase,
    LoadProgress,
    ModelInfo,
    ModelSpec,
)
from mlxpool_server.errors import LoadFailedError, LoadSupersededError, MlxpoolError
from mlxpool_server.mlx_backend.batch import MlxBatch
from mlxpool_server.mlx_backend.memory import device_kind
from mlxpool_server.mlx_backend.model_size import estimate_bytes, read_headers
from mlxpool_server.mlx_backend.tokenizer import MlxTokenizer

DTYPE_OF = {Layout.FLOAT32: mx.float32, Layout.BFLOAT16: mx.bfloat16, Layout.FLOAT16: mx.float16}
TOKENIZER_FILES = ("*.json", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja")
MODEL_FILES = (*TOKENIZER_FILES, "model*.safetensors")
# Weights are evaluated in portions, so that progress shows and a cancelled load stops soon.
PORTION_BYTES = 64 * 1024 * 1024


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
        self, *, max_batch_size: int, prefill_step_tokens: int, default_layout: Layout
    ) -> None:
        self._batch_options = {
            "max_batch_size": max_batch_size,
            "prefill_step_tokens": prefill_step_tokens,
        }
        self._default_layout = default_layout

    def fetch(self, spec: ModelSpec, report: Callable[[LoadProgress], None]) -> None:
        if isinstance(spec.source, HubSource):
            report(LoadProgress(LoadPhase.DOWNLOADING))
            _download(spec.name, spec.source, MODEL_FILES)

    def inspect(self, spec: ModelSpec) -> ModelInfo | None:
        folder = _local_folder(spec)
        if folder is None:
            return None
        config = _read_config(spec.name, folder)
        text_config = config.get("text_config") or {}
        quantization = config.get("quantization") or {}
        try:
            headers = read_headers(folder)
        except (SafetensorError, OSError, ValueError) as error:
            raise LoadFailedError(spec.name, f"its weights cannot be read: {error}") from error
        has_template = _has_chat_template(folder)
        return ModelInfo(
            architecture=str(config["model_type"]),
            quantization=_describe(quantization),
            context_length=_first_int(config, text_config, "max_position_embeddings"),
            vocab_size=_first_int(config, text_config, "vocab_size"),
            estimated_bytes=estimate_bytes(headers, quantization, self._layout(spec)),
            revision=folder.name if isinstance(spec.source, HubSource) else "",
            capabilities=frozenset({Capability.CHAT}) if has_template else frozenset(),
        )

    def load_tokenizer(self, spec: ModelSpec) -> MlxTokenizer:
        folder = _local_folder(spec)
        if folder is None and isinstance(spec.source, HubSource):
            folder = _download(spec.name, spec.source, TOKENIZER_FILES)
        if folder is None:
            raise LoadFailedError(spec.name, "its folder does not exist")
        config = _read_config(spec.name, folder)
        try:
            return MlxTokenizer.read(
                folder,
                vocab_size=_first_int(config, config.get("text_config") or {}, "vocab_size"),
                eos_token_ids=_eos_token_ids(folder, config),
            )
        except Exception as error:  # whatever transformers raises on a foreign folder
            raise LoadFailedError(spec.name, f"its tokenizer cannot be read: {error}") from error

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


def _local_folder(spec: ModelSpec) -> Path | None:
    """Where the files are, if they are here."""
    if isinstance(spec.source, Path):
        if not spec.source.is_dir():
            raise LoadFailedError(spec.name, "its folder does not exist")
        return spec.source
    try:
        return Path(
            snapshot_download(
                spec.source.repo_id,
                revision=spec.source.revision,
                allow_patterns=list(MODEL_FILES),
                local_files_only=True,
            )
        )
    except LocalEntryNotFoundError:
        return None


def _download(name: str, source: HubSource, patterns: tuple[str, ...]) -> Path:
    try:
        return Path(
            snapshot_download(
                source.repo_id, revision=source.revision, allow_patterns=list(patterns)
            )
        )
    except Exception as error:  # the hub client's errors have no common base
        raise LoadFailedError(name, f"the hub did not give it: {_one_line(error)}") from error


def _read_config(name: str, folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text())
    except FileNotFoundError as error:
        raise LoadFailedError(name, "its folder has no config.json") from error
    except (OSError, ValueError) as error:
        raise LoadFailedError(name, f"its config.json cannot be read: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise LoadFailedError(name, "its config.json has no model_type")
    return config


def _eos_token_ids(folder: Path, config: dict[str, Any]) -> object:
    """generation_config.json's, which is the more careful one, or config.json's."""
    try:
        generation = json.loads((folder / "generation_config.json").read_text())
        return generation["eos_token_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return config.get("eos_token_id")


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").exists() or (folder / "chat_template.json").exists():
        return True
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text())
    except (OSError, ValueError):
        return False
    return bool(config.get("chat_template") or config.get("chat_template_type"))


def _first_int(config: dict[str, Any], text_config: dict[str, Any], key: str) -> int:
    value = config.get(key, text_config.get(key))
    return value if isinstance(value, int) else 0


def _describe(quantization: dict[str, Any]) -> str:
    if "bits" not in quantization:
        return ""
    return f"{quantization['bits']}-bit, group {quantization.get('group_size')}"


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:500] or type(error).__name__
