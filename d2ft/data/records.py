"""What a checkpoint remembers of its training data, to notice when it has changed."""

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

from d2ft.errors import UserError

# Masks and keypoints are most of the bytes, and do not change without their boxes.
_LEFT_OUT = ("segmentation", "keypoints")


def describe_records(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """
    Return ``{"images", "annotations", "sha256"}`` of dataset dicts.

    The hash is of the order of the images, their names relative to the folder they share, their
    sizes, and the annotations without masks and keypoints. So data may move to another place.
    """
    folder = os.path.commonpath([os.path.dirname(record["file_name"]) for record in records])
    digest = hashlib.sha256()
    annotations = 0
    for record in records:
        kept = [
            {key: value for key, value in annotation.items() if key not in _LEFT_OUT}
            for annotation in record.get("annotations", ())
        ]
        annotations += len(kept)
        name = os.path.relpath(record["file_name"], folder)
        row = [name, record.get("width"), record.get("height"), kept]
        digest.update(json.dumps(row, sort_keys=True, default=repr).encode())
    return {"images": len(records), "annotations": annotations, "sha256": digest.hexdigest()}


def check_same_records(
    saved: dict[str, Any] | None, now: dict[str, Any], names: Sequence[str]
) -> None:
    """
    Check that a run is resumed on the data that it was started on.

    Args:
        saved: of the checkpoint; None, of an older one, passes.
        now: of this run.
        names: DATASETS.TRAIN, for the message.

    Raises:
        UserError: if they differ.
    """
    if saved in (None, now):
        return
    counts = ("images", "annotations")
    changes = [
        f"{saved[key]} {key} then, {now[key]} now" for key in counts if saved[key] != now[key]
    ]
    what = "; ".join(changes) or "as many images and annotations, but not the same"
    raise UserError(
        f"the training data {', '.join(names)} has changed since the checkpoint was written: {what}. "
        "Restore it, or start a new run from these weights: without --resume, with MODEL.WEIGHTS set "
        "to the checkpoint and another OUTPUT_DIR"
    )
