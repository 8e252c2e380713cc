import json

import pytest

from tests.factories import PROJECT, run_script

FOLDER = PROJECT / "projects/HeadInit"


@pytest.mark.slow
@pytest.mark.ci
def test_the_measurement_goes_on_where_it_was_stopped_and_is_drawn(tmp_path):
    options = ["--seeds", 0, "--output", "out"]
    first = run_script(
        FOLDER / "measure.py", "--budgets", 0, "--curves", "remap", *options, cwd=tmp_path
    )
    assert first.returncode == 0, first.stderr
    second = run_script(FOLDER / "measure.py", "--budgets", 0, 2, *options, cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    rows = json.loads((tmp_path / "out/results.json").read_text())
    measured = [(row["curve"], row["iterations"]) for row in rows]
    assert measured == [("remap", 0), ("skip", 0), ("skip", 2), ("remap", 2)]
    assert rows[0]["segm"] > 10 > rows[1]["segm"]
    assert not list((tmp_path / "out").glob("run_*"))

    drawn = run_script(FOLDER / "plot.py", "out/results.json", cwd=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "out/results.png").read_bytes().startswith(b"\x89PNG")
