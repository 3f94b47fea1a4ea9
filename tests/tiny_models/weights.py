"""Random weights for several architectures, saved as a converted model would be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

from tiny_models.tokenizers import write_byte_level

VOCAB_SIZE = 320
_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": _COMMON | {"model_type": "llama", "tie_word_embeddings": False},
    # Local layers with a window of 16 between global ones.
    "gemma3_text": _COMMON
    | {"model_type": "gemma3_text", "sliding_window": 16, "sliding_window_pattern": 2},
    # Recurrent: no attention, and no word on how long a context may be.
    "mamba": {
        "model_type": "mamba", "vocab_size": VOCAB_SIZE, "hidden_size": 64,
        "intermediate_size": 128, "state_size": 8, "num_hidden_layers": 2, "conv_kernel": 4,
        "use_bias": False, "use_conv_bias": True, "time_step_rank": 4,
    },
    # Recurrent and attention layers in turn, with experts.
    "qwen3_next": _COMMON
    | {
        "model_type": "qwen3_next", "linear_num_value_heads": 4, "linear_num_key_heads": 2,
        "linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_conv_kernel_dim": 4,
        "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 64, "mlp_only_layers": [], "moe_intermediate_size": 64,
        "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "full_attention_interval": 2,
        "norm_topk_prob": True, "tie_word_embeddings": False,
    },
}  # fmt: skip
# With the kinds of cache that those above lack. Few tests need them.
RARE_ARCHITECTURES: dict[str, dict[str, Any]] = {
    # A list of caches a layer: recurrent state and keys and values.
    "falcon_h1": _COMMON
    | {
        "model_type": "falcon_h1", "num_hidden_layers": 2, "mamba_d_ssm": 64, "mamba_n_heads": 4,
        "mamba_d_head": 16, "mamba_d_state": 16, "tie_word_embeddings": False,
    },
    # A list of caches a layer: recurrent state and, in every second, a window of 16.
    "baichuan_m1": _COMMON
    | {
        "model_type": "baichuan_m1", "num_hidden_layers": 2, "rope_theta": 10000.0,
        "sliding_window": 16, "sliding_window_layers": [1], "conv_window": 2,
    },
    # Recurrent layers between windows of 16.
    "recurrent_gemma": _COMMON
    | {
        "model_type": "recurrent_gemma", "attention_bias": False, "conv1d_width": 4,
        "logits_soft_cap": 30.0, "num_key_value_heads": 1, "rope_theta": 10000.0,
        "attention_window_size": 16, "block_types": ["recurrent", "attention"],
    },
    # Chunks of 16, which know one row only.
    "llama4": {
        "model_type": "llama4",
        "text_config": _COMMON
        | {
            "model_type": "llama4_text", "attention_bias": False, "attention_chunk_size": 16,
            "interleave_moe_layer_step": 2, "intermediate_size_mlp": 128,
            "num_experts_per_tok": 1, "num_local_experts": 2, "rope_scaling": None,
            "rope_theta": 10000.0, "use_qk_norm": True,
        },
    },
}  # fmt: skip


def write_model(
    folder: Path,
    architecture: str = "llama",
    *,
    quantized: bool = False,
    seed: int = 7,
    **changes: Any,
) -> Path:
    """A model folder with weights, config and a byte-level tokenizer; returns the folder."""
    config = (ARCHITECTURES | RARE_ARCHITECTURES)[architecture] | changes
    write_weights(folder, config, quantized=quantized, seed=seed)
    write_byte_level(folder)
    return folder


def write_weights(
    folder: Path, config: dict[str, Any], *, quantized: bool = False, seed: int = 7
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model_class, args_class = _get_classes(config)
    # The process's generator is nobody's: a test's models are the same in every run.
    mx.random.seed(seed)
    model = model_class(args_class.from_dict(config))
    if quantized:
        config = config | {"quantization": {"group_size": 32, "bits": 4}}
        nn.quantize(model, group_size=32, bits=4, class_predicate=_is_divisible)
    weights = dict(tree_flatten(model.parameters()))
    if config["model_type"] in RARE_ARCHITECTURES and not quantized:
        # Some of their layers begin as zeros, and would do nothing.
        weights = {
            name: array + 0.1 * mx.random.normal(array.shape) for name, array in weights.items()
        }
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _is_divisible(_: str, module: nn.Module) -> bool:
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0
