"""WIDER FACE's official metric as an evaluator."""

import logging
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
from detectron2.data import MetadataCatalog

from d2ft.errors import UserError
from d2ft.evaluation.box_predictions import BoxEvaluator, ImagePredictions, annotation_boxes
from d2ft.evaluation.wider_face_ap import (
    match_faces,
    stretch_scores,
    wider_face_average_precision,
)
from d2ft.progress import open_bar

logger = logging.getLogger(__name__)

LEVELS = ("easy", "medium", "hard")


class FaceLists(NamedTuple):
    """
    The faces of an image and which of them each level counts.

    Attributes:
        boxes: (F, 4) XYXY in pixels.
        counted: level -> (F,) flags.
    """

    boxes: np.ndarray
    counted: dict[str, np.ndarray]


def read_face_lists(folder: Path) -> dict[str, FaceLists]:
    """
    Read the official lists of the validation set.

    Args:
        folder: with ``wider_face_val.mat`` and ``wider_{easy,medium,hard}_val.mat``, from the
            evaluation archive of http://shuoyang1213.me/WIDERFACE/.

    Returns:
        "<event>/<image without suffix>" -> its lists.

    Raises:
        UserError: if a file is missing, or scipy, which reads them, is not installed.
    """
    paths = {name: folder / f"wider_{name}_val.mat" for name in ("face", *LEVELS)}
    missing = [path.name for path in paths.values() if not path.is_file()]
    if missing:
        raise UserError(
            f"{folder} lacks {', '.join(missing)} of WIDER FACE's four lists; take "
            "ground_truth_dir out of the dataset's metadata to get one AP over all valid faces"
        )
    try:
        from scipy.io import loadmat
    except ModuleNotFoundError as error:
        raise UserError(
            "WIDER FACE's lists are .mat files, which need scipy: pip install scipy"
        ) from error
    files = {name: loadmat(path) for name, path in paths.items()}
    faces = files["face"]
    lists = {}
    for i, event in enumerate(faces["event_list"][:, 0]):
        for j, image in enumerate(faces["file_list"][i, 0][:, 0]):
            boxes = faces["face_bbx_list"][i, 0][j, 0].astype(np.float64).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            counted = {}
            for level in LEVELS:
                counted[level] = np.zeros(len(boxes), dtype=bool)
                # Numbers of faces, from 1.
                numbers = files[level]["gt_list"][i, 0][j, 0].astype(np.int64).ravel()
                counted[level][numbers - 1] = True
            lists[f"{event.item()}/{image.item()}"] = FaceLists(boxes, counted)
    return lists


class WiderFaceEvaluator(BoxEvaluator):
    """
    WIDER FACE's official AP, easy, medium and hard, or one AP over all valid faces.

    The metadata entry ``ground_truth_dir`` is the folder of the official lists, for
    :func:`read_face_lists`. With it, faces and levels come from the lists; a dataset of fewer
    images is judged on those. Without it, there is one AP over all annotated faces without
    ``ignore``, by the same rules, which is not an official number. The log says which it is.
    """

    def __init__(self, dataset_name: str) -> None:
        """
        Prepare for a dataset of one class.

        Raises:
            UserError: if it has more classes, or as :func:`read_face_lists`.
        """
        super().__init__(dataset_name)
        if len(self._classes) != 1:
            raise UserError(
                f"dataset {dataset_name!r} has the classes {', '.join(self._classes)}; the WIDER "
                "FACE metric judges one. Register the dataset with evaluator_type 'coco'"
            )
        folder = MetadataCatalog.get(dataset_name).get("ground_truth_dir")
        self._lists = None if folder is None else read_face_lists(Path(folder))

    def _evaluate(
        self,
        records: list[dict[str, Any]],
        predictions: list[ImagePredictions],
    ) -> dict[str, dict[str, float]]:
        faces = [self._faces(record) for record in records]
        scores = stretch_scores([found.scores for found in predictions])
        matches = [
            match_faces(found.boxes, stretched, lists.boxes)
            for found, stretched, lists in open_bar(
                zip(predictions, scores, faces, strict=True),
                total=len(faces),
                desc="WIDER FACE AP",
                unit="image",
            )
        ]
        levels = LEVELS if self._lists is not None else ("all",)
        percent = {
            level: wider_face_average_precision(matches, [f.counted[level] for f in faces]) * 100
            for level in levels
        }
        if self._lists is None:
            logger.info(
                "AP of %s over all valid faces, not an official number, as there are no lists of "
                "easy, medium and hard faces: %.3f %%",
                self._dataset_name,
                percent["all"],
            )
            return {"bbox": {"AP": percent["all"]}}
        logger.info(
            "WIDER FACE's AP by the official lists, on %d of their %d images: %s",
            len(records),
            len(self._lists),
            ", ".join(f"{level} {value:.3f} %" for level, value in percent.items()),
        )
        # The hard list holds the faces of the other two.
        return {"bbox": {"AP": percent["hard"], **{f"AP-{lv}": v for lv, v in percent.items()}}}

    def _faces(self, record: dict[str, Any]) -> FaceLists:
        if self._lists is None:
            annotations = record["annotations"]
            valid = np.array([not a.get("ignore") for a in annotations], dtype=bool)
            return FaceLists(annotation_boxes(annotations), {"all": valid})
        path = PurePath(record["file_name"])
        name = f"{path.parent.name}/{path.stem}"
        if name not in self._lists:
            raise UserError(
                f"{self._dataset_name}: the image {record['file_name']} is not in WIDER FACE's "
                "lists of the validation set; take ground_truth_dir out of the dataset's metadata "
                "to get one AP over all valid faces"
            )
        return self._lists[name]
