"""Bars of a terminal, and the lines of the log between them."""

import contextlib
import io
import logging

from detectron2.data import DatasetCatalog

from d2ft.evaluation.progress import InferenceProgress
from d2ft.progress import open_bar


class _Terminal(io.StringIO):
    def isatty(self):
        return True


@contextlib.contextmanager
def _terminal():
    """Let standard output and error be one terminal that d2ft's log goes to."""
    stream = _Terminal()
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger("d2ft")
    logger.addHandler(handler)
    try:
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            yield stream
    finally:
        logger.removeHandler(handler)


def _lines(terminal):
    """Return what is written, a line for each time that the cursor goes to the beginning."""
    return [line.strip() for line in terminal.getvalue().replace("\r", "\n").split("\n")]


def test_a_line_of_the_log_is_above_the_bar_and_not_inside_of_it():
    with _terminal() as terminal, open_bar(total=2, unit="it") as bar:
        bar.update()
        logging.getLogger("d2ft.some").warning("a line")
        bar.update()
    assert "a line" in _lines(terminal)
    assert any("2/2" in line for line in _lines(terminal))


def test_an_evaluation_shows_its_images():
    DatasetCatalog.register("three", lambda: [{}, {}, {}])
    bar = InferenceProgress("three")
    with _terminal() as terminal:
        bar.reset()
        for _ in range(3):
            bar.process([{}], [{}])
        assert bar.evaluate() == {}
    assert any("three" in line and "3/3" in line for line in _lines(terminal))


def test_without_a_terminal_nothing_is_shown(capsys):
    assert list(open_bar([1, 2])) == [1, 2]
    assert capsys.readouterr() == ("", "")
