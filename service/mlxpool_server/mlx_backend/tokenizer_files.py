"""The files of a model that another program's tokenizer is made from."""

from __future__ import annotations

from pathlib import Path

from mlxpool_server.errors import LoadFailedError
from mlxpool_server.mlx_backend.model_folder import MIB
from mlxpool_server.regular_file import opened_regular

FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt", "*.tiktoken",
    "chat_template.json", "*.jinja",
    # They name the tokens that end an answer.
    "config.json", "generation_config.json",
)  # fmt: skip
# The gateway takes as many files, and as many bytes.
MAX_FILES = 50
MAX_BYTES = 200 * MIB


def read_tokenizer_files(model: str, folder: Path) -> dict[str, bytes]:
    """Return their contents by name. Raises: LoadFailedError."""
    files = sorted({file for pattern in FILES for file in folder.glob(pattern)})
    if len(files) > MAX_FILES:
        raise LoadFailedError(model, f"its tokenizer has {len(files)} files; at most {MAX_FILES}")
    contents: dict[str, bytes] = {}
    left_bytes = MAX_BYTES
    try:
        for file in files:
            with opened_regular(file) as opened:
                contents[file.name] = opened.read(left_bytes + 1)
            left_bytes -= len(contents[file.name])
            if left_bytes < 0:
                raise LoadFailedError(model, f"its tokenizer has more than {MAX_BYTES} bytes")
    except OSError as error:
        problem = f"its tokenizer cannot be read: {error.strerror or error}"
        raise LoadFailedError(model, problem) from error
    except ValueError as error:
        raise LoadFailedError(model, f"its tokenizer cannot be read: {error}") from error
    if not contents:
        raise LoadFailedError(model, "its folder holds no tokenizer")
    return contents
