import pytest

from d2ft.checkpoint.zoo import is_backbone_only, source_classes
from d2ft.labels import COCO_CLASSES

MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x/137849600/model_final_f10217.pkl"
HTTPS = "https://dl.fbaipublicfiles.com/detectron2/"


@pytest.mark.parametrize("prefix", ["detectron2://", HTTPS])
@pytest.mark.parametrize(
    ("path", "classes"),
    [
        (MASK_RCNN, COCO_CLASSES),
        ("COCO-Detection/retinanet_R_50_FPN_3x/190397829/model_final_5bd44e.pkl", COCO_CLASSES),
        ("COCO-Keypoints/keypoint_rcnn_R_50_FPN_3x/137849621/model_final_a6e10b.pkl", ("person",)),
        ("Cityscapes/mask_rcnn_R_50_FPN/142423278/model_final_af9cf5.pkl", None),
        ("ImageNetPretrained/MSRA/R-50.pkl", None),
    ],
)
def test_class_names_of_the_zoo_follow_from_the_folder(prefix, path, classes):
    assert source_classes(prefix + path) == classes


@pytest.mark.parametrize("path", [MASK_RCNN, f"/weights/{MASK_RCNN}", "", "model_final_f10217.pkl"])
def test_local_file_is_not_of_the_zoo_whatever_its_name(path):
    assert source_classes(path) is None


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("detectron2://ImageNetPretrained/MSRA/R-50.pkl", True),
        (f"{HTTPS}ImageNetPretrained/torchvision/R-50.pkl", True),
        ("catalog://ImageNetPretrained/FAIR/R-50-GN", True),
        (f"detectron2://{MASK_RCNN}", False),
        ("ImageNetPretrained/MSRA/R-50.pkl", False),
    ],
)
def test_backbones_are_known_by_their_address(address, expected):
    assert is_backbone_only(address) is expected
