"""Small random models and tokenizers, written as real files. Needs mlx."""

from tiny_models.encoders import ENCODERS, write_encoder, write_pipeline
from tiny_models.tokenizers import CHAT_TEMPLATE, write_byte_level, write_sentence_piece
from tiny_models.weights import (
    ARCHITECTURES,
    RARE_ARCHITECTURES,
    VOCAB_SIZE,
    write_model,
    write_weights,
)

__all__ = [
    "ARCHITECTURES",
    "CHAT_TEMPLATE",
    "ENCODERS",
    "RARE_ARCHITECTURES",
    "VOCAB_SIZE",
    "write_byte_level",
    "write_encoder",
    "write_model",
    "write_pipeline",
    "write_sentence_piece",
    "write_weights",
]
