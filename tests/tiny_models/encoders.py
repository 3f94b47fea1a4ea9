"""Small random models of the BERT family, saved as sentence-transformers would."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

ENCODER_VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghij", "##a", "##b", "##c", "cab"]
_COMMON = {
    "vocab_size": len(ENCODER_VOCAB),
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 140,
    "pad_token_id": 0,
}
_BERT = _COMMON | {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "type_vocab_size": 2}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": _BERT | {"model_type": "bert"},
    "roberta": _BERT | {"model_type": "roberta", "type_vocab_size": 1, "pad_token_id": 1},
    "xlm-roberta": _BERT | {"model_type": "xlm-roberta", "type_vocab_size": 1, "pad_token_id": 1},
    "modernbert": _COMMON
    | {
        "model_type": "modernbert", "hidden_activation": "gelu", "norm_eps": 1e-5,
        "global_attn_every_n_layers": 2, "local_attention": 8, "global_rope_theta": 1000.0,
        "local_rope_theta": 100.0, "architectures": ["ModernBertModel"],
    },
}  # fmt: skip
_MODULES = {"bert": "bert", "roberta": "xlm_roberta", "xlm-roberta": "xlm_roberta"}


def write_encoder(
    folder: Path,
    kind: str = "bert",
    *,
    rename: Callable[[str], str] = lambda name: name,
    quantized: bool = False,
    dtype: mx.Dtype = mx.float32,
    pooling: str | None = "mean_tokens",
    **changes: Any,
) -> Path:
    """A folder with weights, a WordPiece tokenizer and, unless `pooling` is None, a pipeline.

    `rename` gives weights their names in the file; an empty one leaves the weight out.
    """
    config = ENCODERS[kind] | changes
    folder.mkdir(parents=True, exist_ok=True)
    arch = importlib.import_module(f"mlx_embeddings.models.{_MODULES.get(kind, kind)}")
    mx.random.seed(11)
    model = (arch.ModernBertModel if kind == "modernbert" else arch.Model)(
        arch.ModelArgs.from_dict(config)
    )
    model.set_dtype(dtype)
    if quantized:
        nn.quantize(model, group_size=32, bits=8)
        config |= {"quantization": {"group_size": 32, "bits": 8}}
    weights = {
        written: _varied(name, array)
        for name, array in tree_flatten(model.parameters())
        if (written := rename(name))
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_word_pieces(folder)
    if pooling is not None:
        write_pipeline(folder, pooling)
    return folder


def write_pipeline(folder: Path, pooling: str = "mean_tokens", *more: str, **lengths: Any) -> None:
    """modules.json and what it names; `more` are classes behind the pooling."""
    classes = ["Transformer", "Pooling", *more, "Normalize"]
    modules = [
        {
            "idx": place, "name": str(place), "path": f"{place}_{each}" if place else "",
            "type": f"sentence_transformers.models.{each}",
        }
        for place, each in enumerate(classes)
    ]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    (folder / "1_Pooling").mkdir(exist_ok=True)
    config = {"word_embedding_dimension": 32, "pooling_mode_max_tokens": False}
    config |= {f"pooling_mode_{pooling}": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if lengths:
        (folder / "sentence_bert_config.json").write_text(json.dumps(lengths), encoding="utf-8")


def write_word_pieces(folder: Path) -> None:
    """BERT's kind: lower case, words of pieces, [CLS] before and [SEP] behind."""
    vocab = {name: index for index, name in enumerate(ENCODER_VOCAB)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))  # noqa: S106 - no password
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = [AddedToken(name, special=True) for name in ENCODER_VOCAB[:4]]
    tokenizer.add_special_tokens(special)
    # As the published ones are, which would cut every text.
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "unk_token": "[UNK]",
        "cls_token": "[CLS]", "sep_token": "[SEP]",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def _varied(name: str, array: mx.array) -> mx.array:
    """Norms and biases begin as ones and zeros, and would hide that they are left out."""
    if array.ndim != 1:
        return array
    return array + 0.2 * mx.random.normal(array.shape).astype(array.dtype)
