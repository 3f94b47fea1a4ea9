"""Which tokens may come next in one row: made ahead, on another thread."""

from __future__ import annotations

import threading

import numpy as np
import structlog
from numpy.typing import NDArray

from mlxpool_server.engine.backend import Guide
from mlxpool_server.errors import BadConstraintError, MlxpoolError
from mlxpool_server.mlx_backend.foreign_tokenizer import TokenizerError, panics_as_errors

log = structlog.get_logger(__name__)

Words = NDArray[np.uint32]


class RowMask:
    """The engine thread reads it; until `is_made` is set it is the maker's."""

    def __init__(self, guide: Guide) -> None:
        self._guide = guide
        self._bits = b""
        self.is_made = threading.Event()
        # It cannot go on: any token will do, nobody gets it.
        self.error: MlxpoolError | None = None

    def make(self, token_id: int | None) -> None:
        """On the maker's thread. `token_id`: the one that came; None: none yet. Raises nothing."""
        try:
            if self.error is None:
                self._bits = self._next_bits(token_id)
        except MlxpoolError as error:
            self.error = error
        except Exception as error:  # noqa: BLE001 - a stranger's grammar: its row fails alone
            log.warning("mask.failed", error=type(error).__name__)
            self.error = BadConstraintError("constraint", "its masks cannot be made")
        finally:
            self.is_made.set()

    def _next_bits(self, token_id: int | None) -> bytes:
        try:
            with panics_as_errors():
                if token_id is not None:
                    self._guide.advance(token_id)
                return self._guide.allowed()
        except TokenizerError as error:
            raise BadConstraintError("constraint", str(error)) from error

    def give_up(self, limit_s: float) -> None:
        """It takes too long. Engine thread; the maker may be busy with it still."""
        self.error = BadConstraintError("constraint", f"a step takes more than {limit_s:g} s")
        self.is_made.set()

    def words(self, vocab_size: int) -> Words:
        """One bit a token, the lowest first: shape (vocab_size / 32, rounded up,).

        MaskMaker.wait comes before it.
        """
        size = (vocab_size + 31) // 32
        words = np.zeros(size, dtype=np.uint32)
        known = np.frombuffer(self._bits, dtype=np.uint8)[: size * 4]
        if self.error is not None or not known.any():
            words[:] = np.uint32(0xFFFFFFFF)
            return words
        words.view(np.uint8)[: known.size] = known
        return words
