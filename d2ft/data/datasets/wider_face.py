"""
WIDER FACE: the official text files and MMDetection's XML layout, one class "face".

Official format, http://shuoyang1213.me/WIDERFACE/ and the readme of ``wider_face_split``: the path
of an image, the number of its faces, then a line ``x y w h blur expression illumination invalid
occlusion pose`` for each, in pixels. An image without faces has one line of zeros, or none.
MMDetection's layout: https://github.com/open-mmlab/mmdetection/tree/main/configs/wider_face.
"""

import functools
import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from detectron2.structures import BoxMode

from d2ft.data.cache import cached_records, warn_once
from d2ft.data.catalog import register_instances
from d2ft.data.datasets.image_size import read_image_size
from d2ft.data.datasets.voc_xml import object_flag, read_xml
from d2ft.errors import UserError

logger = logging.getLogger(__name__)

WIDER_FACE_CLASSES = ("face",)

_EVALUATOR_TYPE = "wider_face"
_FIELDS = 10
_INVALID = 7
_PARSER_VERSION = 1

# XYXY in pixels, and whether the face is to be ignored.
_Face = tuple[list[float], bool]


def register_wider_face_instances(
    name: str,
    image_dir: str | os.PathLike[str],
    annotations: str | os.PathLike[str],
    ground_truth_dir: str | os.PathLike[str] | None = None,
) -> None:
    """
    Register WIDER FACE.

    Args:
        name: for DATASETS.TRAIN and DATASETS.TEST.
        image_dir: as in :func:`load_wider_face_instances`.
        annotations: as there.
        ground_truth_dir: folder of the official lists of easy, medium and hard faces of the
            validation set (``wider_easy_val.mat`` ...); without it there is one AP over all faces.
    """
    lists: dict[str, Any] = (
        {} if ground_truth_dir is None else {"ground_truth_dir": str(ground_truth_dir)}
    )
    image_dir, annotations = Path(image_dir).absolute(), Path(annotations).absolute()
    register_instances(
        name,
        functools.partial(load_wider_face_instances, image_dir, annotations),
        thing_classes=WIDER_FACE_CLASSES,
        evaluator_type=_EVALUATOR_TYPE,
        **lists,
    )


def load_wider_face_instances(
    image_dir: str | os.PathLike[str], annotations: str | os.PathLike[str]
) -> list[dict[str, Any]]:
    """
    Return WIDER FACE as Detectron2 dataset dicts, cached on disk.

    Boxes without width or height are dropped, those past the image clipped; the log says how many.

    Args:
        image_dir: holds a folder for each event: ``WIDER_train/images``, in MMDetection's layout
            ``WIDER_train``.
        annotations: the official ``wider_face_train_bbx_gt.txt``; or MMDetection's ``train.txt``,
            a name a line, whose annotations are ``image_dir/Annotations/<name>.xml``.

    Returns:
        Dicts whose ``image_id`` is "<event>/<image>" without suffix. Faces marked invalid
        (in XML: difficult) have ``ignore`` and ``iscrowd`` 1: Detectron2 does not train on them
        and COCO's metric counts them as neither right nor wrong.

    Raises:
        UserError: if a file is missing, broken or malformed, with file and line.
    """
    image_dir, annotations = Path(image_dir).absolute(), Path(annotations).absolute()
    lines = [line.strip() for line in _read_text(annotations).splitlines()]
    names = [line for line in lines if line]
    if not names:
        raise UserError(f"{annotations} names no image")
    images = [image_dir / line for line in names if _is_image(line)]
    if images:
        sources = [annotations]
        for image in images:
            _require_image(image, annotations)
    else:
        _refuse_repeated(names, annotations)
        sources = [annotations, *(image_dir / "Annotations" / f"{name}.xml" for name in names)]
        # Unlike Path's, false for a name that no file can have.
        missing = [path for path in sources[1:] if not os.path.isfile(path)]
        if missing:
            raise UserError(
                f"{annotations} has no line that is the path of an image, so it is read as a list "
                f"of names, but {missing[0]} does not exist"
            )
        # The event is in the XML alone: these are the images and perhaps some of the same name.
        stems = set(names)
        images = [path for path in sorted(image_dir.glob("*/*.jpg")) if path.stem in stems]

    def parse() -> list[dict[str, Any]]:
        if len(sources) == 1:
            faces = _parse_official(lines, annotations, image_dir)
        else:
            faces = dict(_parse_xml(path, image_dir) for path in sources[1:])
        return _records(faces, image_dir)

    records = cached_records(
        f"WIDER FACE of {annotations}, images {image_dir}",
        [*sources, *images],
        parse,
        version=_PARSER_VERSION,
    )
    dropped, clipped = (sum(r[key] for r in records) for key in ("dropped_boxes", "clipped_boxes"))
    if dropped or clipped:
        warn_once(
            logger,
            "%s: %d boxes have no area in the image and were dropped, %d were clipped to it",
            annotations,
            dropped,
            clipped,
        )
    return records


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(
            f"the WIDER FACE file {path} does not exist. Built-in names look under "
            "$DETECTRON2_DATASETS/widerface, and DETECTRON2_DATASETS is "
            f"{os.environ.get('DETECTRON2_DATASETS', 'not set')}"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text: {error}") from error


def _is_image(line: str) -> bool:
    return line.lower().endswith((".jpg", ".jpeg", ".png"))


def _require_image(image: Path, source: Path) -> None:
    if not os.path.isfile(image):
        raise UserError(f"{source} names the image {image}, which does not exist")


def _refuse_repeated(names: Iterable[str], source: Path) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise UserError(f"{source} names {repeated[0]} twice")


def _parse_official(lines: Sequence[str], source: Path, image_dir: Path) -> dict[Path, list[_Face]]:
    found: dict[Path, list[_Face]] = {}
    at = 0
    while at < len(lines):
        name, at = lines[at], at + 1
        if not name:
            continue
        if not _is_image(name):
            raise UserError(f"{source}, line {at}: expected the path of an image, got {name!r}")
        image = image_dir / name
        if image in found:
            raise UserError(f"{source}, line {at}: names {name} twice")
        count = lines[at] if at < len(lines) else ""
        at += 1
        if not (count.isascii() and count.isdigit()):
            raise UserError(
                f"{source}, line {at}: expected the number of faces of {name}, got {count!r}"
            )
        # An image without faces has a line of zeros or goes on with the next image.
        if int(count) == 0 and at < len(lines) and lines[at].split() == ["0"] * _FIELDS:
            at += 1
        faces = []
        for _ in range(int(count)):
            line = lines[at] if at < len(lines) else ""
            at += 1
            try:
                faces.append(_parse_face(line))
            except ValueError as error:
                raise UserError(f"{source}, line {at}: a face of {name} {error}") from error
        found[image] = faces
    return found


def _parse_face(line: str) -> _Face:
    fields = line.split()
    if len(fields) != _FIELDS:
        raise ValueError(f"has {len(fields)} fields instead of {_FIELDS}: {line!r}")
    try:
        values = [float(field) for field in fields]
    except ValueError as error:
        raise ValueError(f"has a field that is not a number: {line!r}") from error
    x, y, width, height = values[:4]
    if not all(map(math.isfinite, values)) or width < 0 or height < 0:
        raise ValueError(f"has a negative size or a value that is not finite: {line!r}")
    if values[_INVALID] not in (0, 1):
        raise ValueError(f"is marked invalid by {fields[_INVALID]!r}, but that is 0 or 1")
    return [x, y, x + width, y + height], values[_INVALID] == 1


def _parse_xml(path: Path, image_dir: Path) -> tuple[Path, list[_Face]]:
    """Return the image and its faces; corners are taken as they are."""
    root = read_xml(path)
    folder = (root.findtext("folder") or "").strip()
    if not folder:
        raise UserError(f"{path} has no folder, which is the event of its image")
    faces = []
    for number, element in enumerate(root.iter("object"), start=1):
        try:
            if element.findtext("name") != WIDER_FACE_CLASSES[0]:
                raise ValueError(f"is {element.findtext('name')!r}, not a face")
            box = [float(element.findtext(f"bndbox/{key}", "")) for key in
                   ("xmin", "ymin", "xmax", "ymax")]  # fmt: skip
            if not all(map(math.isfinite, box)) or box[2] < box[0] or box[3] < box[1]:
                raise ValueError(f"has the box {box}")
        except ValueError as error:
            raise UserError(f"{path}, object {number}: {error}") from error
        is_difficult = object_flag(element, "difficult", f"{path}, object {number}")
        faces.append((box, is_difficult == 1))
    image = image_dir / folder / f"{path.stem}.jpg"
    _require_image(image, path)
    return image, faces


def _records(faces: Mapping[Path, Sequence[_Face]], image_dir: Path) -> list[dict[str, Any]]:
    records = []
    for image, found in faces.items():
        width, height = read_image_size(image)
        annotations = []
        clipped = 0
        for box, ignored in found:
            inside = [
                min(max(value, 0.0), float(limit))
                for value, limit in zip(box, (width, height, width, height), strict=True)
            ]
            if inside[0] >= inside[2] or inside[1] >= inside[3]:
                continue
            clipped += inside != box
            annotations.append(
                {
                    "bbox": inside,
                    "bbox_mode": BoxMode.XYXY_ABS,
                    "category_id": 0,
                    "iscrowd": int(ignored),
                    "ignore": int(ignored),
                }
            )
        records.append(
            {
                "file_name": str(image),
                "image_id": PurePath(os.path.relpath(image, image_dir)).with_suffix("").as_posix(),
                "height": height,
                "width": width,
                "annotations": annotations,
                "dropped_boxes": len(found) - len(annotations),
                "clipped_boxes": clipped,
            }
        )
    return records
