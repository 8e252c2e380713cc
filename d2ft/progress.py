"""Bars for a terminal, on stderr. Lines of the log are written above them."""

import logging
import sys
from collections.abc import Iterable
from typing import IO, Any

from detectron2.utils import comm
from tqdm import tqdm


def shows_bars() -> bool:
    """Tell whether this is the main process, and its stderr a terminal."""
    return comm.is_main_process() and sys.stderr.isatty()


def open_bar(iterable: Iterable[Any] | None = None, **arguments: Any) -> Any:
    """
    Return a ``tqdm`` bar, which is shown if :func:`shows_bars`.

    Args:
        iterable: to go over with the bar.
        arguments: of ``tqdm``.
    """
    shown = shows_bars()
    if shown:
        _write_lines_above_bars()
    return tqdm(iterable, file=sys.stderr, dynamic_ncols=True, disable=not shown, **arguments)


class _AboveBars:
    """A stream that takes the bars away while it writes."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with tqdm.external_write_mode(file=self._stream):
            self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()


def _write_lines_above_bars() -> None:
    for name in ("detectron2", "fvcore", "d2ft"):
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream in (
                sys.stdout,
                sys.stderr,
            ):
                handler.setStream(_AboveBars(handler.stream))
