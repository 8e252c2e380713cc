import json
import os
import subprocess
import sys

import pytest

from tests.factories import PROJECT

FOLDER = PROJECT / "projects/HeadInit"


def _run(script, *arguments, cwd):
    python_path = os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, str(FOLDER / script), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": python_path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.ci
def test_the_measurement_goes_on_where_it_was_stopped_and_is_drawn(tmp_path):
    options = ["--seeds", 0, "--output", "out"]
    first = _run("measure.py", "--budgets", 0, "--curves", "remap", *options, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    second = _run("measure.py", "--budgets", 0, 2, *options, cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    rows = json.loads((tmp_path / "out/results.json").read_text())
    measured = [(row["curve"], row["iterations"]) for row in rows]
    assert measured == [("remap", 0), ("skip", 0), ("skip", 2), ("remap", 2)]
    assert rows[0]["segm"] > 10 > rows[1]["segm"]
    assert not list((tmp_path / "out").glob("run_*"))

    drawn = _run("plot.py", "out/results.json", cwd=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "out/results.png").read_bytes().startswith(b"\x89PNG")
