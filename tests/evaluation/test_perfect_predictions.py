"""What a loader reads, given to the evaluator of its format as predictions, is perfect."""

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from d2ft.config import get_cfg
from d2ft.data import (
    register_kitti_instances,
    register_voc_instances,
    register_wider_face_instances,
)
from d2ft.evaluation import build_evaluator

REST = "1.5 1.6 3.7 0 1 20 0.1"
LEVELS = ("easy", "moderate", "hard")


def _truth(record, *, also_ignored=False):
    """Return the annotations as predictions, each with a score of its own."""
    chosen = [a for a in record["annotations"] if also_ignored or not a.get("ignore")]
    boxes = [
        BoxMode.convert(a.get("kitti_bbox", a["bbox"]), a["bbox_mode"], BoxMode.XYXY_ABS)
        for a in chosen
    ]
    instances = Instances((record["height"], record["width"]))
    instances.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
    instances.pred_classes = torch.tensor([a["category_id"] for a in chosen], dtype=torch.int64)
    instances.scores = torch.linspace(0.9, 0.5, len(chosen))
    return instances


def _evaluate_truth(name, **options):
    cfg = get_cfg()
    cfg.MODEL.MASK_ON = False
    evaluator = build_evaluator(cfg, name)
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        evaluator.process([record], [{"instances": _truth(record, **options)}])
    return evaluator.evaluate()["bbox"]


def test_kitti(tmp_path):
    for folder in ("image_2", "label_2"):
        (tmp_path / "training" / folder).mkdir(parents=True)
    # 41 of each class: with fewer, recall does not have 40 steps. One car leaves the image.
    lines = [f"{name} 0 0 0 {x} 10 {x + 60} 70 {REST}"
             for x, name in ((0, "Car"), (100, "Pedestrian"), (200, "Cyclist"), (300, "Van"))]  # fmt: skip
    lines += [
        f"Car 0 0 0 380.5 100 450 160 {REST}",
        "DontCare -1 -1 -10 0 120 90 190 -1 -1 -1 0 0 0 0",
    ]
    for number in range(41):
        Image.new("RGB", (400, 200)).save(tmp_path / f"training/image_2/{number:06}.png")
        (tmp_path / f"training/label_2/{number:06}.txt").write_text("\n".join(lines))
    register_kitti_instances("my_kitti", tmp_path)
    for results in (
        _evaluate_truth("my_kitti"),
        _evaluate_truth("my_kitti", also_ignored=True),  # Van and DontCare are no mistakes
    ):
        assert {key: value for key, value in results.items() if value != 100} == {}
        assert {f"AP-{name}-{level}" for name in ("Car", "Pedestrian", "Cyclist")
                for level in LEVELS} < results.keys()  # fmt: skip


def test_real_frames_of_kitti(real_data):
    register_kitti_instances("my_kitti", real_data / "kitti")
    results = _evaluate_truth("my_kitti")
    lines = [
        line.split()
        for file in (real_data / "kitti/training/label_2").glob("*.txt")
        for line in file.read_text().splitlines()
    ]
    # Limits of evaluate_object.cpp: least height, highest occlusion, most truncation.
    for level, limits in zip(LEVELS, ((40, 0, 0.15), (25, 1, 0.3), (25, 2, 0.5)), strict=True):
        counted = sum(
            fields[0] == "Car"
            and float(fields[7]) - float(fields[5]) > limits[0]
            and int(fields[2]) <= limits[1]
            and float(fields[1]) <= limits[2]
            for fields in lines
        )
        # n objects reach n of the 41 recalls: of the 40 all but the first count, of the 11 each
        # fourth.
        assert results[f"AP-Car-{level}"] == pytest.approx(100 * (counted - 1) / 40)
        assert results[f"AP-Car-{level}-R11"] == pytest.approx(100 * ((counted + 3) // 4) / 11)


@pytest.mark.parametrize("lists", [True, False], ids=["official lists", "without"])
def test_real_images_of_wider_face(real_data, lists):
    if lists:
        pytest.importorskip("scipy")
    root = real_data / "widerface"
    register_wider_face_instances(
        "my_faces",
        root / "WIDER_val/images",
        root / "wider_face_split/wider_face_val_bbx_gt.txt",
        root / "ground_truth" if lists else None,
    )
    results = _evaluate_truth("my_faces", also_ignored=True)
    assert results.keys() == ({"AP", "AP-easy", "AP-medium", "AP-hard"} if lists else {"AP"})
    assert all(value == pytest.approx(100) for value in results.values())


def test_real_images_of_blood_cells(real_data):
    root = real_data / "VOC_BCCD/VOCdevkit/VOC2007"
    register_voc_instances("my_cells", root, "val", ["RBC", "WBC", "Platelets"])
    results = _evaluate_truth("my_cells")
    assert results["AP"] == results["AP50"] == pytest.approx(100)
