"""The quickstart and the benchmark as users run them."""

import json
import re

import pytest

from tests.factories import PROJECT, run_script

TOOLS = PROJECT / "tools"


@pytest.mark.slow
@pytest.mark.ci
def test_the_quickstart_learns_and_draws(tmp_path):
    run = tmp_path / "run"
    result = run_script(TOOLS / "quickstart.py", "OUTPUT_DIR", run)
    assert result.returncode == 0, result.stdout + result.stderr
    before, after = map(float, re.findall(r"(?:before fine-tuning|after) +([\d.]+)", result.stdout))
    assert before < 1
    assert after >= 15
    assert (run / "prediction.png").stat().st_size > 100_000
    report = json.loads((run / "load_report.json").read_text())
    assert report["counts"]["skipped"] == 6
    assert report["counts"]["missing"] == 0


@pytest.mark.slow
@pytest.mark.ci
def test_the_benchmark_of_the_loader_compares_equal_things(tmp_path):
    result = run_script(
        TOOLS / "benchmark.py", "loader", "--quick", "--json", tmp_path / "measured.json"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    measured = json.loads((tmp_path / "measured.json").read_text())
    names = [row["name"] for row in measured["results"]]
    assert "training loader, 0 workers" in names
    assert all(row["ratio"] > 0 for row in measured["results"])


def test_a_stripped_checkpoint_is_what_fine_tuning_needs(tmp_path):
    import torch

    tensors = {"a.weight": torch.randn(3, 4), "a.num_batches_tracked": torch.tensor(5)}
    source = {"model": tensors, "trainer": {"x": 1}, "d2ft": {"thing_classes": ["cat"]}}
    torch.save(source, tmp_path / "model_final.pth")
    arguments = [tmp_path / "model_final.pth", tmp_path / "weights.pth", "--half"]
    assert run_script(TOOLS / "strip_checkpoint.py", *arguments).returncode == 0
    stripped = torch.load(tmp_path / "weights.pth", weights_only=True)
    assert set(stripped) == {"model", "d2ft"}
    assert list(stripped["model"]) == ["a.weight"]
    assert torch.equal(stripped["model"]["a.weight"], tensors["a.weight"].half())
