"""The measurement of growth, on next to nothing."""

import json
import sys

import pytest

from tests.factories import PROJECT, run_script

FOLDER = PROJECT / "projects" / "Growth"


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_every_part_is_measured_and_drawn(tmp_path):
    path = tmp_path / "growth.json"
    sizes = ["--images", 3, 6, "--instances", 2, 4, "--repetitions", 1]
    result = run_script(FOLDER / "measure.py", "--output", path, *sizes)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads(path.read_text())
    assert len(rows) == 20
    assert all(row["seconds"] > 0 for row in rows)
    drawn = run_script(FOLDER / "plot.py", path)
    assert drawn.returncode == 0, drawn.stderr
    assert drawn.stdout.count("\n") == 10
    assert path.with_suffix(".png").is_file()
