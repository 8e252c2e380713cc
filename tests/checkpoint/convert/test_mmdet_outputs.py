"""What MMDetection detected, as ``record_mmdet.py`` recorded it, against the converted models."""

import lzma

import pytest

from d2ft.checkpoint.class_names import known_classes
from d2ft.checkpoint.describe import describe_checkpoint
from d2ft.checkpoint.weights import read_weights
from tests.checkpoint.convert.compare_mmdet import compare
from tests.conftest import PROJECT

RECORDS = PROJECT / "tests/checkpoint/convert/data/mmdet"
MODELS = sorted(path.stem for path in RECORDS.glob("*.npz"))


@pytest.mark.parity
@pytest.mark.parametrize("name", MODELS)
def test_file_of_mmdetection_gives_its_detections_in_detectron2(name):
    difference = compare(RECORDS, name)[name]
    assert difference.recorded > 50
    assert difference.is_within_tolerance, difference


def test_all_recorded_models_are_there():
    assert MODELS == [
        "cascade_mask_rcnn_pytorch",
        "mask_rcnn_caffe",
        "mask_rcnn_pytorch",
        "retinanet_pytorch",
    ]


def test_file_with_the_history_of_mmengine_is_read_and_tells_its_classes(tmp_path):
    path = tmp_path / "epoch_1.pth"
    path.write_bytes(lzma.decompress((RECORDS / "mask_rcnn_caffe.pth.xz").read_bytes()))
    assert b"HistoryBuffer" in path.read_bytes()
    names = tuple(f"class {i}" for i in range(4))
    assert known_classes(read_weights(str(path)), str(path)) == names
    description = describe_checkpoint(path)
    assert description["framework"] == "MMDetection"
    assert description["class_names"] == list(names)
