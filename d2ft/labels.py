"""
Class names of the datasets that d2ft knows, with the ids their files use.

Plain data: nothing here reads a file or needs Detectron2.
"""

import re
from typing import NamedTuple


class CityscapesLabel(NamedTuple):
    """
    One row of Cityscapes' label table.

    Attributes:
        name: the class as in ``polygons.json``; a group of instances is ``<name>group`` there.
        id: the value in ``labelIds.png``; in ``instanceIds.png`` an instance is
            ``id * 1000 + number`` and a group, or a class without instances, is ``id``.
        has_instances: single objects are told apart.
        ignore_in_eval: pixels of it are void for the official metrics.
    """

    name: str
    id: int
    has_instances: bool = False
    ignore_in_eval: bool = False


# The ids are those of the evaluation server:
# https://github.com/mcordts/cityscapesScripts/blob/v2.3.0/cityscapesscripts/helpers/labels.py
CITYSCAPES_LABELS: tuple[CityscapesLabel, ...] = (
    CityscapesLabel("unlabeled", 0, ignore_in_eval=True),
    CityscapesLabel("ego vehicle", 1, ignore_in_eval=True),
    CityscapesLabel("rectification border", 2, ignore_in_eval=True),
    CityscapesLabel("out of roi", 3, ignore_in_eval=True),
    CityscapesLabel("static", 4, ignore_in_eval=True),
    CityscapesLabel("dynamic", 5, ignore_in_eval=True),
    CityscapesLabel("ground", 6, ignore_in_eval=True),
    CityscapesLabel("road", 7),
    CityscapesLabel("sidewalk", 8),
    CityscapesLabel("parking", 9, ignore_in_eval=True),
    CityscapesLabel("rail track", 10, ignore_in_eval=True),
    CityscapesLabel("building", 11),
    CityscapesLabel("wall", 12),
    CityscapesLabel("fence", 13),
    CityscapesLabel("guard rail", 14, ignore_in_eval=True),
    CityscapesLabel("bridge", 15, ignore_in_eval=True),
    CityscapesLabel("tunnel", 16, ignore_in_eval=True),
    CityscapesLabel("pole", 17),
    CityscapesLabel("polegroup", 18, ignore_in_eval=True),
    CityscapesLabel("traffic light", 19),
    CityscapesLabel("traffic sign", 20),
    CityscapesLabel("vegetation", 21),
    CityscapesLabel("terrain", 22),
    CityscapesLabel("sky", 23),
    CityscapesLabel("person", 24, has_instances=True),
    CityscapesLabel("rider", 25, has_instances=True),
    CityscapesLabel("car", 26, has_instances=True),
    CityscapesLabel("truck", 27, has_instances=True),
    CityscapesLabel("bus", 28, has_instances=True),
    CityscapesLabel("caravan", 29, has_instances=True, ignore_in_eval=True),
    CityscapesLabel("trailer", 30, has_instances=True, ignore_in_eval=True),
    CityscapesLabel("train", 31, has_instances=True),
    CityscapesLabel("motorcycle", 32, has_instances=True),
    CityscapesLabel("bicycle", 33, has_instances=True),
    CityscapesLabel("license plate", -1, ignore_in_eval=True),
)

# The eight classes of the instance task, in the order that Detectron2 and MMDetection use.
CITYSCAPES_INSTANCE_LABELS: tuple[CityscapesLabel, ...] = tuple(
    label for label in CITYSCAPES_LABELS if label.has_instances and not label.ignore_in_eval
)
CITYSCAPES_INSTANCE_CLASSES: tuple[str, ...] = tuple(
    label.name for label in CITYSCAPES_INSTANCE_LABELS
)

# The 20 classes in alphabetical order, as Detectron2 and MMDetection number them:
# http://host.robots.ox.ac.uk/pascal/VOC/voc2012/#devkit, VOCinit.m.
VOC_CLASSES: tuple[str, ...] = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip

# The 80 classes in the order of their category ids:
# https://cocodataset.org/#download, instances_val2017.json, "categories".
COCO_CLASSES: tuple[str, ...] = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog",
    "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella",
    "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich",
    "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote",
    "keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book",
    "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip

# Category ids of the classes above; COCO's ids have gaps.
COCO_CATEGORY_IDS: tuple[int, ...] = tuple(
    i for i in range(1, 91) if i not in {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
)

# Other spelling -> COCO's name of the same class. Case and separators do not count: see
# fold_class_name, by which "pottedplant" of VOC, "traffic_light" of LVIS and "Potted Plant" of
# Objects365 are COCO's already. Cityscapes' names that COCO has are COCO's. WIDER FACE's only
# class, face, has no counterpart in the other sets. A part of a class, or a class that is drawn
# otherwise (KITTI's Van, Tram, Cyclist and Person_sitting, Cityscapes' rider), is no spelling of
# it: that it may start from it anyway is for the user to say.
CLASS_ALIASES: dict[str, str] = {
    # Pascal VOC: http://host.robots.ox.ac.uk/pascal/VOC/voc2007/, development kit, section 2
    "aeroplane": "airplane",
    "motorbike": "motorcycle",
    "sofa": "couch",
    "tv monitor": "tv",
    # KITTI: https://www.cvlibs.net/datasets/kitti/eval_object.php, readme of the development kit
    "pedestrian": "person",
    # LVIS v1, as its own table of synsets maps it to COCO:
    # https://github.com/lvis-dataset/lvis-api/blob/master/data/coco_to_synset.json
    "ball": "sports ball",
    "bus (vehicle)": "bus",
    "car (automobile)": "car",
    "cellular telephone": "cell phone",
    "computer keyboard": "keyboard",
    "doughnut": "donut",
    "fireplug": "fire hydrant",
    "flowerpot": "potted plant",
    "hair dryer": "hair drier",
    "laptop computer": "laptop",
    "microwave oven": "microwave",
    "mouse (computer equipment)": "mouse",
    "necktie": "tie",
    "orange (fruit)": "orange",
    "remote control": "remote",
    "ski": "skis",
    "television set": "tv",
    "train (railroad vehicle)": "train",
    # Objects365 v2, spelled as in its annotation files:
    # https://github.com/open-mmlab/mmdetection/blob/v3.3.0/mmdet/datasets/objects365.py
    "bowl/basin": "bowl",
    "dinning table": "dining table",
    "handbag/satchel": "handbag",
    "moniter/tv": "tv",
    "orange/tangerine": "orange",
}


def fold_class_name(name: str) -> str:
    """Return what of a class name counts: lower case, without spaces, ``_`` and ``-``."""
    return re.sub(r"[\s_-]+", "", name.lower())
