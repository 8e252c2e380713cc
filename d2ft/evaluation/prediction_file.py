"""Read a file of predictions in COCO's results form, image by image."""

import json
import math
import os
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Instances

from d2ft.errors import UserError
from d2ft.evaluation.predictions import category_ids, results_to_instances
from d2ft.rle import check_rle

_CHUNK_BYTES = 1 << 20

# A prediction longer than this is none: the longest run-length codes have some 100 kB.
_LONGEST_BYTES = 64 << 20

_BETWEEN = re.compile(r"[\s,]*")


class PredictionFile:
    """
    The predictions on one dataset, of a run of d2ft or of another tool.

    Only the place of each prediction is kept in memory, 16 bytes of it. The order in the file
    does not matter. An image without a prediction has none; a prediction that comes twice counts
    twice; keys of no use here, such as ``id``, are left aside. A missing ``bbox`` is made from
    the mask.

    Attributes:
        path: the file.
        has_masks: every prediction has a mask; else none has one.
    """

    def __init__(self, path: str | os.PathLike[str], dataset_name: str) -> None:
        """
        Find the predictions of each image.

        Raises:
            UserError: if the file is missing or no list of results, an image id does not belong
                to the dataset, or only some of the predictions have a mask.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"the file of predictions {self.path} does not exist")
        self._dataset_name = dataset_name
        self._image_ids = [record["image_id"] for record in DatasetCatalog.get(dataset_name)]
        self._class_of_category = {
            category: index for index, category in enumerate(category_ids(dataset_name))
        }
        self._file = open(self.path, "rb")  # noqa: SIM115 - closed by close()
        try:
            self._index()
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        """Return the number of predictions."""
        return len(self._offsets)

    def __enter__(self) -> "PredictionFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self, record: dict[str, Any]) -> Instances:
        """
        Return the predictions for one image of the dataset as a model gives them.

        Raises:
            UserError: if one of them has a category that the dataset does not have, a score or a
                box that is not finite, a box of negative size, or a mask of another size than
                the image or that cannot be decoded.
        """
        size = (int(record["height"]), int(record["width"]))
        results = []
        for position in self._positions.get(record["image_id"], ()):
            self._file.seek(self._offsets[position])
            entry = json.loads(self._file.read(self._lengths[position]))
            try:
                results.append(self._check(entry, size))
            except ValueError as error:
                raise UserError(
                    f"{self.path}: prediction {position + 1}, for the image "
                    f"{record['image_id']!r}, {error}"
                ) from error
        return results_to_instances(
            results, size, self._class_of_category, with_masks=self.has_masks
        )

    def _index(self) -> None:
        number_of_image = {image_id: n for n, image_id in enumerate(self._image_ids)}
        images, self._offsets, self._lengths = array("i"), array("q"), array("i")
        self.has_masks = True
        for offset, length, entry in _entries(self._file, self.path):
            where = f"{self.path}: prediction {len(images) + 1}"
            if not isinstance(entry, dict) or "image_id" not in entry:
                raise UserError(f"{where} is not a JSON object with an image_id: {entry!r:.80}")
            number = _look_up(number_of_image, entry["image_id"])
            if number is None:
                raise UserError(
                    f"{where} is for the image {entry['image_id']!r}, which {self._dataset_name!r} "
                    f"does not have; its ids are like {self._image_ids[0]!r}"
                    if self._image_ids
                    else f"{where}: the dataset {self._dataset_name!r} has no images"
                )
            has_mask = "segmentation" in entry
            if not images:
                self.has_masks = has_mask
            elif has_mask != self.has_masks:
                raise UserError(f"{where} has {'a' if has_mask else 'no'} mask, unlike the first")
            images.append(number)
            self._offsets.append(offset)
            self._lengths.append(length)
        order = np.argsort(np.asarray(images), kind="stable")
        ends = np.cumsum(np.bincount(images, minlength=len(self._image_ids)))
        self._positions = dict(
            zip(self._image_ids, np.split(order, ends[:-1]) if len(ends) else [], strict=True)
        )

    def _check(self, entry: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
        missing = {"category_id", "score"} - set(entry)
        if missing:
            raise ValueError(f"has no {min(missing)}")
        if _look_up(self._class_of_category, entry["category_id"]) is None:
            names = MetadataCatalog.get(self._dataset_name).thing_classes
            known = zip(self._class_of_category, names, strict=True)
            raise ValueError(
                f"has the category_id {entry['category_id']!r}; those of {self._dataset_name!r} "
                f"are {', '.join(f'{category} ({name})' for category, name in known)}"
            )
        if not _is_finite(entry["score"]):
            raise ValueError(f"has the score {entry['score']!r}, which is no finite number")
        result = {key: entry[key] for key in ("category_id", "score")}
        if self.has_masks:
            try:
                result["segmentation"] = check_rle(entry["segmentation"], size)
            except ValueError as error:
                raise ValueError(f"has a mask that {error}") from error
        elif "bbox" not in entry:
            raise ValueError("has neither bbox nor segmentation")
        box = entry.get("bbox")
        if "bbox" not in entry:
            box = mask_util.toBbox(result["segmentation"]).tolist()
        result["bbox"] = box
        if not _is_box(box):
            raise ValueError(
                f"has the bbox {box!r}; expected [x, y, width, height], finite, sizes from 0 on"
            )
        return result


def _look_up(table: dict[Any, int], key: Any) -> int | None:
    """Return what ``table`` has for a JSON value; 1.0 and true are no ids."""
    return table.get(key) if type(key) in (int, str) else None


def _is_box(value: Any) -> bool:
    is_four = isinstance(value, list) and len(value) == 4
    return is_four and all(map(_is_finite, value)) and min(value[2:]) >= 0


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _entries(file: IO[bytes], path: Path) -> Iterator[tuple[int, int, Any]]:
    """Yield (offset, length, value) of what is in the JSON list of a file, in bytes."""
    decoder = json.JSONDecoder()
    # One character a byte, so that places in the text are places in the file.
    text, base = file.read(_CHUNK_BYTES).decode("latin-1"), 0
    position = len(text) - len(text.lstrip())
    if text[position : position + 1] != "[":
        raise UserError(
            f"{path} is no file of predictions: it begins with {text[position : position + 20]!r} "
            "and not with a JSON list of results"
        )
    position += 1
    while True:
        position = _match_end(text, position)
        if text[position : position + 1] == "]":
            return
        try:
            value, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError:
            more = file.read(_CHUNK_BYTES).decode("latin-1")
            if not more or len(text) - position > _LONGEST_BYTES:
                raise UserError(
                    f"{path} is damaged or cut off: no JSON from byte {base + position} on"
                ) from None
            text, base, position = text[position:] + more, base + position, 0
            continue
        raw = text[position:end]
        yield base + position, end - position, value if raw.isascii() else _decode(raw)
        position = end


def _match_end(text: str, position: int) -> int:
    match = _BETWEEN.match(text, position)
    assert match is not None  # the pattern matches the empty text
    return match.end()


def _decode(raw: str) -> Any:
    return json.loads(raw.encode("latin-1"))
