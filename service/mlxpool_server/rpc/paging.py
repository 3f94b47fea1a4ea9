"""Pages of a list in name order."""

from __future__ import annotations

from collections.abc import Sequence

from mlxpool_server.domain import ModelStatus
from mlxpool_server.errors import InvalidFieldError

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000


def page_of(
    models: Sequence[ModelStatus], page_size: int, page_token: str
) -> tuple[Sequence[ModelStatus], str]:
    """Return the page after `page_token` (the last name seen) and the next token, if any."""
    if page_size < 0:
        raise InvalidFieldError("page_size", "may not be negative")
    size = min(page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
    rest = [model for model in models if model.name > page_token]
    page = rest[:size]
    return page, page[-1].name if len(rest) > size else ""
