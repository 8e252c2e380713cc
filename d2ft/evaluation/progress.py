"""Show how far an inference is."""

import math
from typing import Any

from detectron2.data import DatasetCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from d2ft.progress import open_bar


class InferenceProgress(DatasetEvaluator):
    """
    A bar on stderr that moves with each image; measures nothing.

    It is there in a terminal and on the main process only. In a log, ``inference_on_dataset`` says
    every five seconds how far it is, how long data, model and evaluators take, and what is left.
    """

    def __init__(self, dataset_name: str) -> None:
        """Take the number of images from a registered dataset."""
        self._dataset_name = dataset_name
        self._bar: Any = None

    def reset(self) -> None:
        """Open the bar."""
        images = len(DatasetCatalog.get(self._dataset_name))
        self._bar = open_bar(
            total=math.ceil(images / comm.get_world_size()), desc=self._dataset_name, unit="image"
        )

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Move the bar."""
        self._bar.update(len(inputs))

    def evaluate(self) -> dict[str, Any]:
        """Close the bar; return no results."""
        self._bar.close()
        return {}
