"""The task ``train`` of ``benchmark.py``: a step of Mask R-CNN R50-FPN on the CPU."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from benchmark_sides import Side, build_seeded
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from d2ft.config import load_cfg
from d2ft.data import register_builtin_datasets
from d2ft.data.mapper import FinetuneDatasetMapper
from d2ft.engine.trainer import FinetuneTrainer

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "cityscapes_ft.yaml"
INSTANCES = 20  # an image

# name, unit, values of ours, values of the stock way, peak memory of both in MiB
Row = tuple[str, str, list[float], list[float], float, float]


def benchmark_train(_: Path, *, quick: bool) -> Iterator[Row]:
    """Compare steps of two images, forward to optimizer, from the same weights and numbers."""
    for height in (128,) if quick else (256, 512):
        sides = {name: Side(build_steps, name == "ours", height) for name in ("ours", "stock")}
        masks = _assert_equal_steps(sides, steps=1 if quick else 2)
        times: dict[str, list[float]] = {name: [] for name in sides}
        for step in range(1 if quick else 5):
            for name, side in sides.items():
                times[name].append(side(step)[1])
        peaks = (side.close() for side in sides.values())
        title = f"step at {height}x{height * 2}, {masks} masks"
        yield title, "s", times["ours"], times["stock"], *peaks


def build_steps(fast: bool, height: int) -> Callable[..., dict[str, float]]:
    """
    Build a model with random weights, and a batch for it.

    Args:
        fast: build it as d2ft does, with MODEL.FAST_CPU; else as Detectron2 does.
        height: of the images in pixels; they are twice as wide.

    Returns:
        A function that takes a step and returns its losses. Its arguments are the seed of the
        step's random numbers and, if they are wanted, a file for the gradients. The learning rate
        is 0, so that each step has the same work.
    """
    register_builtin_datasets()
    overrides = f"INPUT.MIN_SIZE_TRAIN ({height},{height}) INPUT.RANDOM_FLIP none"
    cfg = load_cfg(CONFIG, ["MODEL.DEVICE", "cpu", *overrides.split()])
    model = build_seeded(cfg, FinetuneTrainer.build_model if fast else build_model).train()
    batch = _batch(cfg)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=0.0, momentum=cfg.SOLVER.MOMENTUM)

    def step(seed: int, gradients: Path | None = None) -> dict[str, float]:
        torch.manual_seed(seed)
        optimizer.zero_grad()
        with EventStorage() as storage:
            losses = model(batch)
            found = {name: loss.item() for name, loss in losses.items()}
            found["masks"] = 2 * storage.latest()["roi_head/num_fg_samples"][0]
        sum(losses.values()).backward()
        optimizer.step()
        if gradients is not None:
            named = model.named_parameters()
            torch.save({n: p.grad for n, p in named if p.grad is not None}, gradients)
        return found

    return step


def _batch(cfg: Any) -> list[dict[str, Any]]:
    """Return the two frames with the most instances, with exactly INSTANCES each."""
    mapper = FinetuneDatasetMapper(cfg, is_train=True)
    records = DatasetCatalog.get("cityscapes_instance_train")
    batch = []
    for record in sorted(records, key=lambda record: -len(record["annotations"]))[:2]:
        objects = [a for a in record["annotations"] if not a["iscrowd"]]
        torch.manual_seed(0)
        chosen = (objects * INSTANCES)[:INSTANCES]
        batch.append(mapper({**record, "annotations": chosen}))
    return batch


def _assert_equal_steps(sides: dict[str, Side], steps: int) -> int:
    """Compare losses and gradients; return how many masks a step learns from."""
    for step in range(steps):
        with tempfile.TemporaryDirectory(prefix="d2ft_benchmark_") as folder:
            files = {name: Path(folder, name) for name in sides}
            ours, stock = (side(step, files[name])[0] for name, side in sides.items())
            gradients, expected = (torch.load(file) for file in files.values())
        assert ours.keys() == stock.keys()
        assert all(abs(ours[key] - stock[key]) <= 1e-4 for key in stock), (ours, stock)
        assert gradients.keys() == expected.keys()
        worst = max(
            ((gradients[n] - g).norm() / (g.norm() + 1e-7)).item() for n, g in expected.items()
        )
        print(f"Losses within 1e-4, gradients within {worst:.1e} of stock's: {stock}")
        assert worst <= 1e-3, worst
    return round(stock["masks"])
