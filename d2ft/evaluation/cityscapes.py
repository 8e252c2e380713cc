"""The official Cityscapes instance metric, computed by cityscapesscripts itself."""

import itertools
import logging
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.utils import comm
from PIL import Image
from tabulate import tabulate
from tqdm import tqdm

from d2ft.errors import UserError
from d2ft.host import cityscapesscripts_bridge
from d2ft.labels import CITYSCAPES_INSTANCE_LABELS

logger = logging.getLogger(__name__)

_LABEL_ID_OF_NAME = {label.name: label.id for label in CITYSCAPES_INSTANCE_LABELS}


def require_official_classes(dataset_name: str) -> list[str]:
    """
    Return the classes of a dataset that the official metric is to judge.

    Raises:
        UserError: if one of them is not among the official eight.
    """
    classes = list(MetadataCatalog.get(dataset_name).thing_classes)
    unknown = [name for name in classes if name not in _LABEL_ID_OF_NAME]
    if unknown:
        raise UserError(
            f"dataset {dataset_name!r} has the class {unknown[0]!r}, which the Cityscapes "
            f"instance metric does not know; it knows {', '.join(_LABEL_ID_OF_NAME)}. "
            "Register the dataset with evaluator_type 'coco'"
        )
    return classes


class CityscapesInstanceEvaluator(DatasetEvaluator):
    """
    Official instance AP and AP50 of Cityscapes, in total and per class.

    Each process keeps its predictions as run-length codes; the main process writes all of them in
    the format of the evaluation server to a temporary folder and runs
    ``evalInstanceLevelSemanticLabeling`` of cityscapesscripts. A frame without predictions counts
    as empty.
    """

    def __init__(self, dataset_name: str) -> None:
        """
        Prepare for a dataset whose dicts have ``instance_file_name``.

        Raises:
            UserError: as :func:`require_official_classes`.
        """
        self._classes = require_official_classes(dataset_name)
        self._dataset_name = dataset_name
        self.reset()

    def reset(self) -> None:
        """Forget all predictions."""
        self._predictions: list[dict[str, Any]] = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Keep the predicted masks, classes and scores of a batch."""
        for sample, output in zip(inputs, outputs, strict=True):
            instances = output["instances"].to("cpu")
            self._predictions.extend(instances_to_coco_json(instances, sample["image_id"]))

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Return ``{"segm": {"AP", "AP50", "AP-<class>", "AP50-<class>"}}`` in percent."""
        gathered = comm.gather(self._predictions, dst=0)
        if not comm.is_main_process():
            return {}
        by_image: dict[str, list[dict[str, Any]]] = {}
        for prediction in itertools.chain.from_iterable(gathered):
            by_image.setdefault(prediction["image_id"], []).append(prediction)
        records = DatasetCatalog.get(self._dataset_name)
        with tempfile.TemporaryDirectory(prefix="d2ft_cityscapes_") as temporary:
            # The official code compares paths as text, so no link may be in them.
            folder = Path(temporary).resolve()
            lists = [
                self._write_predictions(folder, number, by_image.get(record["image_id"], []))
                for number, record in enumerate(
                    tqdm(records, desc="Writing predictions", unit="frame")
                )
            ]
            averages = _official_averages(lists, records, folder)
        results = self._results(averages)
        rows = [(name, results[f"AP-{name}"], results[f"AP50-{name}"]) for name in self._classes]
        rows.append(("average", results["AP"], results["AP50"]))
        table = tabulate(rows, headers=("class", "AP", "AP50"), floatfmt=".3f")
        logger.info("Official Cityscapes instance AP in percent:\n%s", table)
        return {"segm": results}

    def _write_predictions(
        self, folder: Path, frame: int, predictions: list[dict[str, Any]]
    ) -> Path:
        """Write masks and the list that names them: ``<mask file> <label id> <score>`` a line."""
        lines = []
        for number, prediction in enumerate(predictions):
            # Numbers, not names: a space in a name would break the line.
            file = f"{frame}_{number}.png"
            mask = mask_util.decode(prediction["segmentation"])
            Image.fromarray(mask * np.uint8(255)).save(folder / file)
            label_id = _LABEL_ID_OF_NAME[self._classes[prediction["category_id"]]]
            lines.append(f"{file} {label_id} {prediction['score']}\n")
        path = folder / f"{frame}.txt"
        path.write_text("".join(lines), encoding="utf-8")
        return path

    def _results(self, averages: dict[str, Any]) -> dict[str, float]:
        results = OrderedDict(
            AP=averages["allAp"] * 100,
            AP50=averages["allAp50%"] * 100,
        )
        for name in self._classes:
            results[f"AP-{name}"] = averages["classes"][name]["ap"] * 100
        for name in self._classes:
            results[f"AP50-{name}"] = averages["classes"][name]["ap50%"] * 100
        return OrderedDict((key, float(value)) for key, value in results.items())


def _official_averages(
    predictions: list[Path], records: list[dict[str, Any]], folder: Path
) -> dict[str, Any]:
    import cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling as official

    ground_truth = [record["instance_file_name"] for record in records]
    args = official.args
    before = dict(vars(args))
    args.predictionPath = str(folder)
    args.gtInstancesFile = str(folder / "gtInstances.json")
    args.JSONOutput = False
    args.quiet = True
    logger.info("Computing the official Cityscapes instance AP of %d frames ...", len(records))
    try:
        with cityscapesscripts_bridge():
            result = official.evaluateImgLists(list(map(str, predictions)), ground_truth, args)
    except SystemExit as error:
        # Its printError says on standard output what was wrong and exits the process.
        raise RuntimeError("cityscapesscripts refused the predictions, see above") from error
    finally:
        vars(args).clear()
        vars(args).update(before)
    return dict(result["averages"])
