"""Layers that take a decode step at once: which they are, and that they say the same.

Where there is no CUDA, the kernel's place is taken by MLX's own operations in single precision, so
that what is compared is not rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.utils import load_model

from fakes.step_attention import attend_plainly
from mlxpool_server.mlx_backend.memory import device_kind
from mlxpool_server.mlx_backend.model_caches import new_caches
from mlxpool_server.mlx_backend.step_attention import layers
from mlxpool_server.mlx_backend.step_attention.kernel import attend_step
from mlxpool_server.mlx_backend.step_attention.layers import teach_steps
from tiny_models.weights import write_weights

SIZES = {
    "vocab_size": 320, "hidden_size": 256, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512, "tie_word_embeddings": True, "rope_theta": 10000.0,
}  # fmt: skip
LLAMA_3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
KNOWN: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "attention_bias": True},
    "llama 3.1": {"model_type": "llama", "rope_scaling": LLAMA_3},
    "llama, slower": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}},
    "helium": {"model_type": "helium", "attention_bias": False, "mlp_bias": False},
    "qwen 2": {"model_type": "qwen2"},
    "qwen 3": {"model_type": "qwen3"},
}
OTHERS: dict[str, dict[str, Any]] = {
    "a size that the kernel has not": {"model_type": "llama", "head_dim": 16},
    "many heads for one": {
        "model_type": "llama", "num_attention_heads": 16, "num_key_value_heads": 1
    },
    "other positions": {
        "model_type": "llama",
        "rope_scaling": {
            "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64
        },
    },
    "part of a head is turned": {
        "model_type": "stablelm", "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25,
        "use_qkv_bias": False,
    },
    "another forward pass": {"model_type": "olmo2"},
}  # fmt: skip
HAS_KERNEL = device_kind() == "cuda"
DTYPE = mx.bfloat16 if HAS_KERNEL else mx.float32
# Of all logits of a step together; positions that are off by one make it 0.26 and more.
MAX_ERROR = 5e-2 if HAS_KERNEL else 1e-5
# Caches of another shape bring other products on CUDA, and nowhere else.
MAX_ROUNDING = 1e-5 if HAS_KERNEL else 0.0
PROMPT_LENGTHS = [3, 17, 1]


def written(folder: Path, changes: dict[str, Any]) -> Path:
    write_weights(folder, SIZES | changes)
    return folder


@pytest.fixture(autouse=True)
def dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "DTYPES", (DTYPE,))


def read(folder: Path, dtype: mx.Dtype = DTYPE) -> Any:
    model = load_model(folder)[0]
    model.set_dtype(dtype)
    return model


def steps_of(model: Any, *, is_joined: bool) -> list[mx.array]:
    """Logits of some steps of rows of different lengths, of which one leaves."""
    prompt = mx.array([[7 * row + place for place in range(17)] for row in range(3)])
    caches = new_caches(model, 3, is_joined=is_joined)
    for cache in caches:
        cache.prepare(lengths=PROMPT_LENGTHS, right_padding=[17 - n for n in PROMPT_LENGTHS])
    model(prompt, cache=caches)
    for cache in caches:
        cache.finalize()
    found = [model(mx.array([[step], [5], [9]]), cache=caches)[:, -1] for step in range(3)]
    for cache in caches:
        cache.filter([0, 2])
    found += [model(mx.array([[step], [5]]), cache=caches)[:, -1] for step in range(3)]
    for cache in caches:
        # One row is as even as many of one length.
        cache.filter([1])
    return [*found, model(mx.array([[1]]), cache=caches)[:, -1]]


def error_of(found: mx.array, wanted: mx.array) -> Any:
    """Of all logits together, over theirs."""
    error = mx.linalg.norm((found - wanted).astype(mx.float32))
    return (error / mx.linalg.norm(wanted.astype(mx.float32))).item()


@pytest.mark.parametrize("changes", KNOWN.values(), ids=KNOWN.keys())
def test_a_known_layer_says_the_same(changes: dict[str, Any], tmp_path: Path) -> None:
    """Step by step what mlx-lm's own layers say, and it is not they who say it."""
    folder = written(tmp_path, changes)
    calls = []

    def attend(*arguments: Any) -> tuple[mx.array, mx.array]:
        calls.append(arguments)
        return attend_step(*arguments) if HAS_KERNEL else attend_plainly(*arguments)

    expected = steps_of(read(folder), is_joined=False)
    model = read(folder)
    assert teach_steps(model, attend)
    for found, wanted in zip(steps_of(model, is_joined=True), expected, strict=True):
        assert error_of(found, wanted) < MAX_ERROR
    assert len(calls) == 7 * SIZES["num_hidden_layers"]


@pytest.mark.parametrize("changes", OTHERS.values(), ids=OTHERS.keys())
def test_any_other_layer_is_left_alone(changes: dict[str, Any], tmp_path: Path) -> None:
    """Nothing is guessed: what is not known to be the same is not touched."""
    model = load_model(written(tmp_path, changes))[0]
    before = {type(module) for module in model.modules()}
    assert not teach_steps(model, attend_plainly)
    assert {type(module) for module in model.modules()} == before


def test_another_type_is_mlx_lms(tmp_path: Path) -> None:
    """What the kernel does not have runs as before, on the joined caches."""
    folder = written(tmp_path, KNOWN["qwen 3"])
    other = mx.float32 if HAS_KERNEL else mx.bfloat16
    model, plain = read(folder, other), read(folder, other)
    assert teach_steps(model, lambda *_: pytest.fail("is not of this type"))
    for found, wanted in zip(
        steps_of(model, is_joined=True), steps_of(plain, is_joined=False), strict=True
    ):
        assert error_of(found, wanted) <= MAX_ROUNDING
