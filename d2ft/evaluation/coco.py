"""COCO-style box and mask AP for any registered dataset."""

import tempfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator


class CocoEvaluator(COCOEvaluator):
    """
    Same as :class:`COCOEvaluator`, but the ground truth is always that of the registered dataset.

    Detectron2 writes a converted dataset to the output folder, remembers that file in the
    metadata of the dataset and uses it in later runs, also when the dataset has changed. Here it
    is made anew in a temporary folder for every evaluator.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str],
        *,
        max_dets_per_image: int | None = None,
        result_names: Mapping[str, str] | None = None,
    ) -> None:
        """
        Prepare the ground truth.

        Args:
            dataset_name: a registered dataset.
            tasks: of "bbox", "segm", "keypoints".
            max_dets_per_image: the detections of an image that AP counts, best first; 100 is
                COCO's own and the default.
            result_names: task -> key in the results, where another evaluator has the task's name.
        """
        metadata = MetadataCatalog.get(dataset_name)
        converted = not hasattr(metadata, "json_file")
        with tempfile.TemporaryDirectory(prefix="d2ft_coco_") as folder:
            super().__init__(
                dataset_name,
                tasks=tuple(tasks),
                output_dir=folder,
                max_dets_per_image=max_dets_per_image,
                use_fast_impl=False,
                allow_cached_coco=False,
            )
        if converted:
            del metadata.json_file
        self._output_dir = None
        self._result_names = dict(result_names or {})

    def evaluate(self, img_ids: Sequence[int] | None = None) -> dict[str, Any]:
        """Return task -> metric -> percent on the main process and nothing on the others."""
        results = super().evaluate(img_ids)
        return OrderedDict((self._result_names.get(task, task), v) for task, v in results.items())
