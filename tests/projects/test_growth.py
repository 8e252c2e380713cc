"""The measurement of growth, on next to nothing."""

import json
import os
import subprocess
import sys

import pytest

from tests.factories import PROJECT

FOLDER = PROJECT / "projects" / "Growth"


def _run(script, *arguments):
    python_path = os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-W", "ignore", FOLDER / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": python_path},
        check=False,
    )


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_every_part_is_measured_and_drawn(tmp_path):
    path = tmp_path / "growth.json"
    sizes = ["--images", 3, 6, "--instances", 2, 4, "--repetitions", 1]
    result = _run("measure.py", "--output", path, *sizes)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads(path.read_text())
    assert len(rows) == 18
    assert all(row["seconds"] > 0 for row in rows)
    drawn = _run("plot.py", path)
    assert drawn.returncode == 0, drawn.stderr
    assert drawn.stdout.count("\n") == 9
    assert path.with_suffix(".png").is_file()
