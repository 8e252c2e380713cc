"""
Make an installable wheel from the Detectron2 build that tools/detectron2_requirement.txt names.

That wheel is pure Python as far as it can be used, but it cannot be installed as it is: it is
marked for CPython 3.10 alone, for the sake of an extension module that no current PyTorch loads;
it holds a top-level package ``tools`` that would hide other people's folder of that name; and it
asks for ``numpy<2``, which Detectron2 upstream does not. Changing the wheel and not the installed
files leaves pip with a true list of what it installed.

Usage: python repack_detectron2.py WHEEL OUTPUT_FOLDER, prints the path of the new wheel.
"""

import base64
import csv
import hashlib
import io
import re
import sys
import zipfile
from pathlib import Path

# "black" is only imported to export a LazyConfig; see EXTRAS_REQUIRE in setup.py.
_DROPPED_REQUIREMENT = re.compile(
    r"^Requires-Dist: (numpy|black)\b(?!.*extra ==).*\n", re.MULTILINE
)


def repack(wheel: Path, folder: Path) -> Path:
    """
    Write a copy of ``wheel`` that holds the Python code of Detectron2 alone, for any Python 3.

    Args:
        wheel: file of the published build.
        folder: where the copy goes; exists, and is not the folder of ``wheel``.

    Returns:
        The path of the copy, named for the tag py3-none-any.

    Raises:
        ValueError: if the wheel does not contain the package ``detectron2``.
    """
    name, version = wheel.name.split("-")[:2]
    dist_info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        contents = {
            path: archive.read(path)
            for path in archive.namelist()
            if path.startswith((f"{dist_info}/", "detectron2/")) and not path.endswith((".so", "/"))
        }
    if "detectron2/__init__.py" not in contents:
        raise ValueError(f"{wheel} does not contain the package detectron2")

    metadata = contents[f"{dist_info}/METADATA"].decode()
    contents[f"{dist_info}/METADATA"] = _DROPPED_REQUIREMENT.sub("", metadata).encode()
    contents[f"{dist_info}/top_level.txt"] = b"detectron2\n"
    contents[f"{dist_info}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: d2ft\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    record = f"{dist_info}/RECORD"
    contents.pop(record, None)
    contents[record] = _record(contents, record)

    copy = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(copy, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in contents.items():
            archive.writestr(path, content)
    return copy


def _record(contents: dict[str, bytes], record: str) -> bytes:
    # https://packaging.python.org/en/latest/specifications/recording-installed-packages/
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for path, content in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        writer.writerow([path, f"sha256={digest}", len(content)])
    writer.writerow([record, "", ""])
    return text.getvalue().encode()


if __name__ == "__main__":
    print(repack(Path(sys.argv[1]), Path(sys.argv[2])))
