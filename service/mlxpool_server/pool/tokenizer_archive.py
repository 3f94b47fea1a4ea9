"""A tokenizer's files as one ZIP, for a program that has no other way to get them."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping

# The fastest: it is made once for each program that asks.
COMPRESSION_LEVEL = 1


def archive(files: Mapping[str, bytes]) -> bytes:
    """Return the same bytes for the same files: no time is in them."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(
        buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=COMPRESSION_LEVEL
    ) as zipped:
        for name, content in sorted(files.items()):
            zipped.writestr(_entry(name), content)
    return buffer.getvalue()


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.compress_type = zipfile.ZIP_DEFLATED
    return entry
