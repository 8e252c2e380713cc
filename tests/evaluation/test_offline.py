import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.data import DatasetCatalog
from detectron2.evaluation import DatasetEvaluators
from detectron2.structures import Boxes, Instances

from d2ft.config import get_cfg
from d2ft.data import register_builtin_datasets
from d2ft.data.synthetic import write_mini_cityscapes
from d2ft.errors import UserError
from d2ft.evaluation import build_evaluator
from d2ft.evaluation.masks import decode_mask
from d2ft.evaluation.offline import evaluate_predictions
from d2ft.evaluation.predictions import PredictionWriter, predictions_file, results_json

DATASET = "cityscapes_instance_val"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    write_mini_cityscapes(
        root / "cityscapes", splits={"val": 5}, image_size=(128, 256), num_objects=(5, 9), seed=1
    )
    return root


@pytest.fixture
def cfg(root, monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    register_builtin_datasets()
    cfg = get_cfg()
    cfg.MODEL.MASK_ON = True
    cfg.OUTPUT_DIR = str(tmp_path / "run")
    return cfg


def _predict(record, number):
    """Return ground truth that was moved, with random scores and now and then another class."""
    generator = torch.Generator().manual_seed(number)
    size = (record["height"], record["width"])
    annotations = record["annotations"] if number != 3 else []
    moves = torch.randint(-3, 4, (len(annotations), 2), generator=generator).tolist()
    masks = [
        decode_mask(annotation["segmentation"]).roll(move, (0, 1))
        for annotation, move in zip(annotations, moves, strict=True)
    ]
    boxes = torch.tensor([a["bbox"] for a in annotations]).reshape(-1, 4)
    classes = torch.tensor([a["category_id"] for a in annotations], dtype=torch.int64)
    wrong = torch.rand(len(annotations), generator=generator) < 0.2
    instances = Instances(size)
    instances.pred_boxes = Boxes(boxes + torch.rand(boxes.shape, generator=generator) * 4)
    instances.scores = torch.rand(len(annotations), generator=generator)
    instances.pred_classes = torch.where(wrong, (classes + 1) % 8, classes)
    instances.pred_masks = torch.stack(masks) if masks else torch.zeros(0, *size).bool()
    return instances


def _evaluate(cfg, numbers):
    """Evaluate the frames of these numbers, and keep the predictions, as a run does."""
    writer = PredictionWriter(DATASET, predictions_file(cfg.OUTPUT_DIR, DATASET))
    evaluator = DatasetEvaluators([writer, build_evaluator(cfg, DATASET)])
    evaluator.reset()
    records = DatasetCatalog.get(DATASET)
    for number in numbers:
        instances = _predict(records[number], number)
        evaluator.process([records[number]], [{"instances": instances}])
    return evaluator.evaluate()


@pytest.mark.parametrize("with_masks", [True, False])
def test_kept_predictions_have_the_numbers_of_the_run_to_the_last_digit(cfg, with_masks):
    cfg.MODEL.MASK_ON = with_masks
    results = _evaluate(cfg, range(5))
    path = predictions_file(cfg.OUTPUT_DIR, DATASET)
    assert 0 < results["bbox"]["AP"] < 100
    assert set(results) == ({"segm", "bbox", "segm_coco"} if with_masks else {"bbox"})
    assert results_json(evaluate_predictions(cfg, DATASET, path)) == results_json(results)


def test_frames_that_a_file_does_not_mention_count_as_empty(cfg):
    path = predictions_file(cfg.OUTPUT_DIR, DATASET)
    # The fourth frame has no predictions in any case.
    everything = results_json(_evaluate(cfg, (0, 1, 2, 3, 4)))
    assert results_json(_evaluate(cfg, (0, 1, 2, 4))) == everything
    half = _evaluate(cfg, (0, 1))
    assert half["segm"]["AP"] < json.loads(everything)["segm"]["AP"]
    assert results_json(evaluate_predictions(cfg, DATASET, path)) == results_json(half)


def test_boxes_of_a_tool_without_masks_are_evaluated_where_the_config_says_so(cfg, tmp_path):
    _evaluate(cfg, range(5))
    found = json.loads(predictions_file(cfg.OUTPUT_DIR, DATASET).read_text())
    path = tmp_path / "boxes.json"
    path.write_text(
        json.dumps([{k: v for k, v in f.items() if k != "segmentation"} for f in found])
    )
    with pytest.raises(UserError, match="have no masks, and MODEL.MASK_ON is True"):
        evaluate_predictions(cfg, DATASET, path)
    cfg.MODEL.MASK_ON = False
    assert evaluate_predictions(cfg, DATASET, path)["bbox"]["AP"] > 0


def _work(rank, shares, cfg, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(shares)
    )
    # Less than a prediction, so that shares come in many parts.
    PredictionWriter.process.__globals__["_CHUNK_BYTES"] = 100
    results = _evaluate(cfg, shares[rank])
    (folder / f"{rank}.json").write_text(results_json(results or {}))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "shares",
    [[(0, 1, 2), (3, 4)], [(0, 1, 2, 3, 4), ()], [(), (0, 1), (2, 3, 4)], [(0,), (), (1, 2, 3, 4)]],
)
def test_several_processes_have_the_digits_of_one_also_with_an_empty_share(
    cfg, tmp_path, monkeypatch, shares
):
    path = predictions_file(cfg.OUTPUT_DIR, DATASET)
    expected = results_json(_evaluate(cfg, range(5)))
    predictions = path.read_bytes()
    path.unlink()
    mp.start_processes(_work, (shares, cfg, tmp_path), nprocs=len(shares), start_method="fork")
    assert (tmp_path / "0.json").read_text() == expected
    assert {(tmp_path / f"{rank}.json").read_text() for rank in range(1, len(shares))} == {"{}"}
    assert path.read_bytes() == predictions
    assert np.isfinite(json.loads(expected)["segm"]["AP"])
