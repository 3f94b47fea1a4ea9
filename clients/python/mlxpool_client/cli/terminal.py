"""Where a command reads and writes: a terminal with colours, or plain text for a pipe."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console, RenderableType
from rich.status import Status
from rich.table import Table
from rich.text import Text

# A model's text must not drive the terminal that shows it: what is no character becomes one.
_CONTROLS = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}


def printable(text: str) -> str:
    """Return `text` with its control characters, except newline and tab, made visible."""
    return text.translate(_CONTROLS)


class Waiting:
    """A line that says what is going on until there is output; nothing where no one looks."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status: Status | None = None
        self._is_over = not console.is_terminal

    def show(self, text: str) -> None:
        if self._is_over:
            return
        line = Text(printable(text))
        if self._status is None:
            self._status = self._console.status(line)
            self._status.start()
        else:
            self._status.update(line)

    def stop(self) -> None:
        """Clear the line for good: from here on there is output."""
        self._is_over = True
        if self._status is not None:
            self._status.stop()
            self._status = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


class Terminal:
    """The standard streams. Output is exact in a pipe, and made harmless on a terminal."""

    def __init__(self, stdin: TextIO, stdout: TextIO, stderr: TextIO) -> None:
        self._stdin = stdin
        self._stdout = stdout
        self._stderr = stderr
        self.is_live = stdout.isatty()
        self.is_interactive = stdin.isatty() and stdout.isatty()
        self.console = _console(stdout)
        self.error_console = _console(stderr)

    def write(self, text: str) -> None:
        """Write text of a model or a server, at once."""
        self._stdout.write(printable(text) if self.is_live else text)
        self._stdout.flush()

    def line(self, text: str) -> None:
        self.write(f"{text}\n")

    def aside(self, text: str) -> None:
        """Write text that is no output, reasoning for example, to stderr."""
        if self._stderr.isatty():
            self.error_console.print(Text(printable(text), style="dim"), end="", soft_wrap=True)
        else:
            self._stderr.write(text)
            self._stderr.flush()

    def note(self, text: str) -> None:
        """Write one line for people to stderr."""
        # A message may quote what a client sent: one line stays one line.
        self._stderr.write(f"mlxpool: {printable(' '.join(text.split()))}\n")
        self._stderr.flush()

    def show(self, renderable: RenderableType) -> None:
        self.console.print(renderable)

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print rows under their headers; aligned plain columns in a pipe."""
        if self.is_live:
            self.show(rich_table(headers, rows))
            return
        lines = [headers, *rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
        for line in lines:
            cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            self.line("  ".join(cells).rstrip())

    def waiting(self) -> Waiting:
        return Waiting(self.error_console)

    def read_all(self) -> str:
        return self._stdin.read()

    def ask(self, prompt: str) -> str:
        """Return the next line. Raises: EOFError after the last."""
        if self.is_interactive:
            return input(prompt)
        line = self._stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")

    def abandon_output(self) -> None:
        """Send what is still buffered nowhere: the reader is gone, and exit would complain."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stdout.fileno())
            os.close(nowhere)


def rich_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table of literal text: no markup, no control characters."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in headers:
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


class _Console(Console):
    def on_broken_pipe(self) -> None:
        # Rich would exit here with code 1; main decides that.
        raise BrokenPipeError


def _console(stream: TextIO) -> Console:
    is_terminal = stream.isatty()
    return _Console(
        file=stream,
        force_terminal=is_terminal,
        no_color=None if is_terminal else True,
        markup=False,
        highlight=False,
        emoji=False,
    )
