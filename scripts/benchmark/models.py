"""The model folders that every target serves; `python -m benchmark.models NAME` makes one.

They differ from a usual one in their end of sequence, which the model cannot produce, and on a CPU
in their weights, which are float32 as the loop and mlxpool hold them: a peer cannot convert them.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark.synthetic_tokenizer import forbid_end, write_synthetic_tokenizer, write_words
from mlxpool_server.errors import DemoModelError
from mlxpool_server.mlx_backend.demo_model import demo_model_path, ensure_demo_model
from mlxpool_server.mlx_backend.openblas import load_openblas
from mlxpool_server.mlx_backend.user_cache import cache_folder

_CONVERSION = 1
_GROUP_SIZE = 64
_SCALE = 0.02
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shape:
    """Llama's, with random weights."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab_size: int
    tied: bool
    bits: int | None = None

    def config(self) -> dict[str, Any]:
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab_size,
            "tie_word_embeddings": self.tied,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "max_position_embeddings": 8192,
        }


SHAPES = {
    "tiny": Shape(64, 128, 2, 4, 2, 49152, tied=False),
    "llama-135m-bf16": Shape(576, 1536, 30, 9, 3, 49152, tied=True),
    "llama-1b-bf16": Shape(2048, 8192, 16, 32, 8, 128256, tied=True),
    "llama-1b-4bit": Shape(2048, 8192, 16, 32, 8, 128256, tied=True, bits=4),
    "llama-8b-4bit": Shape(4096, 14336, 32, 32, 8, 128256, tied=False, bits=4),
    "llama-8b-bf16": Shape(4096, 14336, 32, 32, 8, 128256, tied=False),
}
MODELS = ("demo", *SHAPES)


def ensure_model(name: str) -> Path:
    """Return the folder, made first where needed. Imports mlx.

    Raises: DemoModelError when the demo model is wanted and cannot be fetched.
    """
    load_openblas()
    import mlx.core as mx  # noqa: PLC0415 - after load_openblas()

    on_cpu = mx.default_device() == mx.Device(mx.cpu, 0)
    kind = "float32" if on_cpu else "stored"
    folder = cache_folder() / "benchmark" / f"{name}-{kind}-{_CONVERSION}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as workshop:
        draft = Path(workshop) / "model"
        draft.mkdir()
        if name == "demo":
            _convert_demo(draft, on_cpu=on_cpu)
        else:
            _write_random(draft, SHAPES[name], on_cpu=on_cpu)
        vocab_size = json.loads((draft / "config.json").read_text())["vocab_size"]
        forbid_end(draft, vocab_size)
        write_words(draft)
        draft.rename(folder)
    return folder


def _convert_demo(folder: Path, *, on_cpu: bool) -> None:
    original = ensure_demo_model(lambda line: print(line, file=sys.stderr))
    shutil.copytree(original, folder, dirs_exist_ok=True)
    if not on_cpu:
        return
    import mlx.core as mx  # noqa: PLC0415 - after load_openblas()
    from mlx_lm.utils import dequantize_model, load_model, save_model  # noqa: PLC0415

    model, config = load_model(original, lazy=True)
    model = dequantize_model(model)
    model.set_dtype(mx.float32)
    (folder / "model.safetensors").unlink()
    save_model(folder, model)
    config = {key: fact for key, fact in config.items() if not key.startswith("quantization")}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _write_random(folder: Path, shape: Shape, *, on_cpu: bool) -> None:
    import mlx.core as mx  # noqa: PLC0415 - after load_openblas()
    import mlx.nn as nn  # noqa: PLC0415
    from mlx.utils import tree_flatten, tree_unflatten  # noqa: PLC0415
    from mlx_lm.models.llama import Model, ModelArgs  # noqa: PLC0415
    from mlx_lm.utils import save_model  # noqa: PLC0415

    config = shape.config()
    dtype = mx.float32 if on_cpu else mx.bfloat16
    mx.random.seed(7)
    model = Model(ModelArgs.from_dict(config))
    weights = []
    # Its type covers more than lists of names and arrays.
    parameters: Any = tree_flatten(model.parameters())
    for name, array in parameters:
        # A norm's weight is a vector, and one.
        is_norm = array.ndim == 1
        random = mx.ones(array.shape) if is_norm else mx.random.normal(array.shape) * _SCALE
        weights.append((name, random.astype(dtype)))
        mx.eval(weights[-1][1])
    model.update(tree_unflatten(weights))
    if shape.bits and not on_cpu:
        config["quantization"] = {"group_size": _GROUP_SIZE, "bits": shape.bits}
        nn.quantize(model, group_size=_GROUP_SIZE, bits=shape.bits)
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    _write_tokenizer(folder, shape.vocab_size)


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    """The demo model's where it fits and is there, else a synthetic one: nothing is fetched."""
    demo = demo_model_path()
    if demo and json.loads((demo / "config.json").read_text())["vocab_size"] == vocab_size:
        for name in _TOKENIZER_FILES:
            shutil.copyfile(demo / name, folder / name)
    else:
        write_synthetic_tokenizer(folder, vocab_size)


def main() -> int:
    try:
        print(ensure_model(sys.argv[1]))
    except DemoModelError as error:
        print(f"model: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
