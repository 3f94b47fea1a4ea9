"""LoRA adapters with random weights, saved as mlx-lm's training would."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model


def write_adapter(
    folder: Path, model: Path, *, seed: int, keys: list[str], rank: int = 4, num_layers: int = 4
) -> Path:
    """As mlx-lm's training writes one, with weights that change what the model says."""
    parameters = {"rank": rank, "scale": 6.0, "dropout": 0.0, "keys": keys}
    config = {"fine_tune_type": "lora", "num_layers": num_layers, "lora_parameters": parameters}
    module = load_model(model)[0]
    linear_to_lora_layers(module, num_layers, parameters)
    mx.random.seed(seed)
    weights = {
        name: 0.3 * mx.random.normal(array.shape)
        for name, array in tree_flatten(module.parameters())
        if ".lora_" in name
    }
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
