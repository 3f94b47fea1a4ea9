"""Turns a Llama-shaped GGUF file into a model folder that mlx-lm loads.

The weights stay packed as they are stored; the tokenizer is rebuilt as a `tokenizer.json`, so
that mlx-lm streams with its byte-pair detokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

_GROUP_SIZE = 32
_CONTROL_TOKEN = 3
_END_OF_TEXT = "<|endoftext|>"

_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model in `gguf` to the existing, empty `folder`.

    Knows Llama with tied embeddings and a GPT-2 style byte-pair tokenizer that splits digits.
    """
    # mx.load's type covers every file format and cannot be narrowed.
    loaded: Any = mx.load(str(gguf), return_metadata=True)
    tensors, metadata = loaded
    facts = {name: _plain(fact) for name, fact in metadata.items()}
    # One type for scales (stored as float16) and norms (float32), or activations become float32;
    # bfloat16, because SmolLM2's reach 24,927 and float16 ends at 65,504. It changes the
    # next-token distribution by 0.0008 nats (KL divergence over 1,023 tokens of English).
    weights = {
        _renamed(name): tensor if tensor.dtype == mx.uint32 else tensor.astype(mx.bfloat16)
        for name, tensor in tensors.items()
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    _write_json(folder / "config.json", _config(facts, weights))
    _write_json(folder / "generation_config.json", _generation_config(facts))
    _tokenizer(facts).save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(facts))
    (folder / "chat_template.jinja").write_text(facts["tokenizer.chat_template"], encoding="utf-8")


def _plain(fact: Any) -> Any:
    return fact.tolist() if isinstance(fact, mx.array) else fact


def _renamed(name: str) -> str:
    """blk.3.attn_q.scales -> model.layers.3.self_attn.q_proj.scales."""
    stem, _, part = name.rpartition(".")
    if stem.startswith("blk."):
        _, layer, tensor = stem.split(".")
        return f"model.layers.{layer}.{_LAYER_TENSORS[tensor]}.{part}"
    return f"{_TENSORS[stem]}.{part}"


def _config(facts: Mapping[str, Any], weights: Mapping[str, mx.array]) -> dict[str, Any]:
    quantization = _quantization(weights)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": facts["llama.embedding_length"],
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": facts["llama.attention.head_count"],
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "max_position_embeddings": facts["llama.context_length"],
        "rms_norm_eps": facts["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": facts["llama.rope.freq_base"],
        # GGUF stores the rows of Q and K in the order of the interleaved rotation.
        "rope_traditional": True,
        "tie_word_embeddings": True,
        "vocab_size": facts["llama.vocab_size"],
        "quantization": quantization,
        "quantization_config": quantization,
        **_generation_config(facts),
    }


def _quantization(weights: Mapping[str, mx.array]) -> dict[str, Any]:
    """The commonest width as the default, every layer of another width by name."""
    bits = {
        name.removesuffix(".scales"): _bits(weights, name)
        for name in weights
        if name.endswith(".scales")
    }
    widths = list(bits.values())
    usual = max(set(widths), key=widths.count)
    layers = {
        layer: {"group_size": _GROUP_SIZE, "bits": width}
        for layer, width in bits.items()
        if width != usual
    }
    return {"group_size": _GROUP_SIZE, "bits": usual, **layers}


def _bits(weights: Mapping[str, mx.array], scales: str) -> int:
    packed = weights[scales.removesuffix("scales") + "weight"]
    return packed.shape[-1] * 32 // (weights[scales].shape[-1] * _GROUP_SIZE)


def _generation_config(facts: Mapping[str, Any]) -> dict[str, Any]:
    eos = facts["tokenizer.ggml.eos_token_id"]
    # A chat turn ends with one, a plain completion with the other.
    end_of_text = facts["tokenizer.ggml.tokens"].index(_END_OF_TEXT)
    return {
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": [eos, end_of_text] if eos != end_of_text else [eos],
        "pad_token_id": facts["tokenizer.ggml.padding_token_id"],
    }


def _tokenizer(facts: Mapping[str, Any]) -> Tokenizer:
    tokens: list[str] = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = facts["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in control])
    return tokenizer


def _tokenizer_config(facts: Mapping[str, Any]) -> dict[str, Any]:
    tokens = facts["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[facts["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[facts["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[facts["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[facts["tokenizer.ggml.unknown_token_id"]],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": facts["llama.context_length"],
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
