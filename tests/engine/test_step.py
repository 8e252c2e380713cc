import itertools
import shutil

import pytest
import torch
from detectron2.utils.events import EventStorage

from d2ft.config import load_cfg
from d2ft.data import build_train_loader
from d2ft.engine import FinetuneTrainer
from d2ft.engine.step import FinetuneStep
from tests.engine.runs import assert_same_run
from tests.factories import PROJECT, seeded_model

# All anchors and proposals are used, so that what is sampled does not depend on the split.
ALL_SAMPLES = [
    "SOLVER.IMS_PER_BATCH", "4",
    "INPUT.MIN_SIZE_TRAIN", "(64, 64)",
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE", "100000",
    "MODEL.RPN.POSITIVE_FRACTION", "1.0",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "1000",
    "MODEL.ROI_HEADS.POSITIVE_FRACTION", "1.0",
    "DATALOADER.ASPECT_RATIO_GROUPING", "False",
]  # fmt: skip


@pytest.mark.parametrize("parts", [2, 4])
def test_the_parts_of_a_batch_have_the_gradients_of_the_batch(overrides, parts):
    cfg = load_cfg(PROJECT / "configs/cityscapes_ft.yaml", [*overrides, *ALL_SAMPLES])
    model = seeded_model(cfg).train()
    data = next(iter(build_train_loader(cfg)))
    counts = [len(sample["instances"]) for sample in data]
    assert len(set(counts)) > 1, "equal counts would not show a wrong share"
    results = {}
    for number in (1, parts):
        step = FinetuneStep(model, [data], torch.optim.SGD(model.parameters(), 0.1), parts=number)
        model.zero_grad()
        with EventStorage():
            losses = step.backward(data)
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results[number] = losses, gradients
    whole, split = results[1], results[parts]
    for first, second in itertools.pairwise([whole, split]):
        for kind in (0, 1):
            assert first[kind].keys() == second[kind].keys()
            for name, value in first[kind].items():
                # Sums in another order, in float32.
                error = (second[kind][name] - value).norm() / value.norm().clamp(min=1e-9)
                assert error < 1e-4, name


def test_parts_of_a_resumed_run_have_the_random_numbers_of_the_first_seed(overrides, tmp_path):
    options = [*overrides, "SOLVER.ACCUMULATE", "2", "DATASETS.TEST", "()"]

    def train(folder, seed, *, resume=False):
        more = ["SEED", str(seed), "OUTPUT_DIR", str(tmp_path / folder)]
        cfg = load_cfg(PROJECT / "configs/cityscapes_ft.yaml", [*options, *more])
        trainer = FinetuneTrainer(cfg)
        trainer.resume_or_load(resume=resume)
        trainer.train()

    train("whole", 1)
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    (tmp_path / "stopped/last_checkpoint").write_text("model_0000001.pth")
    train("stopped", 2, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
