"""Bars of a terminal, and the lines of the log between them."""

import io
import logging
import types

import pytest
from detectron2.data import DatasetCatalog

from d2ft.engine.hooks import progress
from d2ft.engine.hooks.progress import EvaluationBar, open_bar


class _Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """Let standard output and error be one terminal that d2ft's log goes to."""
    stream = _Terminal()
    # Not in sys itself, whose streams pytest changes between the fixture and the test.
    monkeypatch.setattr(progress, "sys", types.SimpleNamespace(stdout=stream, stderr=stream))
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger("d2ft")
    logger.addHandler(handler)
    yield stream
    logger.removeHandler(handler)


def _lines(terminal):
    """Return what is written, a line for each time that the cursor goes to the beginning."""
    return [line.strip() for line in terminal.getvalue().replace("\r", "\n").split("\n")]


def test_a_line_of_the_log_is_above_the_bar_and_not_inside_of_it(terminal):
    with open_bar(total=2, unit="it") as bar:
        bar.update()
        logging.getLogger("d2ft.some").warning("a line")
        bar.update()
    assert "a line" in _lines(terminal)
    assert any("2/2" in line for line in _lines(terminal))


def test_an_evaluation_shows_its_images(terminal):
    DatasetCatalog.register("three", lambda: [{}, {}, {}])
    bar = EvaluationBar("three")
    bar.reset()
    bar.process([{}], [{}])
    assert bar.evaluate() is None
    assert any("three" in line and "/3" in line for line in _lines(terminal))


def test_without_a_terminal_nothing_is_shown(capsys):
    assert list(open_bar([1, 2])) == [1, 2]
    assert capsys.readouterr() == ("", "")
