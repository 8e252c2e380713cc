"""What a checkpoint remembers of its training data, to notice when it has changed."""

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

from d2ft.data.columns import RecordColumns
from d2ft.errors import UserError


def describe_columns(columns: RecordColumns) -> dict[str, Any]:
    """
    Return ``{"images", "annotations", "columns_sha256"}`` of dataset dicts.

    The hash is of the order of the images, their names relative to the folder they share, their
    sizes, and the boxes and classes of the annotations: masks and keypoints are most of the bytes,
    and do not change without their boxes. So data may move to another place.
    """
    folder = os.path.commonpath([os.path.dirname(name) for name in columns.file_names])
    names = [
        # Cutting is 20 times as fast, and the same where the path is written plainly.
        name[len(folder) + 1 :] if name.startswith(f"{folder}/") else os.path.relpath(name, folder)
        for name in columns.file_names
    ]
    digest = hashlib.sha256(json.dumps(names).encode())
    for values in (
        columns.sizes,
        columns.boxes,
        columns.categories,
        columns.image_of,
        columns.is_crowd,
        columns.is_ignored,
    ):
        digest.update(values.tobytes())
    return {
        "images": len(columns.file_names),
        "annotations": len(columns.boxes),
        "columns_sha256": digest.hexdigest(),
    }


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
    # A checkpoint of an older version has another hash, which says nothing here.
    if saved is None or all(saved[key] == now[key] for key in saved.keys() & now.keys()):
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
