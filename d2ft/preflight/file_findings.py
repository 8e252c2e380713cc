"""Find what is wrong with the files of datasets: unreadable, of an odd kind, copied, leaked."""

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
from detectron2.data import MetadataCatalog

from d2ft.preflight.findings import DatasetTable, Finding, named
from d2ft.preflight.image_files import ImageFile

_KINDS = {
    "L": "grey", "LA": "grey with alpha", "1": "black and white", "P": "with a palette",
    "PA": "with a palette and alpha", "RGBA": "with alpha",
}  # fmt: skip


def find_unreadable(name: str, problems: dict[str, str], total: int) -> list[Finding]:
    """
    Report files that are not there or cannot be read.

    Args:
        name: of the dataset.
        problems: path -> what is wrong with the file.
        total: number of files that were looked at.
    """
    by_problem: dict[str, list[str]] = defaultdict(list)
    for path, problem in problems.items():
        by_problem[problem].append(path)
    root = MetadataCatalog.get(name).get("image_root") or MetadataCatalog.get(name).get("image_dir")
    where = f" (its images are looked for in {root})" if root else ""
    return [
        Finding(
            "error",
            "file-missing" if "exist" in problem else "file-unreadable",
            name,
            f"{len(paths)} of {total} images: the file {problem}: {named(paths)}",
            f"put the files there or correct the folder{where}"
            if "exist" in problem
            else "replace the files by whole ones, or take the images out of the annotations",
        )
        for problem, paths in by_problem.items()
    ]


def find_bad_files(table: DatasetTable, files: dict[str, ImageFile]) -> list[Finding]:
    """
    Report files that cannot be read, are of another size than annotated, or of an odd kind.

    Args:
        table: of the dataset.
        files: what is in each of its files.
    """
    own = {path: files[path] for path in dict.fromkeys(table.file_names)}
    bad = {path: file.problem for path, file in own.items() if file.problem}
    found = find_unreadable(table.name, bad, len(own))
    turned: list[str] = []
    other_size: list[str] = []
    for path, stated in zip(table.file_names, table.sizes, strict=True):
        file = files[path]
        if file.problem or np.isnan(stated).any() or tuple(stated) == (file.height, file.width):
            continue
        height, width = stated.astype(int)
        text = f"{path} ({width}x{height}, read as {file.width}x{file.height})"
        is_turned = file.turned and (width, height) == (file.height, file.width)
        (turned if is_turned else other_size).append(text)
    deep = [path for path, file in own.items() if file.is_16_bit]
    cmyk = [path for path, file in own.items() if file.mode == "CMYK"]
    by_kind: dict[str, list[str]] = defaultdict(list)
    for path, file in own.items():
        if file.mode in _KINDS:
            by_kind[_KINDS[file.mode]].append(path)
    checks = [
        ("error", "image-turned", turned, "are annotated as stored, but their EXIF orientation "
         "turns them when they are read", "turn the pixels for good and drop the EXIF tag, or "
         "annotate the turned images"),
        ("error", "image-size", other_size, "have another size than the annotations say",
         "use the images that were annotated, or correct height and width"),
        ("error", "image-16-bit", deep, "have more than 8 bits: values above 255 are read as 255, "
         "so that most are white", "convert them to 8 bits by scaling, not by cutting off"),
        ("warning", "image-cmyk", cmyk, "are CMYK, which is read as RGB without its colour "
         "profile", "convert them to RGB with a program that knows the profile"),
        *(
            ("note", "image-kind", paths, f"are {kind}; they are read as RGB", "nothing, if the "
             "images to come are of this kind as well")
            for kind, paths in by_kind.items()
        ),
    ]  # fmt: skip
    found += [
        Finding(level, code, table.name, f"{len(items)} images {what}: {named(items)}", fix)
        for level, code, items, what, fix in checks
        if items
    ]
    return found


def find_copies(tables: Iterable[DatasetTable], groups: list[list[str]]) -> list[Finding]:
    """Report images that lie under several names in one dataset; ``groups`` have equal bytes."""
    found = []
    for table in tables:
        own = set(table.file_names)
        copies = [inside for group in groups if len(inside := sorted(own & set(group))) > 1]
        if copies:
            found.append(
                Finding(
                    "warning",
                    "image-copied",
                    table.name,
                    f"{len(copies)} images lie under several names: "
                    f"{named(' = '.join(group) for group in copies)}",
                    "keep one of each, with all of its annotations",
                )
            )
    return found


def find_leaks(train: DatasetTable, test: DatasetTable, groups: list[list[str]]) -> list[Finding]:
    """Report images of a training set that are in a test set; ``groups`` have equal bytes."""
    representative = {path: group[0] for group in groups for path in group}
    taught: dict[str, list[int]] = defaultdict(list)
    for index, path in enumerate(train.file_names):
        taught[representative.get(path, path)].append(index)
    same_labels: list[str] = []
    other_labels: list[str] = []
    for index, path in enumerate(test.file_names):
        twins = taught.get(representative.get(path, path))
        if twins:
            text = f"{path} = {train.file_names[twins[0]]}"
            same = any(_labels(train, twin) == _labels(test, index) for twin in twins)
            (same_labels if same else other_labels).append(text)
    fix = "take them out of one of the two sets: the AP of images that were learned says nothing"
    return [
        Finding(
            "error",
            code,
            f"{train.name} / {test.name}",
            f"{len(items)} images are in both, {what}: {named(items)}",
            fix,
        )
        for code, items, what in (
            ("leak-labels", same_labels, "with the same labels"),
            ("leak-image", other_labels, "with other labels"),
        )
        if items
    ]


def _labels(table: DatasetTable, image: int) -> list[tuple[str, ...]]:
    return sorted(
        (str(table.categories[row]), *(f"{value:.1f}" for value in table.boxes[row]))
        for row in np.flatnonzero(table.image_of == image)
    )
