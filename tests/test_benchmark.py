"""The tasks of the benchmark end, having found that both sides give the same."""

import json
import os
import subprocess
import sys

import pytest

from tests.factories import PROJECT

pytestmark = [pytest.mark.slow, pytest.mark.ci]


@pytest.mark.parametrize("task", ["mapper", "train", "inference", "startup"])
def test_a_task_compares_equal_things(task, tmp_path):
    python_path = os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", PROJECT / "tools" / "benchmark.py", task, "--quick"]
    result = subprocess.run(
        [*command, "--json", tmp_path / "measured.json"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": python_path},
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads((tmp_path / "measured.json").read_text())["results"]
    assert rows
    assert all(row["ratio"] > 0 for row in rows)
