"""The tasks of the benchmark end, having found that both sides give the same."""

import json

import pytest

from tests.factories import PROJECT, run_script

pytestmark = [pytest.mark.slow, pytest.mark.ci]


@pytest.mark.parametrize("task", ["mapper", "train", "inference", "startup", "index"])
def test_a_task_compares_equal_things(task, tmp_path):
    measured = tmp_path / "measured.json"
    tool = PROJECT / "tools/benchmark.py"
    result = run_script(tool, task, "--quick", "--json", measured)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads(measured.read_text())["results"]
    assert rows
    assert all(row["ratio"] > 0 for row in rows)
