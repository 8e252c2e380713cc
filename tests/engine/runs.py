"""Runs of ``tools/train_net.py`` as processes that tests may kill, and what is compared of them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from tests.factories import PROJECT, SHORT_RUN, TINY_MODEL

CONFIG = PROJECT / "configs" / "cityscapes_ft.yaml"
SCRIPT = PROJECT / "tools" / "train_net.py"
# What depends on the machine and the moment.
NOT_COMPARED = {"time", "data_time", "rank_data_time", "eta_seconds", "max_mem"}


class Runs:
    """Starts the same short run in any folder; ``options`` override those of ``base``."""

    def __init__(
        self,
        datasets,
        weights,
        *options,
        num_processes=1,
        config=CONFIG,
        base=(*TINY_MODEL, *SHORT_RUN),
    ):
        self._config = config
        self._options = [*base, "MODEL.WEIGHTS", str(weights), *options]
        self._processes = ["--num-gpus", str(num_processes), "--dist-url", "auto"]
        path = os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])
        self._environment = {
            **os.environ,
            "DETECTRON2_DATASETS": str(datasets),
            "PYTHONPATH": path,
            # The order of floating-point sums depends on the number of threads.
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
        }

    def start(self, folder, *arguments):
        """Start the run in a process group of its own; its output goes to ``folder.out``."""
        command = [
            sys.executable, "-W", "ignore", SCRIPT, "--config-file", self._config, *self._processes,
        ]  # fmt: skip
        flags = [a for a in arguments if str(a).startswith("--")]
        more = [a for a in arguments if not str(a).startswith("--")]
        command += [*flags, *self._options, *more, "OUTPUT_DIR", folder]
        with Path(f"{folder}.out").open("a") as output:
            return subprocess.Popen(
                list(map(str, command)),
                env=self._environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def finish(self, folder, *arguments):
        """Run to the end; return the exit code."""
        return self.start(folder, *arguments).wait()


def kill_group(process):
    """Kill a run with all its processes, as the kernel or a scheduler does."""
    with contextlib.suppress(ProcessLookupError):  # it has come to its end by itself
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(process, condition, *, pause=0.002):
    """Return whether ``condition`` came true before the process ended."""
    while process.poll() is None:
        if condition():
            return True
        time.sleep(pause)
    return False


def iterations_in(folder):
    """Return how many lines metrics.json has."""
    path = Path(folder) / "metrics.json"
    return path.read_text().count("\n") if path.is_file() else 0


def metrics_of(folder):
    """Return the lines of metrics.json without what depends on the machine."""
    lines = (Path(folder) / "metrics.json").read_text().splitlines()
    # A metric of a class without instances is NaN, which equals nothing.
    rows = [json.loads(line, parse_constant=str) for line in lines]
    return [{k: v for k, v in row.items() if k not in NOT_COMPARED} for row in rows]


def weights_of(folder, name="model_final.pth"):
    return torch.load(Path(folder) / name, weights_only=True)["model"]


def assert_same_run(first, second):
    """
    Assert that what two runs have left is bit-equal.

    That is all of the last checkpoint (weights, optimizer, schedule, moving average, best value,
    patience, smoothed metrics), of the best and the averaged model, and the lines of metrics.json.
    """
    first, second = Path(first), Path(second)
    for name in ("model_final.pth", "model_best.pth", "model_ema.pth"):
        assert (first / name).is_file() == (second / name).is_file(), name
        if (first / name).is_file():
            saved = (torch.load(folder / name, weights_only=True) for folder in (first, second))
            assert not list(_differences(*saved)), name
    lines = metrics_of(first), metrics_of(second)
    assert [line["iteration"] for line in lines[0]] == [line["iteration"] for line in lines[1]]
    for line, other in zip(*lines, strict=True):
        names = line.keys() | other.keys()
        different = {n: (line.get(n), other.get(n)) for n in names if line.get(n) != other.get(n)}
        assert not different, f"iteration {line['iteration']}: {different}"


def _differences(first, second, path=""):
    """Yield the paths at which two checkpoints differ."""
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        for key in first:
            # The config that a checkpoint tells names the folder of its run.
            if key not in NOT_COMPARED | {"config"}:
                yield from _differences(first[key], second[key], f"{path}/{key}")
    elif isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        if len(first) != len(second):
            yield f"{path}: {len(first)} and {len(second)} items"
            return
        for i, pair in enumerate(zip(first, second, strict=True)):
            yield from _differences(*pair, f"{path}/{i}")
    elif isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        if not torch.equal(first, second):
            yield path
    elif repr(first) != repr(second):  # as which NaN equals itself
        yield f"{path}: {first!r} and {second!r}"


def output_of(folder):
    return Path(f"{folder}.out").read_text()
