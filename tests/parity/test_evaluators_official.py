"""
The evaluators on real datasets, read by d2ft's loaders, against Detectron2's or plain references.

Predictions are the ground truth with every damage at once: shifted, eroded, merged, duplicated, of
a wrong class, of tied scores, of one pixel, empty, touching borders, or none at all.
"""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, Instances

from d2ft.data import (
    register_coco_instances,
    register_kitti_instances,
    register_voc_instances,
    register_wider_face_instances,
)
from d2ft.evaluation import (
    CocoEvaluator,
    KittiEvaluator,
    PascalVocEvaluator,
    WiderFaceEvaluator,
)
from d2ft.evaluation.box_predictions import annotation_boxes
from d2ft.evaluation.wider_face import read_face_lists
from tests.parity.kitti_reference import reference_ap as kitti_reference
from tests.parity.test_kitti_official import read_labels
from tests.parity.wider_face_reference import reference_ap as wider_face_reference

pytestmark = pytest.mark.parity


def damaged(record, num_classes, seed, *, ties):
    """Return predictions whose corners are multiples of 1/2, which every format keeps."""
    rng = np.random.default_rng(seed)
    height, width = record["height"], record["width"]
    annotations = [a for a in record["annotations"] if rng.random() < 0.9]
    if seed % 7 == 6:
        annotations = []
    boxes = annotation_boxes(annotations)
    sizes = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    changed = [
        boxes,
        boxes + rng.normal(0, 0.07, boxes.shape) * sizes,
        boxes + np.array([0.1, 0.1, -0.1, -0.1]) * sizes,
        np.hstack([np.zeros_like(boxes[:, :2]), boxes[:, 2:]]),
        np.hstack([boxes[:, :2], boxes[:, :2] + 1]),
        np.hstack([boxes[:, :2], boxes[:, :2]]),
    ]
    if len(boxes) > 1:
        others = np.roll(boxes, 1, axis=0)
        low, high = np.minimum(boxes, others), np.maximum(boxes, others)
        changed.append(np.hstack([low[:, :2], high[:, 2:]]))
    # Most are shifted only; of the rest each gets some.
    kind = rng.choice(len(changed), len(boxes), p=_shares(len(changed)))
    found = np.array([changed[k][i] for i, k in enumerate(kind)]).reshape(-1, 4)
    classes = np.array([a["category_id"] for a in annotations], np.int64)
    wrong = rng.random(len(classes)) < 0.1
    classes[wrong] = rng.integers(0, num_classes, wrong.sum())
    twice = rng.random(len(found)) < 0.2
    found, classes = np.vstack([found, found[twice]]), np.append(classes, classes[twice])
    found = (found.clip(0, [width, height, width, height]) * 2).round() / 2
    found[:, 2:] = np.maximum(found[:, 2:], found[:, :2])
    scores = rng.random(len(found))
    instances = Instances((height, width))
    instances.pred_boxes = Boxes(torch.tensor(found, dtype=torch.float32).reshape(-1, 4))
    instances.scores = torch.tensor(scores.round(1) if ties else scores, dtype=torch.float32)
    instances.pred_classes = torch.tensor(classes, dtype=torch.int64)
    return instances


def _shares(number):
    return [0.2, 0.5, *[0.3 / (number - 2)] * (number - 2)]


def _run(evaluator, records, predictions):
    evaluator.reset()
    for record, instances in zip(records, predictions, strict=True):
        evaluator.process([record], [{"instances": instances}])
    return evaluator.evaluate()


@pytest.mark.parametrize("year", [2007, 2012])
def test_blood_cells_have_detectron2s_numbers(tmp_path, real_data, year):
    root = real_data / "VOC_BCCD" / "VOCdevkit" / "VOC2007"
    for folder in ("Annotations", "JPEGImages"):
        (tmp_path / folder).symlink_to(root / folder)
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    # Fewer than 1000 predictions, so that all differ in the three digits that Detectron2 keeps of
    # a score; it orders equal ones at random.
    names = (root / "ImageSets" / "Main" / "val.txt").read_text().split()[:40]
    (tmp_path / "ImageSets" / "Main" / "some.txt").write_text("\n".join(names))
    classes = ["Platelets", "RBC", "WBC"]
    register_voc_instances("cells", tmp_path, "some", classes, year=year)
    records = DatasetCatalog.get("cells")
    predictions = [damaged(r, 3, seed, ties=False) for seed, r in enumerate(records)]
    total = sum(map(len, predictions))
    scores = torch.from_numpy(np.random.default_rng(0).permutation(999)[:total] / 1000).float()
    for instances in predictions:
        instances.scores, scores = scores[: len(instances)], scores[len(instances) :]
    ours = _run(PascalVocEvaluator("cells"), records, predictions)["bbox"]
    theirs = _run(PascalVOCDetectionEvaluator("cells"), records, predictions)["bbox"]
    assert 0 < ours["AP"] < ours["AP50"] < 100
    for key, value in theirs.items():
        # Means of the same numbers in another order.
        assert ours[key] == pytest.approx(value, rel=0, abs=1e-12)


@pytest.mark.parametrize("max_dets", [None, 3])
def test_coco_images_have_detectron2s_numbers(real_data, max_dets):
    register_coco_instances(
        "coco_real",
        real_data / "coco" / "annotations" / "instances_val2017.json",
        real_data / "coco" / "val2017",
    )
    records = DatasetCatalog.get("coco_real")
    classes = MetadataCatalog.get("coco_real").thing_classes
    predictions = [damaged(r, len(classes), seed, ties=True) for seed, r in enumerate(records)]
    for record, instances in zip(records, predictions, strict=True):
        masks = torch.zeros(len(instances), record["height"], record["width"], dtype=torch.bool)
        corners = instances.pred_boxes.tensor.int().tolist()
        for mask, (x0, y0, x1, y1) in zip(masks, corners, strict=True):
            mask[y0:y1, x0:x1] = True
            mask[(y0 + y1) // 2 :, (x0 + x1) // 2 :] = False
        instances.pred_masks = masks
    options = {"tasks": ("bbox", "segm"), "max_dets_per_image": max_dets}
    ours = _run(CocoEvaluator("coco_real", **options), records, predictions)
    stock = COCOEvaluator("coco_real", distributed=False, use_fast_impl=False, **options)
    theirs = _run(stock, records, predictions)
    for task in ("bbox", "segm"):
        assert 0 < ours[task]["AP"] < 100
        # Detectron2 has no AR in its results, and takes AP50 and AP75 at 100 detections.
        shared = {k: ours[task][k] for k in theirs[task] if k not in ("AP50", "AP75")}
        if max_dets is None:
            shared = {k: v for k, v in ours[task].items() if not k.startswith("AR")}
        np.testing.assert_equal(shared, {k: theirs[task][k] for k in shared})


def test_kitti_frames_have_the_numbers_of_the_official_rules(real_data):
    register_kitti_instances("kitti_real", real_data / "kitti")
    records = DatasetCatalog.get("kitti_real")
    classes = MetadataCatalog.get("kitti_real").thing_classes
    predictions = [damaged(r, 3, seed, ties=True) for seed, r in enumerate(records)]
    ours = _run(KittiEvaluator("kitti_real"), records, predictions)["bbox"]
    found = [
        [
            (classes[category], box, score)
            for category, box, score in zip(
                p.pred_classes.tolist(),
                p.pred_boxes.tensor.tolist(),
                p.scores.tolist(),
                strict=True,
            )
        ]
        for p in predictions
    ]
    truth = read_labels(real_data / "kitti" / "training" / "label_2")
    expected = kitti_reference(list(zip(truth, found, strict=True)))
    assert ours["AP-Car-moderate"] > 0
    for (name, level), pair in expected.items():
        for suffix, value in zip(("", "-R11"), pair, strict=True):
            got = ours[f"AP-{name}-{level}{suffix}"]
            assert got == value * 100 or (np.isnan(got) and value == 0)


def test_wider_faces_have_the_numbers_of_the_official_rules(real_data):
    pytest.importorskip("scipy")
    root = real_data / "widerface"
    lists_folder = root / "ground_truth"
    register_wider_face_instances(
        "faces_real",
        root / "WIDER_val" / "images",
        root / "wider_face_split" / "wider_face_val_bbx_gt.txt",
        lists_folder,
    )
    records = DatasetCatalog.get("faces_real")
    predictions = [damaged(r, 1, seed, ties=True) for seed, r in enumerate(records)]
    ours = _run(WiderFaceEvaluator("faces_real"), records, predictions)["bbox"]
    lists = read_face_lists(lists_folder)
    assert ours["AP"] > 0
    for level in ("easy", "medium", "hard"):
        images = []
        for record, instances in zip(records, predictions, strict=True):
            faces = lists[record["image_id"]]
            order = np.argsort(-instances.scores.numpy(), kind="stable")
            rows = zip(instances.pred_boxes.tensor.tolist(), instances.scores.tolist(), strict=True)
            rows = list(rows)
            images.append(
                (
                    list(zip(faces.boxes.tolist(), faces.counted[level].tolist(), strict=True)),
                    [rows[i] for i in order],
                )
            )
        # The reference adds one product after the other, NumPy pairs of them.
        expected = wider_face_reference(images) * 100
        assert ours[f"AP-{level}"] == pytest.approx(expected, rel=0, abs=1e-10)
