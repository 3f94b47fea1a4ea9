"""A backend without mlx: bytes are tokens, and tests decide when it steps, loads and fails."""

from fakes.loader import FakeFiles, FakeLoader
from fakes.memory import FakeMemory
from fakes.model import FakeBatch, FakeModel
from fakes.tokenizer import EOS, VOCAB_SIZE, FakeTokenizer

__all__ = [
    "EOS",
    "VOCAB_SIZE",
    "FakeBatch",
    "FakeFiles",
    "FakeLoader",
    "FakeMemory",
    "FakeModel",
    "FakeTokenizer",
]
