"""``tools/evaluate_predictions.py`` as users run it."""

import json
import subprocess
import sys

import pytest

from tests.factories import PROJECT, write_cityscapes

SCRIPT = PROJECT / "tools" / "evaluate_predictions.py"


def _run(root, *arguments):
    config = PROJECT / "configs" / "cityscapes_ft.yaml"
    return subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), "--config-file", str(config), *arguments],
        env={"DETECTRON2_DATASETS": str(root), "PYTHONPATH": str(PROJECT), "PATH": "", "HOME": ""}
        | {"D2FT_CACHE": str(root / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.ci
def test_a_file_of_another_tool_is_evaluated_and_a_mistake_is_one_line(tmp_path):
    root = write_cityscapes(tmp_path)
    path = tmp_path / "found.json"
    path.write_text("[]")
    done = _run(root, "--predictions", str(path))
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout[done.stdout.index("\n{\n") :])
    assert set(results) == {"segm", "bbox", "segm_coco"}
    refused = _run(root, "--predictions", str(path), "--dataset", "cityscapes_instance_vla")
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith("error: dataset 'cityscapes_instance_vla'")
